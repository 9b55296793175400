"""Drawings in SVG: panels side by side, each with a line for every name.

Knows only the figures that serve.py makes of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT, MARGIN = 380, 260, 60
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")
PANELS = {"ttft_ms": "time to first token, ms", "tpot_ms": "time per output token, ms"}

Lines = dict[str, list[tuple[float, float]]]  # by name, its points


def draw(title: str, runs: list[dict[str, Any]]) -> str:
    """The p50 and p99 of each of PANELS by output tokens/s; a point a run that has the figure."""
    panels = {
        name: {
            p: [(run["output_tokens_per_s"], run[key][p]) for run in runs if run[key]]
            for p in ("p50", "p99")
        }
        for key, name in PANELS.items()
    }
    return drawing(title, "output tokens/s", panels)


def draw_policies(title: str, policies: dict[str, list[dict[str, Any]]]) -> str:
    """By requests/s, a line a policy: the share within the SLO, and the median of each PANELS."""

    def lines(value: Callable[[dict[str, Any]], float]) -> Lines:
        return {n: [(run["rate"], value(run)) for run in runs] for n, runs in policies.items()}

    panels = {"requests within the SLO, %": lines(lambda run: 100 * run["goodput"]["share"])}
    for key, name in PANELS.items():
        panels[f"{name}, p50"] = lines(lambda run, key=key: run[key]["p50"])
    return drawing(title, "requests/s", panels)


def drawing(title: str, x_name: str, panels: dict[str, Lines]) -> str:
    width, height = len(panels) * (WIDTH + MARGIN) + MARGIN, HEIGHT + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        text(width / 2, 20, title, "middle"),
    ]
    for i, (name, lines) in enumerate(panels.items()):
        parts.append(f'<g transform="translate({MARGIN + i * (WIDTH + MARGIN)} {MARGIN})">')
        parts += [*panel_parts(name, x_name, lines), "</g>"]
    return "\n".join([*parts, "</svg>", ""])


def panel_parts(name: str, x_name: str, lines: Lines) -> list[str]:
    """One panel with its origin in the upper left corner; both axes begin at 0."""
    high_x = max([x for points in lines.values() for x, _ in points], default=1.0) * 1.05
    high_y = max([y for points in lines.values() for _, y in points], default=1.0) * 1.05
    parts = [f'<path d="M0 0V{HEIGHT}H{WIDTH}" fill="none" stroke="black"/>']
    parts.append(text(0, -8, name, "start"))
    parts.append(text(WIDTH / 2, HEIGHT + 32, x_name, "middle"))
    for tick in range(5):
        share = tick / 4
        parts.append(text(share * WIDTH, HEIGHT + 16, f"{share * high_x:,.4g}", "middle"))
        parts.append(text(-6, HEIGHT * (1 - share) + 4, f"{share * high_y:,.4g}", "end"))
    for row, (key, points) in enumerate(lines.items()):
        color = COLORS[row % len(COLORS)]
        spots = [(x / high_x * WIDTH, HEIGHT * (1 - y / high_y)) for x, y in sorted(points)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in spots]
        parts.append(f'<rect x="12" y="{8 + 16 * row}" width="10" height="10" fill="{color}"/>')
        parts.append(text(28, 17 + 16 * row, key, "start"))
    return parts


def text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
