"""Keys that change while the API runs."""

import logging
import os
from pathlib import Path

import pytest

from api.keyring import Keyring
from shared.errors import ConfigurationError
from shared.settings import ApiSettings


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "keys"
    file.write_text("\ufeff# our clients\r\nteam-a:old, team-b:other\r\n")
    return file


def accepted(keyring: Keyring, *keys: str) -> list[str]:
    """The names for which these keys stand; "" for an unknown key."""
    clients = [keyring.find(key.encode()) for key in keys]
    return [client.tenant if client else "" for client in clients]


def replace(file: Path, text: str) -> None:
    new = file.with_name("new")
    new.write_text(text)
    new.replace(file)


def test_a_key_is_rotated_without_a_restart(file: Path) -> None:
    keyring = Keyring(ApiSettings(api_keys="fixed:f", api_keys_file=file))
    assert accepted(keyring, "old", "other", "new", "f") == ["team-a", "team-b", "", "fixed"]
    replace(file, "team-a:old team-a:new")
    keyring.reread()
    keyring.reread()
    assert accepted(keyring, "old", "other", "new", "f") == ["team-a", "", "team-a", "fixed"]
    replace(file, "team-a:new")
    keyring.reread()
    keyring.reread()
    assert accepted(keyring, "old", "other", "new", "f") == ["", "", "team-a", "fixed"]


def test_a_file_of_the_same_size_and_time_is_read_again_too(file: Path) -> None:
    keyring = Keyring(ApiSettings(api_keys_file=file))
    before = file.stat()
    file.write_bytes(file.read_bytes().replace(b"old", b"new"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    keyring.reread()
    keyring.reread()
    assert accepted(keyring, "old", "new") == ["", "team-a"]


def test_a_file_that_is_being_written_is_not_read_half(file: Path) -> None:
    keyring = Keyring(ApiSettings(api_keys_file=file))
    for written in ("team-", "team-a:ol", "team-a:old team-c:t"):
        file.write_text(written)
        keyring.reread()
        assert accepted(keyring, "old", "ol", "t", "other") == ["team-a", "", "", "team-b"]


@pytest.mark.parametrize("content", ["", "# none", ":x", "team-a:old team-b:old", None])
def test_a_malformed_or_missing_file_keeps_the_keys_and_is_logged_once(
    file: Path, content: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    keyring = Keyring(ApiSettings(api_keys_file=file))
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    for _ in range(4):
        keyring.reread()
    assert accepted(keyring, "old", "other") == ["team-a", "team-b"]
    assert not keyring.is_empty
    (record,) = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert str(file) in record.getMessage()
    assert "LORELAY_API_KEYS_FILE" in record.getMessage()
    replace(file, "team-a:new")
    keyring.reread()
    keyring.reread()
    assert accepted(keyring, "old", "new") == ["", "team-a"]


def test_a_key_of_the_file_must_not_have_another_name_in_the_settings(file: Path) -> None:
    settings = ApiSettings(api_keys="team-z:old", api_keys_file=file)
    with pytest.raises(ConfigurationError, match="LORELAY_API_KEYS_FILE"):
        Keyring(settings)
