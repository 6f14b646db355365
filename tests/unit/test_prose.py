"""The prose lint finds texts whose first word names nothing, wherever they may stand."""

import subprocess
import sys
from pathlib import Path

import pytest

PROSE = Path(__file__).parents[2] / "scripts" / "prose.py"


def found(file: Path, text: str) -> list[str]:
    """The lines that the lint reports, as `line: text`."""
    file.write_text(text)
    done = subprocess.run([sys.executable, PROSE, file], capture_output=True, text=True, check=False)
    lines = [line.removeprefix(f"{file}:") for line in done.stdout.splitlines()]
    assert (done.returncode, done.stderr) == (int(bool(lines)), "")
    return lines


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('"""What it is."""\n', "1: What it is."),
        ('class A:\n    """One that was."""\n', "2: One that was."),
        ('def f():\n    """\n    Not this.\n    """\n', "2: Not this."),
        ('X = 1\n"""Whether so."""\n', "2: Whether so."),
        ("x = 1\n# By the way.\n# It is.\n", "2: By the way."),
        ("x = 1  # as it was\ny = 2  # How it is\n", "2: How it is"),
    ],
)
def test_it_finds_docstrings_attribute_docstrings_and_comments_of_python(
    tmp_path: Path, text: str, line: str
) -> None:
    assert found(tmp_path / "a.py", text) == [line]


@pytest.mark.parametrize(("name", "mark"), [("a.lua", "--"), ("a.cpp", "//"), ("a.h", "//")])
def test_it_finds_comments_of_lua_and_cpp(tmp_path: Path, name: str, mark: str) -> None:
    text = (
        f"x = 1 {mark} Else y\n{mark} Fine is this.\n{mark} Where it goes on.\ny()\n{mark} Where it opens.\n"
    )
    assert found(tmp_path / name, text) == ["1: Else y", "5: Where it opens."]


def test_it_finds_every_sentence_of_a_page_but_no_heading_table_or_code(tmp_path: Path) -> None:
    page = (
        "# How it works\n\nA sentence. Of\nanother. **As** it\nis.\n\n* Those here\n* fine\n\n"
        "| What | How |\n|---|---|\n\n```\nNot code\n```\nQueues are lists, as `By` says.\n"
    )
    assert found(tmp_path / "a.md", page) == ["3: Of another.", "4: As** it is.", "7: Those here"]


def test_it_is_content_with_first_words_that_name_something(tmp_path: Path) -> None:
    text = '"""Whatever. What is inside may begin so."""\n# Notes come first.\n# What follows goes on.\n'
    assert found(tmp_path / "a.py", text) == []
    assert found(tmp_path / "b.py", "# noqa: F401\nx = '''\nWhat is no docstring.'''\n") == []
