"""Images that encoders encode: what waits, what goes on, and what is left after ends and errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pictured import TowerEncoders, compare, request, run

from gllm_engine.arch import read_arch
from gllm_engine.arch.vision import Vision
from gllm_engine.config import EngineConfig
from gllm_engine.engine.core import IN_PROCESS, Engine
from gllm_engine.engine.process import EngineProcess, close, listen
from gllm_engine.model.tiny import write_tiny_model
from gllm_engine.types import Finish, Request

SMALL = {
    "device": "cpu", "cpu_threads": 1, "max_model_len": 128, "max_num_seqs": 4, "num_pages": 64,
    "page_size": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Embeddings are added after two of its layers, too."""
    path = tmp_path_factory.mktemp("model")
    return write_tiny_model(path, "Qwen3VLForConditionalGeneration", seed=3)


@pytest.fixture
def vision(model: Path) -> Vision:
    vision = read_arch(model).vision
    assert vision is not None
    return vision


@pytest.fixture
def engine(model: Path) -> Iterator[Engine]:
    """Its encoders encode nothing before `encoders` lets them."""
    config = EngineConfig(model=str(model), **SMALL, encoder_workers=1)
    one = Engine(config, make_encoders=TowerEncoders)
    encoders(one).stopped = True
    assert one._runner.decoder.tower is None
    yield one
    one.close()
    assert encoders(one).closed


def encoders(engine: Engine) -> TowerEncoders:
    found: Any = engine._encoders
    return found


def run_until_idle(engine: Engine) -> dict[int, Finish]:
    """What finishes until all that are left wait for images."""
    finished: dict[int, Finish] = {}
    for _ in range(100):
        outputs = engine.step().get(IN_PROCESS)
        engine.check_integrity()
        if outputs is not None:
            finished |= outputs.finished
        elif engine.awaits_images or not engine.has_work:
            return finished
    raise AssertionError("the engine never rests")


def pictured(vision: Vision, name: str = "a", **sampling: Any) -> Request:
    return request(vision, 5, (name, 3, 4), 4, **sampling)


@pytest.fixture(scope="module")
def inside(model: Path) -> Any:
    """The output of each request where the ranks encode."""
    one = Engine(EngineConfig(model=str(model), **SMALL))
    vision = one._arch.vision
    assert vision is not None
    found = run(one, [pictured(vision), pictured(vision, "b"), request(vision, 20)])
    one.close()
    return found


def test_who_waits_for_no_image_goes_on(engine: Engine, vision: Vision, inside: Any) -> None:
    """And those that wait cost no steps."""
    waiting = pictured(vision)
    engine.add(waiting)
    assert not run_until_idle(engine)
    text = request(vision, 20)
    engine.add(text)
    assert [*run_until_idle(engine)] == [text.id]
    stats = engine.stats()
    assert (stats.images_waiting, stats.images_encoded, stats.encoders) == (1, 0, 1)
    assert stats.stuck_encoders == 2
    for _ in range(3):
        assert engine.step() == {}
    assert engine.stats().steps == stats.steps
    encoders(engine).stopped = False
    compare(run(engine, [pictured(vision)]), inside[:1])
    assert not engine.has_work and encoders(engine).num_submitted == 1
    assert (engine.stats().images_waiting, engine.stats().images_encoded) == (0, 1)
    assert engine.stats().image_hits == 1


def test_equal_images_are_encoded_once(engine: Engine, vision: Vision, inside: Any) -> None:
    encoders(engine).stopped = False
    compare(run(engine, [pictured(vision) for _ in range(3)]), inside[:1] * 3)
    assert encoders(engine).num_submitted == 1
    run(engine, [pictured(vision, cache_salt="other")])
    assert encoders(engine).num_submitted == 2


def test_what_nobody_needs_is_cancelled(engine: Engine, vision: Vision, inside: Any) -> None:
    one, other, third = [pictured(vision), pictured(vision), pictured(vision, "b")]
    for each in (one, other, third):
        engine.add(each)
    run_until_idle(engine)
    assert len(encoders(engine).busy) == 2
    engine.abort(one.id)
    assert len(encoders(engine).busy) == 2  # the other one needs it
    engine.abort(other.id)
    assert len(encoders(engine).busy) == 1
    engine.drop(IN_PROCESS)
    engine.check_integrity()
    assert encoders(engine).is_idle and not engine.has_work
    encoders(engine).stopped = False
    compare(run(engine, [pictured(vision)]), inside[:1])


