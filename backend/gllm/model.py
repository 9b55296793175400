"""The model class that Triton's Python stub runs: passes requests to the engine client, and the
engine's outputs to the streams.

No engine code runs in the stub, because a busy thread delays the response senders, and Triton never
restarts a dead stub. Owns the lifetimes of the threads, and the mapping from sequences to streams.
Heavy imports are in `initialize`, because Triton calls `auto_complete_config` in a short-lived
process of its own.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton_python_backend_utils as pb_utils

from gllm_backend.gllm.metrics import Metrics
from gllm_backend.gllm.request import INPUTS, OUTPUTS, ParsedRequest, parse_request
from gllm_backend.gllm.response import Arrival, Choice, Result, Sender, Stream
from gllm_engine import Image, InvalidField, Outputs, Video, __version__, shorten

if TYPE_CHECKING:
    from gllm_engine import ImageShare

SWEEP_S = 0.05  # between two checks for cancelled and overdue requests
SWEEP_SHARE = 4  # the pause after a sweep is at least this many times as long as the sweep
IMAGE_REQUESTS = 8  # whose images are loaded at a time
WAITING_REQUESTS = 32  # the same of those with images from other servers, and of those with videos
MAX_TOKEN_IDS = 1 << 20  # of input_ids that are only counted or turned into text
CLOSE_S = 10.0  # the longest wait for a thread to end
SWITCH_S = 1e-4  # Python's thread switch interval: a busy thread must not delay the senders
# config.pbtxt parameters; the names of the last two are the vLLM backend's.
DEFAULTS = {
    "sender_threads": "2",
    "coalesce": "true",
    "REPORT_CUSTOM_METRICS": "true",
    "ENABLE_VLLM_HEALTH_CHECK": "false",
}
# Parameters that Triton's Python backend itself reads.
OTHERS = ("EXECUTION_ENV_PATH", "FORCE_CPU_ONLY_INPUT_TENSORS")


class TritonPythonModel:
    """One front end (Triton: one model instance). All front ends of a model share its engine."""

    @staticmethod
    def auto_complete_config(auto_complete_model_config: Any) -> Any:
        """Declare the tensors, so that config.pbtxt needs three lines."""
        config = auto_complete_model_config
        for name, (kind, dims) in INPUTS.items():
            config.add_input({"name": name, "data_type": kind, "dims": dims, "optional": True})
        for name, (kind, dims) in OUTPUTS.items():
            config.add_output({"name": name, "data_type": kind, "dims": dims})
        config.set_model_transaction_policy({"decoupled": True})
        config.set_max_batch_size(0)
        return config

    def initialize(self, args: dict[str, str]) -> None:
        """Start or join the engine. Raises an error with one sentence if the model cannot load."""
        from gllm_engine import (
            EngineClient,
            EngineUnavailable,
            ImageLoader,
            ImageMemory,
            Tokenizer,
            describe_checkpoint,
            end_with_parent,
            read_config,
        )

        # When the server is killed, a stub would hang in its next call to the server.
        end_with_parent()
        self._unavailable = EngineUnavailable
        name = args["model_name"]
        version = args["model_version"]
        threads, coalesce, measure, check = _parameters(json.loads(args["model_config"]))
        self._name = name
        self._unloads_unhealthy = check
        sys.setswitchinterval(SWITCH_S)
        self.config = read_config(Path(args["model_repository"]) / version / "model.json")
        self.tokenizer = Tokenizer(Path(self.config.tokenizer or self.config.model))
        if self.tokenizer.chat_template is not None:
            self.tokenizer.chat_template.start()
        self.images = ImageLoader(self.config, self.tokenizer)
        self._description = describe_checkpoint(
            Path(self.config.model), self.tokenizer, self.images.modalities
        )
        self._chats = ThreadPoolExecutor(1, thread_name_prefix="chats")
        # Requests with images wait in a thread each, apart by what they wait for: see `awaited`.
        numbers = {None: IMAGE_REQUESTS, "server": WAITING_REQUESTS, "video": WAITING_REQUESTS}
        self._with_images = {
            awaited: ThreadPoolExecutor(number, "images") for awaited, number in numbers.items()
        }
        self.image_memory = ImageMemory(self.config.image_bytes)
        self._lock = threading.Lock()  # guards the two below
        self.live: set[Stream] = set()
        self._sequences: dict[int, tuple[Stream, int]] = {}  # sequence id -> stream, index
        self._ids = count()
        self._turns = count()
        self._stopping = threading.Event()
        self.senders = [Sender(f"sender-{i}", coalesce) for i in range(threads)]
        self.metrics = Metrics(name, version, pb_utils.Logger.log_warn, measure)
        self.client = EngineClient(
            self.config,
            scope=f"{name}/{version}",
            instance=args["model_instance_name"],
            on_outputs=self._on_outputs,
            on_stats=self.metrics.engine,
            on_lost=self._on_lost,
        )
        if self.tokenizer.chat_template is not None:
            self.tokenizer.chat_template.warm_up()
        self._sweeper = threading.Thread(target=self._sweep, name="sweep", daemon=True)
        self._sweeper.start()

    def execute(self, requests: list[Any]) -> None:
        """Check, tokenize and submit each request; the sender threads send the responses."""
        for request in requests:
            stream = Stream(
                request.request_id(),
                request.get_response_sender(),
                self.senders[next(self._turns) % len(self.senders)],
                self.tokenizer,
                self.client.abort,
                self._on_end,
                self._on_close,
            )
            with self._lock:
                self.live.add(stream)
            self._take(stream, request)

    def is_ready(self) -> bool:
        """Whether the engine takes requests now. Triton 26.03 and later call it for readiness."""
        return self.client.trouble is None

    def _unload(self, reason: str) -> None:
        """Unload the model because its engine is lost, as the vLLM backend does if configured."""
        pb_utils.Logger.log_error(f"model {self._name} is unloaded, it has no engine: {reason}")
        try:
            pb_utils.unload_model(self._name)
        except Exception:  # the server's model control mode is not explicit
            problem = traceback.format_exc()
            pb_utils.Logger.log_error(f"model {self._name} cannot be unloaded\n{problem}")

    def finalize(self) -> None:
        """Wait `drain_timeout_s` for running requests, fail the rest, and end all threads."""
        limit = time.monotonic() + self.config.drain_timeout_s
        while self.live and time.monotonic() < limit:
            time.sleep(0.01)
        self._chats.shutdown(cancel_futures=True)
        for pool in self._with_images.values():
            pool.shutdown(wait=False, cancel_futures=True)
        for stream in self._snapshot():
            stream.fail("unavailable", "the model is being unloaded")
        for sender in self.senders:
            sender.close(CLOSE_S)
        self._stopping.set()
        self._sweeper.join(CLOSE_S)
        self.images.close()
        self.client.close()
        self.metrics.close(CLOSE_S)

    # ------------------------------------------------------------ a request's beginning

    def _take(self, stream: Stream, request: Any) -> None:
        with self._failing(stream):
            parsed = parse_request(request, self.images.texts)
            stream.begin(parsed)
            if parsed.images:
                self._queue_images(stream, parsed)
            elif parsed.kind == "messages":
                # A chat template may take seconds; requests without one must not wait for it.
                self._chats.submit(self._start_later, stream, parsed)
            else:
                self._start(stream, parsed)

    def _queue_images(self, stream: Stream, parsed: ParsedRequest) -> None:
        from gllm_engine import ImageShare

        self.images.check(parsed.images)
        pool = self._with_images[self.images.awaited(parsed.images)]
        # Messages may name anything as an image; loading it says so.
        inner = (image.source if isinstance(image, Video) else image for image in parsed.images)
        size = sum(len(image) for image in inner if isinstance(image, bytes | str))
        share = ImageShare(self.image_memory)
        share.reserve(size)
        pool.submit(self._start_later, stream, parsed, share).add_done_callback(
            lambda _: share.close()
        )

    def _start_later(
        self, stream: Stream, parsed: ParsedRequest, share: ImageShare | None = None
    ) -> None:
        with self._failing(stream):
            if stream.failure is None:  # else the request was cancelled or failed meanwhile
                self._start(stream, parsed, share)

    @contextmanager
    def _failing(self, stream: Stream) -> Iterator[None]:
        """Turn an exception in the block into a failure of this stream alone."""
        try:
            yield
        except InvalidField as error:
            stream.fail("invalid", str(error))
        except self._unavailable as error:
            stream.fail("unavailable", str(error))
        except Exception:  # a bug must cost one request only
            stream.problem = traceback.format_exc()
            stream.fail("internal", "an internal error, see the server's log")

    def _start(
        self, stream: Stream, parsed: ParsedRequest, share: ImageShare | None = None
    ) -> None:
        """`share`: of the memory for images, if it has any."""
        from gllm_engine import Completion, make_requests, truncated

        if parsed.operation != "generate":
            stream.finish(parsed, self._result(stream, parsed, share))
            return
        sampling = parsed.sampling
        info = self.client.info
        ids, text = self._tokenize(parsed)
        if not ids:
            raise InvalidField(parsed.kind, "the prompt has no tokens, at least one is needed")
        ids, images = self._place(stream, parsed, ids, share)
        ids = truncated(ids, sampling, info.max_model_len, bool(images))
        _check_len(len(ids), info.max_model_len)
        if parsed.prepend_prompt and parsed.kind != "text_input":
            text = self.tokenizer.decode(ids)
        # The engine checks them too, but ids beyond 64 bits cannot be encoded.
        for field in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            _check_ids(field, getattr(sampling, field), info.vocab_size)
        requests = make_requests(self.tokenizer, ids, sampling, self._ids, images)
        choices = [Choice(r.id, Completion(self.tokenizer, ids, sampling)) for r in requests]
        parsed = dataclasses.replace(parsed, images=())  # it lives as long as the stream
        stream.open(parsed, text, len(ids), choices)
        with self._lock:
            self._sequences |= {r.id: (stream, i) for i, r in enumerate(requests)}
        self.client.submit(requests)
        if stream.failure is not None:  # the stream may have failed before the submit
            self._forget(stream)
            self.client.abort([request.id for request in requests])

    def _result(self, stream: Stream, parsed: ParsedRequest, share: ImageShare | None) -> Result:
        """The answer to an operation other than generate."""
        if parsed.operation == "describe":
            if self.client.trouble is not None:  # servers in front ask whether the model answers
                raise self._unavailable(self.client.trouble)
            info = self.client.info
            facts = self._description | {
                "model": self._name,
                "max_model_len": info.max_model_len,
                "vocab_size": info.vocab_size,
                "eos_token_ids": info.eos_token_ids,
                "software": f"gllm {__version__}",
            }
            return Result(json.dumps(facts))
        ids, text = self._tokenize(parsed)
        if parsed.operation == "token_texts":
            text = json.dumps([self.tokenizer.token_text(id) for id in ids])
        elif parsed.kind == "input_ids":
            text = self.tokenizer.decode(ids, skip_special_tokens=False)
        if parsed.images:
            ids, _ = self._place(stream, parsed, ids, share)
        return Result(text, ids if parsed.operation == "tokenize" else None)

    def _tokenize(self, parsed: ParsedRequest) -> tuple[list[int], str]:
        """The prompt's token ids, and its text unless it is given as token ids.

        The prompt may be longer than the model allows, so that its tokens can be counted. A text of
        more characters than that many tokens can spell is refused before it is tokenized.
        """
        info = self.client.info
        if parsed.kind == "input_ids":
            most = max(MAX_TOKEN_IDS, info.max_model_len)
            if len(parsed.prompt) > most:
                problem = f"{len(parsed.prompt)} token ids given, at most {most}"
                raise InvalidField("input_ids", problem)
            ids: list[int] = parsed.prompt.tolist()
            _check_ids("input_ids", ids, info.vocab_size)
            return ids, ""
        if parsed.kind == "messages":
            text = self.tokenizer.render(parsed.prompt, info.max_model_len, **parsed.template)
            whole = text
        else:
            text = parsed.prompt
            whole = self.images.with_places(text, parsed.images)
        return self.tokenizer.encode(whole, parsed.add_special_tokens, info.max_model_len), text

    def _place(
        self, stream: Stream, parsed: ParsedRequest, ids: list[int], share: ImageShare | None
    ) -> tuple[list[int], tuple[Image, ...]]:
        """The prompt with all tokens of its images, and the images."""
        most = self.client.info.max_model_len
        loaded = self.images.load(parsed.images, most, lambda: stream.failure is not None, share)
        placed: tuple[list[int], tuple[Image, ...]] = self.images.place(ids, loaded)
        return placed

    # ------------------------------------------------------------ the client's thread

    def _on_outputs(self, outputs: Outputs) -> None:
        now = time.monotonic()
        batches: dict[Sender, list[tuple[Stream, Arrival]]] = {s: [] for s in self.senders}
        tokens = dict(zip(outputs.ids, outputs.tokens, strict=True))
        known = 0
        with self._lock:  # an aborted sequence has no stream any more
            owners = {
                sequence_id: self._sequences[sequence_id]
                for sequence_id in tokens | outputs.prompt_logprobs | outputs.finished
                if sequence_id in self._sequences
            }
        for sequence_id, (stream, index) in owners.items():
            arrival = Arrival(
                index,
                tokens.get(sequence_id),
                outputs.logprobs.get(sequence_id),
                outputs.prompt_logprobs.get(sequence_id),
                outputs.finished.get(sequence_id),
            )
            known += arrival.token is not None
            batches[stream.sender].append((stream, arrival))
        if known:  # counted before delivery, so that the page never lags behind a response
            self.metrics.count("generation_tokens_total", known)
        for sequence_id, num in outputs.num_cached_tokens.items():
            if sequence_id in owners and owners[sequence_id][1] == 0:
                owners[sequence_id][0].num_cached_tokens = num
        for sequence_id, at in outputs.admitted_at.items():
            if sequence_id in owners:
                owners[sequence_id][0].admit(at)
        for sender, batch in batches.items():
            if batch:
                sender.deliver(batch, now)

    def _on_lost(self, sentence: str) -> None:
        self.metrics.engine_lost()
        for stream in self._snapshot():
            stream.fail("unavailable", sentence)
        if self._unloads_unhealthy and not self.is_ready():
            self._unload(sentence)

    # ------------------------------------------------------------ the sweep's thread

    def _sweep(self) -> None:
        pause = SWEEP_S
        failed_starts = 0
        while not self._stopping.wait(pause):
            began = time.monotonic()
            if failed_starts != self.client.failed_starts:
                failed_starts = self.client.failed_starts
                self.metrics.gauge("engine_failed_starts", failed_starts)
            for stream in self._snapshot():
                self._look_after(stream, began)
            pause = max(SWEEP_S, SWEEP_SHARE * (time.monotonic() - began))

    def _look_after(self, stream: Stream, now: float) -> None:
        try:
            if stream.is_cancelled():
                stream.fail("cancelled", "Request was cancelled")
            elif stream.deadline is not None and now > stream.deadline:
                assert stream.parsed is not None  # the deadline comes from it
                stream.fail(
                    "deadline", f"timeout: {stream.parsed.timeout_us} microseconds are over"
                )
        except Exception:  # an error with one request must not end the sweep of the others
            traceback.print_exc()

    # ------------------------------------------------------------ a request's end

    def _on_end(self, stream: Stream) -> None:
        """On the sender's thread: count the request, then release its last response.

        The metrics thread releases it after it has written the counts. An operation in which the
        engine has no part is neither counted nor logged, unless it fails.
        """
        if stream.error is None and stream.result is not None:
            stream.sender.release(stream)
            return
        self._forget(stream)
        self._measure(stream)
        self.metrics.after_flush(lambda: stream.sender.release(stream))

    def _on_close(self, stream: Stream) -> None:
        """On the sender's thread, after FINAL."""
        with self._lock:
            self.live.discard(stream)
        self._report(stream)

    def _forget(self, stream: Stream) -> None:
        with self._lock:
            for choice in stream.choices:
                self._sequences.pop(choice.sequence_id, None)

    def _measure(self, stream: Stream) -> None:
        metrics = self.metrics
        first = stream.first_token_at
        last = stream.last_token_at
        if first is not None:
            metrics.count("prompt_tokens_total", stream.num_prompt_tokens)
            metrics.observe("time_to_first_token_seconds", first - stream.began)
        if stream.error is not None and stream.error.status == "cancelled":
            metrics.count("request_cancellations_total")
        elif stream.error is not None:
            metrics.count("request_errors_total", status=stream.error.status)
        else:
            for choice in stream.choices:
                metrics.count("request_success_total", finished_reason=str(choice.finish_reason))
            num_tokens = [choice.num_tokens for choice in stream.choices]
            later = max(num_tokens) - 1
            if later > 0 and first is not None and last is not None:
                metrics.observe("time_per_output_token_seconds", (last - first) / later)
            for name, seconds in zip(("queue", "prefill", "decode"), stream.times(), strict=True):
                metrics.observe(f"request_{name}_time_seconds", seconds)
            metrics.observe("e2e_request_latency_seconds", time.monotonic() - stream.began)
            metrics.observe("request_prompt_tokens", stream.num_prompt_tokens)
            metrics.observe("request_generation_tokens", sum(num_tokens))
            metrics.observe("request_params_n", len(stream.choices))

    def _report(self, stream: Stream) -> None:
        """Log one line for a request. Only one, because a call to the logger takes 50-80 us."""
        if stream.result is not None and stream.error is None:
            return
        name = f"request {stream.request_id!r}"
        if stream.error is not None:
            line = f"{name}: {stream.error.status}: {' '.join(stream.error.message.split())}"
        else:
            ends = ", ".join(f"{c.num_tokens} tokens ({c.finish_reason})" for c in stream.choices)
            seconds = time.monotonic() - stream.began
            line = f"{name}: {stream.num_prompt_tokens} tokens in, {ends} out, {seconds:.3f} s"
        if stream.problem is not None:
            pb_utils.Logger.log_error(f"{line}\n{stream.problem}")
        elif self.config.log_requests:
            pb_utils.Logger.log_info(line)

    def _snapshot(self) -> list[Stream]:
        with self._lock:
            return list(self.live)


