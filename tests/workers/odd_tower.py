"""A vision tower that fails at images of certain colours, for encoders that are forked (forked.py).

The first pixel's first number is the fault; an image without a fault has a larger one.
"""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from gllm_engine.model import VisionTower

# Kills the process. Fails. Waits to be killed: for the first process that has it, which leaves its
# pid; for others it is an ordinary image.
POISON, BROKEN, HELD = 1, 2, 3
ORDINARY = 4  # from here on


def held_by(directory: Path) -> int | None:
    """The process that waits to be killed, once there is one."""
    with suppress(FileNotFoundError, ValueError):
        return int((directory / "held").read_text())
    return None


def install(directory: Path) -> None:
    encode = VisionTower.encode

    def encode_oddly(tower: VisionTower, images: list[Tensor]) -> list[Tensor]:
        while (directory / "slow").exists():  # a load takes so long
            time.sleep(0.02)
        faults = {int(image.flatten()[0]) for image in images if image.any()}  # blanks warm up
        if POISON in faults:
            os.kill(os.getpid(), signal.SIGKILL)
        if BROKEN in faults:
            raise ValueError("broken on purpose")
        if HELD in faults:
            with suppress(FileExistsError):
                with (directory / "held").open("x") as file:
                    file.write(str(os.getpid()))
                while True:
                    signal.pause()
        return encode(tower, images)

    VisionTower.encode = encode_oddly  # type: ignore[method-assign]