def test_what_a_failed_constraint_frees_is_planned_with(engine: Engine, vision: Vision) -> None:
    """Before the engine rests: no message tells it later."""
    failing, other = pictured(vision), pictured(vision, "b")
    for each in (failing, other):
        engine.add(each)
    run_until_idle(engine)
    broken: Any = SimpleNamespace(error="no token is allowed")
    engine._constrained[IN_PROCESS, failing.id] = broken
    assert engine.step()[IN_PROCESS].finished[failing.id].message == broken.error
    assert engine.has_work and not engine.awaits_images
    assert not run_until_idle(engine)


def test_an_image_that_cannot_be_encoded(engine: Engine, vision: Vision, inside: Any) -> None:
    """Fails the sequences that need it. The next request with it is another try."""
    bad = [pictured(vision), pictured(vision)]
    good = pictured(vision, "b")
    for each in (*bad, good):
        engine.add(each)
    run_until_idle(engine)
    encoders(engine).fail(0)
    finished = run_until_idle(engine)
    assert finished.keys() == {each.id for each in bad}
    for finish in finished.values():
        assert (finish.reason, finish.status) == ("error", "internal")
        assert finish.message == "image: not encoded: every encoder that had it died"
    encoders(engine).stopped = False
    compare(run(engine, [pictured(vision, "b"), pictured(vision)]), [inside[1], inside[0]])
    assert not engine.has_work


def test_after_a_failed_step_images_are_encoded_again(
    engine: Engine, vision: Vision, inside: Any
) -> None:
    encoders(engine).stopped = False
    compare(run(engine, [pictured(vision)]), inside[:1])
    launch = engine._runner.launch
    for loses_landed in (False, True):

        def fail(plan: Any, loses_landed: bool = loses_landed) -> Any:
            if plan.arrived or not loses_landed:
                engine._runner.launch = launch  # type: ignore[method-assign]
                raise RuntimeError("a kernel failed")
            return launch(plan)

        engine._runner.launch = fail  # type: ignore[method-assign]
        asked = pictured(vision, "b")
        engine.add(asked)
        finished: dict[int, Finish] = {}
        while not finished:
            for outputs in engine.step().values():
                finished |= outputs.finished
        assert finished[asked.id].status == "internal"
        engine.check_integrity()
        assert encoders(engine).is_idle
    encoders(engine).num_submitted = 0
    compare(run(engine, [pictured(vision), pictured(vision, "b")]), inside[:2])
    assert encoders(engine).num_submitted == 2
    assert len(engine._runner._images._embeddings) == 2
    assert encoders(engine).is_idle


def test_a_turn_of_the_process_hears_its_encoders_once(
    engine: Engine, vision: Vision, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = Counter[str]()

    def count(owner: object, name: str) -> None:
        method = getattr(owner, name)

        def counted(*given: Any, **named: Any) -> Any:
            counts[name] += 1
            return method(*given, **named)

        monkeypatch.setattr(owner, name, counted)

    server = EngineProcess(engine, listen(f"ipc://{tmp_path}/s"))
    try:
        server.draining = True
        count(server, "_listen")
        count(encoders(engine), "poll")
        encoders(engine).stopped = False
        engine.add(pictured(vision))
        server.run()
    finally:
        close(server.socket)
    assert counts["poll"] == counts["_listen"] > 3


def test_a_sequence_is_computed_up_to_its_first_image(engine: Engine, vision: Vision) -> None:
    """Texts and images that are there are computed while later images are encoded."""
    asked = request(vision, 6, ("a", 2, 2), 4, ("b", 2, 2), 3)
    engine.add(asked)
    for planned in (6, 6 + 4 + 4):
        assert not run_until_idle(engine)
        assert engine._live[IN_PROCESS, asked.id].planned == planned
        encoders(engine).land()
    assert asked.id in run_until_idle(engine)


def test_an_interrupt_in_an_exchange_with_encoders_breaks_the_engine(
    engine: Engine, vision: Vision, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have lost a place of the landing, without which images wait for ever."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(encoders(engine), "submit", interrupt)
    asked = pictured(vision)
    engine.add(asked)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    assert engine.broken == "the engine was interrupted in an exchange with its encoders"
    assert engine.step()[IN_PROCESS].finished[asked.id].status == "internal"
