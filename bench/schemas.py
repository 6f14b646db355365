"""Measures structured output on a file of JSON schemas: which ones compile, and what their grammars accept.

`python -m bench.schemas maskbench.jsonl.gz --model MODEL` reads one object per line: `id`, `schema`, and
`tests`, which are instances with their validity. Each instance goes through the API's check and the worker's
matcher, token by token as the model's tokenizer writes it: compact, and with keys in the schema's order.
"""

import argparse
import asyncio
import gzip
import json
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from api.contract.form_fields import Form
from api.grammars import GrammarChecker
from shared.errors import InvalidRequest
from shared.messages import SamplingParams
from shared.settings import ApiSettings
from worker.engine.sequence import Sequence
from worker.engine.served_models import ServedModel, ServedModels
from worker.model.grammar import Grammars
from worker.model.tokenizer import Tokenizer

Json = Any
"""A decoded JSON value."""
MAX_DEPTH = 30
"""Depth of references and nested schemas up to which keys are sorted."""


class Matching:
    """The grammars of a worker that serves one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        served = ServedModels(ServedModel("base", "1", "", tokenizer, created=0))
        self._grammars = Grammars(served, len(tokenizer.backend))
        self.mask_s: list[float] = []
        """Duration of each computation of a mask."""

    def compiles(self, grammar: str) -> bool:
        """True if the worker can compile a grammar that the API accepted."""
        try:
            self._grammars.compile(grammar, self._tokenizer)
        except InvalidRequest:
            return False
        return True

    def accepts(self, grammar: str, text: str) -> bool:
        """True if each token of a text is allowed where it comes, and an end token after the last one."""
        seq = Sequence("r", 0, None, SamplingParams(grammar=grammar), [0], 1, max_tokens=1 << 30)
        seq.eos_token_ids = self._tokenizer.eos_token_ids
        for token_id in self._tokenizer.backend(text, add_special_tokens=False)["input_ids"]:
            if not self._allows(seq, [token_id]):
                return False
            seq.token_ids.append(token_id)
        return self._allows(seq, self._tokenizer.eos_token_ids)

    def _allows(self, seq: Sequence, token_ids: Iterable[int]) -> bool:
        """True if one of some tokens may come next."""
        begin_s = time.perf_counter()
        masks = self._grammars.masks([seq])
        self.mask_s.append(time.perf_counter() - begin_s)
        if masks is None or masks.errors:
            return False
        return any(masks.allowed[0, token_id // 32] >> token_id % 32 & 1 for token_id in token_ids)


def in_order(value: Json, schema: Json, root: Json, depth: int = 0) -> Json:
    """Returns an instance with the keys of its objects in the schema's order."""
    schemas = list(_parts(schema, root, depth))
    if isinstance(value, list):
        inner: Json = next((part["items"] for part in schemas if isinstance(part.get("items"), dict)), {})
        return [in_order(item, inner, root, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    properties: dict[str, Json] = {}
    for part in schemas:
        for name, inner in part.get("properties", {}).items():
            properties.setdefault(name, inner)
    others: Json = next(
        (
            part["additionalProperties"]
            for part in schemas
            if isinstance(part.get("additionalProperties"), dict)
        ),
        {},
    )
    required = [name for part in schemas for name in part.get("required", ()) if isinstance(name, str)]
    names = [name for name in dict.fromkeys([*properties, *required, *value]) if name in value]
    return {name: in_order(value[name], properties.get(name, others), root, depth + 1) for name in names}


def _parts(schema: Json, root: Json, depth: int) -> Iterator[dict[str, Json]]:
    """Yields a schema and all schemas that it combines."""
    if not isinstance(schema, dict) or depth > MAX_DEPTH:
        return
    yield schema
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        yield from _parts(_resolve(reference, root), root, depth + 1)
    for combination in ("allOf", "anyOf", "oneOf"):
        for part in schema.get(combination, ()):
            yield from _parts(part, root, depth + 1)


def _resolve(reference: str, root: Json) -> Json:
    found = root
    for step in reference.removeprefix("#").strip("/").split("/"):
        name = step.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, dict) or (name and name not in found):
            return None
        found = found[name] if name else found
    return found


async def measure(path: Path, matching: Matching) -> Iterator[str]:
    """Checks all schemas of a file; returns the lines of the report."""
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    checker, check_s = GrammarChecker(ApiSettings()), []
    with gzip.open(path, "rt") as lines:
        for line in lines:
            entry = json.loads(line)
            counts["schemas"] += 1
            begin_s = time.perf_counter()
            try:
                grammar = await checker.build(Form("json_schema", entry["schema"], "schema"))
            except InvalidRequest as error:
                counts["refused"] += 1
                wrong.append(f"refused: {entry['id']}: {error.message}")
                continue
            check_s.append(time.perf_counter() - begin_s)
            if not matching.compiles(grammar):
                wrong.append(f"not compiled by the worker: {entry['id']}")
                continue
            counts["compiled"] += 1
            for test in entry["tests"]:
                kind = "valid" if test["valid"] else "invalid"
                counts[kind] += 1
                data = in_order(test["data"], entry["schema"], entry["schema"])
                text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
                if matching.accepts(grammar, text) == test["valid"]:
                    counts[f"{kind}, right"] += 1
                else:
                    wrong.append(f"{kind} instance of {entry['id']}: {text[:200]}")
    masks = np.array(matching.mask_s) * 1e6
    return iter(
        [
            *wrong,
            f"{counts['compiled']} of {counts['schemas']} schemas compile",
            f"{counts['invalid, right']} of {counts['invalid']} invalid instances are rejected",
            f"{counts['valid, right']} of {counts['valid']} valid instances are accepted",
            f"check in the API: median {np.median(check_s) * 1e3:.1f} ms, "
            f"maximum {max(check_s) * 1e3:.0f} ms",
            f"mask of one sequence: median {np.median(masks):.0f} µs, p99 {np.percentile(masks, 99):.0f} µs, "
            f"maximum {masks.max():.0f} µs",
        ]
    )


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("schemas", type=Path, help="a .jsonl.gz file")
    parser.add_argument("--model", required=True, help="folder of a model, whose tokenizer is used")
    arguments = parser.parse_args()
    matching = Matching(Tokenizer.load(arguments.model))
    for line in asyncio.run(measure(arguments.schemas, matching)):
        sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    main()
