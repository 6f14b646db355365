from pathlib import Path

import pytest
from transformers import AutoTokenizer

from shared.errors import ConfigurationError, InvalidRequest
from shared.messages import TemplateInputs
from tests.streams import make_request
from tests.tiny_models import EOS, SPECIAL_TOKENS, build_tokenizer, change_json
from worker.model.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(folder)
    (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


def test_a_chat_becomes_the_templates_tokens_up_to_the_answer(folder: Path, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    backend = AutoTokenizer.from_pretrained(folder)
    assert ids == backend.encode("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    assert all(isinstance(token_id, int) for token_id in ids)


def test_the_developer_role_is_the_system_role_where_the_template_knows_no_other(
    tokenizer: Tokenizer,
) -> None:
    by_name = [
        tokenizer.encode_chat([{"role": role, "content": "be brief"}, {"role": "user", "content": "hi"}])
        for role in ("developer", "system")
    ]
    assert by_name[0] == by_name[1]


def test_a_template_with_bos_gets_no_second_one(folder: Path, tmp_path: Path) -> None:
    backend = AutoTokenizer.from_pretrained(folder)
    backend.chat_template = "{{ bos_token }}" + backend.chat_template
    backend.add_bos_token = True
    backend.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    ids = Tokenizer.load(tmp_path).encode_chat([{"role": "user", "content": "hi"}])
    assert ids.count(backend.bos_token_id) == 1


LISTING_TEMPLATE = (
    "{% for tool in tools or [] %}<{{ tool.function.name }}>{% endfor %}"
    "{% for message in messages %}{{ message.role }}:{{ message.reasoning_content or '-' }}"
    ":{{ message.content }};{% endfor %}"
    "{% if add_generation_prompt %}assistant:{{ enable_thinking }}:{{ reasoning_effort }}{% endif %}"
)
"""A template that shows each of its inputs."""


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        (TemplateInputs(), "user:-:hi;assistant:why:he;assistant::"),
        (
            TemplateInputs([{"type": "function", "function": {"name": "f"}}]),
            "<f>user:-:hi;assistant:why:he;assistant::",
        ),
        (
            TemplateInputs(variables={"enable_thinking": False, "reasoning_effort": "low", "unknown": 1}),
            "user:-:hi;assistant:why:he;assistant:False:low",
        ),
        (TemplateInputs(continue_final_message=True), "user:-:hi;assistant:why:he"),
    ],
)
def test_the_template_gets_tools_variables_and_reasoning(
    folder: Path, inputs: TemplateInputs, text: str
) -> None:
    backend = AutoTokenizer.from_pretrained(folder)
    backend.chat_template = LISTING_TEMPLATE
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "he", "reasoning_content": "why"},
    ]
    ids = Tokenizer(backend, frozenset()).encode_chat(messages, inputs)
    assert ids == backend.encode(text, add_special_tokens=False)


def test_a_text_becomes_its_tokens_with_those_that_the_tokenizer_puts_around_every_text(
    folder: Path, tokenizer: Tokenizer
) -> None:
    backend = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode_text("the né 😀") == backend("the né 😀")["input_ids"]
    assert tokenizer.decode(tokenizer.encode_text("the né 😀")) == "the né 😀"
    assert tokenizer.encode_text("") == backend("")["input_ids"]


def test_a_text_that_is_no_unicode_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="can't be tokenized") as caught:
        tokenizer.encode_text("half a pair: \ud800")
    assert caught.value.param == "prompt"


def test_decode_skips_special_tokens(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_chat([{"role": "user", "content": "né 😀"}])
    assert tokenizer.decode(ids) == "user\nné 😀\nassistant\n"


def test_the_detokenizer_gives_the_same_text_piece_by_piece(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode_chat([{"role": "user", "content": "the né 😀 in"}])
    detokenizer = tokenizer.detokenizer()
    assert "".join(detokenizer.add(token_id) for token_id in ids) == tokenizer.decode(ids)


def test_special_tokens_are_those_that_decode_skips(tokenizer: Tokenizer) -> None:
    assert set(tokenizer.special_tokens.values()) == set(SPECIAL_TOKENS)
    for token_id in [*tokenizer.special_tokens, 10_000_000]:
        assert tokenizer.decode([token_id]) == ""
        assert tokenizer.detokenizer().add(token_id) == ""


def test_a_special_token_or_an_unknown_id_leaves_the_text_around_it_whole(tokenizer: Tokenizer) -> None:
    silent = [*tokenizer.special_tokens, 10_000_000] * 9
    ids = [other for token_id in tokenizer.encode_text("né 😀") for other in (token_id, *silent)]
    detokenizer = tokenizer.detokenizer()
    assert "".join(detokenizer.add(token_id) for token_id in ids) == "né 😀"


def test_every_declared_end_token_ends_a_sequence(folder: Path, tmp_path: Path) -> None:
    eos = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(EOS)
    assert Tokenizer.load(folder).eos_token_ids == {eos}
    build_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [65, 66]}')
    assert Tokenizer.load(tmp_path).eos_token_ids == {eos, 65, 66}


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "judge", "content": "hi"}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"content": "hi"}],
    ],
)
def test_messages_that_the_template_refuses_are_an_invalid_request(
    tokenizer: Tokenizer, messages: list[dict[str, object]]
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        tokenizer.encode_chat(messages)
    assert caught.value.param == "messages"


def test_a_templates_own_words_reach_the_client(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidRequest, match="unknown role judge"):
        tokenizer.encode_chat([{"role": "judge", "content": "hi"}])


def test_a_model_without_chat_template_encodes_texts_and_refuses_chats_with_the_way_out(
    tmp_path: Path,
) -> None:
    build_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    change_json(tmp_path / "tokenizer_config.json", chat_template=None)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.decode(tokenizer.encode_text("hello")) == "hello"
    assert tokenizer.grammar_of(make_request(messages=[], prompts=("hello",))) == ""
    assert tokenizer.max_token_bytes == 0
    with pytest.raises(InvalidRequest, match="/v1/completions") as caught:
        tokenizer.encode_chat([{"role": "user", "content": "hi"}])
    assert caught.value.param == "messages"


def test_a_chat_template_with_a_wrong_syntax_is_refused(tmp_path: Path) -> None:
    build_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% for %}")
    with pytest.raises(ConfigurationError, match=r"LORELAY_MODEL: .* chat template that can't be compiled"):
        Tokenizer.load(tmp_path)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigurationError, match=r"LORELAY_MODEL: .* tokenizer"):
        Tokenizer.load(tmp_path)
