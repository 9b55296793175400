"""The answer to one Triton request: what has arrived for it, its tensors, and who sends them.

Owns detokenizing and sending. Two sends on one request at a time kill tritonserver itself, so:
a `Stream` is pinned to one `Sender`, only that sender's thread ever sends, and a send from any
other thread is refused. All other threads only leave things in a stream's inbox.
Must not know of Triton's inputs, the engine's connection or metrics.
"""

from __future__ import annotations

import json
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import triton_python_backend_utils as pb_utils

from gllm_backend.gllm.request import ParsedRequest
from gllm_engine import Finish, TokenLogprobs

if TYPE_CHECKING:  # they bring transformers; this module is imported in a throw-away process too
    from gllm_engine import Completion, Tokenizer

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
LEAST_LOGPROB = -9999.0  # instead of minus infinity, which JSON cannot say


class Arrival(NamedTuple):
    """What one step of the engine made for one sequence of a stream."""

    index: int  # which of the n sequences
    token: int | None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish: Finish | None = None


class Failure(NamedTuple):
    """Why a request ends without a whole answer."""

    status: str  # gllm_engine.types.Status
    message: str


class Choice:
    """One of the n sequences of a request, as its user sees it. The sender's thread owns it."""

    def __init__(self, sequence_id: int, completion: Completion) -> None:
        self.sequence_id = sequence_id
        self.completion = completion
        self.running = True  # the engine may still produce for it
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self.cumulative_logprob = 0.0
        self.clear()

    def clear(self) -> None:
        """Forget what has been sent."""
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, dict[str, Any]]] = []  # one a token, when asked for

    def feed(self, arrivals: list[Arrival]) -> None:
        """Take in new tokens, in order. What comes after the end is ignored."""
        finish = arrivals[-1].finish
        self.running = self.running and finish is None
        tokens = [a.token for a in arrivals if a.token is not None]
        logprobs = [a.logprobs for a in arrivals if a.logprobs is not None]
        delta = self.completion.feed(tokens, logprobs, finish)
        if delta is None:  # it had ended
            return
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.num_tokens += len(delta.token_ids)
        self.finish_reason = delta.finish_reason
        if delta.logprobs is not None:
            self.logprobs += delta.logprobs
            self.cumulative_logprob = delta.cumulative_logprob


