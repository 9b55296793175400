"""The step loop's body: requests in, plans to the runner, tokens out, grouped by front end.

Owns the live sequences and the plans in flight. Knows nothing of text, sockets or processes; one
thread drives it.
"""

from __future__ import annotations

import gc
import logging
from collections import defaultdict, deque
from collections.abc import Callable, Hashable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import msgspec

from gllm_engine.arch import Model, read_arch
from gllm_engine.config import ConfigError, EngineConfig, settle
from gllm_engine.runner import NullRunner, cache_dirs
from gllm_engine.sampling import InvalidField, shown
from gllm_engine.sched import (
    Committed,
    IntegrityError,
    Policy,
    Refused,
    Scheduler,
    Sequence,
)
from gllm_engine.text.constraints import Constraint, Grammars
from gllm_engine.types import (
    Finish,
    ModelInfo,
    Outputs,
    Request,
    Stats,
    Status,
    StepPlan,
    StepResult,
)
from gllm_engine.workers.build_runner import check_shards, device_of, load_runner
from gllm_engine.workers.group import GroupLost, WorkerGroup

# While grammars compile and nothing else is to do, step() waits so long and comes back.
COMPILE_WAIT_S = 0.005
# So many steps that fail, with none between them that succeeds, are no accident.
MAX_FAILED_STEPS = 3

# Kernels do not depend on how many there are.
_PAGES_TO_COMPILE = 64

log = logging.getLogger(__name__)

Client = Hashable
Key = tuple[Client, int]  # client, sequence id


class StepHandle(Protocol):
    """A step under way."""

    def wait(self) -> StepResult: ...


class StepRunner(Protocol):
    """What runs plans, strictly in the order of launch."""

    num_pages: int

    def launch(self, plan: StepPlan) -> StepHandle: ...

    def is_alive(self) -> bool:
        """Whether it can run another plan after one that failed."""
        ...

    def check(self) -> None:
        """Raise what a launch would, if that is known already. Costs next to nothing."""
        ...

    def close(self) -> None:
        """Give up what it holds; it is not used again."""
        ...


class EngineBroken(RuntimeError):
    """The engine can compute nothing any more; the message says why."""


