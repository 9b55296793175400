"""Whole models with images: as transformers computes them, however the steps are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from pictured import TowerEncoders, compare, request, run, transformers_scores

from gllm_engine.arch import read_arch
from gllm_engine.arch.vision import Vision
from gllm_engine.config import EngineConfig
from gllm_engine.engine.core import Engine
from gllm_engine.model.tiny import write_tiny_model
from gllm_engine.types import Request

FAMILIES = [
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3_5ForConditionalGeneration",
]
SMALL = {
    "device": "cpu",
    "cpu_threads": 1,
    "max_model_len": 128,
    "max_num_seqs": 8,
    "num_snapshots": 30,
}
MakeEngine = Callable[..., Engine]


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), request.param, seed=2)


@pytest.fixture
def engine(model: Path) -> Iterator[MakeEngine]:
    made = []

    def make(**over: Any) -> Engine:
        values: dict[str, Any] = {"num_pages": 96, "page_size": 4} | SMALL | over
        config = EngineConfig(model=str(model), **values)
        made.append(Engine(config, make_encoders=TowerEncoders))
        return made[-1]

    yield make
    for one in made:
        one.close()


def vision_of(engine: Engine) -> Vision:
    vision = engine._arch.vision
    assert vision is not None
    return vision


def requests(vision: Vision, **sampling: Any) -> list[Request]:
    """The first two are the same text with two pictures, the last two with two videos."""
    return [
        request(vision, 5, ("a", 3, 4), 4, **sampling),
        request(vision, 5, ("b", 3, 4), 4, **sampling),
        request(vision, ("c", 1, 2), 1, ("a", 3, 4), 2, ("d", 5, 2), 21, **sampling),
        request(vision, 12, **sampling),
        request(vision, 5, ("e", 2, 3, 3), 4, ("a", 3, 4), 2, **sampling),
        request(vision, 5, ("f", 2, 3, 3), 4, ("a", 3, 4), 2, **sampling),
    ]


@pytest.fixture(scope="module")
def alone(model: Path) -> list[Any]:
    """The output of each request in an engine of its own, as a whole."""
    found = []
    for number in range(6):
        engine = Engine(EngineConfig(model=str(model), num_pages=64, page_size=4, **SMALL))
        found += run(engine, [requests(vision_of(engine))[number]])
        engine.close()
    return found


@pytest.fixture(scope="module")
def theirs(model: Path) -> Any:
    """The model in transformers."""
    from transformers import AutoModelForImageTextToText

    names = {r"^model\.(?!language_model\.|visual\.)": "model.language_model."}
    theirs = AutoModelForImageTextToText.from_pretrained(
        model, dtype=torch.float32, key_mapping=names
    )
    if read_arch(model).tie:
        theirs.lm_head.weight = theirs.get_input_embeddings().weight
    return theirs


def test_every_token_is_scored_as_by_transformers(engine: MakeEngine, theirs: Any) -> None:
    one = engine()
    vision = vision_of(one)
    asked = requests(vision, prompt_logprobs=0)
    for each, found in zip(asked, run(one, asked), strict=True):
        output = found[len(each.prompt) - 1 :]
        assert len(output) == 12
        compare([found], [transformers_scores(theirs, each, vision, output)])


@pytest.mark.parametrize("model", FAMILIES[:1], indirect=True)
def test_moments_may_be_further_apart_than_their_tokens(engine: MakeEngine, theirs: Any) -> None:
    """Up to the checkpoint's length, 2048, whatever max_model_len is."""
    one = engine()
    vision = vision_of(one)
    film = (5, ("e", 2, 3, 3))
    (found,) = run(one, [request(vision, *film, interval=900, prompt_logprobs=0, max_tokens=1)])
    ends = request(vision, *film, interval=900)
    compare([found], [transformers_scores(theirs, ends, vision, found[-1:])])
    # Text goes on behind the last moment: at 7 + 1801.
    asked = request(vision, *film, 4, interval=900)
    (output,) = run(one, [asked])
    again = replace(asked, id=0, prompt=asked.prompt + [token for token, _ in output])
    scored = replace(asked.sampling, prompt_logprobs=0, max_tokens=1)
    (found,) = run(one, [replace(again, sampling=scored)])
    compare([found[len(asked.prompt) - 1 : -1]], [output])


@pytest.mark.parametrize("model", FAMILIES[:1], indirect=True)
def test_positions_end_at_the_checkpoints_length(engine: MakeEngine) -> None:
    one = engine()
    vision = vision_of(one)
    film = (5, ("e", 2, 3, 3))
    # The last of its tokens is at 2044, so 3 come after it.
    (output,) = run(one, [request(vision, *film, interval=1018)])
    assert len(output) == 4
    one.add(request(vision, *film, interval=1022))
    (outputs,) = one.step().values()
    (finish,) = outputs.finished.values()
    assert finish.status == "invalid"
    assert finish.message == (
        "video: after its times text goes on at position 2052, the checkpoint has 2048 positions"
    )


WAYS: dict[str, dict[str, Any]] = {
    "batched": {},
    "in chunks": {"max_num_batched_tokens": 8, "encoder_budget": 3},
    "in chunks, two in flight": {"max_num_batched_tokens": 9, "plans_in_flight": 2},
    "images forgotten": {
        "max_num_batched_tokens": 8,
        "encoder_budget": 12,
        "image_cache_tokens": 13,
    },
    "preempted": {"num_pages": 33, "plans_in_flight": 2},
}
ELSEWHERE = {
    f"{way}, encoded elsewhere": over | {"encoder_workers": 1} for way, over in WAYS.items()
}


@pytest.mark.parametrize("way", [*WAYS, *ELSEWHERE])
def test_steps_do_not_matter(engine: MakeEngine, alone: list[Any], way: str) -> None:
    """The second time prefixes are cached, unless they did not fit."""
    one = engine(**(WAYS | ELSEWHERE)[way])
    vision = vision_of(one)
    compare(run(one, requests(vision)), alone)
    compare(run(one, requests(vision)), alone)
    stats = one.stats()
    assert stats.kv_usage == 0
    assert (stats.preemptions > 0) == way.startswith("preempted")
    assert stats.prefix_hits > 20
    held = {held.number for held in one._scheduler._images._held.values()}
    assert one._runner._images._embeddings.keys() <= held | set(one._scheduler._images._forgotten)
    assert not one._runner._images._pixels


def test_samples_of_one_prompt_share_the_image(engine: MakeEngine, alone: list[Any]) -> None:
    one = engine()
    vision = vision_of(one)
    compare(run(one, [requests(vision)[2], requests(vision)[2]]), [alone[2]] * 2)
    assert len(one._runner._images._embeddings) == 3


def test_aborts_and_failed_steps_leave_nothing(engine: MakeEngine, alone: list[Any]) -> None:
    one = engine(max_num_batched_tokens=8)
    vision = vision_of(one)
    asked = requests(vision)[2]
    one.add(asked)
    one.step()
    one.abort(asked.id)
    one.check_integrity()
    launch = one._runner.launch

    def fail(plan: Any) -> Any:
        one._runner.launch = launch
        raise RuntimeError("a kernel failed")

    one._runner.launch = fail
    one.add(requests(vision)[0])
    assert one.step()
    one.check_integrity()
    compare(run(one, requests(vision)), alone)
    assert not one._runner._images._pixels
