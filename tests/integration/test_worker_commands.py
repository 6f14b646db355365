"""RQ's commands to a worker: anybody may publish to its channel."""

import json
from unittest.mock import Mock

import pytest
import redis

from worker import LoraWorker
from worker.serving.service import WorkerService


class ServingWorker(LoraWorker):
    """A worker that serves already; its service records what it is asked for."""

    def __init__(self, connection: redis.Redis) -> None:
        super().__init__(["default"], connection=connection)
        self.service = self._service = Mock(spec=WorkerService)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff",
        b"",
        b"[]",
        b"5",
        b'"stop-job"',
        b"{}",
        b'{"command": ["a"]}',
        b'{"command": "stop-job"}',
        b"[" * 99_999,
    ],
    ids=lambda data: repr(data[:24]),
)
def test_a_command_that_can_not_be_read_raises_nothing(connection: redis.Redis, data: bytes) -> None:
    worker = ServingWorker(connection)
    worker.handle_payload({"type": "message", "data": data})
    worker.service.stop_request.assert_not_called()


@pytest.mark.parametrize("job_id", ["x", ["x"], {"a": 1}, None])
def test_a_stop_names_a_request_by_text_whatever_was_sent(connection: redis.Redis, job_id: object) -> None:
    worker = ServingWorker(connection)
    command = json.dumps({"command": "stop-job", "job_id": job_id}).encode()
    worker.handle_payload({"type": "message", "data": command})
    worker.service.stop_request.assert_called_once_with(str(job_id))
