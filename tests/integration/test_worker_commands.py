"""RQ's commands to a worker: anybody may publish to its channel."""

import json
from unittest.mock import Mock

import pytest
import redis

from worker import LoraWorker
from worker.serving.service import WorkerService


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
    worker = LoraWorker(["default"], connection=connection)
    worker._service = Mock(spec=WorkerService)
    worker.handle_payload({"type": "message", "data": data})
    worker._service.stop_request.assert_not_called()


@pytest.mark.parametrize("job_id", ["x", ["x"], {"a": 1}, None])
def test_a_stop_names_a_request_by_text_whatever_was_sent(connection: redis.Redis, job_id: object) -> None:
    worker = LoraWorker(["default"], connection=connection)
    worker._service = Mock(spec=WorkerService)
    command = json.dumps({"command": "stop-job", "job_id": job_id}).encode()
    worker.handle_payload({"type": "message", "data": command})
    worker._service.stop_request.assert_called_once_with(str(job_id))
