"""The comparison of two checkouts: its intervals."""

from bench.compare import interval


def test_an_interval_encloses_the_median_of_the_ratios() -> None:
    median, low, high = interval([0.98, 1.0, 1.02, 0.99, 1.01])
    assert (median, 0.98 <= low <= median <= high <= 1.02) == (1.0, True)


def test_equal_ratios_leave_no_room() -> None:
    assert interval([1.25] * 4) == [1.25, 1.25, 1.25]
