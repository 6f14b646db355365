"""The compose files and images, as far as they can be checked without Docker."""

import http.server
import importlib.metadata
import re
import shlex
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from ruamel.yaml import YAML
from uvicorn import main as uvicorn_command

from lorelay.embedded import StateFolder
from shared.settings import ApiSettings, WorkerSettings
from tests.redis_server import RedisServer

ROOT = Path(__file__).parent.parent.parent
FILES = ("docker-compose.yml", "deploy/docker-compose.gpu.yml")

RUN_BY_TESTS = {
    "uvicorn --factory api.main:create_app --host --port": "tests/deployment.py",
    "rq worker -u -w worker.LoraWorker --connection-class worker.serving.patience.PatientRedis": (
        "tests/deployment.py"
    ),
    "lorelay dashboard --redis-url --host --port": "tests/integration/test_dashboard.py",
    "lorelay status --here --redis-url": "tests/unit/lorelay/test_status.py",
}
"""The commands of the services without their values, and the file whose tests run them."""


@pytest.fixture(scope="module")
def services() -> Any:
    return YAML(typ="safe").load(ROOT / "docker-compose.yml")["services"]


def test_idle_connections_of_the_image_and_the_service_outlive_uvicorns_default(services: Any) -> None:
    variable = "UVICORN_TIMEOUT_KEEP_ALIVE"
    assert services["api"]["environment"][variable] == "${LORELAY_KEEP_ALIVE_S:-75}"
    assert f"ENV {variable}=75" in (ROOT / "api" / "Dockerfile").read_text()
    envvar_prefix = uvicorn_command.context_settings["auto_envvar_prefix"]
    (option,) = [option for option in uvicorn_command.params if option.name == "timeout_keep_alive"]
    assert f"{envvar_prefix}_{option.name}".upper() == variable


def without_values(command: str) -> str:
    """`rq worker -u URL -w x.Y` becomes `rq worker -u -w x.Y`: names stay, addresses and numbers go."""
    return " ".join(word for word in shlex.split(command) if not re.search(r"://|^[\d.]+$", word))


def duration_s(text: str) -> int:
    assert text.endswith("s")
    return int(text.removesuffix("s"))


@pytest.mark.parametrize("file", FILES)
def test_the_files_follow_the_compose_schema(file: str) -> None:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", file]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("service", ["api", "worker", "dashboard"])
def test_every_command_is_one_that_other_tests_run(services: Any, service: str) -> None:
    commands = [services[service]["command"]]
    check = services[service]["healthcheck"]["test"]
    if check[1] != "python":
        commands.append(shlex.join(check[1:]))
    for command in map(without_values, commands):
        program, *words = command.split()
        text = (ROOT / RUN_BY_TESTS[command]).read_text()
        # `--host` is left at its default there.
        for word in (word for word in words if word != "--host"):
            assert word in text, f"{RUN_BY_TESTS[command]} runs no {program} with {word}"


def test_redis_is_configured_as_the_embedded_server_is(services: Any, tmp_path: Path) -> None:
    with StateFolder(tmp_path / "state") as state:
        embedded = " ".join(state.command(Path("valkey-server")))
    program, *words = services["redis"]["command"].split()
    assert program == "valkey-server"
    for name, value in zip(words[::2], words[1::2], strict=True):
        assert f"{name} {value}" in embedded


def test_redis_is_not_reachable_from_outside_and_the_dashboard_from_this_machine_only(services: Any) -> None:
    assert "ports" not in services["redis"]
    assert all(port.startswith("127.0.0.1:") for port in services["dashboard"]["ports"])


def test_workers_can_be_scaled(services: Any) -> None:
    assert not {"container_name", "ports", "hostname"} & set(services["worker"])


def test_every_service_is_checked_and_restarted(services: Any) -> None:
    for service in services.values():
        assert service["restart"] == "unless-stopped"
        assert service["healthcheck"]["test"][0] == "CMD"


def test_the_stop_grace_is_longer_than_the_drain(services: Any) -> None:
    assert duration_s(services["api"]["stop_grace_period"]) > ApiSettings.model_fields["api_drain_s"].default
    assert (
        duration_s(services["worker"]["stop_grace_period"]) > WorkerSettings.model_fields["drain_s"].default
    )


def test_every_variable_that_compose_sets_is_a_setting(services: Any) -> None:
    fields = {"redis_url"} | set(ApiSettings.model_fields) | set(WorkerSettings.model_fields)
    for name in ("api", "worker"):
        variables = [key for key in services[name]["environment"] if key.startswith("LORELAY_")]
        assert {key.removeprefix("LORELAY_").lower() for key in variables} <= fields


