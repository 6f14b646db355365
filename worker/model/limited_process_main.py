"""Runs templates and patterns of adapters within limits: `python -m worker.model.limited_process_main FD`.

The first process imports all modules, and forks a child. The child answers requests on the socket FD. If a
request exceeds a limit, the kernel ends the child. The first process then answers this request with an error
and forks another child, which takes milliseconds. Both processes end when the worker closes its end of the
socket, or when the child is killed.
"""

import json
import os
import re
import resource
import signal
import socket
import struct
import sys
from typing import Any

from jinja2 import TemplateError

from worker.model.marked_template import compile_template, render

LIMIT_S = 5.0
"""Maximum time of the processor for one request."""
LIMIT_VARIABLE = "LORELAY_TEMPLATE_LIMIT_S"
"""The environment variable that replaces `LIMIT_S`, for tests."""
MAX_MEMORY_BYTES = 1024 * 1024 * 1024
"""Maximum address space of the child, of which Python and transformers take 0.2 GB."""
MAX_TEXT_CHARS = 32 * 1024 * 1024
LENGTH = struct.Struct("!Q")


def send(peer: socket.socket, data: bytes) -> None:
    """Sends a message, preceded by its length."""
    peer.sendall(LENGTH.pack(len(data)))
    peer.sendall(data)


def receive(peer: socket.socket, max_num_bytes: int) -> bytes | None:
    """Returns the next message, or None if the other end is closed.

    Raises:
        OSError: the connection broke, or the message is longer than `max_num_bytes`.
    """
    head = _receive_exactly(peer, LENGTH.size)
    if head is None:
        return None
    (num_bytes,) = LENGTH.unpack(head)
    if num_bytes > max_num_bytes:
        raise OSError(f"a message of {num_bytes} bytes")
    return _receive_exactly(peer, num_bytes)


def _receive_exactly(peer: socket.socket, num_bytes: int) -> bytes | None:
    data = bytearray()
    while len(data) < num_bytes:
        piece = peer.recv(min(num_bytes - len(data), 1 << 20))
        if not piece:
            return None
        data += piece
    return bytes(data)


def main(fd: int) -> None:
    """Serves the requests on a socket until its other end is closed."""
    # The worker drains after these signals, and still needs this process; it ends by closing the socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    limit_s = float(os.environ.get(LIMIT_VARIABLE, LIMIT_S))
    compile_template("{{ messages }}")  # imports transformers before the first fork
    peer = socket.socket(fileno=fd)
    while True:
        pid = os.fork()
        if pid == 0:
            _limit()
            _serve(peer, limit_s)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        # If the kernel killed it for want of memory, it may have had no request, or read half of one: this
        # answer would then be taken for that of the next request.
        if status == 0 or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            return
        send(peer, _failure("LimitExceeded", _describe(status, limit_s)))
        send(peer, b"")


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _serve(peer: socket.socket, limit_s: float) -> None:
    while (request := receive(peer, sys.maxsize)) is not None:
        # The signal has its default action, which ends this process even inside of a call of C code.
        signal.setitimer(signal.ITIMER_PROF, limit_s)
        text, mask = _answer(json.loads(request))
        signal.setitimer(signal.ITIMER_PROF, 0)
        send(peer, text)
        send(peer, mask)


def _answer(request: dict[str, Any]) -> tuple[bytes, bytes]:
    """Returns the result of a request: the text or the error as JSON, and the mask."""
    try:
        text, mask = _do(request)
        if len(text) > MAX_TEXT_CHARS:
            return _failure("LimitExceeded", f"its text is longer than {MAX_TEXT_CHARS} characters"), b""
        return json.dumps({"text": text}).encode(), mask
    except MemoryError:
        return _failure("LimitExceeded", f"it needs more than {MAX_MEMORY_BYTES >> 20} MiB of memory"), b""
    except TemplateError as error:
        return _failure("TemplateError", str(error)), b""
    # A template is a program and may raise any exception.
    except Exception as error:
        return _failure(type(error).__name__, str(error)), b""


def _do(request: dict[str, Any]) -> tuple[str, bytes]:
    """Matches a pattern, renders a template, or compiles a template, depending on the request's fields."""
    if "names" in request:
        _match(request["pattern"], request["names"])
    elif "client" in request:
        return render(request["source"], request["own"], request["client"])
    else:
        compile_template(request["source"])
    return "", b""


def _match(pattern: str, names: list[str]) -> None:
    """Matches a pattern in all ways in which PEFT matches patterns of the config."""
    for form in (pattern, rf".*\.{pattern}\.(\d+)\.", rf"(.*\.)?({pattern})$"):
        try:
            compiled = re.compile(form)
        except re.error:  # PEFT reports it
            continue
        for name in names:
            compiled.fullmatch(name)
            compiled.match(name)


def _failure(kind: str, reason: str) -> bytes:
    return json.dumps({"error": kind, "reason": reason[:1000]}).encode()


def _describe(status: int, limit_s: float) -> str:
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        return f"it takes longer than {limit_s:g} s"
    return f"it ended its process (status {status})"


if __name__ == "__main__":
    main(int(sys.argv[1]))
