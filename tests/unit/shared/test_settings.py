"""Settings: what is read, and how a malformed value is named."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from shared.errors import ConfigurationError
from shared.setting_lists import AdapterSource
from shared.settings import ApiSettings, RedisSettings, WorkerSettings


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORELAY_REDIS_URL", raising=False)
    monkeypatch.setenv("LORELAY_MODEL", "org/base")


def test_adapters_are_read_as_names_with_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORELAY_ADAPTERS", "a=/some/where  b=org/name")
    settings = WorkerSettings.load()
    assert settings.adapters == (AdapterSource("a", "/some/where"), AdapterSource("b", "org/name"))


def test_a_lease_that_runs_out_before_it_is_renewed_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"HEARTBEAT_S \(4\) must be shorter than LORELAY_LEASE_S"):
        WorkerSettings.load(model="m", heartbeat_s=4, lease_s=4)


def test_one_bare_path_is_named_by_its_folder() -> None:
    assert WorkerSettings.load(adapters="adapters/pirate").adapters == (
        AdapterSource("pirate", "adapters/pirate"),
    )


@pytest.mark.parametrize(
    ("adapters", "reason"),
    [
        ("a=x a=y", "'a' is given twice"),
        ("a=x y", "'y' is not of the form name=path"),
        ("a=", "'a=' is not of the form name=path"),
        ("default=x", "no adapter may be called 'default'"),
        ("org/base=x", "both called 'org/base'"),
        ("..=x", "can't be the name of a model"),
        ("'a\nb=x' c=y", "can't be the name of a model"),
    ],
)
def test_malformed_adapters_are_refused_with_the_reason(adapters: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        WorkerSettings.load(adapters=adapters)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LORELAY_MAX_BATCH_SIZE", "many"),
        ("LORELAY_MAX_BATCH_SIZE", "0"),
        ("LORELAY_DTYPE", "int8"),
        ("LORELAY_LEASE_S", "-1"),
        ("LORELAY_LEASE_S", "inf"),
        ("LORELAY_DRAIN_S", "1e300"),
        ("LORELAY_STEP_TARGET_MS", "inf"),
        ("LORELAY_CACHE_MAX_ENTRY_COUNT", "1.5"),
        ("LORELAY_TRUST_REMOTE_CODE", "maybe"),
        ("LORELAY_ADAPTERS", "a=x y"),
    ],
)
def test_a_malformed_variable_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match=name) as caught:
        WorkerSettings.load()
    assert caught.value.param == name


def test_a_missing_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORELAY_MODEL")
    with pytest.raises(ConfigurationError, match="LORELAY_MODEL"):
        WorkerSettings.load()
    with pytest.raises(ConfigurationError, match="LORELAY_REDIS_URL"):
        RedisSettings.load()


@pytest.mark.parametrize("url", ["localhost:6379", "http://x", ""])
def test_a_url_that_is_not_redis_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="LORELAY_REDIS_URL"):
        RedisSettings.load(redis_url=url)


def test_api_keys_may_be_separated_by_commas_or_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORELAY_API_KEYS", "one, two three")
    assert ApiSettings.load().api_keys == ("one", "two", "three")


def test_settings_can_not_be_changed() -> None:
    with pytest.raises(ValidationError):
        ApiSettings.load().max_queue_depth = 1  # type: ignore[misc]


def test_the_base_is_called_as_given_and_a_folder_by_its_name(tmp_path: Path) -> None:
    assert WorkerSettings.load().base_name == "org/base"
    assert WorkerSettings.load(model=f"{tmp_path}/").base_name == tmp_path.name
    assert WorkerSettings.load(model=str(tmp_path), model_name="mine").base_name == "mine"


def test_adapters_may_stand_in_a_file_with_folders_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "one more").mkdir()
    file = tmp_path / "adapters.txt"
    file.write_text("# ours\na=one more\n\n  b=org/hub-id\nc=./missing\nd=/some/where#1\n")
    assert WorkerSettings.load(adapters=f"'@{file}' e=x/y").adapters == (
        AdapterSource("a", f"{tmp_path}/one more"),
        AdapterSource("b", "org/hub-id"),
        AdapterSource("c", f"{tmp_path}/missing"),
        AdapterSource("d", "/some/where#1"),
        AdapterSource("e", "x/y"),
    )


@pytest.mark.parametrize(
    ("last_line", "reason"),
    [
        ("b", "adapters.txt, line 3: 'b' is not of the form name=path"),
        ("a=y", "adapters.txt, line 3: adapter name 'a' is given twice"),
        ("default=y", "adapters.txt, line 3: no adapter may be called 'default'"),
        ("..=y", "adapters.txt, line 3: '..' can't be the name of a model"),
    ],
)
def test_a_malformed_line_is_refused_with_file_and_line(tmp_path: Path, last_line: str, reason: str) -> None:
    (tmp_path / "adapters.txt").write_text(f"a=x\n\n{last_line}\n")
    with pytest.raises(ConfigurationError, match=reason) as caught:
        WorkerSettings.load(adapters=f"@{tmp_path}/adapters.txt")
    assert caught.value.param == "LORELAY_ADAPTERS"


def test_a_file_of_adapters_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigurationError, match="can't read 'no-file': No such file or directory"):
        WorkerSettings.load(adapters="@no-file")


def test_weights_are_read_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert WorkerSettings.load(model="m").adapter_weights == {}
    monkeypatch.setenv("LORELAY_ADAPTER_WEIGHTS", "a=2 org/name=0.5  m=3e0")
    assert WorkerSettings.load(model="m").adapter_weights == {"a": 2.0, "org/name": 0.5, "m": 3.0}


@pytest.mark.parametrize("weights", ["a", "a=", "=2", "a=x", "a=0", "a=-1", "a=nan", "a=inf", "a=1 a=2"])
def test_malformed_weights_are_refused(monkeypatch: pytest.MonkeyPatch, weights: str) -> None:
    monkeypatch.setenv("LORELAY_ADAPTER_WEIGHTS", weights)
    with pytest.raises(ConfigurationError, match="is not of the form name=weight") as caught:
        WorkerSettings.load(model="m")
    assert caught.value.param == "LORELAY_ADAPTER_WEIGHTS"