def _check_len(length: int, max_len: int) -> None:
    if length >= max_len:
        problem = f"its {length} tokens leave no room for output; prompt and output together"
        raise InvalidField("prompt", f"{problem} are limited to {max_len} tokens (max_model_len)")


def _check_ids(field: str, ids: Iterable[int], vocab_size: int) -> None:
    for token in ids:
        if not 0 <= token < vocab_size:
            problem = f"token {shorten(str(token))} is outside the vocabulary [0, {vocab_size})"
            raise InvalidField(field, problem)


def _parameters(model_config: dict[str, Any]) -> tuple[int, bool, bool, bool]:
    """The parameters of DEFAULTS, with the values in config.pbtxt. Raises ValueError."""
    given = {k: v["string_value"] for k, v in model_config.get("parameters", {}).items()}
    for key in given:
        if key not in (*DEFAULTS, *OTHERS):
            raise ValueError(
                f"config.pbtxt: unknown parameter {key}; known are {', '.join(DEFAULTS)}"
            )
    given = DEFAULTS | given
    threads = given["sender_threads"]
    if not re.fullmatch("[0-9]{1,2}", threads) or not 1 <= int(threads) <= 64:
        raise ValueError(f"config.pbtxt: sender_threads: {threads!r} is not a number from 1 to 64")
    switches = ("coalesce", "REPORT_CUSTOM_METRICS", "ENABLE_VLLM_HEALTH_CHECK")
    for key in switches:
        if given[key].lower() not in ("true", "false"):
            raise ValueError(f"config.pbtxt: {key}: {given[key]!r} is neither 'true' nor 'false'")
    coalesce, measure, check = (given[key].lower() == "true" for key in switches)
    return int(threads), coalesce, measure, check
