"""The tokenizer, chat template and end tokens that an adapter brings along."""

import copy
import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from worker.model.chat_template import OWN_PROCESS, Renderer
from worker.model.checked_files import FileProblem, read_file
from worker.model.marked_template import LimitExceeded
from worker.model.tokenizer import Tokenizer, as_ids, response_template_of, templates_of

TEMPLATE_FILE = "chat_template.jinja"
GENERATION_FILE = "generation_config.json"
_CONFIG_FILE = "tokenizer_config.json"
_MORE_TEMPLATES = "additional_chat_templates"
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_OTHER_FILES = ("special_tokens_map.json", "added_tokens.json", "merges.txt", "chat_template.json")
FILES = (
    _CONFIG_FILE,
    TEMPLATE_FILE,
    GENERATION_FILE,
    *_VOCABULARIES,
    *_OTHER_FILES,
    f"{_MORE_TEMPLATES}/*.jinja",
)
"""Patterns of the files in an adapter's folder that this module reads."""
MAX_FILE_BYTES = 256 * 1024 * 1024


class TokenizerProblem(Exception):
    """A reason to refuse an adapter's tokenizer, chat template or end tokens."""


def own_files(folder: Path) -> dict[str, bytes]:
    """Returns the contents of an adapter's tokenizer files, by names relative to `folder`.

    Raises:
        TokenizerProblem: a file is no regular file, or is too large.
    """
    # `glob` would leave out links that lead nowhere, and the base's tokenizer would be used instead.
    named = {folder / name for name in FILES if "*" not in name and os.path.lexists(folder / name)}
    found = sorted(named.union(*(folder.glob(pattern) for pattern in FILES if "*" in pattern)))
    return {str(path.relative_to(folder)): _read(path) for path in found}


def files_digest(files: dict[str, bytes]) -> str:
    """Returns the SHA-256 (hex) of the names and contents of files."""
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def load_tokenizer(
    files: dict[str, bytes], base: Tokenizer, num_embeddings: int, renderer: Renderer = OWN_PROCESS
) -> Tokenizer:
    """Returns the tokenizer that an adapter's files describe, or `base` if both are equivalent.

    If the files lack a tokenizer, a template or end tokens, those of the base are used. End tokens in the
    adapter's `tokenizer_config.json` and `generation_config.json` replace the base's end tokens from the same
    file. `renderer` runs a chat template that is not the base's.

    Raises:
        TokenizerProblem: the model can't use the tokenizer; the message names the file and the reason.
    """
    if not files:
        return base
    backend = _backend(files, base)
    _check_vocabulary(backend, base.backend, num_embeddings)
    _check_patterns(backend, base.backend)
    generation_eos = _generation_eos(files, num_embeddings)
    try:
        own = Tokenizer(
            backend,
            base.generation_eos if generation_eos is None else generation_eos,
            parses_control_tokens=base.parses_control_tokens,
            renderer=OWN_PROCESS if templates_of(backend) <= base.template_sources else renderer,
        )
    except LimitExceeded as error:
        raise TokenizerProblem(f"its chat template can't be used: {error}") from error
    except TemplateError as error:
        raise TokenizerProblem(f"its chat template can't be compiled: {error}") from error
    return base if own.says_the_same(base) else own


def _read(path: Path) -> bytes:
    try:
        return read_file(path, MAX_FILE_BYTES)
    except FileNotFoundError as error:
        raise TokenizerProblem(f"{path.name} is a link to a file that does not exist") from error
    except FileProblem as problem:
        raise TokenizerProblem(str(problem)) from problem


def _backend(files: dict[str, bytes], base: Tokenizer) -> Any:
    if files.keys() <= {TEMPLATE_FILE, GENERATION_FILE}:
        backend = copy.copy(base.backend)  # shares the vocabulary
        if TEMPLATE_FILE in files:
            backend.chat_template = _text(files, TEMPLATE_FILE)
        return backend
    with tempfile.TemporaryDirectory(prefix="lorelay-tokenizer-") as name:
        backend = _load(Path(name), files, base)
    if not backend.chat_template:
        backend.chat_template = base.backend.chat_template
    if backend.eos_token is None:
        backend.eos_token = base.backend.eos_token
    return backend


