"""Finds the highest rate within an SLO: scripts/bench sweep --start MODEL --rate 4,8 --slo ttft=2.

For each layout and policy a server is started. The rates are those of --rate, ascending, up to the
first that misses the SLO, then by bisection between that one and the one before. All else is as in
serve.py, which runs it: `serve --within` is the same.
"""

from __future__ import annotations

import argparse

from gllm_benchmarks import serve


def parse_arguments() -> argparse.Namespace:
    return serve.parse_arguments("sweep", within=0.05)


if __name__ == "__main__":
    serve.main(parse_arguments())
