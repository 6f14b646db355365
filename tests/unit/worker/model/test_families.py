"""The sweep over model families, on families whose outcome is known."""

import pytest
import torch

from tests.families import Outcome, families, render, try_family

torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("family", "outcome"),
    [
        ("llama", Outcome("llama", "equal")),
        ("bloom", Outcome("bloom", "refused", "none of its layers calls the attention function")),
    ],
)
def test_a_family_is_served_exactly_or_refused_with_the_reason(family: str, outcome: Outcome) -> None:
    assert try_family(family) == outcome


def test_a_family_that_transformers_itself_cannot_run_is_left_untried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.families.reference", lambda folder: 1 // 0)
    assert try_family("llama") == Outcome(
        "llama", "untried", "ZeroDivisionError: integer division or modulo by zero"
    )


def test_encoders_are_not_tried() -> None:
    assert {"llama", "gpt2", "mamba"} <= set(families())
    assert not {"bert", "bart", "whisper"} & set(families())


def test_the_page_counts_and_names_every_family() -> None:
    page = render(
        [
            Outcome("a", "equal"),
            Outcome("b", "refused", "no"),
            Outcome("c", "equal"),
            Outcome("d", "untried", "?"),
        ]
    )
    assert "3 families were tried: 2 give exactly the same tokens, 1 are refused" in " ".join(page.split())
    assert "`a`, `c`" in page
    assert "| `b` | no |" in page
    assert "| `d` | ? |" in page
