"""Tiny tokenizers of the kinds that models have, and chat templates in the styles that models use."""

from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL = (
    "<unk>",
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|user|>",
    "<|assistant|>",
    "[INST]",
    "[/INST]",
)
ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Added tokens that are not special, as in Qwen's tokenizers."""
LETTERS = [chr(code) for code in range(32, 127)] + ["\n", "é", "▁"]

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}{% set c = m.content %}{% if m.role == 'assistant' %}{% set r = '' %}"
    "{% if m.reasoning_content is string %}{% set r = m.reasoning_content %}{% elif '</think>' in c %}"
    "{% set r = c.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n<think>\n' + r.strip('\n') + '\n</think>\n\n' + c }}"
    "{% for t in m.tool_calls %}"
    '{{ \'<tool_call>\n{"name": "\' }}{{ t.function.name }}{{ \'", "arguments": \' }}'
    "{% if t.function.arguments is string %}{{ t.function.arguments }}{% else %}"
    "{{ t.function.arguments | tojson }}{% endif %}{{ '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ c ~ '<|im_end|>' ~ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MACRO = (
    "{% macro turn(m) -%}<|im_start|>{{ m['role'] }}\n{% for p in m['content'] %}{% if p['type'] == 'text' %}"
    "{{ p['text'] }}{% endif %}{% endfor %}<|im_end|>{%- endmacro %}"
    "{% set ns = namespace(text='') %}{% for m in messages %}{% set ns.text = ns.text + turn(m) ~ '\n' %}"
    "{% endfor %}{{ ns.text }}<|im_start|>assistant\n"
)
FORMAT = (
    "{% for m in messages %}{{ '<|im_start|>%s\n%s<|im_end|>' | format(m.role, m.content) }}"
    "{{ '<|im_start|>{}<|im_end|>'.format(m.content) }}{{ ['<s>', m.content] | join('</s>') }}{% endfor %}"
)
TEMPLATES = {
    "ChatML": CHATML,
    "Qwen": QWEN,
    "Llama 2": LLAMA2,
    "Phi": PHI,
    "macro and parts": MACRO,
    "format": FORMAT,
}


def byte_level() -> Tokenizer:
    """BPE over bytes, as GPT-2's, with runs of spaces among the added tokens, as GPT-NeoX's."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {word: number for number, word in enumerate([*letters, "he", "Ġt", "Ġthe"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("h", "e"), ("Ġ", "t"), ("Ġt", "he")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken("  ", normalized=True), AddedToken("    ", normalized=True)])
    return backend


def sentencepiece_bpe() -> Tokenizer:
    """BPE with byte fallback, as Llama 2's: merges of its vocabulary give control tokens."""
    words = [*SPECIAL[:3], *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS, "/s", "</s", "he", "<s"]
    vocab = {word: number for number, word in enumerate(dict.fromkeys(words))}
    merges = [("h", "e"), ("/", "s"), ("<", "/s"), ("</s", ">"), ("<", "s"), ("<s", ">")]
    backend = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def unigram() -> Tokenizer:
    """Unigram, as T5's: its model finds control tokens in any text, as they are its likeliest words."""
    words = [(word, 0.0) for word in SPECIAL[:3]] + [(letter, -9.0) for letter in LETTERS] + [("▁the", -5.0)]
    backend = Tokenizer(models.Unigram(words, unk_id=0, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return backend


def wordpiece() -> Tokenizer:
    """WordPiece with lower-case text, as BERT's."""
    words = [*SPECIAL[:3], *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    backend = Tokenizer(
        models.WordPiece({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s|[^\w\s]"), "isolated")
    backend.decoder = decoders.WordPiece()
    return backend


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level BPE": byte_level,
    "SentencePiece BPE": sentencepiece_bpe,
    "Unigram": unigram,
    "WordPiece": wordpiece,
}


def wrap(backend: Tokenizer, template: str, added: Sequence[str | AddedToken] = ADDED) -> Any:
    """A transformers tokenizer with control tokens, some of which take the spaces beside them."""
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    backend.add_special_tokens([AddedToken("<|im_end|>", normalized=False, rstrip=True)])
    backend.add_tokens(list(added))
    backend.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=template,
    )