class Engine:
    """One model, its scheduler and its runner. Clients are any hashable names of front ends.

    `broken`: None, or why no step can succeed any more; whoever drives the engine must end it.

    A sequence is live from add() until its Finish is in the outputs of a step, or until abort()
    or drop(), after which nothing more comes for it.
    """

    def __init__(
        self,
        config: EngineConfig,
        make_runner: Callable[[EngineConfig, Model], StepRunner] | None = None,
        policy: Policy | None = None,
    ) -> None:
        """Load the model and get ready. Raises ConfigError, ArchError or LoadError.

        `make_runner`: what to run plans with, in place of the model in `config.model`. `policy`:
        in place of the schedule policy that the configuration names.
        """
        config = settle(config, on_gpu=device_of(config).type == "cuda")
        path = Path(config.model)
        arch = read_arch(path)
        _check_len(config, arch)
        # First, because it works on a thread of its own while the model loads.
        tokenizer = Path(config.tokenizer or config.model)
        self._grammars = Grammars(tokenizer, arch.vocab, arch.eos_token_ids)
        self._runner = (make_runner or _make_runner)(config, arch)
        max_model_len = _model_len(config, arch, self._runner.num_pages)
        # Known by now: the model takes longer to load than the tokenizer.
        eos_token_ids = self._grammars.eos_token_ids
        self._scheduler = Scheduler(
            config, self._runner.num_pages, max_model_len, eos_token_ids, policy
        )
        self.info = ModelInfo(
            vocab_size=arch.vocab,
            max_model_len=max_model_len,
            num_pages=self._runner.num_pages,
            page_size=config.page_size,
            eos_token_ids=eos_token_ids,
        )
        self._depth = config.plans_in_flight
        self._max_waiting = config.max_waiting
        self._failed_steps = 0  # since the last that succeeded
        self.broken: str | None = None
        self._launched: deque[StepHandle] = deque()
        self._live: dict[Key, Sequence] = {}
        self._constrained: dict[Key, Constraint] = {}
        self._compiling: dict[Key, tuple[Request, Future[Constraint]]] = {}
        self._outboxes: defaultdict[Client, Outputs] = defaultdict(_nothing)
        # What is loaded stays: the collector need not look at it again in every full pass.
        gc.collect()
        gc.freeze()

    # ------------------------------------------------------------ requests come and go

    def add(self, request: Request, client: Client = None) -> None:
        """Take a request. One that cannot be served gets its error in the next step's outputs."""
        key = (client, request.id)
        if key in self._live or key in self._compiling:
            self._refuse(key, "invalid", f"A sequence with id {request.id} is already live.")
            return
        if self.broken is not None:
            self._refuse(key, "unavailable", self.broken)
            return
        try:
            self._check(request)
        except InvalidField as error:
            self._refuse(key, "invalid", str(error))
            return
        constraint = self._grammars.constrain(request)
        if not isinstance(constraint, Future):
            self._admit(key, request, constraint)
        elif len(self._compiling) >= self._max_waiting:
            constraint.cancel()
            waiting = len(self._compiling)
            self._refuse(key, "unavailable", f"the queue is full: {waiting} grammars are waiting")
        else:
            self._compiling[key] = request, constraint

    def abort(self, id: int, client: Client = None) -> None:
        """End a sequence now; its pages are free at once. One that has ended is left alone."""
        self._forget((client, id))

    def num_cached_tokens(self, id: int, client: Client = None) -> int:
        """Prompt tokens of a live sequence that the prefix cache held; 0 for any other."""
        sequence = self._live.get((client, id))
        return 0 if sequence is None else max(0, sequence.num_cached_tokens)

    def drop(self, client: Client) -> None:
        """Abort all sequences of a client, and forget what was to be told to it."""
        for key in [*self._live, *self._compiling]:
            if key[0] == client:
                self._forget(key)
        self._outboxes.pop(client, None)

    def _forget(self, key: Key) -> None:
        sequence = self._live.pop(key, None)
        if sequence is not None:
            self._scheduler.abort(sequence)
        self._constrained.pop(key, None)
        _, compiling = self._compiling.pop(key, (None, None))
        if compiling is not None:
            compiling.cancel()

    def _check(self, request: Request) -> None:
        """Raise InvalidField for a token id that the model does not have."""
        sampling = request.sampling
        self._check_ids("input_ids", request.prompt)
        self._check_ids("stop_token_ids", sampling.stop_token_ids)
        self._check_ids("logit_bias", list(sampling.logit_bias))
        for words in request.bad_words:
            self._check_ids("bad_words", words)

    def _check_ids(self, field: str, ids: list[int] | tuple[int, ...]) -> None:
        vocab = self.info.vocab_size
        if ids and not (min(ids) >= 0 and max(ids) < vocab):
            bad = next(id for id in ids if not 0 <= id < vocab)
            raise InvalidField(field, f"token id {shown(bad)} is outside [0, {vocab - 1}]")

    def _admit(self, key: Key, request: Request, constraint: Constraint | None) -> None:
        sequence = Sequence(key, request.prompt, request.sampling, request.seed, constraint)
        try:
            self._scheduler.add(sequence)
        except Refused as refused:
            self._refuse(key, refused.status, refused.message)
            return
        self._live[key] = sequence
        if constraint is not None:
            self._constrained[key] = constraint

    def _admit_compiled(self) -> None:
        if not self._scheduler.has_work and not self._outboxes:
            futures = [future for _, future in self._compiling.values()]
            wait(futures, COMPILE_WAIT_S, FIRST_COMPLETED)
        for key, (request, future) in list(self._compiling.items()):
            if not future.done():
                continue
            del self._compiling[key]
            error = future.exception()
            if error is None:
                self._admit(key, request, future.result())
            elif isinstance(error, InvalidField):
                self._refuse(key, "invalid", str(error))
            else:
                log.error("a grammar could not be compiled", exc_info=error)
                self._refuse(key, "internal", "structured_outputs: the grammar compiler failed.")

    def _refuse(self, key: Key, status: Status, message: str) -> None:
        client, id = key
        finish = Finish("error", status=status, message=message)
        self._outboxes[client].finished[id] = finish

    # ------------------------------------------------------------ steps

    def step(self) -> dict[Client, Outputs]:
        """One turn: plan and launch a step if the deque has room, take in the oldest if not.

        Returns what is new for each client. Never raises for a failed step: it fails the live
        sequences instead, and the engine goes on unless it is `broken` then.
        """
        if self._compiling:
            self._admit_compiled()
        try:
            plan = self._scheduler.schedule() if len(self._launched) < self._depth else None
            if self._constrained:  # before the plan's token for them can count as theirs
                self._fail_constrained()
            if plan is not None:
                self._launched.append(self._runner.launch(plan))
            if self._launched and (plan is None or len(self._launched) >= self._depth):
                self._sort(self._scheduler.commit(self._launched.popleft().wait()))
                self._failed_steps = 0
        except BaseException as error:  # whatever a kernel or a worker raises
            self._fail(error)
            if not isinstance(error, Exception):  # Ctrl-C: ours to survive, not to swallow
                raise
            self._judge(error)
        outboxes, self._outboxes = self._outboxes, defaultdict(_nothing)
        return dict(outboxes)

    def watch(self) -> None:
        """Between steps: find out whether the runner has died. Then the engine is `broken`."""
        try:
            self._runner.check()
        except GroupLost as error:
            self._fail(error)
            self._judge(error)

    def _sort(self, committed: Committed) -> None:
        """Put the results of one step into the outboxes of their clients."""
        outboxes = self._outboxes
        for sequence, token in committed.tokens:
            client, id = sequence.key
            outbox = outboxes[client]
            outbox.ids.append(id)
            outbox.tokens.append(token)
        for sequence, entry in committed.logprobs:
            client, id = sequence.key
            outboxes[client].logprobs[id] = entry
        for sequence, entries in committed.prompt_logprobs:
            client, id = sequence.key
            outboxes[client].prompt_logprobs[id] = entries
        for sequence, finish in committed.finished:
            client, id = sequence.key
            outboxes[client].finished[id] = finish
            self._live.pop(sequence.key)
            self._constrained.pop(sequence.key, None)

    def _fail(self, error: BaseException) -> None:
        """Fail every live sequence after a step that raised, and begin anew."""
        log.error("a step failed; %d sequences fail with it", len(self._live), exc_info=error)
        self._scheduler.reset()
        self._launched.clear()
        why = str(error) if isinstance(error, GroupLost) else type(error).__name__
        message = f"The engine failed in a step that computed this request ({why})."
        for key in self._live:
            self._refuse(key, "internal", message)
        self._live.clear()
        self._constrained.clear()

    def _judge(self, error: Exception) -> None:
        """After a failed step: whether to go on. If not, what waits for a grammar fails too."""
        self._failed_steps += 1
        kind = type(error).__name__
        if isinstance(error, GroupLost):
            self.broken = str(error)
        elif not self._runner.is_alive():
            self.broken = f"the engine's device can compute nothing any more ({kind})"
        elif self._failed_steps >= MAX_FAILED_STEPS:
            self.broken = f"{self._failed_steps} steps of the engine failed in a row ({kind})"
        if self.broken is not None:
            for key in list(self._compiling):
                self._forget(key)
                self._refuse(key, "unavailable", self.broken)

    def _fail_constrained(self) -> None:
        broken = [(key, c.error) for key, c in self._constrained.items() if c.error is not None]
        for key, message in broken:
            self._forget(key)
            self._refuse(key, "invalid", str(message))

    # ------------------------------------------------------------ state

    @property
    def has_work(self) -> bool:
        """Whether step() has anything to do or to tell."""
        return self._scheduler.has_work or bool(self._compiling or self._outboxes)

    def stats(self) -> Stats:
        stats = self._scheduler.stats()
        return msgspec.structs.replace(stats, waiting=stats.waiting + len(self._compiling))

    def check_integrity(self) -> None:
        """Raise IntegrityError with a sentence if the bookkeeping contradicts itself."""
        self._scheduler.check_integrity()
        if len(self._launched) != self._scheduler.num_in_flight:
            raise IntegrityError("The engine and the scheduler disagree on the plans in flight.")
        for key, sequence in self._live.items():
            if sequence.queue is None:
                raise IntegrityError(f"Sequence {key} is live but not scheduled.")
        if not self._constrained.keys() <= self._live.keys():
            raise IntegrityError("A constraint has outlived its sequence.")

    def close(self) -> None:
        """End all sequences. The model's memory is freed with this object. Idempotent."""
        for key in [*self._live, *self._compiling]:
            self._forget(key)
        self._launched.clear()
        self._outboxes.clear()
        self._grammars.close()
        self._runner.close()
        gc.unfreeze()


