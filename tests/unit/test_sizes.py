"""Files, classes and functions stay small, and tests stay out of other classes' private attributes."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("api", "bench", "lorelay", "shared", "worker")
MAX_FILE_LINES = 350
MAX_CLASS_LINES = 200
MAX_FUNCTION_LINES = 50
MAX_PRIVATE_ACCESSES = 15
LARGER: dict[str, str] = {}
"""Exceptions, `path:name`, each with the words by which its docstring tells the reason."""


class Part(NamedTuple):
    """A class or function, with its length in lines."""

    name: str
    node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

    @property
    def num_lines(self) -> int:
        return (self.node.end_lineno or self.node.lineno) - self.node.lineno + 1

    @property
    def limit(self) -> int:
        return MAX_CLASS_LINES if isinstance(self.node, ast.ClassDef) else MAX_FUNCTION_LINES


def sources(folder: str) -> dict[str, str]:
    """The text of each Python file of a folder, by its path."""
    files = sorted((ROOT / folder).rglob("*.py"))
    return {str(file.relative_to(ROOT)): file.read_text() for file in files}


def parts(path: str, source: str) -> Iterator[Part]:
    """The classes and functions of a file, also those inside others."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield Part(f"{path}:{node.name}", node)


def private_accesses(source: str) -> Iterator[str]:
    """The expressions `x._y` of a file, where x is neither `self` nor `cls`."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr[1:2] == "_":
            continue
        if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
            yield ast.unparse(node)


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_file_class_or_function_is_long_but_those_that_tell_why(folder: str) -> None:
    found = sources(folder)
    assert found
    long_files = {path for path, source in found.items() if source.count("\n") > MAX_FILE_LINES}
    long_parts = {
        part.name
        for path, source in found.items()
        for part in parts(path, source)
        if part.num_lines > part.limit
    }
    assert long_files | long_parts == {name for name in LARGER if name.startswith(f"{folder}/")}


def test_a_long_one_tells_why_in_its_docstring() -> None:
    for name, reason in LARGER.items():
        path = name.partition(":")[0]
        source = (ROOT / path).read_text()
        (node,) = [part.node for part in parts(path, source) if part.name == name] or [ast.parse(source)]
        assert reason in " ".join((ast.get_docstring(node) or "").split()), name


def test_tests_touch_few_private_attributes_of_others() -> None:
    found = [
        f"{path}: {access}"
        for path, source in sources("tests").items()
        for access in private_accesses(source)
    ]
    assert len(found) <= MAX_PRIVATE_ACCESSES, "\n".join(found)


def test_an_access_is_private_if_one_underscore_leads_and_no_self_is_before_it() -> None:
    source = "a._b\nself._c\ncls._d\nself.e._f\na.__class__\na.b\nsuper()._g\n"
    assert sorted(private_accesses(source)) == ["a._b", "self.e._f", "super()._g"]