def _load(folder: Path, files: dict[str, bytes], base: Tokenizer) -> Any:
    """Loads a tokenizer from a copy of the files, with the base's vocabulary if the files have none."""
    from transformers import AutoTokenizer

    config = _json(files, _CONFIG_FILE)
    if not any(name in files for name in _VOCABULARIES):
        base.backend.save_pretrained(folder)
        theirs = json.loads((folder / _CONFIG_FILE).read_text())
        config = theirs | config | {"tokenizer_class": theirs.get("tokenizer_class")}
        if "chat_template" in config:
            # The base's own template, in its file, would take precedence.
            shutil.rmtree(folder / _MORE_TEMPLATES, ignore_errors=True)
            (folder / TEMPLATE_FILE).unlink(missing_ok=True)
    config.setdefault("tokenizer_class", type(base.backend).__name__)
    for name, content in {**files, _CONFIG_FILE: json.dumps(config).encode()}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    # transformers and the Rust library raise exceptions of many kinds for damaged files.
    except Exception as error:
        names = ", ".join(name for name in files if name not in (TEMPLATE_FILE, GENERATION_FILE))
        reason = str(error).replace(str(folder), "it")
        raise TokenizerProblem(f"its tokenizer ({names}) can't be loaded: {reason}") from error


def _check_vocabulary(own: Any, base: Any, num_embeddings: int) -> None:
    """Raises an error for tokens without embeddings, or if the base's ids stand for other words."""
    theirs = {token_id: token for token, token_id in base.get_vocab().items()}
    renamed = base.added_tokens_decoder  # e.g. reserved tokens, which fine-tuning gives a meaning
    for token, token_id in sorted(own.get_vocab().items(), key=lambda entry: entry[1]):
        if token_id >= num_embeddings:
            raise TokenizerProblem(
                f"its tokenizer adds the token {token!r} with id {token_id}, but the base has embeddings for "
                f"{num_embeddings} tokens only; train it without added tokens, or on a base that has them"
            )
        if theirs.get(token_id, token) != token and token_id not in renamed:
            raise TokenizerProblem(
                f"its tokenizer is not the base's: token {token_id} is {token!r} instead of "
                f"{theirs[token_id]!r}; remove its tokenizer files, or serve it on its own base"
            )


def _check_patterns(own: Any, base: Any) -> None:
    """Raises an error for regular expressions that the base lacks, since they might backtrack endlessly."""
    if new := sorted(_patterns(own) - _patterns(base)):
        raise TokenizerProblem(
            f"its tokenizer has a regular expression that the base's lacks: {new[0][:200]!r}; remove its "
            "tokenizer files, or serve it on its own base"
        )


def _patterns(backend: Any) -> set[str]:
    """Returns a tokenizer's regular expressions; a tokenizer written in Python has none in its files."""
    fast = getattr(backend, "backend_tokenizer", None)
    found: set[str] = set()
    parts = [response_template_of(backend)] + ([] if fast is None else [json.loads(fast.to_str())])
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            found |= {str(value) for name, value in part.items() if _may_be_slow(name)}
            # The model and the added tokens are large, and have no expressions.
            parts += [value for name, value in part.items() if name not in ("model", "added_tokens")]
        elif isinstance(part, list):
            parts += part
    return found


def _may_be_slow(name: str) -> bool:
    """True for keys with regular expressions or rules, in `tokenizer.json` or in a response template."""
    return name in ("Regex", "content_args") or "pattern" in name


def _generation_eos(files: dict[str, bytes], num_embeddings: int) -> frozenset[int] | None:
    """Returns the end tokens in `generation_config.json`, or None if the file names none."""
    declared = _json(files, GENERATION_FILE).get("eos_token_id")
    if declared is None:
        return None
    ids = declared if isinstance(declared, list) else [declared]
    if not all(type(token_id) is int and 0 <= token_id < num_embeddings for token_id in ids):
        raise TokenizerProblem(f"{GENERATION_FILE}: eos_token_id {declared!r} is no token of the base")
    return as_ids(ids)


def _json(files: dict[str, bytes], name: str) -> dict[str, Any]:
    try:
        content = json.loads(files.get(name, b"{}"))
    except (ValueError, RecursionError) as error:
        raise TokenizerProblem(f"{name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise TokenizerProblem(f"{name} is no JSON object")
    return content


def _text(files: dict[str, bytes], name: str) -> str:
    try:
        return files[name].decode()
    except UnicodeDecodeError as error:
        raise TokenizerProblem(f"{name} is not UTF-8: {error}") from error
