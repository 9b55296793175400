"""A pytest plugin that finds races: threads of the product wait at lines chosen at random.

    PYTHONPATH=tests scripts/test -p pauses tests/engine/test_process.py

A thread other than the test's own waits at one in LINES lines, once at each; other lines are chosen
every CHOICE_S seconds. Slow machines do the same, but seldom. A test that fails with the plugin
alone assumes an order of events that is not certain, or the product does. (A short timeout that
is over is no race.)
"""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

LINES = 6
CHOICE_S = 10.0
PAUSE_S = 0.2
# The product's folders, but for those of models: they compute in every thread that runs.
ROOT = Path(__file__).parents[1]
TRACED = tuple(f"{ROOT / folder}/" for folder in ("gllm_engine", "client", "backend"))
SKIPPED = tuple(f"{ROOT / 'gllm_engine' / folder}/" for folder in ("arch", "model", "ops", "text"))

_seed = random.getrandbits(32)
_paused: set[tuple[str, int, int]] = set()


def _pause(frame: FrameType, event: str, _: Any) -> Any:
    if event == "line":
        place = (frame.f_code.co_filename, frame.f_lineno, int(time.monotonic() / CHOICE_S))
        if place not in _paused and hash((place, _seed)) % LINES == 0:
            _paused.add(place)
            time.sleep(PAUSE_S)
    return _pause


def _trace(frame: FrameType, event: str, _: Any) -> Any:
    path = frame.f_code.co_filename
    return _pause if path.startswith(TRACED) and not path.startswith(SKIPPED) else None


threading.settrace(_trace)
