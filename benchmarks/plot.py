"""Plots in SVG: panels side by side, each with one line per name.

This module knows only the figures that serve.py computes from a run. matplotlib belongs to the
[bench] extra, so it is imported only for drawing.
"""

from __future__ import annotations

import io
from typing import Any

PANELS = {"ttft_ms": "time to first token, ms", "tpot_ms": "time per output token, ms"}

Run = dict[str, Any]  # the figures of a run
Points = list[tuple[float, float]]
Panels = dict[str, dict[str, Points]]  # title -> name of a line -> its points


def draw(title: str, runs: list[Run]) -> str:
    """Plot the p50 and p99 of each of PANELS over output tokens/s."""
    panels = {
        name: {p: points(runs, "output_tokens_per_s", key, p) for p in ("p50", "p99")}
        for key, name in PANELS.items()
    }
    return drawing(title, "output tokens/s", panels)


def draw_policies(title: str, policies: dict[str, dict[str, Run]]) -> str:
    """Plot the share within the SLO and the median of each of PANELS over requests/s, by policy."""
    lines = {policy: list(runs.values()) for policy, runs in policies.items()}
    shares = {n: [(r["rate"], 100 * r["goodput"]["share"]) for r in lines[n]] for n in lines}
    panels: Panels = {"requests within the SLO, %": shares}
    for key, name in PANELS.items():
        panels[f"{name}, p50"] = {n: points(r, "rate", key, "p50") for n, r in lines.items()}
    return drawing(title, "requests/s", panels)


def points(runs: list[Run], x: str, key: str, p: str) -> Points:
    """One (x, figure) point per run that has the figure."""
    return [(run[x], run[key][p]) for run in runs if run[key]]


def drawing(title: str, x_name: str, panels: Panels) -> str:
    """An SVG plot, identical for identical points; all axes begin at 0. Raises SystemExit."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("a plot needs matplotlib: pip install 'gllm-triton[bench]'") from None
    out = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "gllm", "text.parse_math": False}):
        figure = Figure(figsize=(4.4 * len(panels), 3.8), layout="constrained")
        figure.suptitle(title)
        for number, (name, lines) in enumerate(panels.items(), 1):
            axes = figure.add_subplot(1, len(panels), number, title=name, xlabel=x_name)
            for key, places in lines.items():
                x, y = ([place[i] for place in sorted(places)] for i in (0, 1))
                axes.plot(x, y, marker=".", label=key)
            axes.set(xlim=(0, None), ylim=(0, None))
            axes.legend()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()
