"""Reports of benchmarks: a table, then one JSON line with the figures and their conditions.

This module does not know what was measured.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from gllm_client import GenerateError

RESULTS = Path(__file__).parent / "results"
Figures = dict[str, Any]  # what a benchmark, or one run of it, has measured, as JSON


def make_parser(name: str, about: str) -> ArgumentParser:
    """The parser of `scripts/bench NAME`, with the options of all benchmarks."""
    parser = ArgumentParser(prog=f"scripts/bench {name}", description=about)
    parser.add_argument("--save", action="store_true", help="in benchmarks/results, as JSON")
    parser.add_argument("--name", help="of the result; the default names benchmark and model")
    return parser


def exit_on_sigterm() -> None:
    """Let SIGTERM end this process as an error does, which also ends the processes it started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


@contextmanager
def told(*kinds: type[Exception]) -> Iterator[None]:
    """End with the sentence alone of an error of a file, a connection, a server or of `kinds`.

    Any other error is a bug, which has its traceback. Also a decorator: `@told()`.
    """
    try:
        yield
    except (OSError, GenerateError, *kinds) as error:
        raise SystemExit(str(error)) from None


def number(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], Any]:
    """An argparse type: one number from `low` to `high`; `kind` is int or float."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise ArgumentTypeError(f"{text[:60]!r} is not a number") from None
        if not low <= value <= high:  # NaN compares false
            raise ArgumentTypeError(f"{text[:60]} is outside [{low:g}, {high:g}]")
        return value

    return parse


def table_lines(header: list[str], rows: list[list[Any]]) -> list[str]:
    """A Markdown table, which can be pasted into documents."""
    lines = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
    return [f"| {' | '.join(cells)} |" for cells in padded]


def print_table(title: str, header: list[str], rows: list[list[Any]]) -> None:
    print("\n".join(["", title, "", *table_lines(header, rows)]))


def record(
    arguments: Namespace,
    default: str,
    figures: Figures,
    show: bool = True,
    draw: Callable[[], str] | None = None,
) -> None:
    """Print the figures as a JSON line (`show`) and, with --save, write them to results/NAME.json.

    `arguments`: of make_parser's parser. `default`: NAME without --name. `draw`: makes an SVG plot,
    which is written to --plot and, with --save, to results/NAME.svg.
    """
    name = arguments.name or default
    line = {
        "benchmark": name,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "command": _command(),
        "hardware": _hardware(),
        "python": platform.python_version(),
        "figures": rounded(figures),
    }
    if show:
        print(f"\n{json.dumps(line)}")
    if arguments.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(line, indent=2) + "\n")
    saved = RESULTS / f"{name}.svg" if arguments.save else None
    for path in filter(None, (arguments.plot, saved)) if draw else ():
        path.write_text(draw())


def _command() -> str:
    """The command line without directories, which are private."""
    given = [Path(sys.executable).name, *sys.orig_argv[1:]]
    return " ".join(Path(word).name if word.startswith("/") else word for word in given)


def rounded(value: Any) -> Any:
    """`value` with floats rounded to five significant digits; no figure is more accurate."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _commit() -> str:
    """The measured commit. GLLM_COMMIT overrides it for code without its repository."""
    if given := os.environ.get("GLLM_COMMIT"):
        return given
    describe = ("describe", "--always", "--exclude=*", "--dirty=+changes")
    return _output("git", "-C", str(Path(__file__).parent), *describe).strip() or "unknown"


def _hardware() -> str:
    """The number and names of GPUs, then of processors."""
    chips = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    chips += [line.partition(": ")[2] for line in cpuinfo if line.startswith("model name")] or [
        platform.machine()
    ]
    return " and ".join(f"{chips.count(chip)} x {chip}" for chip in dict.fromkeys(chips))


def _output(*command: str) -> str:
    """A program's output; empty if the program is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
