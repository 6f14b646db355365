"""Tests of the replies that are waited out, in every form in which redis-py passes them on."""

from collections.abc import Callable

import pytest
import redis
from redis._parsers.base import BaseParser

from shared.queue.connections import is_transient
from shared.queue.not_now import TRANSIENT_REPLIES, code_of, reply_of

PASSING = {
    "BUSY": ["BUSY Redis is busy running a script. You can only call SCRIPT KILL or SHUTDOWN NOSAVE."],
    "CLUSTERDOWN": ["CLUSTERDOWN Hash slot not served", "CLUSTERDOWN The cluster is down"],
    "ERR Script killed by user": [
        "ERR Script killed by user with SCRIPT KILL...",
        "ERR Script killed by user with SCRIPT KILL.",
    ],
    "ERR max number of clients": [
        "ERR max number of clients reached",
        "ERR max number of clients + cluster connections reached",
    ],
    "LOADING": ["LOADING Redis is loading the dataset in memory"],
    "MASTERDOWN": ["MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'."],
    "MISCONF": [
        "MISCONF Errors writing to the AOF file: No space left on device",
        "MISCONF Valkey is configured to save RDB snapshots, but it's currently unable to persist to disk.",
    ],
    "NOREPLICAS": ["NOREPLICAS Not enough good replicas to write."],
    "NOSCRIPT": ["NOSCRIPT No matching script. Please use EVAL.", "NOSCRIPT No matching script."],
    "OOM": ["OOM command not allowed when used memory > 'maxmemory'."],
    "READONLY": ["READONLY You can't write against a read only replica."],
    "TRYAGAIN": ["TRYAGAIN Multiple keys request during rehashing of slot"],
    "UNBLOCKED": [
        "UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)",
        "UNBLOCKED client unblocked via CLIENT UNBLOCK",
    ],
}
LASTING = [
    "BUSYGROUP Consumer Group name already exists",
    "BUSYKEY Target key name already exists.",
    "CROSSSLOT Keys in request don't hash to the same slot",
    "DENIED Redis is running in protected mode because protected mode is enabled",
    "ERR ACL failure in script: No permissions to access a key",
    "ERR The user executing the script can't run this command or subcommand",
    "ERR unknown command 'FOO', with args beginning with: 'BUSY ' 'OOM '",
    "ERR value is not an integer or out of range",
    "EXECABORT Transaction discarded because of previous errors.",
    "INPROG Failover already in progress",
    "NOAUTH Authentication required.",
    "NOPERM User app has no permissions to run the 'publish' command",
    "NOPERM this user has no permissions to access one of the keys used as arguments",
    "NOPROTO unsupported protocol version",
    "REDIRECT 127.0.0.1:6380",
    "WRONGPASS invalid username-password pair or user is disabled.",
    "WRONGTYPE Operation against a key holding the wrong kind of value",
]
ALL_PASSING = [reply for replies in PASSING.values() for reply in replies]


def parsed(reply: str) -> redis.RedisError:
    """The exception that redis-py makes of a reply."""
    error = BaseParser.parse_error(reply)
    assert isinstance(error, redis.RedisError)
    return error


def in_pipeline(reply: str) -> redis.RedisError:
    """The exception of a pipeline, which quotes the command, and with it a client's text."""
    error = parsed(reply)
    redis.client.Pipeline.annotate_exception(None, error, 1, ["SET", "a) BUSY (b", "OOM LOADING"])  # type: ignore[arg-type]
    return error


def in_async_pipeline(reply: str) -> redis.RedisError:
    error = parsed(reply)
    redis.asyncio.client.Pipeline.annotate_exception(None, error, 12, ["SET", "k", "READONLY"])  # type: ignore[arg-type]
    return error


def in_exec(reply: str) -> redis.RedisError:
    """The reply of a server that refuses EXEC itself."""
    return parsed(f"EXECABORT Transaction discarded because of: {reply}")


def in_script(reply: str) -> redis.RedisError:
    """The reply of Redis 7."""
    return parsed(f"{reply} script: f_{'a' * 40}, on @user_script:12.")


def in_valkey_script(reply: str) -> redis.RedisError:
    return parsed(f"{reply} script: on @user_script:12.")


def refused_in_old_script(reply: str) -> redis.RedisError:
    """The reply of Redis 6.2 when it refuses a call."""
    return raised_in_old_script(f"@user_script: 12: -{reply}")


def raised_in_old_script(reply: str) -> redis.RedisError:
    """The reply of Redis 6.2 when a call fails."""
    return parsed(f"ERR Error running script (call to f_{'a' * 40}): @user_script:12: {reply}")


FORMS = [
    parsed,
    in_pipeline,
    in_exec,
    in_script,
    in_valkey_script,
    refused_in_old_script,
    raised_in_old_script,
]
if redis.__version__ >= "8":
    # Older versions lose the reply on the way; only APIs use it, which answer 503 whatever the reply is.
    FORMS.append(in_async_pipeline)
Form = Callable[[str], redis.RedisError]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reply", ALL_PASSING)
def test_a_reply_that_says_not_now_is_waited_out_in_every_form(reply: str, form: Form) -> None:
    assert is_transient(form(reply))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reply", LASTING)
def test_a_reply_that_says_more_than_not_now_is_never_waited_out(reply: str, form: Form) -> None:
    assert not is_transient(form(reply))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("reply", ALL_PASSING + LASTING)
def test_the_reply_is_read_out_of_every_form(reply: str, form: Form) -> None:
    # redis-py has one class for NOAUTH and WRONGPASS.
    expected = [reply, reply.replace("NOAUTH", "WRONGPASS")]
    assert reply_of(form(reply)).startswith(tuple(expected))
    assert code_of(form(reply)) in [each.split()[0] for each in expected]


def test_every_member_of_the_list_is_tested_and_has_a_reason() -> None:
    assert PASSING.keys() == TRANSIENT_REPLIES.keys()
    assert all(reply.startswith(f"{said} ") for said, replies in PASSING.items() for reply in replies)
    assert all(TRANSIENT_REPLIES.values())


def test_a_script_of_redis_6_2_that_was_killed_is_repeated() -> None:
    killed = "Script killed by user with SCRIPT KILL..."
    assert is_transient(raised_in_old_script(killed))


@pytest.mark.parametrize("error", [redis.ConnectionError("Connection refused"), redis.TimeoutError("late")])
def test_a_lost_connection_is_transient(error: redis.RedisError) -> None:
    assert is_transient(error)


@pytest.mark.parametrize("code", ["ASK", "MOVED"])
def test_a_cluster_is_not_waited_for(code: str) -> None:
    error = parsed(f"{code} 3999 127.0.0.1:6381")
    assert not is_transient(error)
    assert code_of(error) == code


def test_an_exception_without_a_text_is_not_passing() -> None:
    assert not is_transient(redis.ResponseError())
