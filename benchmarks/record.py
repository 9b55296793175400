"""How a benchmark reports: a table for people, then one JSON line with all that made the figures.

Knows nothing of what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--save", action="store_true", help="in benchmarks/results, as JSON")


def number(kind: Callable[[str], float], low: float, high: float) -> Callable[[str], Any]:
    """For argparse: a parser of one number from `low` to `high`; `kind` is int or float."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:60]!r} is not a number") from None
        if not low <= value <= high:  # not a number compares false
            raise argparse.ArgumentTypeError(f"{text[:60]} is outside [{low:g}, {high:g}]")
        return value

    return parse


def table_lines(header: list[str], rows: list[list[Any]]) -> list[str]:
    """A Markdown table, so that it can be pasted where results are told."""
    lines = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    padded = ([c.ljust(w) for c, w in zip(line, widths, strict=True)] for line in lines)
    return [f"| {' | '.join(cells)} |" for cells in padded]


def print_table(title: str, header: list[str], rows: list[list[Any]]) -> None:
    print("\n".join(["", title, "", *table_lines(header, rows)]))


def record(name: str, figures: dict[str, Any], save: bool) -> None:
    """Print the JSON line; with `save`, also write it to results/<name>.json."""
    line = {
        "benchmark": name,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "commit": _commit(),
        "command": _command(),
        "hardware": _hardware(),
        "python": platform.python_version(),
        "figures": _rounded(figures),
    }
    print(f"\n{json.dumps(line)}")
    if save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(line, indent=2) + "\n")


def _command() -> str:
    """As it was given, but where the files are is left out: that is nobody else's business."""
    given = [Path(sys.executable).name, *sys.orig_argv[1:]]
    return " ".join(Path(word).name if word.startswith("/") else word for word in given)


def _rounded(value: Any) -> Any:
    """The same with floats of five significant digits: no figure here is known any better."""
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _commit() -> str:
    """What was measured: GLLM_COMMIT where the code came without its repository."""
    if given := os.environ.get("GLLM_COMMIT"):
        return given
    describe = ("describe", "--always", "--exclude=*", "--dirty=+changes")
    return _output("git", "-C", str(Path(__file__).parent), *describe).strip() or "unknown"


def _hardware() -> str:
    """How many of each chip: GPUs, then processors."""
    chips = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    chips += [line.partition(": ")[2] for line in cpuinfo if line.startswith("model name")] or [
        platform.machine()
    ]
    return " and ".join(f"{chips.count(chip)} x {chip}" for chip in dict.fromkeys(chips))


def _output(*command: str) -> str:
    """What a program prints; nothing where there is no such program or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
