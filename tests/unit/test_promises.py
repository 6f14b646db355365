"""The tests that docs/promises.md names."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECTION = "## What a client, an adapter, a Redis or a neighbour can do to you"


def rows() -> list[list[str]]:
    """The cells of each row of the section's table."""
    text = (ROOT / "docs" / "promises.md").read_text("utf-8")
    _, _, section = text.partition(f"{SECTION}\n")
    lines = [line for line in section.partition("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines[2:]]


def test_every_row_names_a_test_that_exists() -> None:
    found = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert len(rows()) > 60
    for what, _, tests in rows():
        names = re.findall(r"`([^`]+)`", tests)
        assert names, what
        for name in names:
            assert (ROOT / name).is_file() if "/" in name else name in found, f"{name}: {what}"
