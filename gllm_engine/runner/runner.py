"""Runs plans: applies the diff, computes the forward pass, samples. One Runner per rank.

Owns the KV cache and the order of work in a step. launch() never waits for the device; only
RunnerStep.wait() does. Every rank gets every plan. Each pipeline stage sends hidden states to the
next stage, and the last stage samples. Knows nothing of requests, of scheduling, or of what tokens
mean.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gllm_engine.arch import Model
from gllm_engine.config import EngineConfig
from gllm_engine.model import Decoder, LayerCache, States
from gllm_engine.ops import Batch
from gllm_engine.parallel import Pipe, RankGroups
from gllm_engine.runner.batch import StepInputs, build_step
from gllm_engine.runner.graph_pool import GraphPool
from gllm_engine.runner.graphs import DecodeGraphs
from gllm_engine.runner.host_arrays import int_array, to_device
from gllm_engine.runner.image_store import ImageStore
from gllm_engine.runner.kv_sizing import (
    cache_dtype,
    fitting_pages,
    fitting_snapshots,
    image_bytes,
    measured_memory,
)
from gllm_engine.runner.landing import Landing
from gllm_engine.runner.sampler import log_probabilities, sample, scored_at_once
from gllm_engine.runner.sampling_state import SamplingState
from gllm_engine.runner.slot_table import SlotTable
from gllm_engine.runner.step_pieces import StepPieces, most_tokens
from gllm_engine.runner.step_timer import StepTimer, StepTimers
from gllm_engine.runner.token_return import TokenReturn
from gllm_engine.runner.warmup import tiny_plans
from gllm_engine.timeline import OFF, activity
from gllm_engine.types import (
    NO_SNAPSHOT,
    ImagePixels,
    LandingHandle,
    RankSpans,
    StepPlan,
    StepResult,
    TokenLogprobs,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LogprobRows:
    """Log probabilities of some slots, in host memory; valid once the step has ended."""

    slots: list[int]
    num_top: list[int]  # [rows] requested columns after the first
    columns: tuple[Tensor, ...]  # ids, logprobs, ranks, each [rows, 1 + max(num_top)]

    def rows(self) -> list[TokenLogprobs]:
        ids, logprobs, ranks = (column.tolist() for column in self.columns)
        return [
            TokenLogprobs(ids[i][: n + 1], logprobs[i][: n + 1], ranks[i][: n + 1])
            for i, n in enumerate(self.num_top)
        ]


@dataclass(frozen=True)
class RunnerStep:
    """A step under way. Its tensors are host copies, complete when `timer` has ended."""

    step: int
    tokens: Tensor | None = None  # [sampling rows] int64
    scores: LogprobRows | None = None
    prompt_scores: list[LogprobRows] = field(default_factory=list)
    timer: StepTimer | None = None  # None: the plan computes nothing

    def wait(self) -> StepResult:
        """The only place where the host waits for the device."""
        seconds = 0.0 if self.timer is None else self.timer.seconds()
        logprobs: dict[int, TokenLogprobs] = {}
        prompt_logprobs: dict[int, list[TokenLogprobs]] = {}
        if self.scores is not None:
            logprobs = dict(zip(self.scores.slots, self.scores.rows(), strict=True))
        for scores in self.prompt_scores:
            prompt_logprobs.setdefault(scores.slots[0], []).extend(scores.rows())
        tokens = [] if self.tokens is None else self.tokens.tolist()
        return StepResult(self.step, tokens, logprobs, prompt_logprobs, seconds)


class Runner:
    """`num_pages`: pages of the KV cache that the scheduler may use, the spare page not included.

    `took`: seconds of each part of the start. `fill`: loads layers that come later, if any may.
    """

    fill: Callable[[Decoder], None]

    @torch.inference_mode()
    def __init__(
        self,
        config: EngineConfig,
        arch: Model,
        decoder: Decoder,
        ranks: RankGroups | None = None,
        timers: StepTimers | None = None,
    ) -> None:
        """`ranks`: the process groups of this rank; None: it is the only rank.

        `timers`: record the steps; None: nothing is recorded.
        """
        on_gpu = decoder.device.type == "cuda"
        if not on_gpu:
            torch.set_num_threads(config.cpu_threads or default_threads())
        self.decoder = decoder
        self.device = decoder.device
        self._config = config
        self.took: dict[str, float] = {}
        self._timers = timers or StepTimers(self.device, OFF)
        self.recorder = self._timers.recorder
        self.pipe = Pipe() if ranks is None else ranks.pipe
        max_len = config.max_model_len or arch.max_len
        max_pages = -(-max_len // config.page_size)
        with self._timed("kernels"):
            dtype = cache_dtype(config, decoder)
            decoder.compile_kernels(config.page_size, dtype, config.spare_layers > 0)
        with self._timed("memory"):
            memory = partial(measured_memory, config, decoder, max_pages) if on_gpu else None
            fitting = fitting_pages(config, decoder, memory)
            self.num_pages = fitting if ranks is None else ranks.min_over_ranks(fitting)
            # On a GPU one more slot and one more page, for the padding rows of CUDA graphs.
            self._total_pages = num_pages = self.num_pages + on_gpu
            num_slots = config.max_num_seqs + on_gpu
            self.num_snapshots = fitting_snapshots(config, decoder, self.num_pages)
            # Slots come first, then snapshots.
            self.states = decoder.new_states(num_slots + self.num_snapshots)
            self.cache = self.new_cache(decoder, self.states)
            self.table = SlotTable(
                num_slots,
                max_pages,
                num_pages,
                config.page_size,
                self.device,
                decoder.groups,
                arch.has_sections,
            )
            self.sampling = SamplingState(self.table, arch.vocab)
        self.landing: Landing | None = None
        self._images = self._image_store()
        self._returned: TokenReturn | None = None
        if self.pipe.is_first and not self.pipe.is_last:
            self._returned = TokenReturn(self.pipe, self.table, config.plans_in_flight)
        self._graphs: DecodeGraphs | None = None
        self._pieces: StepPieces | None = None
        with self._timed("graphs"):
            self._capture()
        with self._timed("first steps"):
            if on_gpu:
                self._run_tiny_plans(max_len)

    def _image_store(self) -> ImageStore | None:
        """None for a rank that takes no images."""
        decoder = self.decoder
        config = self._config
        if not decoder.image_numbers:
            return None
        log.info(
            "images: embeddings of %d tokens (image_cache_tokens) take %.2f GiB at most",
            config.image_cache_tokens,
            image_bytes(config, decoder) / (1 << 30),
        )
        if decoder.tower is None:
            self.landing = Landing.make(
                config.landing_tokens, decoder.image_numbers, decoder.dtype, self.device
            )
        source = decoder.tower or self.landing
        assert source is not None
        return ImageStore(source, decoder.arch.dim, self.device)

    def _run_tiny_plans(self, max_len: int) -> None:
        config = self._config
        rows = config.max_num_seqs
        tokens = config.max_num_batched_tokens
        room = min(max_len, self.num_pages * config.page_size)
        groups = len(self.decoder.groups)
        for plan in tiny_plans(rows, tokens, room, config.page_size, groups):
            self.launch(plan).wait()

    def new_cache(self, decoder: Decoder, states: States | None = None) -> list[LayerCache]:
        """A cache with as many pages as the runner's, for the layers of `decoder`."""
        config = self._config
        dtype = cache_dtype(config, decoder)
        return decoder.new_cache(self._total_pages, config.page_size, dtype, states)

    def forget_graphs(self) -> None:
        """Wait for the device and free the CUDA graphs, which know the layers' memory."""
        self._timers.current = None  # what captures compute is no part of a step
        self._wait()
        self._graphs = self._pieces = None
        torch.cuda.empty_cache()

    def take(self, decoder: Decoder, cache: list[LayerCache], states: States) -> None:
        """Compute other layers from the next step on, after `forget_graphs`."""
        self.decoder = decoder
        self.cache = cache
        self.states = states
        self._capture()
        self._wait()

    def _wait(self) -> None:
        """Wait until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _capture(self) -> None:
        config = self._config
        if self.device.type != "cuda" or config.enforce_eager:
            return
        pool = GraphPool(self.device)
        self._graphs = DecodeGraphs(
            self.decoder, self.cache, self.table, self.sampling, config.max_num_seqs, pool
        )
        if max_tokens := most_tokens(config, self.decoder):
            spare = self.num_pages * config.page_size
            self._pieces = StepPieces(self.decoder, self.cache, max_tokens, spare)
            self._pieces.capture(pool)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.took[part] = time.perf_counter() - start

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> RunnerStep:
        """Start one step. On return, the next plan may be launched.

        Raises PlanError for a plan that contradicts earlier plans or itself. Every rank raises it
        for the same plans, and before the ranks exchange any data for the step. After any error the
        state of the plan's slots is undefined until they get new owners.
        """
        timer = self._timers.start(plan.step)
        self.sampling.check_masks(plan)
        if self.states.layers:
            self._move_states(plan)
        self.sampling.set_owners(plan.new)
        rows = self.table.begin(plan)
        if self._images is not None:
            self._images.update(plan)  # no part of the time, which is that of the layers
        if rows is None:
            if plan.arrived:
                self._wait()  # nothing else tells that the landing is free
            return RunnerStep(plan.step)
        if self.recorder.is_on:
            timer.work = rows.work(plan.chunks)
        x = self._receive(plan, timer)
        timer.begin()
        if self._graphs is not None and not plan.chunks:
            decoded = self._graphs.forward(rows, x)
            if not self.pipe.is_last:
                return self._hand_on(decoded.hidden.clone(), plan, timer)
            slots = decoded.slots
            scores = decoded.scores
            plain = decoded.tokens
            timer.mark(activity.SAMPLE)
            tokens, logprobs = self._sample(rows.slots_cpu, slots, scores, plan, plain)
            timer.end()
            return RunnerStep(plan.step, tokens, logprobs, [], timer)
        step = build_step(plan, self.table, rows, self.decoder.ops)
        batch = step.batch
        if self._images is not None:
            batch = replace(batch, images=self._images.rows(plan))
        pieces = self._pieces_for(batch)
        hidden = self.decoder.forward(batch, self.cache, x, pieces)
        if not self.pipe.is_last:
            return self._hand_on(hidden if pieces is None else hidden.clone(), plan, timer)
        num_sampling = len(step.sampling_cpu)
        sampled: Tensor | None = None
        logprobs = None
        if num_sampling:
            scores = self.decoder.scores(hidden[:num_sampling])
            timer.mark(activity.SAMPLE)
            sampled, logprobs = self._sample(step.sampling_cpu, step.sampling, scores, plan, None)
        prompt_scores = self._score_prompts(step, hidden[num_sampling:]) if step.scored else []
        timer.end()
        return RunnerStep(plan.step, sampled, logprobs, prompt_scores, timer)

    def _pieces_for(self, batch: Batch) -> StepPieces | None:
        """None if the step has too many tokens, or images."""
        has_images = batch.images is not None or batch.rotation.dim() > 1
        if self._pieces is None or has_images or len(batch.tokens) > self._pieces.max_tokens:
            return None
        return self._pieces

    def put_images(self, images: list[ImagePixels]) -> None:
        """The images that the next plan encodes; on ranks of the first stage."""
        assert self._images is not None
        self._images.put(images)

    @property
    def landings(self) -> list[LandingHandle]:
        """For encoders: the landing of this rank, if it has one."""
        return [] if self.landing is None else [self.landing.handle]

    @torch.inference_mode()
    def land(self, place: int, embeddings: bytes) -> None:
        """Put embeddings into the landing, which an encoder of another machine has made."""
        assert self.landing is not None
        self.landing.write(place, embeddings)

    def _move_states(self, plan: StepPlan) -> None:
        """Copy states to snapshots, then give new owners of slots theirs."""
        first = len(self.table.lengths)
        for slot, snapshot in plan.snapshots:
            self.states.copy(slot, first + snapshot)
        for new in plan.new:
            if new.snapshot == NO_SNAPSHOT:
                self.states.clear(new.slot)
            else:
                self.states.copy(first + new.snapshot, new.slot)

    def _receive(self, plan: StepPlan, timer: StepTimer) -> Tensor | None:
        """Hidden states [tokens, dim] from the previous stage; None on the first stage, which gets
        the tokens of its decode rows here.
        """
        if self.pipe.is_first and self.pipe.is_last:
            return None
        timer.mark(activity.RECEIVE)
        if self._returned is not None:
            self._returned.settle(plan.decode_slots)
            return None
        num_tokens = len(plan.decode_slots) + sum(len(chunk.tokens) for chunk in plan.chunks)
        x = torch.empty(
            num_tokens, self.decoder.arch.dim, dtype=self.decoder.dtype, device=self.device
        )
        return self.pipe.receive(x)

    def _hand_on(self, hidden: Tensor, plan: StepPlan, timer: StepTimer) -> RunnerStep:
        """Send `hidden` to the next stage. No later step may write to its memory."""
        timer.end()
        self.pipe.send(hidden)
        if self._returned is not None:
            sampling = [chunk.slot for chunk in plan.chunks if chunk.samples]
            self._returned.expect(int_array(plan.decode_slots, sampling))
        return RunnerStep(plan.step, timer=timer)

    def is_alive(self) -> bool:
        """Whether the device can still compute. After a fault in a kernel it cannot: every later
        CUDA call of this process fails with the same error.
        """
        try:
            self._wait()
        except RuntimeError:
            return False
        return True

    def check(self) -> None:
        """Does nothing: the next step reports a failed device."""

    def spans(self) -> list[RankSpans]:
        """None: whoever made the recorder has them."""
        return []

    def close(self) -> None:
        self._graphs = self._pieces = None
        self.cache.clear()
        self.states.free()

    def _sample(
        self,
        slots_cpu: np.ndarray[Any, Any],
        slots: Tensor,
        scores: Tensor,
        plan: StepPlan,
        plain: Tensor | None,
    ) -> tuple[Tensor, LogprobRows | None]:
        """Sample a token for each of `slots`, record it as the slot's last token, and return it to
        the first stage. Returns host copies of tokens [n] and of requested log probabilities.

        `slots_cpu`, `slots`: the same slots [n]. `scores`: [n, vocab] logits, or this rank's shard.
        `plain`: [n] tokens of plain sampling, if it has already run.
        """
        sampling = self.sampling
        num_top = sampling.logprobs_cpu[slots_cpu]
        asked = np.flatnonzero(num_top >= 0)
        raw = rows = None
        if len(asked):  # copied before sampling, which may overwrite the logits
            (rows,) = to_device(self.device, asked)
            raw = self.decoder.whole(scores[rows]).float()
        if not sampling.is_plain(slots_cpu, plan.masks):
            batch = sampling.batch(slots_cpu, slots, plan.masks)
            tokens = sample(self.decoder.whole(scores).float(), batch)
            tokens = self.decoder.broadcast(tokens)
            self.table.last_tokens[slots] = tokens
        elif plain is not None:
            tokens = plain
        else:
            tokens = self.decoder.sample_plain(scores, slots, sampling.plain)
        if not self.pipe.is_first:
            self.pipe.return_tokens(tokens.clone())  # the next step may overwrite them
        logprobs = None
        if raw is not None and rows is not None:
            widths = num_top[asked].tolist()
            columns = log_probabilities(raw, tokens[rows], max(widths))
            logprobs = LogprobRows(slots_cpu[asked].tolist(), widths, _to_host(*columns))
        return _to_host(tokens)[0], logprobs

    def _score_prompts(self, step: StepInputs, hidden: Tensor) -> list[LogprobRows]:
        found = []
        num_rows = scored_at_once(self.sampling.vocab)
        for chunk in step.scored:
            num_top = int(self.sampling.prompt_logprobs_cpu[chunk.slot])
            targets = np.asarray(chunk.targets, np.int64)
            (target_ids,) = to_device(self.device, targets)
            for first in range(0, len(targets), num_rows):
                ids = target_ids[first : first + num_rows]
                logits = self.decoder.logits(hidden[first : first + len(ids)])
                columns = _to_host(*log_probabilities(logits, ids, num_top))
                found.append(LogprobRows([chunk.slot], [num_top] * len(ids), columns))
            hidden = hidden[len(targets) :]
        return found


def default_threads(processes: int = 1) -> int:
    """Threads of each of `processes`: those that OMP_NUM_THREADS allows, as for any program.

    Without it, all cores but one, which the server and its front ends need: torch threads that
    share a core wait for each other. On two cores, one thread is four times as fast as two.
    """
    told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if told.isdecimal() and int(told):
        return int(told)
    return max(1, (len(os.sched_getaffinity(0)) - 1) // processes)


def _to_host(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Host copies, complete once the device has run them; on a CPU the tensors themselves."""
    if tensors[0].device.type == "cpu":
        return tensors
    copies = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors)
    for copy, tensor in zip(copies, tensors, strict=True):
        copy.copy_(tensor, non_blocking=True)
    return copies
