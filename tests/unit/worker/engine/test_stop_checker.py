from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.engine.detokenizer import StopChecker

calmly = settings(deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine fails no test, and nothing is left on disk."""

texts = st.lists(st.text(alphabet="abc", max_size=4), max_size=12)
stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=3).map(tuple)


def run(stop: tuple[str, ...], pieces: list[str]) -> tuple[str, bool]:
    checker = StopChecker(stop)
    shown = ""
    for piece in pieces:
        released, stopped = checker.add(piece)
        shown += released
        if stopped:
            return shown, True
    return shown + checker.flush(), False


def first_completion(stop: tuple[str, ...], text: str) -> tuple[str, bool]:
    """The definition, by brute force over all ends."""
    for end in range(1, len(text) + 1):
        starts = [end - len(word) for word in stop if text[:end].endswith(word)]
        if starts:
            return text[: min(starts)], True
    return text, False


def test_without_stop_strings_text_passes_at_once() -> None:
    assert StopChecker(()).add("hello") == ("hello", False)


def test_a_stop_string_across_pieces_is_cut_off() -> None:
    assert run(("\n\nUser:",), ["Hi", "!\n", "\nUs", "er: more"]) == ("Hi!", True)


def test_the_start_of_a_stop_string_is_held_back_until_more_text_decides() -> None:
    checker = StopChecker(("END",))
    assert checker.add("the E") == ("the ", False)
    assert checker.add("N") == ("", False)
    assert checker.add("emy") == ("ENemy", False)


def test_held_text_comes_out_at_the_end() -> None:
    checker = StopChecker(("END",))
    assert checker.add("at the EN") == ("at the ", False)
    assert checker.flush() == "EN"
    assert checker.flush() == ""


def test_the_earliest_of_several_stop_strings_in_one_text_counts() -> None:
    assert run(("later", "now"), ["stop now, not later"]) == ("stop ", True)
    assert run(("stop", "later"), ["stop now, stop later"]) == ("", True)


def test_of_two_that_complete_together_the_longer_one_counts() -> None:
    assert run(("c", "abc"), ["xabc"]) == ("x", True)


def test_an_empty_stop_string_stops_nothing() -> None:
    assert run(("",), ["abc"]) == ("abc", False)


@calmly
@given(stops, texts)
def test_the_cut_is_the_same_however_the_text_is_cut_into_pieces(
    stop: tuple[str, ...], pieces: list[str]
) -> None:
    assert run(stop, pieces) == first_completion(stop, "".join(pieces))


@calmly
@given(stops, texts)
def test_nothing_is_held_that_starts_no_stop_string(stop: tuple[str, ...], pieces: list[str]) -> None:
    checker = StopChecker(stop)
    shown = ""
    for n, piece in enumerate(pieces):
        released, stopped = checker.add(piece)
        shown += released
        if stopped:
            return
        held = "".join(pieces[: n + 1])[len(shown) :]
        assert not held or any(word.startswith(held) for word in stop)