class Stream:
    """One request being answered: any number of data responses, FINAL exactly once.

    It ends (`ended`) when its last response is made, and is closed when that one is sent with
    FINAL, for which it waits for `sender.release`. In between nothing changes its answer.
    `on_abort(ids)`: the engine may stop these sequences. `on_end(stream)`: it has ended; whoever
    is told releases it. `on_close(stream)`: FINAL is sent, or can no longer be sent. All three are
    called on the sender's thread.
    """

    def __init__(
        self,
        request_id: str,
        response_sender: Any,
        sender: Sender,
        tokenizer: Tokenizer,
        on_abort: Callable[[list[int]], None],
        on_end: Callable[[Stream], None],
        on_close: Callable[[Stream], None],
    ) -> None:
        self.request_id = request_id
        self.sender = sender
        self.began = time.monotonic()  # seconds, as the two below
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self.deadline: float | None = None
        self.failure: Failure | None = None  # to be sent; guarded by the sender's lock
        self.error: Failure | None = None  # what the user was told instead of an answer
        self.inbox: list[Arrival] = []  # guarded by the sender's lock
        self.scheduled = False  # guarded by the sender's lock, as the two below
        self.ended = False
        self.released = False
        self.closed = False  # FINAL is sent; guarded by _end
        self.problem: str | None = None  # a traceback, for the log
        self.parsed: ParsedRequest | None = None
        self.num_prompt_tokens = 0
        self.choices: list[Choice] = []
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._gave_prompt_logprobs = False
        self._num_sent = 0
        self._last_response: Any = None  # from its end until FINAL
        self._tokenizer = tokenizer
        self._on_abort = on_abort
        self._on_end = on_end
        self._on_close = on_close
        self._response_sender = response_sender
        self._end = threading.Lock()

    def open(
        self, parsed: ParsedRequest, prompt_text: str, num_prompt_tokens: int, choices: list[Choice]
    ) -> None:
        """Say what is to be answered; before the first arrival."""
        self._prompt_text = prompt_text if parsed.prepend_prompt else ""
        self.num_prompt_tokens = num_prompt_tokens
        self.choices = choices
        self.parsed = parsed
        if parsed.timeout_us is not None:
            self.deadline = self.began + parsed.timeout_us / 1e6

    def fail(self, status: str, message: str) -> None:
        """End the request with an error, after the tokens that have arrived. Any thread."""
        self.sender.fail(self, Failure(status, message))

    def is_cancelled(self) -> bool:
        """Ask Triton (30-80 us). Never after FINAL: Triton's side of the request is gone then."""
        with self._end:
            return not self.closed and self._response_sender.is_cancelled()

    # ------------------------------------------------------------ under the sender's lock

    def accept(self, arrival: Arrival, now: float) -> bool:
        """Put an arrival into the inbox. True when the sender should look at it now."""
        if self.ended or self.failure is not None:
            return False
        finish = arrival.finish
        if finish is not None and finish.reason in ("error", "abort"):
            message = finish.message or f"the engine ended the sequence ({finish.reason})"
            self.failure = Failure(finish.status or "internal", message)
            arrival = arrival._replace(finish=None)  # its text is given out, then the error
        self.inbox.append(arrival)
        if arrival.token is not None:
            self.last_token_at = now
            if self.first_token_at is None:
                self.first_token_at = now
        assert self.parsed is not None
        # A whole answer in one response can wait for its end, unless the text may end it.
        wanted = self.parsed.stream and arrival.token is not None
        return wanted or finish is not None or bool(self.parsed.sampling.stop)

    def take(self) -> tuple[list[Arrival], Failure | None]:
        """All that has arrived since the last time."""
        inbox = self.inbox
        self.inbox = []
        self.scheduled = False
        return inbox, self.failure

    @property
    def is_urgent(self) -> bool:
        """Nothing sent yet, or nothing but the last response or an error left to send."""
        return self._num_sent == 0 or self.ended or self.failure is not None

    # ------------------------------------------------------------ the sender's thread

    def answer(self, inbox: list[Arrival], failure: Failure | None, coalesce: bool) -> None:
        """Send what there is to send. Whatever goes wrong doing so ends this request alone."""
        if self.closed:
            return
        try:
            if not self.ended:
                self._answer(inbox, failure, coalesce)
            elif self.released:
                response = self._last_response
                self._last_response = None
                self._send(response, True)
        except Exception:  # a bug or a vanished client must cost one request, not the thread
            self.problem = traceback.format_exc()
            self._give_up()
        self._stop_idle_sequences()
        if self.closed:
            self._on_close(self)

    def _answer(self, inbox: list[Arrival], failure: Failure | None, coalesce: bool) -> None:
        if self.choices and (failure is None or failure.status != "cancelled"):
            for part in [inbox] if coalesce else one_token_each(inbox):
                if not self.ended:
                    self._feed(part)
                    self._send_chunk()
        if failure is not None and not self.ended:
            self._end_with_error(failure)

    def _feed(self, inbox: list[Arrival]) -> None:
        arrivals: dict[int, list[Arrival]] = {}
        for arrival in inbox:
            self._prompt_logprobs += arrival.prompt_logprobs or []
            arrivals.setdefault(arrival.index, []).append(arrival)
        for index, mine in arrivals.items():
            self.choices[index].feed(mine)

    def _send_chunk(self) -> None:
        """One data response, when there is news that this request wants now."""
        assert self.parsed is not None
        final = all(choice.finish_reason is not None for choice in self.choices)
        news = any(choice.token_ids or choice.text for choice in self.choices)
        if final or (self.parsed.stream and news):
            tensors = self._tensors(self.parsed)
            for choice in self.choices:
                choice.clear()
            response = pb_utils.InferenceResponse(output_tensors=tensors)
            if final:
                self._end_with(response)
            else:
                self._send(response, False)

    def _end_with_error(self, failure: Failure) -> None:
        self.error = failure
        error = pb_utils.TritonError(failure.message, _code(failure.status))
        self._end_with(pb_utils.InferenceResponse(output_tensors=[], error=error))

    def _end_with(self, response: Any) -> None:
        """Keep the last response until it is released."""
        self._last_response = response
        self.sender.hold(self)
        try:
            self._on_end(self)
        except Exception:  # a bug there must not keep the answer back
            self.problem = traceback.format_exc()
            self.sender.release(self)

    def _send(self, response: Any, final: bool) -> None:
        """The one place where a response leaves, on the one thread allowed to let it."""
        self.sender.check_thread()
        self._num_sent += 1
        if final:
            with self._end:
                self.closed = True
                # While a reference to Triton's sender lives, the model cannot be unloaded.
                last = self._response_sender
                self._response_sender = None
                last.send(response, flags=FINAL)
        else:
            self._response_sender.send(response)

    def _give_up(self) -> None:
        """After something failed: say so with FINAL, if anything can be sent at all."""
        failure = Failure("internal", "Error generating stream: an internal error, see the log")
        if self.closed:  # FINAL itself failed: Triton has noted it and takes no second one
            self.error = self.error or failure
        elif not self.ended:
            self._end_with_error(failure)

    def _stop_idle_sequences(self) -> None:
        """Tell the engine of sequences whose further tokens nobody will see."""
        over = [c for c in self.choices if c.running and (self.ended or c.finish_reason)]
        for choice in over:
            choice.running = False
        if over:
            self._on_abort([choice.sequence_id for choice in over])

    # ------------------------------------------------------------ tensors

    def _tensors(self, parsed: ParsedRequest) -> list[Any]:
        """The output tensors of a chunk: one element a sequence, news since the last chunk.

        token_ids: the new tokens of sequence 0, then of sequence 1, ...; num_output_tokens tells
        how many each has. finish_reason is "None" until a sequence has ended, then stays.
        """
        choices = self.choices
        make: dict[str, Callable[[], np.ndarray]] = {
            "text_output": lambda: _bytes(self._prompt_text + c.text for c in choices),
            "finish_reason": lambda: _bytes(str(c.finish_reason) for c in choices),
            "cumulative_logprob": lambda: np.array(
                [c.cumulative_logprob for c in choices], np.float32
            ),
            "logprobs": lambda: _bytes(
                _logprobs_json(c.logprobs if parsed.show_logprobs else None) for c in choices
            ),
            "num_input_tokens": lambda: np.array([self.num_prompt_tokens], np.uint32),
            "num_output_tokens": lambda: np.array([len(c.token_ids) for c in choices], np.uint32),
            "token_ids": lambda: np.array([t for c in choices for t in c.token_ids], np.int32),
        }
        tensors = [pb_utils.Tensor(name, m()) for name, m in make.items() if name in parsed.outputs]
        # All of them are here with the first token of the sequence that they were computed for.
        here = choices[0].num_tokens > 0 or choices[0].finish_reason is not None
        due = "prompt_logprobs" in parsed.outputs and not self._gave_prompt_logprobs
        if due and here:
            text = self._prompt_logprobs_json(parsed)
            tensors.append(pb_utils.Tensor("prompt_logprobs", _bytes([text])))
            self._gave_prompt_logprobs = True
        return tensors

    def _prompt_logprobs_json(self, parsed: ParsedRequest) -> str:
        from gllm_engine import render_logprobs

        if parsed.sampling.prompt_logprobs is None:
            return _logprobs_json(None)
        rendered = [render_logprobs(self._tokenizer, e) for e in self._prompt_logprobs]
        # The first token has nothing before it, so its entry is null.
        return _logprobs_json([None, *rendered])


