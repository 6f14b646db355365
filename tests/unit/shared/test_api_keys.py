"""API keys: names, refusals that show no key, the file."""

import hashlib
from pathlib import Path

import pytest

from shared.api_keys import ApiKey, parse_keys, shown
from shared.errors import ConfigurationError
from shared.settings import ApiSettings

SECRET = "sk-nobody-may-see"


def test_a_key_stands_for_its_name_and_a_bare_one_for_its_digest() -> None:
    digest = hashlib.sha256(b"bare").hexdigest()
    assert parse_keys(["team-a:one:two", "team-a:next", "bare", "bare"]) == (
        ApiKey("team-a", "one:two"),
        ApiKey("team-a", "next"),
        ApiKey(digest, "bare"),
    )
    assert (shown("team-a"), shown(digest)) == ("team-a", digest[:12])


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        (" , ", "holds no key"),
        ("\n", "holds no key"),
        (f":{SECRET}", "entry 1 has no valid name"),
        (f"a:one b/c:{SECRET}", "entry 2 has no valid name"),
        (f"{'n' * 64}:{SECRET}", "entry 1 has no valid name"),
        ("team-a:", "entry 1 has no key"),
        (f"a:{SECRET} b:{SECRET}", "entry 2 has the key of another entry"),
        (f"{SECRET},b:{SECRET}", "entry 2 has the key of another entry"),
        (f"{SECRET}\x00", "entry 1 has a key with a space or a character"),
        (f"a:{SECRET}\x7f", "entry 1 has a key with a space or a character"),
        (f"{SECRET}\u00a0{SECRET}", "entry 1 has a key with a space or a character"),
        (f"{SECRET}\u200b", "entry 1 has a key with a space or a character"),
        (f"{SECRET}\udcff", "entry 1 has a key with a space or a character"),
    ],
)
def test_malformed_keys_are_refused_by_the_number_of_the_entry_and_never_shown(
    keys: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigurationError, match=f"LORELAY_API_KEYS: .*{reason}") as caught:
        ApiSettings.load(api_keys=keys)
    assert SECRET not in f"{caught.value}{caught.value.__cause__}"
    file = tmp_path / "keys"
    file.write_bytes(keys.encode(errors="surrogateescape"))
    with pytest.raises(ConfigurationError, match=r"LORELAY_API_KEYS_FILE: ") as caught:
        ApiSettings.load(api_keys_file=file)
    assert SECRET not in f"{caught.value}{caught.value.__cause__}"


def test_an_empty_variable_means_that_requests_need_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORELAY_API_KEYS", "")
    assert ApiSettings.load().api_keys == ()


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"\xff\xfe", None])
def test_a_file_without_keys_is_refused_and_named(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=rf"LORELAY_API_KEYS_FILE: .*{file}"):
        ApiSettings.load(api_keys_file=file)


def test_settings_never_show_keys() -> None:
    assert SECRET not in f"{ApiSettings.load(api_keys=SECRET)!r} {parse_keys([SECRET, f'a:{SECRET}x'])!r}"
