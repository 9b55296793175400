"""The engine: takes requests, launches plans on the runner, returns tokens for each front end.

Owns the live sequences and the plans in flight. Runs on one thread. Knows nothing of text, sockets
or processes. Imports torch only for an engine that loads a model.
"""

from __future__ import annotations

import logging
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

import msgspec
import zmq

from gllm_engine.arch import Model, cache_groups, check_unknown_keys, read_arch
from gllm_engine.config import ConfigError, EngineConfig, settle
from gllm_engine.engine.check_images import check_images
from gllm_engine.engine.null_runner import NullRunner
from gllm_engine.sampling import InvalidField, shown
from gllm_engine.sched import (
    Amount,
    Committed,
    ImageCache,
    IntegrityError,
    Policy,
    Refused,
    Room,
    Scheduler,
    Sequence,
    SequenceKey,
    capacity,
    make_groups,
)
from gllm_engine.text.constraints import Constraint, Grammars
from gllm_engine.timeline import (
    OFF,
    NoRecorder,
    Recorder,
    Timeline,
    activity,
    check_writable,
)
from gllm_engine.types import (
    Finish,
    ImagePixels,
    LandingHandle,
    ModelInfo,
    Outputs,
    RankSpans,
    Request,
    Stats,
    Status,
    StepPlan,
    StepResult,
)
from gllm_engine.workers.encoders import Encoders, Landed
from gllm_engine.workers.group import StepRefused, WorkerGroup
from gllm_engine.workers.meeting import GroupLost

# If all sequences wait for images, step() waits so long for one and returns.
IMAGE_WAIT_MS = 5
# If compiling grammars are the only work, step() waits this long for one and returns.
COMPILE_WAIT_S = 0.005
# After this many consecutive failed steps the engine is broken.
MAX_FAILED_STEPS = 3

# The compiled kernels do not depend on the number of pages.
_PAGES_TO_COMPILE = 64

# The errors and step handles of a lost device, never freed. An error's frames hold pinned memory;
# freeing it calls the device and aborts the process, which with LLM is the user's process.
_WRECKAGE: list[tuple[BaseException, list[StepHandle]]] = []

log = logging.getLogger(__name__)

Client = bytes  # a front end's name on the engine's socket, which is never empty
IN_PROCESS: Client = b""  # the client of an engine that is called without a socket


class StepHandle(Protocol):
    """A launched step."""

    def wait(self) -> StepResult: ...


class StepRunner(Protocol):
    """Runs plans strictly in the order of launch."""

    num_pages: int
    num_snapshots: int  # of states; 0 if the model keeps none

    def launch(self, plan: StepPlan) -> StepHandle: ...

    def put_images(self, images: list[ImagePixels]) -> None:
        """Take the images that the next plan encodes."""
        ...

    @property
    def landings(self) -> list[LandingHandle]:
        """Where encoders write embeddings: a landing of each rank of the first stage, if there are
        encoders.
        """
        ...

    def land(self, place: int, embeddings: bytes) -> None:
        """Put what an encoder of another machine has made into the landings, before a next plan."""
        ...

    def is_alive(self) -> bool:
        """Whether the runner can run another plan after a failed one."""
        ...

    def check(self) -> None:
        """Raise the error that the next launch would raise, if it is known already. Cheap."""
        ...

    def spans(self) -> list[RankSpans]:
        """The timelines of the ranks that have recorders of their own."""
        ...

    def close(self) -> None:
        """Free the runner's resources; it is not used again."""
        ...


class EngineBroken(RuntimeError):
    """The engine cannot run another step; the message says why."""


