"""Tokenizer, template and end tokens of an adapter are used, or refused by name."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import huggingface_hub
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.errors import AdapterError
from tests.tiny_models import build_adapter, build_model, change_json
from worker.engine.served_models import ServedModel, ServedModels
from worker.model.adapter_store import AdapterStore
from worker.model.adapter_tokenizer import TokenizerProblem, load_tokenizer, own_files
from worker.model.marked_template import LimitExceeded
from worker.model.tokenizer import Tokenizer

NUM_EMBEDDINGS = 300
TEMPLATE = "{% for m in messages %}{{ '<|pad|>' + m.content }}{% endfor %}"
HI = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_model(tmp_path_factory.mktemp("models") / "tiny", vocab_size=NUM_EMBEDDINGS)


@pytest.fixture(scope="module")
def base(model_folder: Path) -> Tokenizer:
    return Tokenizer.load(model_folder)


@pytest.fixture
def copied(model_folder: Path, tmp_path: Path) -> Path:
    """An adapter's folder with a whole copy of the base's tokenizer, as trainers save it."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(model_folder / name, tmp_path / name)
    return tmp_path


def load(folder: Path, base: Tokenizer) -> Tokenizer:
    return load_tokenizer(own_files(folder), base, NUM_EMBEDDINGS)


def add_tokens(folder: Path, *tokens: str, special: bool = False) -> None:
    backend = AutoTokenizer.from_pretrained(folder)
    backend.add_tokens(list(tokens), special_tokens=special)
    backend.save_pretrained(folder)


def shown(tokenizer: Tokenizer, messages: list[dict[str, Any]]) -> str:
    return str(tokenizer.backend.decode(tokenizer.encode_chat(messages)))


