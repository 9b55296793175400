"""Memory that images take in an engine: bounded, whatever the number of requests.

Bytes are counted where Python allocates them.
"""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from msgspec.structs import replace
from pictured import request

from gllm_engine.arch.tiny import tiny_config
from gllm_engine.config import make_config
from gllm_engine.engine.core import Engine
from gllm_engine.model.tiny import write_tiny_model
from gllm_engine.sampling import SamplingParams
from gllm_engine.types import Image, Request

FAMILY = "Qwen3VLForConditionalGeneration"
SIDE = 32  # pixels of a token
ROWS, COLUMNS = 100, 98
SIZE = 3 * ROWS * SIDE * COLUMNS * SIDE  # 10 megapixels
LENGTH = ROWS * COLUMNS + 1
NUMBERS = count(1)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for large images of which nobody reads the weights."""
    path = write_tiny_model(tmp_path_factory.mktemp("model"), FAMILY)
    config = tiny_config(FAMILY)
    config["vision_config"]["patch_size"] = SIDE // 2
    config["text_config"]["max_position_embeddings"] = 2 * LENGTH
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    values = {"model": str(path), "device": "none", "image_memory_gib": 1, "max_num_seqs": 8}
    engine = Engine(make_config(values | {"num_pages": 8 * LENGTH // 16}))
    yield engine
    engine.close()


@pytest.fixture
def prompt(engine: Engine) -> list[int]:
    assert engine._arch.vision is not None
    return [engine._arch.vision.image_token] * (LENGTH - 1) + [7]


def picture(number: int) -> Image:
    """Zeros, which take no memory of the machine until somebody writes to them."""
    digest = number.to_bytes(16, "big")
    shape = (ROWS * SIDE, COLUMNS * SIDE)
    return Image(digest, 0, ROWS, COLUMNS, COLUMNS, *shape, bytes(SIZE))


def of(prompt: list[int], image: Image, tokens: int = 1, tenant: str = "") -> Request:
    sampling = SamplingParams(max_tokens=tokens, ignore_eos=True, tenant=tenant)
    return Request(next(NUMBERS), prompt, sampling, 0, images=(image,))


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def test_a_thousand_large_images_are_bounded(
    engine: Engine, prompt: list[int], traced: None
) -> None:
    """Those that there is room for are served, the others are refused."""
    fitting = (1 << 30) // SIZE
    for number in range(1000):
        engine.add(of(prompt, picture(number)))
    peak = tracemalloc.get_traced_memory()[1]
    assert fitting * SIZE < peak < (1 << 30) + SIZE + fitting * 40 * LENGTH
    finished = []
    while engine.has_work:
        for outputs in engine.step().values():
            finished += outputs.finished.values()
    refused = [each for each in finished if each.status is not None]
    assert (len(finished), len(refused)) == (1000, 1000 - fitting)
    assert {each.status for each in refused} == {"unavailable"}
    assert refused[0].message == (
        f"the queue is full: {fitting * SIZE} bytes of images are held, and with the {SIZE} of "
        f"this prompt they would be more than {1 << 30} (image_memory_gib)"
    )
    engine.step()
    del outputs, finished, refused
    left = tracemalloc.get_traced_memory()[0]
    assert left < 4 * SIZE  # those of the latest plan


def test_running_sequences_count(engine: Engine, prompt: list[int]) -> None:
    """They encode their images again when they have been preempted."""
    few = (1 << 30) // SIZE
    for number in range(few):
        engine.add(of(prompt, picture(number), tokens=2))
    engine.step()
    more = [of(prompt, picture(few))]
    assert not engine.has_room(more)
    assert engine.has_room([request(engine._arch.vision, 5)])  # type: ignore[arg-type]
    while engine.has_work:
        engine.step()
    assert engine.has_room(more)


def test_sequences_of_a_request_share_its_images(engine: Engine, prompt: list[int]) -> None:
    image = picture(0)
    for _ in range(60):  # of 30 MB each
        engine.add(of(prompt, replace(image)))
    assert not engine.step()
    assert engine.stats().running + engine.stats().waiting == 60


def test_what_is_too_large_is_taken_alone(path: Path, prompt: list[int]) -> None:
    values = {"model": str(path), "device": "none", "image_memory_gib": 0.001}
    engine = Engine(make_config(values))
    engine.add(of(prompt, picture(0)))
    assert not engine.step()
    engine.add(of(prompt, picture(1)))
    (outputs,) = engine.step().values()
    (finish,) = [each for each in outputs.finished.values() if each.status is not None]
    assert f"with the {SIZE} of this prompt" in finish.message
    engine.close()


def test_a_tenant_leaves_others_room(engine: Engine, prompt: list[int]) -> None:
    half = (1 << 30) // SIZE // 2
    for number in range(3 * half):
        engine.add(of(prompt, picture(number), tenant="many"))
    other = [of(prompt, picture(9999), tenant="few")]
    assert engine.has_room(other)
    engine.add(of(prompt, picture(1000), tenant="few"))
    assert engine.has_room(other)
    own = [of(prompt, picture(2000), tenant="many")]
    assert not engine.has_room(own)
    while engine.has_work:
        engine.step()
    assert engine.has_room(own)
