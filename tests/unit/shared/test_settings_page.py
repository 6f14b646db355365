"""docs/settings.md names all settings and their defaults."""

import re
from pathlib import Path
from typing import Any

import pytest

from shared.settings import ENV_PREFIX, ApiSettings, RedisSettings, ServeSettings, WorkerSettings

PAGE = (Path(__file__).parents[3] / "docs" / "settings.md").read_text()
ROWS = re.findall(rf"^\| `{ENV_PREFIX}(\w+)` \| ([^|]*?) ?\|.*\|$", PAGE, re.MULTILINE)
DEFAULTS: dict[str, Any] = {
    name.upper(): field.default
    for owner in (RedisSettings, ServeSettings, ApiSettings, WorkerSettings)
    for name, field in owner.model_fields.items()
}


def test_every_setting_is_described_once() -> None:
    assert sorted(name for name, _ in ROWS) == sorted(DEFAULTS)


@pytest.mark.parametrize("name", DEFAULTS)
def test_its_default_is_told(name: str) -> None:
    default = DEFAULTS[name]
    if isinstance(default, bool):
        default = "on" if default else "off"
    if isinstance(default, str | int | float):
        assert dict(ROWS)[name] == str(default)
