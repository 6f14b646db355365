"""Decodes claimed requests. If the data of a request can't be read, only this request fails."""

from collections.abc import Sequence

import msgspec

from shared.errors import GenerationFailed
from shared.messages import GenerationRequest, StreamEvent, decode_event, decode_request
from shared.queue.names import queue_name
from shared.queue.records import Claim, Held

UNREADABLE = "A record of the request in Redis can't be read."
"""The error message for the client; `prelude.lua` has the same text."""


class UnreadableRecord(GenerationFailed):
    """A record of the request in Redis can't be read."""

    def __init__(self, reason: str) -> None:
        super().__init__(UNREADABLE)
        self.reason = reason
        """The reason, for the log and the failed job; it names fields, and never has text of a prompt."""


def read_request(encoded: bytes) -> GenerationRequest:
    """Decodes the request of a job.

    Raises:
        UnreadableRecord: the text is no valid request.
    """
    try:
        return decode_request(encoded)
    # JSON that is nested thousands deep gives a RecursionError.
    except (msgspec.DecodeError, RecursionError) as error:
        raise UnreadableRecord(f"request: {error}") from error


def read_claim(
    held: Held, queue: bytes, version: bytes, encoded: bytes, log: Sequence[bytes], *, alone: bool
) -> Claim:
    """Decodes a claim from the records in Redis.

    `queue`: the queue in which the job waited. `version`: the weights version in the job hash.

    Raises:
        UnreadableRecord: the request or an entry of its log is malformed, or contradicts the job hash.
    """
    request = read_request(encoded)
    if request.request_id != held.request_id:
        raise UnreadableRecord("request: the request_id is not the job's")
    if queue_name(request.base, request.adapter_name).encode() != queue:
        raise UnreadableRecord("request: base and adapter are not those of its queue")
    if request.weights_version.encode() != version:
        raise UnreadableRecord("request: the version is not the job's")
    return Claim(held, request, _decode_log(log), alone)


def _decode_log(log: Sequence[bytes]) -> tuple[StreamEvent, ...]:
    events = []
    for event_no, entry in enumerate(log):
        try:
            event = decode_event(entry)
        except (msgspec.DecodeError, RecursionError) as error:
            raise UnreadableRecord(f"log entry {event_no}: {error}") from error
        if event.event_no != event_no or event.is_terminal:
            raise UnreadableRecord(f"log entry {event_no}: not the event that belongs there")
        events.append(event)
    return tuple(events)
