"""Renders the table of results as text and as a chart."""

from collections.abc import Sequence
from pathlib import Path

from bench.yardstick import Row, Verdict

COLORS = {Verdict.AIM: "#2a7f4f", Verdict.MUST: "#8fbf6f", Verdict.SHORT: "#d1495b", Verdict.NONE: "#bbbbbb"}
MAX_SHARE = 2.5


def to_text(rows: Sequence[Row], heading: Sequence[str]) -> str:
    """Renders the table for a terminal or a README."""
    lines = [("measurement", "result", "must", "aim", "", "absolute values")]
    for row in rows:
        goal, sign = row.goal, "≤" if row.goal.less_is_better else "≥"
        marks = f"{sign} {goal.must:g}", f"{goal.aim:g}"
        lines.append((goal.title, row.shown, *marks, row.verdict, row.figure.detail))
    return "\n".join([*heading, "", *aligned(lines)])


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Joins the cells of each line, and pads them so that columns are aligned."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


def draw(rows: Sequence[Row], heading: Sequence[str], path: Path) -> None:
    """Draws a PNG with a bar per row: the figure relative to the limit. A longer bar is always better."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(12, 1.5 + 0.4 * len(rows)), layout="constrained")
    for place, row in enumerate(reversed(rows)):
        if row.figure.value is not None:
            length = min(row.share(row.figure.value), MAX_SHARE)
            axes.barh(place, length, color=COLORS[row.verdict], height=0.6)
        aim = min(row.share(row.goal.aim), MAX_SHARE)
        axes.plot([aim, aim], [place - 0.35, place + 0.35], color="black", linewidth=1.5)
        axes.annotate(row.shown, (0.02, place), va="center", fontsize=8)
    axes.axvline(1, color="black", linestyle="--", linewidth=1)
    axes.set_xlim(0, MAX_SHARE)
    axes.set_xlabel("share of what the row must reach (dashed line); short lines: the aims")
    axes.set_yticks(range(len(rows)), [row.goal.title for row in reversed(rows)], fontsize=8)
    axes.set_title("\n".join(heading), fontsize=8, loc="left")
    figure.savefig(path, dpi=120)
    plt.close(figure)
