"""Runs plans: applies the diff, computes the forward pass, samples. One Runner a model.

Owns the KV cache and the order of work in a step. launch() never waits for the device; only
Launched.wait() does. Knows nothing of requests, of scheduling, or of what tokens mean.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gllm_engine.config import EngineConfig
from gllm_engine.model import Decoder
from gllm_engine.runner.batch import Step, build_step
from gllm_engine.runner.sampler import log_probabilities, sample
from gllm_engine.runner.state import State, to_device
from gllm_engine.spec import Model
from gllm_engine.types import StepPlan, StepResult, TokenLogprobs

# Prompt positions are scored so many logits at a time: their log probabilities are wide.
MAX_SCORED_LOGITS = 2**24

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scores:
    """Log probabilities of the rows of some slots, on the host or on their way to it."""

    slots: list[int]
    num_top: list[int]  # for each row, how many of the columns after the first it asked for
    columns: tuple[Tensor, ...]  # ids, logprobs, ranks, each [rows, 1 + max(num_top)]

    def rows(self) -> list[TokenLogprobs]:
        ids, logprobs, ranks = (column.tolist() for column in self.columns)
        return [
            TokenLogprobs(ids[i][: n + 1], logprobs[i][: n + 1], ranks[i][: n + 1])
            for i, n in enumerate(self.num_top)
        ]


@dataclass(frozen=True)
class Launched:
    """A step under way. Its tensors are copies on the host, complete once `done` has happened."""

    step: int
    tokens: Tensor | None  # [sampling rows] int64
    scores: Scores | None
    prompt_scores: list[Scores]
    done: torch.cuda.Event | None  # None on a CPU, where launch() has computed everything

    def wait(self) -> StepResult:
        """The only place where the host waits for the device."""
        if self.done is not None:
            self.done.synchronize()
        logprobs, prompt_logprobs = {}, {}
        if self.scores is not None:
            logprobs = dict(zip(self.scores.slots, self.scores.rows(), strict=True))
        for scores in self.prompt_scores:
            prompt_logprobs.setdefault(scores.slots[0], []).extend(scores.rows())
        tokens = [] if self.tokens is None else self.tokens.tolist()
        return StepResult(self.step, tokens, logprobs, prompt_logprobs)


class Runner:
    """`num_pages`: config.num_pages, else what kv_cache_gib holds but at least one sequence."""

    def __init__(self, config: EngineConfig, spec: Model, decoder: Decoder) -> None:
        if decoder.device.type == "cpu":
            torch.set_num_threads(config.cpu_threads or default_threads())
        self.decoder = decoder
        self.device = decoder.device
        max_pages = -(-(config.max_model_len or spec.max_len) // config.page_size)
        itemsize = torch.empty(0, dtype=decoder.dtype).itemsize
        page_bytes = spec.kv_bytes_per_token(itemsize) * config.page_size
        self.num_pages = config.num_pages or _pages_that_fit(config, page_bytes, max_pages)
        with torch.inference_mode():
            self.cache = decoder.new_cache(self.num_pages, config.page_size)
            self.state = State(
                config.max_num_seqs,
                max_pages,
                config.page_size,
                spec.vocab,
                spec.eos_token_ids,
                self.device,
            )

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        """Start one step; the state is as after it, and the next plan may be launched.

        Raises PlanError for a plan that contradicts earlier ones. After any error the state of
        the plan's slots is undefined until they get new owners.
        """
        self.state.apply(plan.new, plan.grown)
        if not plan.decode_slots and not plan.chunks:
            return Launched(plan.step, None, None, [], None)
        step = build_step(plan, self.state)
        hidden = self.decoder.forward(step.batch, self.cache)
        num_sampling = len(step.sampling_cpu)
        tokens, scores = None, None
        if num_sampling:
            tokens, scores = self._sample(step, plan, self.decoder.logits(hidden[:num_sampling]))
        prompt_scores = self._score_prompts(step, hidden[num_sampling:]) if step.scored else []
        done = None
        if self.device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        return Launched(plan.step, tokens, scores, prompt_scores, done)

    def _sample(self, step: Step, plan: StepPlan, logits: Tensor) -> tuple[Tensor, Scores | None]:
        state, slots_cpu = self.state, step.sampling_cpu
        num_top = state.logprobs_cpu[slots_cpu]
        asked = np.flatnonzero(num_top >= 0)
        raw = rows = None
        if len(asked):  # taken before sampling, which overwrites the logits
            (rows,) = to_device(self.device, asked)
            raw = logits[rows]
        tokens = sample(logits, state.sampling_batch(slots_cpu, step.sampling, plan.masks))
        state.record(slots_cpu, step.sampling, tokens)
        scores = None
        if raw is not None and rows is not None:
            widths = num_top[asked].tolist()
            columns = log_probabilities(raw, tokens[rows], max(widths))
            scores = Scores(slots_cpu[asked].tolist(), widths, _to_host(*columns))
        return _to_host(tokens)[0], scores

    def _score_prompts(self, step: Step, hidden: Tensor) -> list[Scores]:
        found = []
        num_rows = max(1, MAX_SCORED_LOGITS // self.state.vocab)
        for chunk in step.scored:
            num_top = int(self.state.prompt_logprobs_cpu[chunk.slot])
            targets = np.asarray(chunk.targets, np.int64)
            (target_ids,) = to_device(self.device, targets)
            for first in range(0, len(targets), num_rows):
                ids = target_ids[first : first + num_rows]
                logits = self.decoder.logits(hidden[first : first + len(ids)])
                columns = _to_host(*log_probabilities(logits, ids, num_top))
                found.append(Scores([chunk.slot], [num_top] * len(ids), columns))
            hidden = hidden[len(targets) :]
        return found


def default_threads() -> int:
    """All cores but one: tensor threads that share a core wait for each other, and the server
    and its front ends run too. On two cores, one thread is four times as fast as two."""
    return max(1, len(os.sched_getaffinity(0)) - 1)


def _to_host(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Copies that are complete when the device has come so far; the tensors themselves on a CPU."""
    if tensors[0].device.type == "cpu":
        return tensors
    copies = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors)
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    return copies


def _pages_that_fit(config: EngineConfig, page_bytes: int, max_pages: int) -> int:
    num_pages = int(config.kv_cache_gib * 2**30) // page_bytes
    if num_pages < max_pages:
        _log.warning(
            "kv_cache_gib=%g holds %d pages, one sequence of the model's length needs %d: "
            "the cache takes %.2f GiB instead; set max_model_len or num_pages for a smaller one",
            config.kv_cache_gib,
            num_pages,
            max_pages,
            max_pages * page_bytes / 2**30,
        )
    return max(num_pages, max_pages)