def test_what_a_worker_fetches_and_builds_outlives_its_container(services: Any) -> None:
    worker = services["worker"]
    folders = [volume.split(":")[1] for volume in worker["volumes"]]
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        assert worker["environment"][name] in folders


def test_every_setting_of_the_env_file_reaches_api_and_workers(services: Any) -> None:
    for name in ("api", "worker"):
        assert services[name]["env_file"] == [{"path": ".env", "required": False}]


def test_the_example_settings_are_those_that_compose_reads() -> None:
    text = "".join((ROOT / file).read_text() for file in FILES)
    lines = (ROOT / ".env.example").read_text().splitlines()
    names = {line.partition("=")[0] for line in lines if line and not line.startswith("#")}
    assert names <= set(re.findall(r"\$\{(\w+)", text))


class _Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(503 if self.path == "/ready" and getattr(self.server, "draining", False) else 200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[http.server.HTTPServer]:
    server = http.server.HTTPServer(("127.0.0.1", 0), _Ready)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("draining", [False, True])
def test_the_health_check_of_the_api_tells_ready_from_draining(
    services: Any, web: http.server.HTTPServer, draining: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    web.draining = draining  # type: ignore[attr-defined]
    monkeypatch.setenv("no_proxy", "*")
    snippet = services["api"]["healthcheck"]["test"][-1].replace(":23333/", f":{web.server_port}/")
    checked = subprocess.run([sys.executable, "-c", snippet], capture_output=True, check=False)
    assert (checked.returncode != 0) == draining


def requirements(names: Iterable[str]) -> set[str]:
    """All packages that these requirements bring along, by the metadata of what is installed."""
    todo, seen = [Requirement(name) for name in names], set[str]()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in seen:
            continue
        seen.add(name)
        extras = [{"extra": extra} for extra in ("", *requirement.extras)]
        for line in importlib.metadata.distribution(name).requires or []:
            further = Requirement(line)
            if further.marker is None or any(further.marker.evaluate(extra) for extra in extras):
                todo.append(further)
    return seen


def installed_extras(dockerfile: str) -> list[str]:
    (extras,) = re.findall(r'pip install .*"\.\[([\w,]+)\]"', (ROOT / dockerfile).read_text())
    return str(extras).split(",")


def test_the_api_image_has_no_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = list(project["dependencies"])
    for extra in installed_extras("api/Dockerfile"):
        wanted += project["optional-dependencies"][extra]
    assert {"fastapi", "rq", "flask"} <= (brought := requirements(wanted))
    assert not {"torch", "transformers", "peft", "numpy"} & brought
    assert "torch" not in (ROOT / "api/Dockerfile").read_text().replace("no torch", "")


def test_the_worker_image_installs_the_pinned_torch_first() -> None:
    text = (ROOT / "worker/Dockerfile").read_text()
    (torch,) = re.findall(r"torch==[\d.]+", text)
    assert (ROOT / "constraints.txt").read_text().splitlines()[0] == torch
    assert text.index(torch) < text.index('".[worker]"')
    assert installed_extras("worker/Dockerfile") == ["worker"]


def test_the_images_get_all_that_they_copy() -> None:
    ignore = (ROOT / ".dockerignore").read_text()
    for dockerfile in ("api/Dockerfile", "worker/Dockerfile"):
        for line in re.findall(r"^COPY (.*) \S+$", (ROOT / dockerfile).read_text(), re.MULTILINE):
            assert all(f"!{name}\n" in ignore for name in line.split())


def documented_lines() -> list[list[str]]:
    """The words of each `docker compose exec` line in README and docs, after `exec`."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    texts = re.findall(r"docker compose exec ([^`\n#]+)", "\n".join(page.read_text() for page in pages))
    return [shlex.split(text) for text in texts]


def test_every_documented_command_in_a_container_reaches_the_unpublished_redis(
    services: Any, redis_server: RedisServer, connection: redis.Redis
) -> None:
    connection.sadd("rq:queues", "rq:queue:QUEUE")
    url = services["api"]["environment"]["LORELAY_REDIS_URL"]
    lines = documented_lines()
    assert {line[1] for line in lines} == {"lorelay", "rq", "valkey-cli"}
    for service, program, *words in lines:
        if program == "valkey-cli":
            assert service == "redis"
            connection.execute_command(*words)
            continue
        # The API's image has both programs, and runs even while no worker does.
        assert service == "api"
        assert program == "lorelay" or url in words
        command = [str(Path(sys.executable).parent / program), *words]
        run = subprocess.run(
            [word.replace(url, redis_server.url) for word in command],
            env={"LORELAY_REDIS_URL": redis_server.url, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, f"{command}: {run.stderr}"
