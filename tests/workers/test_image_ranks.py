"""However many ranks compute a prompt with images, the tokens are those of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from moving import restless_layers
from pictured import TowerEncoders, compare, request, run

from gllm_engine import write_tiny_model
from gllm_engine.arch import read_arch
from gllm_engine.config import ConfigError, EngineConfig
from gllm_engine.engine.core import Engine
from gllm_engine.types import ImagePixels, Request
from gllm_engine.workers.build_runner import check_shards

pytestmark = pytest.mark.usefixtures("quick_starts")

DEEP = "Qwen3VLForConditionalGeneration"  # with what is added after the first two of three layers
SMALL = {
    "device": "cpu", "cpu_threads": 1, "max_model_len": 128, "page_size": 4, "num_pages": 80,
    "num_snapshots": 8,
}  # fmt: skip
TIGHT = {"max_num_batched_tokens": 16, "encoder_budget": 12, "image_cache_tokens": 20}


@pytest.mark.parametrize(
    ("family", "stages", "size", "spare"),
    [(DEEP, 2, 2, 0), (DEEP, 2, 1, 1), ("Qwen3_5ForConditionalGeneration", 2, 1, 0)],
)
def test_ranks_agree(tmp_path: Path, family: str, stages: int, size: int, spare: int) -> None:
    """Also while layers move between them."""
    more = {"num_hidden_layers": 5} if spare else {}
    path = write_tiny_model(tmp_path, family, seed=4, **more)
    vision = read_arch(path).vision
    assert vision is not None

    def asked() -> list[Request]:
        return [
            request(vision, 5, ("a", 3, 4), 4),
            request(vision, ("c", 1, 2), 1, ("a", 3, 4), 2, ("d", 5, 2), 20),
            request(vision, 9),
        ]

    def outputs(cuts: list[tuple[int, ...]], **config: Any) -> Any:
        engine = Engine(EngineConfig(model=str(path), **SMALL, **config))
        try:
            found = run(engine, asked())
            # Steps may be over before the first layers are loaded.
            while engine._config.spare_layers and len(set(cuts)) < 2:
                compare(run(engine, asked()), found)
            return found + run(engine, [request(vision, 5, ("b", 3, 4), 4)])
        finally:
            engine.close()

    ranks = {"pipeline_parallel_size": stages, "tensor_parallel_size": size}
    with restless_layers() as cuts:
        compare(outputs(cuts, **TIGHT, **ranks, spare_layers=spare), outputs([]))
    assert (len(set(cuts)) > 1) == bool(spare)


def test_ranks_fetch_what_lands_though_they_have_nothing_to_compute(tmp_path: Path) -> None:
    """Else the image that comes first may find no place. All ranks have it before it is free."""
    path = write_tiny_model(tmp_path, DEEP, seed=4)
    vision = read_arch(path).vision
    assert vision is not None

    def asked() -> list[Request]:
        return [request(vision, ("a", 3, 4), ("b", 2, 4), 3)]

    inside = Engine(EngineConfig(model=str(path), **SMALL))
    expected = run(inside, asked())
    inside.close()
    ranks = {"pipeline_parallel_size": 2, "tensor_parallel_size": 2, "encoder_workers": 1}
    engine = Engine(
        EngineConfig(model=str(path), **SMALL, **TIGHT, **ranks), make_encoders=TowerEncoders
    )
    encoders: Any = engine._encoders
    try:
        encoders.stopped = True
        (waiting,) = asked()
        engine.add(waiting)
        while not engine.awaits_images:
            engine.step()
        assert len(encoders.busy) == 2
        encoders.land(1)
        (place,) = encoders._sizes.keys() - {place for place, _ in encoders.busy.values()}
        while place in encoders._sizes:
            assert engine.step() == {}
        assert engine.stats().steps == 1 and engine.stats().running == 0
        engine.abort(waiting.id)
        encoders.stopped = False
        compare(run(engine, asked()), expected)
        assert encoders.num_submitted == 3  # the second image is there still
    finally:
        engine.close()


@pytest.mark.parametrize(("stages", "size"), [(1, 1), (2, 2)])
def test_encoders_make_what_ranks_make(tmp_path: Path, stages: int, size: int) -> None:
    """Though they are killed in the middle."""
    path = write_tiny_model(tmp_path, DEEP, seed=4)
    vision = read_arch(path).vision
    assert vision is not None

    def asked(number: int) -> list[Request]:
        return [
            request(vision, 5, (f"a{number}", 3, 4), 4, (f"b{number}", 2, 3), 3),
            request(vision, (f"c{number}", 1, 2), 1, (f"a{number}", 3, 4), 2, ("d", 5, 2), 20),
            request(vision, 9),
        ]

    inside = Engine(EngineConfig(model=str(path), **SMALL))
    expected = [run(inside, asked(number)) for number in range(3)]
    inside.close()
    ranks = {"pipeline_parallel_size": stages, "tensor_parallel_size": size}
    engine = Engine(EngineConfig(model=str(path), **SMALL, **TIGHT, **ranks, encoder_workers=2))
    try:
        compare(run(engine, asked(0)), expected[0])
        encoders = engine._encoders
        assert encoders is not None and engine.stats().encoders == 2
        kill = [slot.child.kill for slot in encoders._slots if slot.child is not None]
        submit = encoders.submit

        def submit_and_kill(image: ImagePixels) -> None:
            submit(image)
            if kill:
                kill.pop()()

        encoders.submit = submit_and_kill  # type: ignore[method-assign]
        compare(run(engine, asked(1)), expected[1])
        assert not kill
        compare(run(engine, asked(2)), expected[2])
        stats = engine.stats()
        assert stats.images_encoded >= 3 * 3 + 1 and stats.image_hits > 0
        assert not encoders._jobs and not encoders._taken
    finally:
        engine.close()


def test_the_first_stage_has_the_layers_that_add_embeddings(tmp_path: Path) -> None:
    arch = read_arch(write_tiny_model(tmp_path, DEEP))
    assert [len(run) for run in arch.runs()] == [2, 1]
    check_shards(EngineConfig(model=".", pipeline_parallel_size=2, assigned_layers="2,1"), arch)
    with pytest.raises(ConfigError, match="stage begin with layer 1: .* in the first, so a stage"):
        check_shards(EngineConfig(model=".", pipeline_parallel_size=2, assigned_layers="1,2"), arch)
