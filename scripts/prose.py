"""Prose lint: finds docstrings, comments and doc sentences whose first word names nothing.

`scripts/prose.py [FILE ...]` prints each finding with file and line; without files, it checks `CHECKED`.
The rule is in CONTRIBUTING.md.
"""

import argparse
import ast
import functools
import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CHECKED = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs"),
    *("api", "bench", "demo", "lorelay", "scripts", "shared", "tests", "worker"),
)
"""Files and folders that are checked by default."""

WORDS = r"What|One (?:that|which|whose|who)|Those|Else|As|Of|By|Not|How|Where"
DOC_OPENER = re.compile(rf"(?:{WORDS})\b")
CODE_OPENER = re.compile(rf"(?:{WORDS}|Whether|So)\b")
DIRECTIVE = re.compile(r"(?:noqa|type:|pragma|!)")
MARKDOWN_ITEM = re.compile(r"(?:[*+-]|\d+\.|>)\s+")
MARKDOWN_MARK = re.compile(rf"{MARKDOWN_ITEM.pattern}|[*_\[(]+")
SENTENCE_END = re.compile(r"(?<=[.!?])[)\"*_]*\s+")


class Piece(NamedTuple):
    """A text (docstring, comment or sentence) and the number of its first line."""

    line: int
    text: str


def python_pieces(source: str) -> Iterator[Piece]:
    """Yields the docstrings of modules, classes, functions and attributes, and the comments."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
            continue
        if isinstance(node.value.value, str):
            yield Piece(node.lineno, node.value.value)
    yield from _python_comments(source)


def _python_comments(source: str) -> Iterator[Piece]:
    """Yields comments; of a comment over several lines, the first line."""
    last_line = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, text = token.start[0], token.string.lstrip("#").strip()
        stands_alone = not token.line[: token.start[1]].strip()
        if not (stands_alone and line == last_line + 1) and not DIRECTIVE.match(text):
            yield Piece(line, text)
        last_line = line if stands_alone else 0


def comment_pieces(source: str, mark: str) -> Iterator[Piece]:
    """Yields line comments of Lua and C++; of a comment over several lines, the first line."""
    was_comment = False
    for number, line in enumerate(source.splitlines(), start=1):
        code, found, text = line.partition(mark)
        stands_alone = bool(found) and not code.strip()
        if found and not (stands_alone and was_comment):
            yield Piece(number, text)
        was_comment = stands_alone


def markdown_pieces(source: str) -> Iterator[Piece]:
    """Yields the sentences of paragraphs and lists, without headings, tables and code."""
    in_code, paragraph = False, list[str]()
    for number, line in enumerate([*source.splitlines(), ""], start=1):
        stripped = line.strip()
        if stripped.startswith("```"):
            in_code = not in_code
        is_text = bool(stripped) and not in_code and not stripped.startswith(("```", "|", "<", "#"))
        if paragraph and (not is_text or MARKDOWN_ITEM.match(stripped)):
            yield from _sentences(number - len(paragraph), paragraph)
            paragraph = []
        if is_text:
            paragraph.append(stripped)


def _sentences(first_line: int, lines: list[str]) -> Iterator[Piece]:
    text, position = "\n".join(lines), 0
    for end in [*(found.end() for found in SENTENCE_END.finditer(text)), len(text)]:
        line = first_line + text.count("\n", 0, position)
        yield Piece(line, _without_marks(text[position:end]))
        position = end


def _without_marks(text: str) -> str:
    while (found := MARKDOWN_MARK.match(text)) is not None:
        text = text[found.end() :]
    return text


READERS: dict[str, Callable[[str], Iterator[Piece]]] = {
    ".py": python_pieces,
    ".md": markdown_pieces,
    ".lua": functools.partial(comment_pieces, mark="--"),
    ".cpp": functools.partial(comment_pieces, mark="//"),
    ".h": functools.partial(comment_pieces, mark="//"),
}


def findings(path: Path) -> Iterator[Piece]:
    """Yields the texts of a file that open with a word that names nothing."""
    opener = DOC_OPENER if path.suffix == ".md" else CODE_OPENER
    for piece in READERS[path.suffix](path.read_text()):
        text = piece.text.strip()
        if opener.match(text):
            yield Piece(piece.line, " ".join(text.split()))


def files_of(path: Path) -> list[Path]:
    """Returns the files under a folder that may contain prose, or the file itself."""
    return sorted(file for file in path.rglob("*") if file.suffix in READERS) if path.is_dir() else [path]


def main() -> int:
    """Prints the findings; the exit code is 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", type=Path)
    paths = parser.parse_args().paths or [ROOT / name for name in CHECKED]
    num_found = 0
    for file in (file for path in paths for file in files_of(path)):
        for piece in sorted(findings(file)):
            num_found += 1
            sys.stdout.write(f"{file}:{piece.line}: {piece.text[:100]}\n")
    return 1 if num_found else 0


if __name__ == "__main__":
    sys.exit(main())
