"""Logging helpers. Each log record has a sentence for people, and fields in `extra` for programs."""

import logging
from typing import Any

FORMAT = "%(asctime)s %(levelname)-7s %(name)s %(message)s"


def configure(level: str = "INFO") -> None:
    """Sets up the root logger of a process; called by entry points only."""
    logging.basicConfig(level=level, format=FORMAT)


def fields(action: str, **values: Any) -> dict[str, Any]:
    """Returns the `extra` of a log record: the action and what it acts on (`request_id`, `adapter_name`)."""
    return {"action": action, **values}


def log_unexpected(logger: logging.Logger, error: BaseException) -> None:
    """Logs an unexpected exception (a bug) with its traceback."""
    logger.error("internal error: %r", error, exc_info=error, extra=fields("internal_error"))
