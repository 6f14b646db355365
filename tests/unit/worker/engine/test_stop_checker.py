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


def test_a_stop_string_that_stays_ends_the_text_in_whatever_pieces_it_comes() -> None:
    for pieces in (["Hi!\nUs", "er: more"], ["Hi!\nUser: more"], [*"Hi!\nUser: more"]):
        checker = StopChecker(("\nUser:",), includes_stop=True)
        shown, stopped = "", False
        for piece in pieces:
            if not stopped:
                released, stopped = checker.add(piece)
                shown += released
        assert (shown, stopped) == ("Hi!\nUser:", True)


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


MARK = "<|end|>"
marked_texts = st.lists(
    st.tuples(st.text(alphabet="ab", max_size=3), st.sampled_from(["", "", MARK])), max_size=8
)
marked_stops = st.lists(
    st.lists(st.sampled_from(["a", "b", MARK]), min_size=1, max_size=3).map("".join), max_size=3
).map(tuple)


def run_marked(stop: tuple[str, ...], pieces: list[tuple[str, str]]) -> tuple[str, bool]:
    checker = StopChecker(stop)
    shown = ""
    for text, mark in pieces:
        released, stopped = checker.add(text, mark)
        shown += released
        if stopped:
            return shown, True
    return shown + checker.flush(), False


def test_a_special_token_that_is_a_stop_string_ends_the_text_before_it() -> None:
    assert run_marked((MARK,), [("hi", ""), (" there", MARK), ("more", "")]) == ("hi there", True)


def test_a_special_token_within_a_stop_string_counts_like_text() -> None:
    pieces = [("x", MARK), ("ab", MARK), ("a", ""), ("b", "")]
    assert run_marked((f"b{MARK}a",), pieces) == ("xa", True)
    assert run_marked((f"{MARK}b",), pieces) == ("xabab", False)


def test_text_is_held_back_behind_a_special_token_but_the_token_is_never_shown() -> None:
    checker = StopChecker((f"a{MARK}{MARK}b",))
    assert checker.add("xa", MARK) == ("x", False)
    assert checker.add("", MARK) == ("", False)
    assert checker.add("a") == ("a", False)
    assert checker.flush() == "a"


@calmly
@given(marked_stops, marked_texts)
def test_the_cut_among_special_tokens_is_that_of_the_text_with_them(
    stop: tuple[str, ...], pieces: list[tuple[str, str]]
) -> None:
    text, stopped = first_completion(stop, "".join(text + mark for text, mark in pieces))
    assert run_marked(stop, pieces) == (text.replace(MARK, ""), stopped)