class Engine:
    """One model, its scheduler and its runner. Clients are the names of front ends.

    `broken`: None, or why no step can succeed any more; the caller must then close the engine.

    A sequence is live from add() until its Finish is in the outputs of a step, or until abort()
    or drop(). After that no output for the sequence follows.
    """

    def __init__(
        self,
        config: EngineConfig,
        make_runner: Callable[[EngineConfig, Model], StepRunner] | None = None,
        policy: Policy | None = None,
        make_encoders: Callable[[EngineConfig, Model, StepRunner], Encoders] | None = None,
    ) -> None:
        """Load the model. Raises ConfigError, ArchError, LoadError or GroupLost.

        `make_runner`: makes the runner, in place of one that loads `config.model`. `policy`:
        replaces the schedule policy that the configuration names. `make_encoders`: makes encoders
        in place of processes.
        """
        arch = read_model(config)
        config = settle(config, _gpu_memory(config), arch.state_bytes)
        check_len(config, arch)
        self._config = config
        self._arch = arch
        self._recorder = OFF if config.timeline is None else Recorder()
        self._timeline = config.timeline  # None: it is not wanted, or it has been written
        if config.timeline is not None:
            check_writable(config.timeline)
        # First, because the tokenizer loads on the grammar thread while the model loads.
        tokenizer = Path(config.tokenizer or config.model)
        self._grammars = Grammars(tokenizer, arch.vocab, arch.eos_token_ids)
        make_runner = make_runner or partial(_make_runner, recorder=self._recorder)
        self._runner = make_runner(config, arch)
        self._start_encoders(make_encoders or _make_encoders)
        self._images = _make_image_cache(config, arch)
        kinds = cache_groups(arch, config.max_model_len or arch.max_len)
        groups = make_groups(kinds, config, self._runner.num_pages)
        max_model_len = model_len(config, arch, capacity(groups, arch.max_len))
        # This wait is short: the model takes longer to load than the tokenizer.
        eos_token_ids = self._grammars.eos_token_ids
        self._scheduler = Scheduler(
            config,
            self._runner.num_pages,
            max_model_len,
            eos_token_ids,
            policy,
            groups,
            self._runner.num_snapshots if arch.keeps_states else None,
            self._images,
        )
        self.info = ModelInfo(
            vocab_size=arch.vocab,
            max_model_len=max_model_len,
            num_pages=self._runner.num_pages,
            page_size=config.page_size,
            eos_token_ids=eos_token_ids,
        )
        self._depth = config.plans_in_flight
        self._room = Room(config.max_waiting, config.max_waiting_tokens, config.image_bytes)
        self._failed_steps = 0  # since the last successful step
        self.broken: str | None = None
        self._launched: deque[StepHandle] = deque()
        self._live: dict[SequenceKey, Sequence] = {}
        self._constrained: dict[SequenceKey, Constraint] = {}
        self._compiling: dict[SequenceKey, tuple[Request, Future[Constraint]]] = {}
        self._outboxes: defaultdict[Client, Outputs] = defaultdict(_nothing)

    def _start_encoders(self, make: Callable[[EngineConfig, Model, StepRunner], Encoders]) -> None:
        self._encoders: Encoders | None = None
        self._poller = zmq.Poller()  # of the encoders' sockets
        self._is_idle = False  # there is no step to run before something comes
        if not self._config.encoder_workers:
            return
        try:
            self._encoders = make(self._config, self._arch, self._runner)
        except BaseException:
            self._runner.close()
            raise
        for socket in self._encoders.sockets():
            self._poller.register(socket, zmq.POLLIN)

    # ------------------------------------------------------------ requests

    def add(self, request: Request, client: Client = IN_PROCESS) -> None:
        """Take a request. A refused request gets its error in the next step's outputs."""
        key = (client, request.id)
        if key in self._live or key in self._compiling:
            self._refuse(key, "invalid", f"A sequence with id {request.id} is already live.")
            return
        if self.broken is not None:
            self._refuse(key, "unavailable", self.broken)
            return
        try:
            self._take(key, request)
        except InvalidField as error:
            self._refuse(key, "invalid", str(error))
        except Exception:  # a bug that one request triggers must not fail the others
            log.exception("a request could not be taken")
            self._forget(key)
            self._refuse(key, "internal", "The engine failed on this request, see the log.")

    def _take(self, key: SequenceKey, request: Request) -> None:
        self._check(request)
        full = self._too_many_pixels([request])
        if full is not None:
            self._refuse(key, "unavailable", full)
            return
        constraint = self._grammars.constrain(request)
        if not isinstance(constraint, Future):
            self._admit(key, request, constraint)
            return
        tenant = request.sampling.tenant
        own = self._compiling_of(tenant)
        more = Amount(1, len(request.prompt))
        full = self._room.refusal(tenant, own, self._compiling_of(None), more)
        if full is None:
            self._compiling[key] = request, constraint
        else:
            constraint.cancel()
            self._refuse(key, "unavailable", f"{full}; these wait for their grammars")

    def _compiling_of(self, tenant: str | None) -> Amount:
        """The requests of a tenant, or of all, that wait for their grammars."""
        requests = [request for request, _ in self._compiling.values()]
        lengths = [len(r.prompt) for r in requests if tenant in (None, r.sampling.tenant)]
        return Amount(len(lengths), sum(lengths))

    def _too_many_pixels(self, requests: list[Request]) -> str | None:
        """Why the engine may not hold the images of these requests of a tenant, too; else None.

        A live sequence keeps its pixels, because it computes them again after a preemption.
        """
        if not any(request.images for request in requests):
            return None
        tenant = requests[0].sampling.tenant
        compiling = [request for request, _ in self._compiling.values()]
        live: list[Request | Sequence] = [*self._live.values(), *compiling]
        own = [each for each in live if each.sampling.tenant == tenant]
        held = _pixels_of(own)
        more = _pixels_of([*own, *requests]) - held
        return self._room.refusal(
            tenant, Amount(pixels=held), Amount(pixels=_pixels_of(live)), Amount(pixels=more)
        )

    def has_room(self, requests: list[Request]) -> bool:
        """Whether the queue has room now for these requests, all of one tenant."""
        if self._too_many_pixels(requests) is not None:
            return False
        stats = self.stats()
        tokens = sum([len(request.prompt) for request in requests])
        for tenant in {request.sampling.tenant for request in requests}:
            own = self._scheduler.waiting_of(tenant).plus(self._compiling_of(tenant))
            total = Amount(stats.waiting, stats.waiting_tokens)
            if self._room.refusal(tenant, own, total, Amount(len(requests), tokens)) is not None:
                return False
        return True

    def abort(self, id: int, client: Client = IN_PROCESS) -> None:
        """End a sequence now and free its pages. Has no effect on an ended sequence."""
        self._forget((client, id))

    def drop(self, client: Client) -> None:
        """Abort all sequences of a client, and discard its unsent outputs."""
        for key in [*self._live, *self._compiling]:
            if key[0] == client:
                self._forget(key)
        self._outboxes.pop(client, None)

    def _forget(self, key: SequenceKey) -> None:
        sequence = self._live.pop(key, None)
        if sequence is not None:
            self._scheduler.abort(sequence)
            self._order_images()
            self._is_idle = False
        self._constrained.pop(key, None)
        _, compiling = self._compiling.pop(key, (None, None))
        if compiling is not None:
            compiling.cancel()

    def _check(self, request: Request) -> None:
        """Raise InvalidField for a token id that the model does not have, and for an image that is
        not what the model takes.
        """
        sampling = request.sampling
        self._check_ids("input_ids", request.prompt)
        self._check_ids("stop_token_ids", sampling.stop_token_ids)
        self._check_ids("allowed_token_ids", sampling.allowed_token_ids)
        self._check_ids("logit_bias", list(sampling.logit_bias))
        for words in request.bad_words:
            self._check_ids("bad_words", words)
        check_images(request, self._arch)

    def _check_ids(self, field: str, ids: list[int] | tuple[int, ...]) -> None:
        vocab = self.info.vocab_size
        if ids and not (min(ids) >= 0 and max(ids) < vocab):
            bad = next(id for id in ids if not 0 <= id < vocab)
            raise InvalidField(field, f"token id {shown(bad)} is outside [0, {vocab - 1}]")

    def _admit(self, key: SequenceKey, request: Request, constraint: Constraint | None) -> None:
        sequence = Sequence(
            key, request.prompt, request.sampling, request.seed, constraint, request.images
        )
        try:
            self._scheduler.add(sequence)
        except Refused as refused:
            self._refuse(key, refused.status, refused.message)
            return
        self._live[key] = sequence
        self._is_idle = False
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

    def _refuse(self, key: SequenceKey, status: Status, message: str) -> None:
        client, id = key
        finish = Finish("error", status=status, message=message)
        self._outboxes[client].finished[id] = finish

    # ------------------------------------------------------------ steps

    def step(self) -> dict[Client, Outputs]:
        """Launch the next plan if fewer than `plans_in_flight` steps are in flight.

        Then, if no plan was launched or that number is reached, wait for the oldest step and commit
        its result. Returns the new outputs of each client. A failed step does not raise: it fails
        the live sequences, and the engine goes on unless it is now `broken`. Also does what watch()
        does.
        """
        self._recorder.mark(activity.PLAN)
        if self._compiling:
            self._admit_compiled()
        if self.awaits_images:
            self._poller.poll(IMAGE_WAIT_MS)
        try:
            self._hear_encoders()
            plan = self._scheduler.schedule() if len(self._launched) < self._depth else None
            self._is_idle = plan is None and not self._launched
            if self._is_idle:
                self._runner.check()
            if self._constrained:  # before the plan can sample a token for a failed constraint
                self._fail_constrained()
            self._order_images()
            if plan is not None:
                self._recorder.mark(activity.DISPATCH, plan.step)
                if plan.encode:
                    self._runner.put_images(self._scheduler.to_encode)
                self._launched.append(self._runner.launch(plan))
            if self._launched and (plan is None or len(self._launched) >= self._depth):
                self._recorder.mark(activity.AWAIT_RESULT)
                result = self._launched.popleft().wait()
                self._recorder.mark(activity.COMMIT, result.step)
                self._sort(self._scheduler.commit(result))
                self._order_images()
                self._failed_steps = 0
        except BaseException as error:  # any error of a kernel or a worker
            self._fail(error)
            if not isinstance(error, Exception):  # Ctrl-C: clean up, then pass it on
                raise
        outboxes = self._outboxes
        self._outboxes = defaultdict(_nothing)
        self._recorder.mark(activity.BETWEEN_STEPS if self._live else activity.NO_WORK)
        return dict(outboxes)

    def watch(self) -> None:
        """Check whether the runner has died; then the engine is `broken`. Also looks after the
        encoders, for which this or step() is called at least every 100 ms.
        """
        try:
            self._runner.check()
            self._hear_encoders()
        except GroupLost as error:
            self._fail(error)

    def _hear_encoders(self) -> None:
        """Take what encoders have done."""
        if self._encoders is None or self._images is None:
            return
        with self._in_one_go():
            for event in self._encoders.poll():
                self._is_idle = False
                if isinstance(event, Landed):
                    self._images.landed(event.number, event.place)
                    continue
                for sequence in self._scheduler.not_landed(event.number):
                    self._forget(sequence.key)
                    self._refuse(sequence.key, "internal", f"image: not encoded: {event.message}")

    def _order_images(self) -> None:
        """Tell encoders what the scheduler wants of them."""
        if self._encoders is None or self._images is None:
            return
        with self._in_one_go():
            orders = self._images.take_orders()
            for number in orders.cancel:
                self._encoders.cancel(number)
            self._encoders.release(orders.release)
            for image in orders.encode:
                self._encoders.submit(image)

    @contextmanager
    def _in_one_go(self) -> Iterator[None]:
        """The engine is broken after an interrupt: a place in the landing may be lost."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            self.broken = "the engine was interrupted in an exchange with its encoders"
            raise

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
        for sequence in committed.begun:
            client, id = sequence.key
            outboxes[client].admitted_at[id] = sequence.admitted_at
            if sequence.num_cached_tokens:
                outboxes[client].num_cached_tokens[id] = sequence.num_cached_tokens
        for sequence, finish in committed.finished:
            client, id = sequence.key
            outboxes[client].finished[id] = finish
            self._live.pop(sequence.key)
            self._constrained.pop(sequence.key, None)

    def _fail(self, error: BaseException) -> None:
        """Fail every live sequence after a failed step, and reset the scheduler.

        The engine is `broken` after a fatal error; requests that wait for a grammar then fail too.
        """
        log.error("a step failed; %d sequences fail with it", len(self._live), exc_info=error)
        self._scheduler.reset()
        self._order_images()
        # Asked once: a device may die between two answers.
        is_device_lost = not isinstance(error, GroupLost) and not self._runner.is_alive()
        if is_device_lost:
            _WRECKAGE.append((error, list(self._launched)))
        self._launched.clear()
        # Only these errors are written for users. The text of other errors goes to the log alone.
        told = isinstance(error, (GroupLost, StepRefused))
        why = str(error) if told else type(error).__name__
        message = f"The engine failed in a step that computed this request ({why})."
        for key in self._live:
            self._refuse(key, "internal", message)
        self._live.clear()
        self._constrained.clear()
        if isinstance(error, Exception):  # Ctrl-C says nothing about the runner
            self._judge(error, is_device_lost)

    def _judge(self, error: Exception, is_device_lost: bool) -> None:
        self._failed_steps += 1
        kind = type(error).__name__
        if isinstance(error, GroupLost):
            self.broken = str(error)
        elif is_device_lost:
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
        """Whether step() has a step to run or outputs to return."""
        return self._scheduler.has_work or bool(self._compiling or self._outboxes)

    @property
    def awaits_images(self) -> bool:
        """Whether step() has nothing to do before an image is encoded, or something else comes."""
        has_news = self._compiling or self._outboxes
        return self._encoders is not None and self._is_idle and not has_news

    def sockets(self) -> list[zmq.Socket[bytes]]:
        """They have something when step() may have more to do."""
        return [] if self._encoders is None else self._encoders.sockets()

    def stats(self) -> Stats:
        stats = self._scheduler.stats()
        encoders = None if self._encoders is None else self._encoders.stats()
        return msgspec.structs.replace(
            stats,
            waiting=stats.waiting + len(self._compiling),
            waiting_tokens=stats.waiting_tokens + self._compiling_of(None).tokens,
            encoders=encoders.encoders if encoders else 0,
            stuck_encoders=encoders.stuck if encoders else 0,
        )

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

    def timeline(self) -> Timeline:
        """The latest steps on all ranks; without the key `timeline` nothing is recorded."""
        return Timeline(self._config, self._recorder.spans(0), self._runner.spans())

    def _write_timeline(self, path: str) -> None:
        timeline = self.timeline()
        if timeline.missing:
            log.warning("the timeline lacks ranks %s, which do not answer", timeline.missing)
        try:
            summary = timeline.write(path)
        except OSError as error:
            log.error("timeline: %s cannot be written (%s)", path, error.strerror)
            return
        rows = [" | ".join(row) for rows in summary.tables() for row in rows]
        log.info("the timeline is in %s\n%s", path, "\n".join(rows))

    def close(self) -> None:
        """End all sequences. The model's memory is freed with this object. Idempotent."""
        if self._timeline is not None:
            self._write_timeline(self._timeline)
            self._timeline = None
        for key in [*self._live, *self._compiling]:
            self._forget(key)
        self._launched.clear()
        self._outboxes.clear()
        self._grammars.close()
        if self._encoders is not None:
            self._encoders.close()
        self._runner.close()


