"""`lorelay`: the command line, the variables behind it, and what stops a start."""

import os
import re
import socket
from pathlib import Path

import pytest

from lorelay import options, plan
from lorelay.embedded import StateFolder
from lorelay.main import main
from lorelay.plan import ServePlan, make_plan
from shared.setting_lists import AdapterSource
from shared.settings import WorkerSettings

pytestmark = pytest.mark.usefixtures("bare_environment")


def plan_for(*words: str) -> ServePlan:
    args = options.build_parser().parse_args(["serve", *words])
    values = options.given_values(args)
    return make_plan(values, options.as_variables(values), use_ssl=args.ssl)


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line with which `lorelay serve` refuses to start."""
    assert main(["serve", *words]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err.removeprefix("lorelay: ").strip()


# The command line and the environment


def test_every_flag_names_a_setting_that_exists() -> None:
    for flag in options.ALL_SERVE_FLAGS:
        assert flag.field in flag.owner.model_fields


def test_help_explains_every_flag_with_variable_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["serve", "-h"])
    printed = " ".join(capsys.readouterr().out.split())
    for flag in options.ALL_SERVE_FLAGS:
        assert re.search(rf"{flag.name} .*\[{flag.variable}; default: .+?\]", printed)
    assert "--ssl " in printed


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.startswith("lorelay ")


def test_flags_set_the_variables_of_the_children(model: Path) -> None:
    words = ["--session-len", "64", "--trust-remote-code", "--api-keys", "k1", "k2", "--dtype", "float32"]
    plan = plan_for(str(model), *words)
    assert plan.variables["LORELAY_SESSION_LEN"] == "64"
    assert plan.variables["LORELAY_TRUST_REMOTE_CODE"] == "true"
    assert plan.variables["LORELAY_API_KEYS"] == "k1 k2"
    assert plan.api.api_keys == ("k1", "k2")
    assert (plan.worker.trust_remote_code, plan.worker.dtype) == (True, "float32")


def test_a_variable_serves_where_no_flag_is_given_and_the_flag_wins(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORELAY_MODEL", str(model))
    monkeypatch.setenv("LORELAY_MAX_BATCH_SIZE", "3")
    assert plan_for().worker.max_batch_size == 3
    assert plan_for("--max-batch-size", "4").worker.max_batch_size == 4


def test_what_the_children_read_from_the_variables_is_what_was_checked(
    model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaced = adapter.with_name("one more")
    spaced.mkdir()
    plan = plan_for("smol", "--adapters", "a=demo/pirate", "b=demo/one more", "c=org/hub-id")
    for name, value in plan.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir("/")
    assert WorkerSettings.load() == plan.worker.model_copy(update={"model_name": "smol"})
    assert plan.worker.model == str(model)
    assert plan.worker.adapters == (
        AdapterSource("a", str(adapter)),
        AdapterSource("b", str(spaced)),
        AdapterSource("c", "org/hub-id"),
    )


def test_adapters_of_the_variable_reach_the_children_with_absolute_paths(
    model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(model.parent))
    monkeypatch.setenv("LORELAY_ADAPTERS", "a=demo/pirate b=~/demo/pirate c=org/hub-id")
    plan = plan_for("smol")
    assert plan.variables["LORELAY_ADAPTERS"] == f"a={adapter} b={adapter} c=org/hub-id"
    assert [source.path for source in plan.worker.adapters] == [str(adapter), str(adapter), "org/hub-id"]


def test_one_bare_adapter_path_is_named_by_its_folder(model: Path, adapter: Path) -> None:
    assert plan_for("smol", "--adapters", "demo/pirate/").worker.adapters == (
        AdapterSource("pirate", str(adapter)),
    )


def test_thousands_of_adapters_reach_the_children_by_the_file_that_lists_them(
    model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (adapter.parent / "list").write_text("".join(f"adapter-{i}=pirate\n" for i in range(5000)))
    plan = plan_for("smol", "--adapters", "@demo/list", "b=demo/pirate")
    assert plan.variables["LORELAY_ADAPTERS"] == f"@{adapter.parent}/list b={adapter}"
    monkeypatch.setenv("LORELAY_ADAPTERS", plan.variables["LORELAY_ADAPTERS"])
    monkeypatch.chdir("/")
    assert WorkerSettings.load(model="smol").adapters == plan.worker.adapters
    assert len(plan.worker.adapters) == 5001
    assert {source.path for source in plan.worker.adapters} == {str(adapter)}


def test_more_adapters_than_a_variable_takes_are_refused_with_the_way_out(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(capsys, "smol", "--adapters", *(f"adapter-{i}=org/adapter-{i}" for i in range(5000)))
    assert said.startswith("LORELAY_ADAPTERS (--adapters): 5000 adapters don't fit into an environment")


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["./smol"], "smol"),
        (["~/smol"], "smol"),
        (["org/smol"], "org/smol"),
        (["smol", "--model-name", "mine"], "mine"),
    ],
)
def test_the_base_is_called_as_given_or_as_its_folder(
    words: list[str], name: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(model.parent))
    assert plan_for(*words).variables["LORELAY_MODEL_NAME"] == name


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:"),
        ("127.0.0.1", "http://127.0.0.1:"),
        ("localhost", "http://localhost:"),
    ],
)
def test_the_url_that_is_shown_can_be_opened_here(model: Path, name: str, url: str) -> None:
    assert plan_for("smol", "--server-name", name).url.startswith(url)


# Errors that stop the start


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "LORELAY_MODEL (MODEL): Field required"),
        (["./nowhere"], "LORELAY_MODEL (MODEL): ./nowhere is no folder"),
        (["~/nowhere"], "LORELAY_MODEL (MODEL): ~/nowhere is no folder"),
        (["smol", "--adapters", "a=./nowhere"], "LORELAY_ADAPTERS (--adapters): a: ./nowhere is no folder"),
        (["smol", "--adapters", "x", "y"], "LORELAY_ADAPTERS (--adapters): 'x' is not of the form name=path"),
        (["smol", "--adapters", "smol=x/y"], "an adapter and the base model are both called 'smol'"),
        (["smol", "--server-port", "0"], "LORELAY_SERVER_PORT (--server-port): Input should be greater"),
        (["smol", "--workers", "none"], "LORELAY_WORKERS (--workers): Input should be a valid integer"),
        (["smol", "--dtype", "int3"], "LORELAY_DTYPE (--dtype): Input should be 'auto', 'bfloat16'"),
        (["smol", "--session-len", "-1"], "LORELAY_SESSION_LEN (--session-len): Input should be greater"),
        (["smol", "--max-batch-size", "0"], "LORELAY_MAX_BATCH_SIZE (--max-batch-size): Input should be"),
        (["smol", "--cache-max-entry-count", "2"], "LORELAY_CACHE_MAX_ENTRY_COUNT (--cache-max-entry-count)"),
        (["smol", "--max-resident-adapters", "0"], "LORELAY_MAX_RESIDENT_ADAPTERS (--max-resident-adapters)"),
        (["smol", "--max-cached-adapter-bytes", "1G"], "LORELAY_MAX_CACHED_ADAPTER_BYTES (--max-cached-adap"),
        (["smol", "--max-wait-s", "0"], "LORELAY_MAX_WAIT_S (--max-wait-s): Input should be greater than 0"),
        (["smol", "--redis-url", "http://x"], "LORELAY_REDIS_URL (--redis-url): is not a redis://"),
        (["smol", "--redis-url", "redis://127.0.0.1:1"], "LORELAY_REDIS_URL (--redis-url): can't"),
        (
            ["smol", "--server-name", "no.such.invalid"],
            "LORELAY_SERVER_NAME: 'no.such.invalid' is no address",
        ),
        (["smol", "--ssl"], "SSL_KEYFILE: is not set, and --ssl needs it"),
    ],
)
@pytest.mark.usefixtures("model")
def test_a_bad_value_stops_the_start_with_one_line_that_names_it(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert refusal(capsys, *words).startswith(said)


@pytest.mark.usefixtures("model")
def test_a_bad_variable_without_a_flag_stops_the_start_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORELAY_DRAIN_S", "soon")
    assert refusal(capsys, "smol").startswith("LORELAY_DRAIN_S: Input should be a valid number")


@pytest.mark.usefixtures("model")
def test_a_port_in_use_stops_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        said = refusal(capsys, "smol", "--server-port", port)
    assert "LORELAY_SERVER_PORT (--server-port): can't listen on 0.0.0.0:" in said
    assert said.endswith("address already in use")


@pytest.mark.usefixtures("model")
def test_a_state_folder_in_use_stops_the_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StateFolder(tmp_path / "state"):
        said = refusal(capsys, "smol")
    assert said.startswith("LORELAY_STATE_DIR (--state-dir): the state folder")
    assert f"in use by process {os.getpid()}" in said


def test_a_missing_certificate_stops_the_start(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    key = model / "key.pem"
    key.touch()
    monkeypatch.setenv("SSL_KEYFILE", str(key))
    monkeypatch.setenv("SSL_CERTFILE", str(model / "nowhere.pem"))
    assert refusal(capsys, "smol", "--ssl") == f"SSL_CERTFILE: {model}/nowhere.pem is no file"


@pytest.mark.usefixtures("model")
def test_missing_worker_packages_stop_the_start(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    assert "pip install -e '.[worker]'" in refusal(capsys, "smol")
