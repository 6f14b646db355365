"""Paths of users who have no home folder."""

import os
import pwd
from pathlib import Path
from typing import Any

import pytest

from lorelay.embedded import StateFolder, running_url
from lorelay.main import main
from shared.errors import ConfigurationError
from shared.paths import expand_home
from shared.settings import ServeSettings, WorkerSettings
from worker.model.loading import find_model


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user without name and home folder, as containers often have."""

    def refuse(user: Any) -> None:
        raise KeyError(user)

    for name in [name for name in os.environ if name.startswith("LORELAY_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", refuse)
    monkeypatch.setattr(pwd, "getpwnam", refuse)
    monkeypatch.chdir(tmp_path)


NO_HOME = r"the home folder in '~.*' is not known: set HOME, or give a path without ~"


@pytest.mark.usefixtures("no_home")
@pytest.mark.parametrize("path", ["~", "~/x", "~somebody/x"])
def test_a_path_with_a_tilde_is_refused_and_the_way_out_is_told(path: str) -> None:
    with pytest.raises(ValueError, match=NO_HOME):
        expand_home(path)
    assert expand_home("a/~b") == Path("a/~b")


@pytest.mark.usefixtures("no_home")
@pytest.mark.parametrize(
    ("words", "setting"),
    [
        ("status", "LORELAY_STATE_DIR (--state-dir)"),
        ("dashboard", "LORELAY_STATE_DIR (--state-dir)"),
        ("status --state-dir ~/s", "LORELAY_STATE_DIR (--state-dir)"),
        ("serve ~/model", "LORELAY_MODEL (MODEL)"),
        ("serve org/model --adapters a=~/a", "LORELAY_ADAPTERS (--adapters): a"),
        ("serve org/model --adapters @~/list", "LORELAY_ADAPTERS (--adapters)"),
    ],
)
def test_every_command_names_the_setting(
    words: str, setting: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"lorelay: {setting}: the home folder in '~")
    assert printed.count("\n") == 1


@pytest.mark.usefixtures("no_home")
def test_help_and_settings_need_no_home(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", "-h"])
    assert caught.value.code == 0
    assert "~/.local/state/lorelay" in capsys.readouterr().out
    assert ServeSettings.load(redis_url="redis://host").redis_url == "redis://host"


@pytest.mark.usefixtures("no_home")
def test_workers_and_the_embedded_server_name_the_setting() -> None:
    with pytest.raises(ConfigurationError, match=f"LORELAY_MODEL: {NO_HOME}"):
        find_model(WorkerSettings.load(model="~/model"))
    with pytest.raises(ConfigurationError, match=f"LORELAY_ADAPTERS: .*{NO_HOME}"):
        WorkerSettings.load(model="m", adapters="@~/list")
    for use in (StateFolder, running_url):
        with pytest.raises(ConfigurationError, match=f"LORELAY_STATE_DIR.*{NO_HOME}.*--redis-url"):
            use(ServeSettings.load().state_dir)


def test_lists_of_adapters_are_utf_8_in_every_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("locale.getencoding", lambda: "latin-1", raising=False)
    (tmp_path / "list").write_bytes("café=/adapters/é\n".encode())
    settings = WorkerSettings.load(model="m", adapters=f"@{tmp_path / 'list'}")
    assert settings.adapters[0] == ("café", "/adapters/é")