def _pixels_of(live: list[Request | Sequence]) -> int:
    """Bytes of their images. Requests of one message share equal ones."""
    pixels = [image.pixels for each in live for image in each.images]
    return sum({id(each): len(each) for each in pixels}.values())


def _nothing() -> Outputs:
    return Outputs([], [])


def read_model(config: EngineConfig) -> Model:
    """The description of the model in config.model.

    Raises ArchError if it is not supported, or config.ignored_config_keys does not name exactly the
    unknown keys of its config.json.
    """
    path = Path(config.model)
    arch = read_arch(path)
    check_unknown_keys(arch.unknown_keys, config.ignored_config_keys, path / "config.json")
    return arch


def _gpu_memory(config: EngineConfig) -> int | None:
    """See memory_of_gpu."""
    if config.device in ("cpu", "none"):
        return None
    from gllm_engine.workers.build_runner import memory_of_gpu  # imported late: imports torch

    return memory_of_gpu(config)


def check_len(config: EngineConfig, arch: Model) -> None:
    """Raise ConfigError if sequences may be longer than the model allows."""
    if (config.max_model_len or 0) > arch.max_len:
        raise ConfigError(
            f"max_model_len: {config.max_model_len} is more than the {arch.max_len} tokens this "
            "model was trained for"
        )


