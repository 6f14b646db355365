"""Rows, the floor's shapes, and what is read from the times of a stream."""

import pytest

from bench.floor import fuse
from bench.load import Stream
from bench.report import to_text
from bench.served import gaps_between, without_end_tokens
from bench.yardstick import Figure, Goal, Row, Verdict, goals

MORE = Goal("more", "tokens", must=0.5, aim=0.8, unit="F")
LESS = Goal("less", "time", must=8, aim=3, unit="ms", less_is_better=True)


@pytest.mark.parametrize(
    ("goal", "value", "verdict"),
    [
        (MORE, 0.9, Verdict.AIM),
        (MORE, 0.5, Verdict.MUST),
        (MORE, 0.49, Verdict.SHORT),
        (MORE, None, Verdict.NONE),
        (LESS, 3, Verdict.AIM),
        (LESS, 8, Verdict.MUST),
        (LESS, 8.1, Verdict.SHORT),
    ],
)
def test_a_figure_is_judged_by_its_goal(goal: Goal, value: float | None, verdict: Verdict) -> None:
    assert Row(goal, Figure(goal.key, value)).verdict is verdict


def test_the_chart_draws_longer_bars_for_better_figures() -> None:
    assert Row(MORE, Figure("more", 1.0)).share(1.0) == 2
    assert Row(LESS, Figure("less", 4)).share(4) == 2
    assert Row(LESS, Figure("less", 0)).share(0) > 100


def test_the_table_shows_figure_must_aim_and_what_is_behind_it() -> None:
    figures = Figure("more", 0.25, "5 of 20 tokens/s"), Figure("less", None, "no GPU")
    rows = [Row(goal, figure) for goal, figure in zip((MORE, LESS), figures, strict=True)]
    lines = to_text(rows, ["today", "scripts/bench"]).splitlines()
    assert lines[:3] == ["today", "scripts/bench", ""]
    assert lines[4].split() == [
        "tokens",
        "0.25",
        "F",
        "≥",
        "0.5",
        "0.8",
        "short",
        "5",
        "of",
        "20",
        "tokens/s",
    ]
    assert lines[5].split() == ["time", "-", "≤", "8", "3", "no", "GPU"]


def test_every_row_has_a_name_of_its_own_and_an_aim_beyond_its_must() -> None:
    rows = goals(has_compiler=True)
    assert len({goal.key for goal in rows}) == len(rows)
    for goal in rows:
        assert goal.aim <= goal.must if goal.less_is_better else goal.aim >= goal.must


def test_the_floor_multiplies_weights_of_one_input_together() -> None:
    named = [
        ("layers.0.attn.q_proj", (8, 4)),
        ("layers.0.attn.k_proj", (2, 4)),
        ("layers.0.attn.v_proj", (2, 4)),
        ("layers.0.attn.o_proj", (4, 8)),
        ("layers.1.attn.q_proj", (8, 4)),
        ("lm_head", (50, 4)),
    ]
    assert fuse(named) == [(12, 4), (4, 8), (8, 4), (50, 4)]


def test_a_stream_whose_gaps_count_meets_no_token_without_text() -> None:
    assert without_end_tokens({"ignore_eos": True}, 9) == {"ignore_eos": True, "min_tokens": 9}
    assert without_end_tokens({}, 9) == {}, "a server that may know neither"


def test_only_gaps_that_lie_in_a_time_are_counted() -> None:
    stream = Stream("m", 0.0, text_at_s=[1, 2, 4, 7, 11])
    assert gaps_between(stream, 2.5, 6) == [2, 3]