def _nothing() -> Outputs:
    return Outputs([], [])


def _check_len(config: EngineConfig, arch: Model) -> None:
    if (config.max_model_len or 0) > arch.max_len:
        raise ConfigError(
            f"max_model_len: {config.max_model_len} is more than the {arch.max_len} tokens this "
            "model was trained for"
        )


def _model_len(config: EngineConfig, arch: Model, num_pages: int) -> int:
    """Tokens a sequence may have: what was asked for, else what the model and the cache can do."""
    if config.max_model_len is not None:
        return config.max_model_len
    capacity = num_pages * config.page_size
    if capacity < arch.max_len:
        log.warning(
            "the KV cache holds %d tokens, so sequences are limited to them; the model was trained "
            "for %d (kv_cache_gib, num_pages)", capacity, arch.max_len
        )  # fmt: skip
    return min(arch.max_len, capacity)


def _make_runner(config: EngineConfig, arch: Model) -> StepRunner:
    if config.device == "none":
        return NullRunner(arch.vocab, config.num_pages)
    check_shards(config, arch)
    if config.num_ranks > 1:
        return WorkerGroup(config)
    return load_runner(config, arch, device_of(config))


def fill_caches(config: EngineConfig) -> tuple[Path, ...]:
    """Compile every kernel that an engine of this configuration needs; returns where they are.

    Of the model only config.json is read. Goes the way of a start, with one layer of each kind and
    weights made up. Raises ConfigError where there is no GPU, and what Engine raises.
    """
    if device_of(config).type != "cuda":
        raise ConfigError(
            "device: kernels are compiled on the GPU they are for; there is none here that torch "
            "finds, or the [gpu] extra is not installed"
        )
    config = msgspec.structs.replace(config, load_format="dummy", num_pages=_PAGES_TO_COMPILE)
    arch = read_arch(Path(config.model))
    _check_len(config, arch)
    kinds = replace(arch, layers=tuple(dict.fromkeys(arch.layers)))
    load_runner(settle(config, on_gpu=True), kinds, device_of(config))
    return cache_dirs()