def test_without_files_and_with_a_copy_of_the_bases_files_it_is_the_bases_tokenizer(
    base: Tokenizer, copied: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert load(copied, base) is base
    assert load(tmp_path_factory.mktemp("empty"), base) is base


def test_a_template_file_of_its_own_is_used(base: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    own = load(tmp_path, base)
    assert shown(own, HI) == "<|pad|>hi"
    assert own.eos_token_ids == base.eos_token_ids
    assert "<|im_start|>" in shown(base, HI)


@pytest.mark.parametrize("has_whole_copy", [True, False])
def test_a_template_in_the_tokenizers_config_is_used(
    base: Tokenizer, copied: Path, has_whole_copy: bool
) -> None:
    (copied / "chat_template.jinja").unlink()
    if not has_whole_copy:
        (copied / "tokenizer.json").unlink()
    change_json(copied / "tokenizer_config.json", chat_template=TEMPLATE)
    assert shown(load(copied, base), HI) == "<|pad|>hi"


def test_further_templates_are_used(base: Tokenizer, copied: Path) -> None:
    (copied / "additional_chat_templates").mkdir()
    (copied / "additional_chat_templates" / "tool_use.jinja").write_text(TEMPLATE)
    assert load(copied, base).backend.chat_template.keys() == {"default", "tool_use"}


def test_a_tokenizer_without_template_has_the_bases(base: Tokenizer, copied: Path) -> None:
    (copied / "chat_template.jinja").unlink()
    add_tokens(copied, "<|extra|>")
    (copied / "chat_template.jinja").unlink(missing_ok=True)
    own = load(copied, base)
    assert own is not base
    assert own.encode_chat(HI) == base.encode_chat(HI)


@pytest.mark.parametrize("has_whole_copy", [True, False])
def test_an_end_token_in_the_tokenizers_config_ends_a_sequence(
    base: Tokenizer, tmp_path: Path, copied: Path, has_whole_copy: bool
) -> None:
    if has_whole_copy:
        change_json(copied / "tokenizer_config.json", eos_token="<|pad|>")
    else:
        for name in os.listdir(copied):
            (copied / name).unlink()
        (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|pad|>"}')
    own = load(copied, base)
    assert own.eos_token_ids == {3} | base.generation_eos
    assert own.encode_chat(HI) == base.encode_chat(HI)


def test_end_tokens_in_the_generation_config_end_a_sequence(base: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [65, 66], "temperature": 0.1}')
    assert load(tmp_path, base).eos_token_ids == {2, 65, 66}
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.1}')
    assert load(tmp_path, base) is base


def test_added_tokens_with_embeddings_are_used_by_the_template_and_are_text_in_a_message(
    base: Tokenizer, copied: Path
) -> None:
    add_tokens(copied, "<|tool|>", "zorbly")
    (copied / "chat_template.jinja").write_text("{% for m in messages %}<|tool|>{{ m.content }}{% endfor %}")
    own = load(copied, base)
    tool, word = (own.backend.convert_tokens_to_ids(token) for token in ("<|tool|>", "zorbly"))
    assert own.encode_chat([{"role": "user", "content": "zorbly"}]) == [tool, word]
    assert own.encode_chat([{"role": "user", "content": "<|tool|>"}]).count(tool) == 1


def rename_reserved(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace("<|pad|>", "<|turn|>"))
    change_json(folder / "tokenizer_config.json", pad_token="<|turn|>")


def test_a_reserved_token_may_have_a_new_name(base: Tokenizer, copied: Path) -> None:
    rename_reserved(copied)
    assert load(copied, base).backend.convert_tokens_to_ids("<|turn|>") == 3


def many_tokens(folder: Path) -> None:
    add_tokens(folder, *(f"<|extra{number}|>" for number in range(60)))


def swap_words(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["A"], vocab["B"] = vocab["B"], vocab["A"]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def writing(name: str, content: bytes) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes(content)


def make_fifo(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    os.mkfifo(folder / "tokenizer_config.json")


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (
            many_tokens,
            r"adds the token '<\|extra\d+\|>' with id 300, but the base has embeddings for 300",
        ),
        (swap_words, r"not the base's: token \d+ is '[AB]' instead of '[AB]'"),
        (writing("tokenizer.json", b"{"), r"tokenizer \(.*tokenizer.json.*\) can't be loaded"),
        (writing("tokenizer_config.json", b"[1]"), r"tokenizer_config.json is no JSON object"),
        (writing("tokenizer_config.json", b"\xff"), r"tokenizer_config.json is not JSON"),
        (writing("chat_template.jinja", b"{% for %}"), r"chat template can't be compiled"),
        (
            writing("generation_config.json", b'{"eos_token_id": 300}'),
            r"generation_config.json: eos_token_id 300",
        ),
        (
            writing("generation_config.json", b'{"eos_token_id": "a"}'),
            r"generation_config.json: eos_token_id 'a'",
        ),
        (writing("generation_config.json", b"{"), r"generation_config.json is not JSON"),
        (make_fifo, r"tokenizer_config.json is no regular file"),
    ],
)
def test_what_can_t_be_used_is_refused_by_name(
    base: Tokenizer, copied: Path, damage: Callable[[Path], Any], reason: str
) -> None:
    damage(copied)
    with pytest.raises(TokenizerProblem, match=reason):
        load(copied, base)


@pytest.fixture
def store(base: Tokenizer, model_folder: Path) -> AdapterStore:
    served = ServedModels(ServedModel("base", "1", str(model_folder), base, 0))
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    return AdapterStore(model, "tiny", Mock(), served)


def test_adapters_share_equal_tokenizers_and_their_versions_cover_them(
    store: AdapterStore, base: Tokenizer, model_folder: Path, tmp_path: Path
) -> None:
    folder = build_adapter(tmp_path / "plain", model_folder)
    plain = store.read_new("plain", str(folder)).model
    assert plain.tokenizer is base
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    first, second = (store.read_new(name, str(folder)).model for name in ("first", "second"))
    assert first.tokenizer is second.tokenizer is not base
    assert first.version == second.version != plain.version
    store._served.add(first)
    store.read("first")
    (folder / "chat_template.jinja").write_text(TEMPLATE + " ")
    with pytest.raises(AdapterError, match="files have changed"):
        store.read("first")


def test_an_adapter_whose_tokenizer_can_t_be_used_is_refused_with_its_name(
    store: AdapterStore, model_folder: Path, tmp_path: Path
) -> None:
    folder = build_adapter(tmp_path / "broken", model_folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(AdapterError, match=r"adapter 'broken' at .*: tokenizer_config.json is not JSON"):
        store.read_new("broken", str(folder))


def test_an_adapter_that_is_read_again_is_the_one_that_was_read_first(
    store: AdapterStore, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A branch of a repository may have moved on since, or the hub may be away."""
    snapshots = iter([build_adapter(tmp_path / "first", model_folder)])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: str(next(snapshots)))
    store._served.add(store.read_new("mine", "org/mine@main").model)
    store.read("mine")


def test_a_template_that_takes_too_long_is_refused_by_name_and_a_copy_of_the_bases_runs_in_the_worker(
    base: Tokenizer, copied: Path
) -> None:
    renderer = Mock()
    renderer.check.side_effect = LimitExceeded("it takes longer than 5 s")
    assert load_tokenizer(own_files(copied), base, NUM_EMBEDDINGS, renderer) is base
    (copied / "chat_template.jinja").write_text(TEMPLATE)
    with pytest.raises(TokenizerProblem, match="chat template can't be used: it takes longer than 5 s"):
        load_tokenizer(own_files(copied), base, NUM_EMBEDDINGS, renderer)


def test_a_tokenizer_with_a_regular_expression_of_its_own_is_refused(base: Tokenizer, copied: Path) -> None:
    hostile = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}
    change_json(copied / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [hostile]})
    with pytest.raises(TokenizerProblem, match=r"regular expression that the base's lacks: '\(a\+\)\+"):
        load(copied, base)