class Sender:
    """A thread that sends for the streams pinned to it.

    A stream waits in line once, however much arrives for it meanwhile: all of it goes into one
    response when its turn comes. So responses are one token each while the thread keeps up, and
    merge by themselves when it does not. Streams that have sent nothing yet, or have only their end
    left to send, are urgent: they go first, but one that runs goes after each of them that it has
    waited for, so that neither kind can starve the other.
    `coalesce` False keeps one token a response, for measurements.
    """

    def __init__(self, name: str, coalesce: bool = True) -> None:
        self._coalesce = coalesce
        self._wake = threading.Condition()
        self._urgent: deque[Stream] = deque()
        self._line: deque[Stream] = deque()
        self._overtaken = False  # the line has waited for the last urgent stream
        self._num_held = 0  # streams that have ended and wait for their release
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def deliver(self, arrivals: Iterable[tuple[Stream, Arrival]], now: float) -> None:
        """Hand over one step's arrivals for this sender's streams. Any thread, no waiting."""
        with self._wake:
            for stream, arrival in arrivals:
                if stream.accept(arrival, now):
                    self._schedule(stream)

    def fail(self, stream: Stream, failure: Failure) -> None:
        """End a stream with an error; the first one given counts."""
        with self._wake:
            if stream.failure is None and not stream.ended:
                stream.failure = failure
                self._schedule(stream)

    def hold(self, stream: Stream) -> None:
        """Note that a stream has ended and waits for its release."""
        with self._wake:
            stream.ended = True
            self._num_held += 1

    def release(self, stream: Stream) -> None:
        """Let a stream that has ended send its last response. Any thread, no waiting."""
        with self._wake:
            stream.released = True
            self._num_held -= 1
            self._schedule(stream)

    def check_thread(self) -> None:
        """Raises RuntimeError anywhere but on this sender's thread."""
        if threading.get_ident() != self._thread.ident:
            raise RuntimeError("a response may be sent only by the sender its request is pinned to")

    def close(self, timeout_s: float) -> None:
        """Send what is waiting, the last responses too, then end the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_s)

    def _schedule(self, stream: Stream) -> None:
        if not stream.scheduled:
            stream.scheduled = True
            (self._urgent if stream.is_urgent else self._line).append(stream)
            self._wake.notify()

    def _next(self) -> Stream:
        if self._urgent and not (self._line and self._overtaken):
            self._overtaken = bool(self._line)
            return self._urgent.popleft()
        self._overtaken = False
        return self._line.popleft()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not (self._urgent or self._line):
                    if self._closing and not self._num_held:
                        return
                    self._wake.wait()
                stream = self._next()
                inbox, failure = stream.take()
            try:
                stream.answer(inbox, failure, self._coalesce)
            except Exception:  # a callback's bug; the other streams must not pay for it
                traceback.print_exc()
            del stream, inbox, failure  # else they live until the next one comes


def one_token_each(inbox: list[Arrival]) -> Iterator[list[Arrival]]:
    """Cut an inbox into parts with at most one token of each sequence."""
    part: list[Arrival] = []
    for arrival in inbox:
        if any(arrival.index == earlier.index for earlier in part):
            yield part
            part = []
        part.append(arrival)
    yield part


def _logprobs_json(entries: list[dict[int, dict[str, Any]] | None] | None) -> str:
    """JSON of {token id: {logprob, rank, decoded_token}} a token; "null" if not computed."""
    for entry in entries or []:
        for about in (entry or {}).values():
            about["logprob"] = max(about["logprob"], LEAST_LOGPROB)
    return json.dumps(entries)


def _bytes(values: Iterable[str]) -> np.ndarray:
    return np.array([value.encode("utf-8") for value in values], np.object_)


def _code(status: str) -> int:
    """Triton has no code for a deadline; its own queue reports an expired timeout so."""
    return {
        "invalid": pb_utils.TritonError.INVALID_ARG,
        "unavailable": pb_utils.TritonError.UNAVAILABLE,
        "deadline": pb_utils.TritonError.UNAVAILABLE,
        "cancelled": pb_utils.TritonError.CANCELLED,
    }.get(status, pb_utils.TritonError.INTERNAL)
