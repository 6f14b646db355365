"""Measures a deployment on this machine; prints the results as a table and draws a chart."""

import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bench import served
from bench.deployment import ROOT, StartFailed
from bench.load import IGNORE_EOS, LoadFailed
from bench.own import STAGES, Context, OwnSizes, Stage
from bench.report import draw, to_text
from bench.yardstick import Figure, Goal, Row, goals
from shared.control_groups import num_usable_cores
from shared.setting_lists import parse_adapters
from worker.model.kernels.threads import COMPILER

SMOKE = OwnSizes(
    concurrency=2,
    num_requests=4,
    max_tokens=4,
    num_prompt_words=4,
    num_alone=1,
    num_alone_rounds=1,
    num_long_prompts=2,
    num_long_prompt_words=20,
    max_running_tokens=300,
    num_adapters=2,
    num_small_adapters=3,
    num_registered=5,
    num_asked=3,
    num_idle_requests=2,
    num_loads=4,
    num_relay_streams=3,
    num_relay_tokens=20,
    script_batch=3,
    num_script_tokens=20,
    num_waves=2,
)


DEMO_MODEL = ("-m", "demo.model")
TABLE, ROWS, CHART = "table.txt", "rows.json", "chart.png"


def main(arguments: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if arguments is None else arguments
    all_goals = {goal.key: goal for goal in goals(has_compiler=has_compiler(os.environ))}
    args = _parser(list(all_goals)).parse_args(words)
    model = args.model or demo_model()
    wanted = frozenset(args.only) or frozenset(all_goals)
    with tempfile.TemporaryDirectory(prefix="lorelay-bench-") as folder:
        settings = {"model": model, "device": args.device, "dtype": args.dtype}
        context = Context(Path(folder), settings, _sizes(args), wanted, dict(parse_adapters(args.adapters)))
        stages = [_served_stage(args)] if args.base_url else STAGES
        figures = {figure.key: figure for figure in _measure(context, stages, all_goals)}
        heading = _heading(words, f"{Path(model).name} on {args.device}", context)
    rows = [Row(goal, figures[key]) for key, goal in all_goals.items() if key in figures]
    _write(rows, heading, args.out)
    return 1 if any(figure.failed for figure in figures.values()) else 0


def has_compiler(environ: Mapping[str, str]) -> bool:
    """Returns True if workers on this machine compile: `g++` exists, and `LORELAY_COMPILE` is not off."""
    return environ.get("LORELAY_COMPILE") != "off" and shutil.which(COMPILER) is not None


def _parser(keys: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", choices=keys, default=[], metavar="ROW", help=f"these rows: {', '.join(keys)}")
    add("--model", default="", metavar="MODEL", help="folder or Hugging Face id [default: the demo model]")
    add("--adapters", nargs="*", default=[], metavar="NAME=PATH", help="use these, not random ones")
    add("--num-adapters", type=int, metavar="N", help="random adapters in a mixed batch [default: 8]")
    add("--concurrency", type=int, metavar="N", help="requests at a time [default: 16]")
    add("--num-requests", type=int, metavar="N", help="requests of one measurement [default: 64]")
    add("--max-tokens", type=int, metavar="N", help="tokens of one answer [default: 64]")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 … [default: %(default)s]")
    add("--dtype", default="bfloat16", help="number type of the weights [default: %(default)s]")
    add("--base-url", metavar="URL", help="measure the server there (without /v1); F is measured here")
    add("--models", type=lambda names: names.split(","), metavar="BASE,ADAPTER,…", help="its models")
    add("--api-key", default="none", help="API key of that server")
    add("--extra", type=json.loads, default=IGNORE_EOS, metavar="JSON", help="more for the body of a request")
    add(
        "--out", type=Path, default=Path(".bench"), metavar="FOLDER", help="for the results [default: .bench]"
    )
    add("--smoke", action="store_true", help="do as little as possible; the figures mean nothing")
    return parser


def demo_model() -> str:
    """Returns the folder of the demo model, which is fetched at the first call."""
    command = [sys.executable, *DEMO_MODEL]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=ROOT, text=True).stdout.strip()


def _sizes(args: argparse.Namespace) -> OwnSizes:
    sizes = SMOKE if args.smoke else OwnSizes()
    given = {
        name: getattr(args, name) for name in ("num_adapters", "concurrency", "num_requests", "max_tokens")
    }
    return replace(sizes, **{name: value for name, value in given.items() if value is not None})


def _served_stage(args: argparse.Namespace) -> Stage:
    """Builds the stage that measures the running server at `--base-url`."""
    if not args.models:
        raise SystemExit("scripts/bench: --base-url needs --models")
    if not args.model:
        _say(f"F is measured with the demo model on {args.device}: --model and --device set others")
    base, *adapters = args.models
    server = served.Server(args.base_url, base, adapters, args.api_key, args.extra)
    return Stage(
        served.KEYS, lambda context: served.figures(server, context.sizes, context.wanted, context.floor)
    )


def _measure(context: Context, stages: Iterable[Stage], all_goals: Mapping[str, Goal]) -> Iterator[Figure]:
    """Yields the wanted figures. If a stage fails, its figures have the reason in place of a value."""
    for stage in stages:
        missing = stage.keys & context.wanted
        if not missing:
            continue
        _say(f"measuring {', '.join(sorted(missing))}")
        try:
            for figure in stage.measure(context):
                if figure.key in missing:
                    missing -= {figure.key}
                    _say(f"{figure.key}: {Row(all_goals[figure.key], figure).shown}")
                    yield figure
        except (LoadFailed, StartFailed, subprocess.SubprocessError, TimeoutError) as error:
            _say(f"failed: {error}")
            yield from (Figure(key, None, f"failed: {error}".splitlines()[0], True) for key in missing)


def _heading(words: Sequence[str], weights: str, context: Context) -> list[str]:
    """Returns the lines above the table; `weights` names the model and device with which F was measured."""
    now = datetime.datetime.now().astimezone()
    floors = sorted(context.floors.items())
    facts = [weights, ", ".join(f"F({batch}) = {_range(speeds)} tokens/s" for batch, speeds in floors)]
    facts += [f"forward pass {state}" for state in sorted(context.forward_states)]
    return [
        f"{now:%Y-%m-%d %H:%M %Z}, {_processor()}, {num_usable_cores()} cores",
        f"scripts/bench {shlex.join(words)}".strip(),
        "; ".join(fact for fact in facts if fact),
    ]


def _range(speeds: Sequence[float]) -> str:
    return " to ".join(sorted({f"{min(speeds):.0f}", f"{max(speeds):.0f}"}, key=int))


def _processor() -> str:
    """Returns the processor's name, or its architecture on systems other than Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _write(rows: Sequence[Row], heading: Sequence[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = to_text(rows, heading)
    (folder / TABLE).write_text(f"{text}\n")
    values = {row.goal.key: row.figure._asdict() for row in rows}
    (folder / ROWS).write_text(json.dumps({"heading": heading, "rows": values}, indent=1) + "\n")
    draw(rows, heading, folder / CHART)
    sys.stdout.write(f"{text}\n\nthe same as a chart: {folder / CHART}\n")


def _say(line: str) -> None:
    sys.stderr.write(f"scripts/bench: {line}\n")


if __name__ == "__main__":
    sys.exit(main())
