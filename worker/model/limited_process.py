"""Runs the chat templates and regular expressions of adapters in a separate process, within limits.

The base's template runs in the worker itself, because the operator chose it. Anybody may have written the
template of an adapter.
"""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from shared.logs import fields
from worker.model import limited_process_main
from worker.model.limited_process_main import LIMIT_S, MAX_TEXT_CHARS, receive, send
from worker.model.marked_template import LimitExceeded, NotNow, Rendered

logger = logging.getLogger(__name__)

PAUSE_S = 10 * LIMIT_S
"""Time for which a template that exceeded a limit is not run for the same tenant again: a tenant that sends
only such chats occupies the process for a small part of the time."""
ANSWER_LIMIT_S = 60.0
"""Time after which the whole process is ended, because the limits inside of it had no effect."""
MAX_ANSWER_BYTES = 16 * MAX_TEXT_CHARS


class LimitedProcess:
    """Runs templates and regular expressions in a process that starts at first use.

    Callable from any thread.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._peer: socket.socket | None = None
        self._end: Callable[[], Any] = lambda: None
        self._paused_until: dict[tuple[str, str], float] = {}
        """The end of each pause, by the template's source and the tenant whose chat caused the pause."""

    def check(self, source: str) -> None:
        """Compiles a template.

        Raises:
            TemplateError: the template can't be compiled.
            LimitExceeded: the template takes too long, or too much memory.
        """
        try:
            self._ask({"source": source})
        except RuntimeError as error:
            raise TemplateError(str(error)) from error

    def render(
        self, source: str, own: Mapping[str, Any], client: Mapping[str, Any], *, tenant: str | None = None
    ) -> Rendered:
        """Does the same as `marked_template.render`; raises a RuntimeError for an error of the template.

        `tenant`: the client that sent the chat; None for a chat of Lorelay's own, which is never refused.

        Raises:
            LimitExceeded: the template takes too long, or too much memory.
            NotNow: the template took too much with another chat of this tenant a moment ago, or the process
                does not answer.
        """
        if tenant is not None and self._clock() < self._paused_until.get((source, tenant), 0):
            raise NotNow(f"another chat made it exceed its limits less than {PAUSE_S:g} s ago")
        try:
            text, mask = self._ask({"source": source, "own": dict(own), "client": dict(client)})
        except LimitExceeded:
            if tenant is not None:
                self._pause(source, tenant)
            raise
        return Rendered(text, mask)

    def _pause(self, source: str, tenant: str) -> None:
        now = self._clock()
        running = {key: end for key, end in self._paused_until.copy().items() if end > now}
        self._paused_until = running | {(source, tenant): now + PAUSE_S}

    def match(self, pattern: str, names: Sequence[str]) -> None:
        """Matches a regular expression against names, as PEFT does.

        Raises:
            LimitExceeded: the match takes too long.
        """
        self._ask({"pattern": pattern, "names": list(names)})

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            self._stop()

    def _ask(self, request: dict[str, Any]) -> tuple[str, bytes]:
        with self._lock:
            answer, mask = self._exchange(json.dumps(request).encode())
        kind, reason = answer.get("error"), answer.get("reason", "")
        if kind == LimitExceeded.__name__:
            logger.warning("code of an adapter was ended: %s", reason, extra=fields("template"))
            raise LimitExceeded(reason)
        if kind is not None:
            raise TemplateError(reason) if kind == TemplateError.__name__ else RuntimeError(reason)
        return answer.get("text", ""), mask

    def _exchange(self, request: bytes) -> tuple[dict[str, Any], bytes]:
        try:
            if self._peer is None:
                self._peer = self._start()
            send(self._peer, request)
            text, mask = receive(self._peer, MAX_ANSWER_BYTES), receive(self._peer, MAX_ANSWER_BYTES)
            if text is None or mask is None:
                raise OSError("the process ended")
            return json.loads(text), mask
        except (OSError, ValueError) as error:
            self._stop()
            logger.warning(
                "the process for adapters' code does not answer: %s", error, extra=fields("template")
            )
            raise NotNow(f"its process does not answer: {error}") from error

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = subprocess.Popen(
                    [sys.executable, "-m", limited_process_main.__name__, str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
        except OSError:
            ours.close()
            raise
        ours.settimeout(ANSWER_LIMIT_S)
        self._end = weakref.finalize(self, _end, ours, process)
        return ours

    def _stop(self) -> None:
        self._end()
        self._peer = None


def _end(peer: socket.socket, process: "subprocess.Popen[bytes]") -> None:
    """Closes the socket, and kills the process and its child, which have a process group of their own."""
    peer.close()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
