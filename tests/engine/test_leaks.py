"""Two thousand requests of every kind, a fifth of them cancelled: nothing stays behind.

Prompts share beginnings, the pool is too small for all that run, and cancellations come at any
moment: while a request waits, is computed in part, or has tokens in flight.
"""

from __future__ import annotations

import gc
import os
import queue
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_process import WAIT_S, Front, owner, until

from gllm_engine import Engine, EngineConfig, Outputs, Request, SamplingParams, StructuredOutputs
from gllm_engine.model.tiny import write_tiny_model
from gllm_engine.sched import Sequence
from gllm_engine.text.constraints import Constraint

__all__ = ["owner"]  # a fixture

SHAKESPEARE = str(Path(__file__).parents[2] / "model_repository/shakespeare/1")
COUNT, WARM = 2000, 500
MOST_OPEN = 40
VOCAB = 256  # token ids that every model here has
# One sequence has up to 60 + 40 + 24 tokens, so 8 pages; 16 run at once.
SMALL = {"max_num_seqs": 16, "num_pages": 28, "max_model_len": 256, "max_num_batched_tokens": 64}
PLAIN: list[dict[str, Any]] = [
    {"temperature": 0}, {"temperature": 1.0}, {"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1},
    {"presence_penalty": 0.5}, {"frequency_penalty": 0.5, "temperature": 0},
    {"repetition_penalty": 1.3}, {"logit_bias": {5: 4.0, 9: -100.0}},
    {"min_tokens": 4, "stop_token_ids": (5, 6, 7)}, {"stop_token_ids": tuple(range(9, 60))},
    {"logprobs": 3}, {"prompt_logprobs": 2, "logprobs": 0}, {"priority": 1}, {"cache_salt": "x"},
]  # fmt: skip
MASKED: list[dict[str, Any]] = [
    {"structured_outputs": StructuredOutputs(regex="[a-z ]{1,30}")},
    {"structured_outputs": StructuredOutputs(choice=("yes", "no"))},
    {"bad_words": ("a", "the")},
]


class Traffic:
    """Requests, and after how many turns each is cancelled (None: it is not). Some end before."""

    def __init__(self, kinds: list[dict[str, Any]]) -> None:
        self.seed = random.SystemRandom().randrange(1 << 30)
        print(f"seed {self.seed}")
        self.rng = random.Random(self.seed)
        self.kinds = kinds
        self.stems = [self.draw(self.rng.randrange(20, 61)) for _ in range(5)]

    def draw(self, count: int) -> list[int]:
        return [self.rng.randrange(3, VOCAB) for _ in range(count)]

    def requests(self, first: int, count: int) -> Iterator[tuple[Request, int | None]]:
        rng = self.rng
        for id in range(first, first + count):
            stem = rng.choice(self.stems)
            prompt = stem[: rng.randrange(len(stem) + 1)] + self.draw(rng.randrange(1, 41))
            kind = rng.choice(self.kinds)
            length = {"max_tokens": rng.randrange(5, 25), "ignore_eos": rng.random() < 0.5}
            words = ((11,), (12, 13)) if "bad_words" in kind else ()
            request = Request(id, prompt, SamplingParams(**length, **kind), id, words)
            yield request, rng.randrange(30) if rng.random() < 0.3 else None


class Book:
    """What is open, and how every request ended."""

    def __init__(self) -> None:
        self.open: dict[int, Request] = {}
        self.due: dict[int, int] = {}  # id -> turn of its cancellation
        self.counts: dict[int, int] = {}
        self.ended = {"length": 0, "stop": 0, "cancelled": 0}

    def submit(self, request: Request, turn: int, after: int | None) -> None:
        self.open[request.id], self.counts[request.id] = request, 0
        if after is not None:
            self.due[request.id] = turn + after

    def cancel(self, turn: int) -> list[int]:
        """Ids to cancel now; those that have ended by themselves are not."""
        due = [id for id, when in self.due.items() if when <= turn]
        gone = [id for id in due if self.open.pop(id, None) is not None]
        for id in due:
            del self.due[id]
        self.ended["cancelled"] += len(gone)
        return gone

    def take(self, outputs: Outputs) -> None:
        for id in outputs.ids:
            if id in self.open:
                self.counts[id] += 1
        for id, finish in outputs.finished.items():
            request = self.open.pop(id, None)
            if request is None:
                continue  # cancelled while this was on its way
            assert finish.reason in ("length", "stop"), finish
            if finish.reason == "length":
                assert self.counts[id] == request.sampling.max_tokens
            self.ended[finish.reason] += 1


def churn(engine: Engine, traffic: Traffic, first: int, count: int) -> Book:
    """Serve `count` requests of two clients; whatever is cancelled is silent from then on."""
    books, turn, rng = {b"a": Book(), b"b": Book()}, 0, traffic.rng
    coming = traffic.requests(first, count)
    more = True
    while more or any(book.open for book in books.values()):
        while more and sum(len(b.open) for b in books.values()) < MOST_OPEN and rng.random() < 0.8:
            request, after = next(coming, (None, None))
            if request is None:
                more = False
                break
            client = rng.choice([b"a", b"b"])
            books[client].submit(request, turn, after)
            engine.add(request, client)
        for client, book in books.items():
            for id in book.cancel(turn):
                engine.abort(id, client)
        for client, outputs in engine.step().items():
            assert {*outputs.ids, *outputs.finished} <= books[client].open.keys()
            books[client].take(outputs)
        turn += 1
    for client, book in books.items():
        book.cancel(10**9)
        engine.drop(client)
    while engine.has_work:  # plans in flight
        assert engine.step() == {}
    both = Book()
    both.ended = {key: sum(b.ended[key] for b in books.values()) for key in both.ended}
    return both


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def of_requests() -> list[Any]:
    """What a request consists of, wherever in this process it is held."""
    gc.collect()
    kinds = (Sequence, Constraint, Request)
    return [thing for thing in gc.get_objects() if type(thing) in kinds]


def check_nothing_is_left(engine: Engine, before: list[Any]) -> None:
    """`before`: what other tests of this process hold."""
    engine.check_integrity()
    stats = engine.stats()
    assert (stats.running, stats.waiting, stats.kv_usage) == (0, 0, 0)
    assert sorted(engine._scheduler._slots) == list(range(SMALL["max_num_seqs"]))
    theirs = set(map(id, before))
    left = [thing for thing in of_requests() if id(thing) not in theirs]
    assert not left, f"{len(left)} left, such as {left[:3]}"


def run(model: str, **config: Any) -> None:
    others = of_requests()
    engine = Engine(EngineConfig(model=model, **SMALL, **config))
    on_gpu = engine._runner.device.type == "cuda"
    traffic = Traffic(PLAIN + MASKED)
    try:
        churn(engine, traffic, 0, WARM)
        check_nothing_is_left(engine, others)
        before = resident(), torch.cuda.memory_allocated() if on_gpu else 0
        ended = churn(engine, traffic, WARM, COUNT - WARM).ended
        check_nothing_is_left(engine, others)
        after = resident(), torch.cuda.memory_allocated() if on_gpu else 0
        print(ended, engine.stats(), [b - a for a, b in zip(before, after, strict=True)])
        assert sum(ended.values()) == COUNT - WARM
        assert ended["cancelled"] > 0.15 * (COUNT - WARM) and min(ended.values()) > 20
        stats = engine.stats()
        assert stats.preemptions > 20 and stats.prefix_hits > 1000
        # Tables of what slots ask for may still grow, to a row a slot.
        assert after[0] - before[0] < (64 if on_gpu else 8) << 20
        assert after[1] - before[1] < 2 << 20
    finally:
        engine.close()


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("depth", [1, 2])
def test_nothing_leaks(tmp_path: Path, depth: int) -> None:
    run(str(write_tiny_model(tmp_path, seed=1)), device="cpu", plans_in_flight=depth)


@pytest.mark.gpu
@pytest.mark.parametrize("eager", [False, True])
def test_nothing_leaks_on_a_gpu(eager: bool) -> None:
    run(SHAKESPEARE, device="cuda", enforce_eager=eager)


def serve(front: Front, traffic: Traffic, first: int, count: int) -> Book:
    """As churn, through an engine's process."""
    book, turn = Book(), 0
    for request, after in traffic.requests(first, count):
        book.submit(request, turn, after)
        front.client.submit([request])
        while True:
            gone = book.cancel(turn)
            if gone:
                front.client.abort(gone)
            turn += 1
            if len(book.open) < MOST_OPEN:
                break
            book.take(front.outputs.get(timeout=WAIT_S))
    while book.open:
        try:
            book.take(front.outputs.get(timeout=0.01))
        except queue.Empty:
            pass
        front.client.abort(book.cancel(turn))
        turn += 1
    until(lambda: bool(front.stats) and front.stats[-1].running + front.stats[-1].waiting == 0)
    assert front.stats[-1].kv_usage == 0 and not front.lost
    return book


def run_process(model: str, owner: int, traffic: Traffic, **config: Any) -> None:
    front = Front(model, owner, **SMALL, **config)
    gpu = torch.cuda.is_available()
    try:
        serve(front, traffic, 0, WARM)
        before = torch.cuda.mem_get_info()[0] if gpu else 0
        ended = serve(front, traffic, WARM, COUNT - WARM).ended
        lost = before - torch.cuda.mem_get_info()[0] if gpu else 0
        assert sum(ended.values()) == COUNT - WARM and ended["cancelled"] > 200
        assert lost < 64 << 20, f"{lost >> 20} MiB"
    finally:
        front.client.close()


def test_nothing_leaks_in_a_process(tmp_path: Path, owner: int) -> None:
    run_process(str(write_tiny_model(tmp_path)), owner, Traffic(PLAIN))  # noqa: F811


@pytest.mark.gpu
@pytest.mark.whole_gpu
def test_nothing_leaks_in_a_process_on_a_gpu(owner: int) -> None:
    run_process(SHAKESPEARE, owner, Traffic(PLAIN + MASKED), device="cuda")
