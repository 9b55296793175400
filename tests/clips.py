"""Videos for tests, and the processors of transformers, without torchvision."""

from __future__ import annotations

import sys
from base64 import b64encode
from functools import cache
from importlib import import_module
from io import BytesIO
from types import ModuleType
from typing import Any

import numpy as np


@cache
def clip(
    frames: int = 48,
    width: int = 96,
    height: int = 64,
    fps: int = 24,
    codec: str = "mpeg4",
    container: str = "mp4",
    seed: int = 0,
) -> bytes:
    """The file of a video whose coarse noise moves."""
    import av

    file = BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    picture = noise.repeat(8, 0).repeat(8, 1)
    with av.open(file, "w", format=container) as output:
        stream = output.add_stream(codec, rate=fps)
        stream.width = width
        stream.height = height
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, 2 * number, 1), format="rgb24")
            output.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        output.mux(stream.encode())
    return file.getvalue()


def url_of(file: bytes) -> str:
    return f"data:video/mp4;base64,{b64encode(file).decode()}"


def transformers_processor(family: str, **settings: Any) -> Any:
    """transformers' video processor of qwen2_vl or qwen3_vl, as far as it needs no torchvision.

    Of that, all that Qwen's use is the resizing of uint8, which is torch's interpolate.
    """
    import transformers  # notes that there is no torchvision, if so

    assert transformers
    path = "torchvision.transforms.v2.functional".split(".")
    names = [".".join(path[: length + 1]) for length in range(len(path))]
    stand_ins = {name: ModuleType(name) for name in names if name not in sys.modules}
    sys.modules |= stand_ins
    for parent, child in zip(names, path[1:], strict=False):
        if parent in stand_ins:
            setattr(stand_ins[parent], child, sys.modules[f"{parent}.{child}"])
    try:
        module = import_module(f"transformers.models.{family}.video_processing_{family}")
    finally:
        for name in stand_ins:
            del sys.modules[name]
    name = {"qwen2_vl": "Qwen2VLVideoProcessor", "qwen3_vl": "Qwen3VLVideoProcessor"}[family]
    return object.__new__(type(name, (getattr(module, name),), settings))
