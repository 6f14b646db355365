"""`lorelay dashboard`: runs rq-dashboard on Lorelay's queues."""

import importlib.util
import signal
import sys

import redis

from shared.errors import ConfigurationError
from shared.queue.refusals import explain


def run(redis_url: str, host: str, port: int) -> None:
    """Serves rq-dashboard until the process gets SIGTERM or Ctrl-C.

    The buttons that delete jobs or empty a queue are disabled; the requeue button works.

    Raises:
        ConfigurationError: rq-dashboard is not installed.
    """
    if importlib.util.find_spec("rq_dashboard") is None:
        raise ConfigurationError(
            "rq-dashboard is not installed: pip install -e '.[dashboard]' in the checkout"
        )
    import rq.serializers

    # Some pages of rq-dashboard read jobs with RQ's default serializer, pickle. Pickle can't read Lorelay's
    # jobs, which are JSON, and unpickling would run any code that somebody has put into Redis.
    rq.serializers.PickleSerializer = rq.serializers.JSONSerializer  # type: ignore[assignment]
    dashboard = importlib.import_module("rq_dashboard.cli").run
    pages = importlib.import_module("rq_dashboard.web").blueprint
    pages.register_error_handler(redis.RedisError, _unavailable)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    words = ["--bind", host, "--port", str(port), "--redis-url", redis_url, "--disable-delete", "--json"]
    dashboard.main(words, prog_name="lorelay dashboard", auto_envvar_prefix="RQ_DASHBOARD")


def _unavailable(error: redis.RedisError) -> tuple[str, int, dict[str, str]]:
    """Answers 503 while Redis is unavailable.

    Without this handler, Flask would answer 500 and log a traceback.
    """
    sys.stderr.write(f"lorelay: {explain(error)}\n")
    return f"{explain(error)}\n", 503, {"Content-Type": "text/plain", "Retry-After": "1"}
