"""A deployment whose user may do just what docs/operations.md says, and some that may do less."""

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
import redis

from shared.queue.permissions import API, WORKER
from tests.deployment import BIN, ROOT, Deployment
from tests.forked import Nursery
from tests.redis_server import BINARIES, RedisServer, free_port
from tests.waiting import wait_until

CHAT = "/v1/chat/completions"
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "stream": True}
DETACH = {"X-Lorelay-Detach": "true"}
OPTIONAL = {"client|setinfo", "client|maint_notifications", "client"}
"""Commands with which redis-py introduces itself to the server, permitted or not."""
SELDOM = {"hexists", "ping", "hdel", "persist", "lrem", "zrangebyscore", "smismember", "rename"}
"""Needed if a name comes back, a channel is silent, a request is given up, a key has a wrong type."""


class Permitted(NamedTuple):
    """A server with a user whose rules a test sets, and a deployment of that user."""

    admin: redis.Redis
    deployment: Deployment

    def allow(self, rules: str) -> None:
        """Gives the user just these permissions."""
        only = ["reset", "on", ">secret", "resetchannels"]
        self.admin.execute_command("ACL", "SETUSER", "app", *only, *rules.split())


def documented_rules() -> str:
    """The rule of docs/operations.md, after the password."""
    lines = (ROOT / "docs" / "operations.md").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("ACL SETUSER app on >PASSWORD "))
    return line.removeprefix("ACL SETUSER app on >PASSWORD ")


@pytest.fixture(params=BINARIES)
def permitted(
    request: pytest.FixtureRequest, nursery: Nursery, tiny_settings: dict[str, str], tmp_path: Path
) -> Iterator[Permitted]:
    port = free_port()
    with (
        tempfile.TemporaryDirectory(prefix="lorelay-") as folder,
        RedisServer(BINARIES[request.param](), Path(folder), port=port),
        redis.Redis(port=port) as admin,
        Deployment(f"redis://app:secret@127.0.0.1:{port}", tmp_path, nursery, **tiny_settings) as deployment,
    ):
        yield Permitted(admin, deployment)


def commands_sent(admin: redis.Redis) -> set[str]:
    """All commands that were carried out so far, those of scripts included."""
    return {name.removeprefix("cmdstat_").partition("|")[0] for name in admin.info("commandstats")}


def denied(admin: redis.Redis) -> set[str]:
    """Commands that the user tried and was not permitted."""
    return {entry["object"] for entry in admin.acl_log()}


def test_the_documented_rule_suffices_to_serve_resume_abort_and_look(permitted: Permitted) -> None:
    permitted.allow(documented_rules())
    permitted.admin.acl_log_reset()
    deployment = permitted.deployment
    worker = deployment.start_worker(step_delay_s="0.05")
    api = deployment.start_api()
    with httpx.Client(base_url=deployment.api_url, timeout=30, trust_env=False) as client:
        assert client.get("/ready").status_code == 200
        assert client.get("/v1/models").status_code == 200
        assert "[DONE]" in client.post(CHAT, json={**ASK, "model": "a"}).text
        begun = client.post(CHAT, json=ASK, headers=DETACH)
        request_id = begun.headers["x-request-id"]
        assert "[DONE]" in client.get(f"{CHAT}/{request_id}/stream").text
        with client.stream("POST", CHAT, json={**ASK, "max_tokens": 100}, headers=DETACH) as running:
            aborted = client.delete(f"{CHAT}/{running.headers['x-request-id']}")
        assert aborted.status_code == 200
    command = [str(BIN / "lorelay"), "status", "--redis-url", deployment.redis_url]
    status = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "tiny" in status
    assert worker.stop() == 0
    api.stop()
    assert denied(permitted.admin) <= OPTIONAL
    rules = [rule for rule in {*WORKER.rules, *API.rules} if rule.startswith("+")]
    needed = {rule.removeprefix("+").partition("|")[0] for rule in rules}
    assert needed - commands_sent(permitted.admin) <= SELDOM
    assert "WARNING" not in worker.output


@pytest.mark.parametrize("rule", ["&lorelay:*", "&rq:*", "+exists"])
def test_a_worker_whose_user_lacks_a_permission_says_which_and_does_not_start(
    permitted: Permitted, rule: str
) -> None:
    permitted.allow(" ".join(other for other in documented_rules().split() if other != rule))
    worker = permitted.deployment.start_worker(wait=False)
    assert worker.wait(60) == 2
    assert f"a permission is missing: ACL SETUSER app {rule}\n" in worker.output
    assert "Traceback" not in worker.output
    assert worker.output.count("\n") <= 2


@pytest.mark.parametrize("rule", ["&lorelay:*", "~rq:*"])
def test_an_api_whose_user_lacks_a_permission_says_which_until_it_is_given(
    permitted: Permitted, rule: str
) -> None:
    assert rule in API.rules
    permitted.allow(" ".join(other for other in API.rules if other != rule))
    api = permitted.deployment.start_api()
    said = f"Redis: a permission is missing: ACL SETUSER app {rule}"
    ready = f"{permitted.deployment.api_url}/ready"

    def answer() -> tuple[int, str]:
        response = httpx.get(ready, trust_env=False)
        return response.status_code, response.json().get("error", {}).get("message", "")

    wait_until(lambda: answer() == (503, said), what="/ready with the rule")
    assert api.output.count(said) >= 1
    permitted.admin.execute_command("ACL", "SETUSER", "app", rule)
    wait_until(lambda: answer()[0] == 200, what="/ready once it is given")
    assert "Traceback" not in api.output


def test_an_api_needs_fewer_permissions_than_a_worker() -> None:
    assert len(API.rules) < len(WORKER.rules)
