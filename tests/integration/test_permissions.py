"""Which permission a user lacks: found without side effects, and named as the rule that gives it."""

import re
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import pytest
import redis

from shared.queue.permissions import API, WORKER, Needs, missing_rules
from tests.redis_server import BINARIES, RedisServer, free_port
from tests.server_faults import BUSY_OPTIONS, FAULTS

NEEDS = {"worker": WORKER, "api": API}
EVERY_RULE = sorted({*WORKER.rules, *API.rules})
OPERATIONS = Path(__file__).parent.parent.parent / "docs" / "operations.md"


class Guarded(NamedTuple):
    """A server, and a user whose rules a test sets."""

    admin: redis.Redis
    pool: redis.ConnectionPool

    def allow(self, rules: list[str]) -> None:
        """The user may do just this."""
        channels = ["resetchannels"]
        self.admin.execute_command("ACL", "SETUSER", "app", "reset", "on", ">secret", *channels, *rules)


@pytest.fixture(scope="module", params=BINARIES)
def guarded(request: pytest.FixtureRequest) -> Iterator[Guarded]:
    port = free_port()
    with (
        tempfile.TemporaryDirectory(prefix="lorelay-") as folder,
        RedisServer(BINARIES[request.param](), Path(folder), port=port, options=BUSY_OPTIONS),
        redis.Redis(port=port) as admin,
        redis.Redis(port=port, username="app", password="secret") as client,
    ):
        yield Guarded(admin, client.connection_pool)


@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS.keys())
def test_the_rules_of_a_program_suffice_and_the_check_changes_nothing(guarded: Guarded, needs: Needs) -> None:
    guarded.allow(needs.rules)
    assert missing_rules(guarded.pool, needs) == []
    assert guarded.admin.dbsize() == 0


@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS.keys())
def test_every_command_is_asked_for_with_arguments_that_the_server_takes(
    guarded: Guarded, needs: Needs
) -> None:
    connection = guarded.admin.connection_pool.make_connection()
    connection.connect()
    replies = {}
    for command in ["MULTI", *needs.commands]:
        connection.send_command(*command.split())
        replies[command] = connection.read_response()
    connection.disconnect()
    assert replies.pop("MULTI") == b"OK"
    assert set(replies.values()) == {b"QUEUED"}


@pytest.mark.parametrize("rule", EVERY_RULE)
def test_a_permission_that_is_missing_is_named_and_no_other(guarded: Guarded, rule: str) -> None:
    for needs in NEEDS.values():
        guarded.allow([other for other in needs.rules if other != rule])
        assert missing_rules(guarded.pool, needs) == [rule] * (rule in needs.rules)


@pytest.mark.parametrize("needs", NEEDS.values(), ids=NEEDS.keys())
def test_all_that_a_user_without_any_permission_needs_is_named_at_once(
    guarded: Guarded, needs: Needs
) -> None:
    guarded.allow(["+multi"])
    named = missing_rules(guarded.pool, needs)
    commands = {rule for rule in needs.rules if rule.startswith("+")}
    assert set(named) == commands - {"+multi"}
    guarded.allow(sorted(commands))
    assert set(missing_rules(guarded.pool, needs)) == set(needs.rules) - commands


@pytest.mark.parametrize("state", FAULTS)
def test_a_server_that_says_not_now_takes_no_permission_away(guarded: Guarded, state: str) -> None:
    for missing in ([], ["+xadd"], ["&rq:*"]):
        guarded.allow([rule for rule in WORKER.rules if rule not in missing])
        with FAULTS[state](guarded.admin):
            assert missing_rules(guarded.pool, WORKER) == missing


def test_keys_that_a_user_may_only_read_are_named(guarded: Guarded) -> None:
    if guarded.admin.info("server")["redis_version"].startswith("6."):
        pytest.skip("Redis 6.2 has no permissions for reading only")
    guarded.allow([rule if rule != "~rq:*" else "%R~rq:*" for rule in WORKER.rules])
    assert missing_rules(guarded.pool, WORKER) == ["~rq:*"]


def test_all_that_the_scripts_call_is_in_the_tables() -> None:
    folder = resources.files("shared.queue") / "lua"
    text = "".join(file.read_text() for file in folder.iterdir() if file.name.endswith(".lua"))
    called = {f"+{name.lower()}" for name in re.findall(r"redis\.p?call\('(\w+)'", text)}
    assert called <= set(EVERY_RULE)


def test_the_rule_in_the_documentation_is_that_of_the_tables() -> None:
    (line,) = (line for line in OPERATIONS.read_text().splitlines() if line.startswith("ACL SETUSER app on"))
    assert line.split()[5:] == ["resetchannels", *EVERY_RULE[-2:], *EVERY_RULE[:-2]]
