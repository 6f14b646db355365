"""Queue names."""

from hypothesis import given
from hypothesis import strategies as st

from shared.queue.names import queue_name, slug


def test_a_plain_name_stays_as_it_is() -> None:
    assert slug("my-lora_2") == "my-lora_2"


def test_other_names_are_lowered_and_kept_apart_by_a_digest() -> None:
    assert slug("Qwen/Qwen3-8B").startswith("qwen-qwen3-8b-")
    assert slug("Qwen/Qwen3-8B") != slug("qwen/Qwen3-8B")


@given(st.text(min_size=1), st.text(min_size=1))
def test_different_names_have_different_slugs_without_characters_that_break_rq(one: str, other: str) -> None:
    assert set(slug(one)) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-")
    assert (slug(one) == slug(other)) == (one == other)


def test_an_adapter_has_a_queue_of_its_own_behind_its_base() -> None:
    assert queue_name("base", None) == "base"
    assert queue_name("base", "pirate") == "base-pirate"
