"""The measurement of structured output counts what compiles and what is accepted."""

import gzip
import json
from pathlib import Path

from bench.schemas import Matching, in_order, measure
from tests.tiny_models import build_tokenizer
from worker.model.tokenizer import Tokenizer

ENTRIES = [
    {
        "id": "right",
        "schema": {
            "properties": {"a": {"$ref": "#/$defs/n"}, "b": {"type": "string"}},
            "required": ["a"],
            "$defs": {"n": {"type": "integer"}},
        },
        "tests": [{"valid": True, "data": {"b": "x", "a": 1}}, {"valid": False, "data": {"a": "1"}}],
    },
    {
        "id": "wrongly marked",
        "schema": {"type": "string"},
        "tests": [{"valid": True, "data": 1}, {"valid": False, "data": "x"}],
    },
    {"id": "refused", "schema": {"not": {}}, "tests": [{"valid": True, "data": 1}]},
]


async def test_the_report_counts_and_names_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "schemas.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, ENTRIES)).encode()))
    matching = Matching(Tokenizer(build_tokenizer(tmp_path), frozenset()))
    lines = [line.split(":")[0] for line in await measure(path, matching)]
    assert lines[:-2] == [
        "valid instance of wrongly marked",
        "invalid instance of wrongly marked",
        "refused",
        "2 of 3 schemas compile",
        "1 of 2 invalid instances are rejected",
        "1 of 2 valid instances are accepted",
    ]


def test_keys_are_sorted_as_the_schema_has_them_wherever_it_leads() -> None:
    inner = {"properties": {"y": {}, "x": {}}}
    schema = {
        "allOf": [{"$ref": "#/$defs/a"}],
        "properties": {"d": {}},
        "$defs": {"a": {"properties": {"b": inner}}},
    }
    value = in_order({"z": 1, "b": {"x": 1, "y": 2}, "d": 0}, schema, schema)
    assert json.dumps(value) == '{"d": 0, "b": {"y": 2, "x": 1}, "z": 1}'
