"""Drives a Runner with hand-made plans: no scheduler, one list of pages, any depth."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

from gllm_engine.runner import Runner
from gllm_engine.sampling import SamplingParams
from gllm_engine.types import Chunk, NewPages, NewSequence, StepPlan, StepResult


@dataclass
class Job:
    """One sequence in one slot; `output` may start with tokens known from before a preemption."""

    slot: int
    prompt: list[int]
    sampling: SamplingParams
    seed: int = 0
    eos: tuple[int, ...] = ()  # forbidden while min_tokens says so
    output: list[int] = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    prompt_logprobs: list = field(default_factory=list)
    computed: int = 0  # tokens planned so far
    pages: list[int] = field(default_factory=list)
    resumed: int = 0  # outputs known at the start

    def __post_init__(self) -> None:
        self.resumed = len(self.output)
        self.known = len(self.prompt) + len(self.output)


def greedy(**more: object) -> SamplingParams:
    return SamplingParams(temperature=0.0, **more)


class Drive:
    """Plans for all jobs at once, each with chunks of `chunk_len` then decode rows."""

    def __init__(self, runner: Runner, page_size: int, seed: int | None = None) -> None:
        self.runner, self.page_size = runner, page_size
        self.free = list(range(runner.num_pages))
        if seed is not None:
            random.Random(seed).shuffle(self.free)
        self.step = 0

    def run(
        self, jobs: list[Job], num_tokens: int, chunk_len: int = 1000, depth: int = 1
    ) -> list[list[int]]:
        """Every job's output once it has `num_tokens` more; their pages are free again."""
        new = [self.begin(job) for job in jobs]
        flights: deque[tuple[object, list[Job]]] = deque()
        while True:
            plan, sampling = self.plan(jobs, num_tokens, chunk_len, new)
            new = []
            if plan is not None:
                flights.append((self.runner.launch(plan), sampling))
            if not flights:
                break
            if plan is None or len(flights) >= depth:
                launched, sampling = flights.popleft()
                self.commit(launched.wait(), sampling, jobs)
        for job in jobs:
            self.free.extend(job.pages)
        return [job.output for job in jobs]

    def begin(self, job: Job) -> NewSequence:
        return NewSequence(job.slot, job.seed, len(job.prompt), job.sampling, job.eos)

    def plan(self, jobs, num_tokens, chunk_len, new) -> tuple[StepPlan | None, list[Job]]:
        new_pages, decodes, chunks, sampling, chunked = [], [], [], [], []
        for job in jobs:
            prompt_len = len(job.prompt)
            if job.known - prompt_len - job.resumed >= num_tokens:
                continue
            tokens = job.prompt + job.output[: job.resumed]
            if job.computed < len(tokens):
                end = min(len(tokens), job.computed + chunk_len)
                samples, targets = end == len(tokens), []
                if job.sampling.prompt_logprobs is not None:
                    targets = tokens[job.computed + 1 : min(end + 1, prompt_len)]
                chunks.append(
                    Chunk(job.slot, job.computed, tokens[job.computed : end], samples, targets)
                )
                job.computed = end
                if samples:
                    chunked.append(job)
            else:
                decodes.append(job.slot)
                sampling.append(job)
                job.computed += 1
                samples = True
            job.known += samples
            num_groups = len(self.runner.decoder.groups)
            first = len(job.pages) // num_groups
            missing = -(-job.computed // self.page_size) - first
            for group in range(num_groups) if missing else ():
                pages = [self.free.pop() for _ in range(missing)]
                new_pages.append(NewPages(job.slot, first, pages, group))
                job.pages.extend(pages)
        if not decodes and not chunks:
            return None, []
        self.step += 1
        return StepPlan(self.step, new, new_pages, decodes, chunks), sampling + chunked

    def commit(self, result: StepResult, sampling: list[Job], jobs: list[Job]) -> None:
        assert len(result.tokens) == len(sampling)
        for job, token in zip(sampling, result.tokens, strict=True):
            job.output.append(token)
            if job.slot in result.logprobs:
                job.logprobs.append(result.logprobs[job.slot])
        for job in jobs:
            job.prompt_logprobs.extend(result.prompt_logprobs.get(job.slot, []))