def model_len(config: EngineConfig, arch: Model, capacity: int) -> int:
    """Tokens of the longest sequence: as configured, else the `capacity` of the cache, which is at
    most the model's length.
    """
    if config.max_model_len is not None:
        return config.max_model_len
    if capacity < arch.max_len:
        log.warning(
            "the KV cache holds %d tokens, so sequences are limited to them; the model was trained "
            "for %d (kv_cache_gib, num_pages)",
            capacity,
            arch.max_len,
        )
    return capacity


def _make_runner(config: EngineConfig, arch: Model, recorder: NoRecorder) -> StepRunner:
    """`recorder`: of this process, for a model that runs in it."""
    if config.device == "none":
        return NullRunner(arch.vocab, config)
    from gllm_engine.workers.build_runner import (
        check_encoder_gpus,
        check_shards,
        device_of,
        load_runner,
    )

    check_shards(config, arch)
    device = device_of(config)
    check_encoder_gpus(config, device)
    if config.num_ranks > 1:
        return WorkerGroup(config, arch)
    return load_runner(config, arch, device, None, recorder)


def _make_image_cache(config: EngineConfig, arch: Model) -> ImageCache | None:
    if arch.vision is None:
        return None
    return ImageCache(config, arch.max_len if arch.has_sections else 0)


def _make_encoders(config: EngineConfig, arch: Model, runner: StepRunner) -> Encoders:
    return Encoders(config, arch, runner.landings, runner.land)


def fill_caches(config: EngineConfig) -> tuple[Path, ...]:
    """Compile every kernel that an engine of this configuration needs; returns the cache dirs.

    Builds a runner as a start does, with random weights and one layer of each kind. Reads only the
    model's config.json. Raises ConfigError without a GPU, and the errors of Engine.
    """
    from gllm_engine.runner import cache_dirs  # imported late, as torch is
    from gllm_engine.workers.build_runner import device_of, load_runner, memory_of_gpu

    memory = memory_of_gpu(config)
    if memory is None:
        raise ConfigError(
            "device: kernels are compiled on the GPU they are for; there is none here that torch "
            "finds, or the [gpu] extra is not installed"
        )
    config = msgspec.structs.replace(
        config, load_format="dummy", num_pages=_PAGES_TO_COMPILE, encoder_workers=0
    )
    arch = read_model(config)
    check_len(config, arch)
    kinds = replace(arch, layers=tuple(dict.fromkeys(arch.layers)))
    load_runner(settle(config, memory, arch.state_bytes), kinds, device_of(config))
    return cache_dirs()
