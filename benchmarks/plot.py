"""Latency against throughput as an SVG drawing: two panels, each with two lines.

Knows only the figures that serve.py makes of a run.
"""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape

WIDTH, HEIGHT, MARGIN = 380, 260, 60
COLORS = {"p50": "#1f77b4", "p99": "#d62728"}
PANELS = {"ttft_ms": "time to first token, ms", "tpot_ms": "time per output token, ms"}


def draw(title: str, runs: list[dict[str, Any]]) -> str:
    """The p50 and p99 of each of PANELS by output tokens/s; a point a run that has the figure."""
    width, height = len(PANELS) * (WIDTH + MARGIN) + MARGIN, HEIGHT + 2 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        text(width / 2, 20, title, "middle"),
    ]
    for i, (key, name) in enumerate(PANELS.items()):
        panel = panel_parts(name, [(r["output_tokens_per_s"], r[key]) for r in runs if r[key]])
        parts += [f'<g transform="translate({MARGIN + i * (WIDTH + MARGIN)} {MARGIN})">', *panel]
        parts.append("</g>")
    return "\n".join([*parts, "</svg>", ""])


def panel_parts(name: str, points: list[tuple[float, dict[str, float]]]) -> list[str]:
    """One panel with its origin in the upper left corner; both axes begin at 0."""
    points = sorted(points, key=lambda point: point[0])
    high_x = max([x for x, _ in points], default=1.0) * 1.05
    high_y = max([about["p99"] for _, about in points], default=1.0) * 1.05
    parts = [f'<path d="M0 0V{HEIGHT}H{WIDTH}" fill="none" stroke="black"/>']
    parts.append(text(0, -8, name, "start"))
    parts.append(text(WIDTH / 2, HEIGHT + 32, "output tokens/s", "middle"))
    for tick in range(5):
        share = tick / 4
        parts.append(text(share * WIDTH, HEIGHT + 16, f"{share * high_x:,.0f}", "middle"))
        parts.append(text(-6, HEIGHT * (1 - share) + 4, f"{share * high_y:,.4g}", "end"))
    for row, (key, color) in enumerate(COLORS.items()):
        spots = [(x / high_x * WIDTH, HEIGHT * (1 - about[key] / high_y)) for x, about in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in spots]
        parts.append(f'<rect x="12" y="{8 + 16 * row}" width="10" height="10" fill="{color}"/>')
        parts.append(text(28, 17 + 16 * row, key, "start"))
    return parts


def text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
