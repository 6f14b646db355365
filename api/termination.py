"""A hook at SIGTERM or SIGINT that runs before the HTTP server's own handler."""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn


def running_server() -> uvicorn.Server | None:
    """Returns the uvicorn server that handles SIGTERM in this process, or None."""
    owner = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return owner if isinstance(owner, uvicorn.Server) else None


@contextmanager
def at_termination(callback: Callable[[], None]) -> Iterator[None]:
    """Schedules `callback` in the running event loop at SIGTERM or SIGINT, then calls the previous handler.

    Does nothing outside the main thread, or for a signal that has no handler. Under uvicorn, both signals
    have handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}

    def handle(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(callback)
        handler = handlers[signal.Signals(number)]
        assert callable(handler)
        handler(number, frame)

    for number in handlers:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
