"""The responses to a Triton request: detokenizes the engine's tokens, builds tensors, sends them.

Two sends on one request at a time kill tritonserver itself. So a `Stream` is pinned to one
`Sender`, only that sender's thread sends the stream's responses, and a send from any other thread
is refused. All other threads only put arrivals or a failure into a stream's inbox:

    client's thread    deliver(arrivals) --+
    sweep, unload ...  fail(failure) ------+--> inbox --> sender's thread --> response sender
    metrics thread     release() ----------+     (first: the urgent streams, see Sender)

Must not know of Triton's inputs, the engine's connection or metrics.
"""

from __future__ import annotations

import json
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import triton_python_backend_utils as pb_utils

from gllm_backend.gllm.request import ParsedRequest
from gllm_engine import Finish, TokenLogprobs

if TYPE_CHECKING:  # the import loads transformers, and Triton's auto-complete process ends at once
    from gllm_engine import Completion, Tokenizer

FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have


class Arrival(NamedTuple):
    """The output of one engine step for one sequence of a stream."""

    choice: int  # which of the n sequences
    token: int | None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish: Finish | None = None


class Failure(NamedTuple):
    """The reason why a request ends with an error."""

    status: str  # gllm_engine.types.Status
    message: str


class Result(NamedTuple):
    """The answer to an operation in which the engine has no part."""

    text: str
    token_ids: list[int] | None = None  # of a prompt


class Choice:
    """The text side of one of a request's n sequences. Only the sender's thread uses it."""

    def __init__(self, sequence_id: int, completion: Completion) -> None:
        self.sequence_id = sequence_id
        self.completion = completion
        self.running = True  # the engine may still send tokens for this sequence
        self.num_tokens = 0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.cumulative_logprob = 0.0
        self.clear()

    def clear(self) -> None:
        """Drop the text, tokens and logprobs that have been sent."""
        self.text = ""
        self.token_ids: list[int] = []
        self.logprobs: list[dict[int, dict[str, Any]]] = []  # one for each token, if requested

    def feed(self, arrivals: list[Arrival]) -> None:
        """Add new tokens, in order. Tokens after the end of the text are ignored."""
        finish = arrivals[-1].finish
        self.running = self.running and finish is None
        tokens = [a.token for a in arrivals if a.token is not None]
        logprobs = [a.logprobs for a in arrivals if a.logprobs is not None]
        delta = self.completion.feed(tokens, logprobs, finish)
        if delta is None:  # the text has ended before
            return
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.num_tokens += len(delta.token_ids)
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason
        if delta.logprobs is not None:
            self.logprobs += delta.logprobs
            self.cumulative_logprob = delta.cumulative_logprob


class Stream:
    """One request being answered: any number of data responses, and the FINAL flag exactly once.

    A stream ends in three steps. Between the first and the last its answer does not change:

        ended     the last response is built and held; `on_end(stream)` is called
        released  the owner has called `sender.release(stream)`
        closed    the last response is sent with FINAL, or FINAL can no longer be sent;
                  `on_close(stream)` is called

    `on_end` must lead to the release. `on_abort(ids)`: the engine may abort these sequences. All
    three callbacks run on the sender's thread.
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
        self.began = time.monotonic()  # seconds, as the four below
        self.admitted_at: float | None = None  # left the queue; set before the first arrival
        self.first_token_at: float | None = None
        self.last_token_at: float | None = None
        self.deadline: float | None = None
        self.failure: Failure | None = None  # not yet sent; guarded by the sender's lock
        self.error: Failure | None = None  # the failure that the last response reports
        self.inbox: list[Arrival] = []  # guarded by the sender's lock
        self.result: Result | None = None  # the whole answer; guarded by the sender's lock
        self.scheduled = False  # guarded by the sender's lock, as the two below
        self.ended = False
        self.released = False
        self.closed = False  # FINAL is sent; guarded by _end
        self.problem: str | None = None  # a traceback, for the log
        self.parsed: ParsedRequest | None = None
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0  # of sequence 0; set before its first arrival
        self.choices: list[Choice] = []
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._gave_prompt_facts = False
        self._num_sent = 0
        self._last_response: Any = None  # held while the stream is ended but not closed
        self._tokenizer = tokenizer
        self._on_abort = on_abort
        self._on_end = on_end
        self._on_close = on_close
        self._response_sender = response_sender
        self._end = threading.Lock()

    def begin(self, parsed: ParsedRequest) -> None:
        """Set the parsed request; its time may be over while its prompt is made."""
        self.parsed = parsed
        if parsed.timeout_us is not None:
            self.deadline = self.began + parsed.timeout_us / 1e6

    def open(
        self, parsed: ParsedRequest, prompt_text: str, num_prompt_tokens: int, choices: list[Choice]
    ) -> None:
        """Set the parsed request and its sequences, before the first arrival."""
        self._prompt_text = prompt_text if parsed.prepend_prompt else ""
        self.num_prompt_tokens = num_prompt_tokens
        self.choices = choices
        self.begin(parsed)

    def admit(self, at: float) -> None:
        """Set when the request left the queue: with that of its sequences which began first."""
        if self.admitted_at is None:
            self.admitted_at = at

    def times(self) -> tuple[float, float, float]:
        """Seconds in the queue, in prefill (to the first token) and in decode (to the last one)."""
        admitted = self.admitted_at or self.began
        first = self.first_token_at or admitted
        last = self.last_token_at or first
        return admitted - self.began, first - admitted, last - first

    def finish(self, parsed: ParsedRequest, result: Result) -> None:
        """End a request whose operation is not generate with its answer. Any thread."""
        self.parsed = parsed
        self.sender.finish(self, result)

    def fail(self, status: str, message: str) -> None:
        """End the request with an error, after the tokens that have arrived. Any thread."""
        self.sender.fail(self, Failure(status, message))

    def is_cancelled(self) -> bool:
        """Ask Triton, which takes 30-80 us. After FINAL Triton has freed the request: False."""
        with self._end:
            return not self.closed and self._response_sender.is_cancelled()

    # ------------------------------------------------------------ under the sender's lock

    def accept(self, arrival: Arrival, now: float) -> bool:
        """Put an arrival into the inbox. Returns True if the sender should handle it now."""
        if self.ended or self.failure is not None:
            return False
        finish = arrival.finish
        if finish is not None and finish.reason in ("error", "abort"):
            message = finish.message or f"the engine ended the sequence ({finish.reason})"
            self.failure = Failure(finish.status or "internal", message)
            arrival = arrival._replace(finish=None)  # its text is sent before the error
        self.inbox.append(arrival)
        if arrival.token is not None:
            self.last_token_at = now
            if self.first_token_at is None:
                self.first_token_at = now
        assert self.parsed is not None
        # Without streaming, tokens wait for the end of the sequence. With stop strings they do
        # not, because the text may end the sequence.
        wanted = self.parsed.stream and arrival.token is not None
        return wanted or finish is not None or bool(self.parsed.sampling.stop)

    def take(self) -> tuple[list[Arrival], Failure | None]:
        """Empty the inbox; returns its arrivals, and the failure if there is one."""
        inbox = self.inbox
        self.inbox = []
        self.scheduled = False
        return inbox, self.failure

    @property
    def is_urgent(self) -> bool:
        """True if no response was sent yet, or only the last response or an error is unsent."""
        return self._num_sent == 0 or self.ended or self.failure is not None

    # ------------------------------------------------------------ the sender's thread

    def answer(self, inbox: list[Arrival], failure: Failure | None, coalesce: bool) -> None:
        """Send the new responses of this stream. An exception ends this request alone."""
        if self.closed:
            return
        try:
            if not self.ended:
                self._answer(inbox, failure, coalesce)
            elif self.released:
                response = self._last_response
                self._last_response = None
                self._send(response, True)
        except Exception:  # a bug or a vanished client must end one request, not the thread
            self.problem = traceback.format_exc()
            self._give_up()
        self._stop_idle_sequences()
        if self.closed:
            self._on_close(self)

    def _answer(self, inbox: list[Arrival], failure: Failure | None, coalesce: bool) -> None:
        if self.result is not None and failure is None:
            assert self.parsed is not None
            tensors = _result_tensors(self.result, self.parsed.outputs)
            self._end_with(pb_utils.InferenceResponse(output_tensors=tensors))
        elif self.choices and (failure is None or failure.status != "cancelled"):
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
            arrivals.setdefault(arrival.choice, []).append(arrival)
        for index, mine in arrivals.items():
            self.choices[index].feed(mine)

    def _send_chunk(self) -> None:
        """Send a data response if the stream has new tokens or text, or end the stream.

        A request without streaming gets one response, at its end.
        """
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
        """Hold the last response until the stream is released."""
        self._last_response = response
        self.sender.hold(self)
        try:
            self._on_end(self)
        except Exception:  # a bug in on_end must not hold the last response for ever
            self.problem = traceback.format_exc()
            self.sender.release(self)

    def _send(self, response: Any, final: bool) -> None:
        """Send a response. No other function calls Triton's send(). Sender's thread only."""
        self.sender.check_thread()
        self._num_sent += 1
        if final:
            with self._end:
                self.closed = True
                # The model cannot be unloaded while a reference to its response sender exists.
                last = self._response_sender
                self._response_sender = None
                last.send(response, flags=FINAL)
        else:
            self._response_sender.send(response)

    def _give_up(self) -> None:
        """After an exception: end the stream with an error, unless it has ended already."""
        failure = Failure("internal", "Error generating stream: an internal error, see the log")
        if self.closed:  # the send of FINAL failed; Triton takes no second FINAL
            self.error = self.error or failure
        elif not self.ended:
            self._end_with_error(failure)

    def _stop_idle_sequences(self) -> None:
        """Abort the sequences whose further tokens will not be sent."""
        over = [c for c in self.choices if c.running and (self.ended or c.finish_reason)]
        for choice in over:
            choice.running = False
        if over:
            self._on_abort([choice.sequence_id for choice in over])

    # ------------------------------------------------------------ tensors

    def _tensors(self, parsed: ParsedRequest) -> list[Any]:
        """The output tensors of a chunk: what is new since the last chunk, by sequence.

        Most tensors have one element for each of the n sequences. token_ids: the new tokens of
        sequence 0, then those of sequence 1, ...; num_output_tokens: the number of new tokens of
        each sequence. finish_reason is "None" until a sequence has ended, then does not change; so
        is stop_reason, which is sent from the first end on. Facts of the prompt that the engine
        tells are sent once, request_times with the first token, for what fails later, and with the
        last one.
        """
        choices = self.choices
        make: dict[str, Callable[[], np.ndarray[Any, Any]]] = {
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
        # The engine tells them of sequence 0, and they are complete with its first token.
        here = choices[0].num_tokens > 0 or choices[0].finish_reason is not None
        is_first = here and not self._gave_prompt_facts
        if is_first:
            tensors += self._prompt_facts(parsed)
            self._gave_prompt_facts = True
        is_last = all(c.finish_reason is not None for c in choices)
        if "stop_reason" in parsed.outputs and any(c.finish_reason is not None for c in choices):
            reasons = _bytes(str(c.stop_reason) for c in choices)
            tensors.append(pb_utils.Tensor("stop_reason", reasons))
        if "request_times" in parsed.outputs and (is_first or is_last):
            tensors.append(pb_utils.Tensor("request_times", np.array(self.times(), np.float32)))
        return tensors

    def _prompt_facts(self, parsed: ParsedRequest) -> list[Any]:
        tensors = []
        if "prompt_logprobs" in parsed.outputs:
            text = self._prompt_logprobs_json(parsed)
            tensors.append(pb_utils.Tensor("prompt_logprobs", _bytes([text])))
        if "num_cached_tokens" in parsed.outputs:
            count = np.array([self.num_cached_tokens], np.uint32)
            tensors.append(pb_utils.Tensor("num_cached_tokens", count))
        return tensors

    def _prompt_logprobs_json(self, parsed: ParsedRequest) -> str:
        from gllm_engine import render_logprobs

        if parsed.sampling.prompt_logprobs is None:
            return _logprobs_json(None)
        rendered = [render_logprobs(self._tokenizer, e) for e in self._prompt_logprobs]
        # No token precedes the first one, so its entry is null.
        return _logprobs_json([None, *rendered])


class Sender:
    """A thread that sends the responses of the streams pinned to it.

    A stream stands in one of two queues, and at most once. When its turn comes, all arrivals in its
    inbox go into one response. So a response holds one token while the thread keeps up with the
    engine, and several when it does not.

        urgent:  streams that have sent no response yet, or have only their end left to send
        line:    all other streams

    Urgent streams go first. But if the line was waiting when an urgent stream went, a stream of
    the line goes next, so that neither queue can starve the other.
    `coalesce` False: one token for each response, for measurements.
    """

    def __init__(self, name: str, coalesce: bool = True) -> None:
        self._coalesce = coalesce
        self._wake = threading.Condition()
        self._urgent: deque[Stream] = deque()
        self._line: deque[Stream] = deque()
        self._overtaken = False  # the line was waiting when the last urgent stream went
        self._num_held = 0  # streams that have ended and wait for their release
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def deliver(self, arrivals: Iterable[tuple[Stream, Arrival]], now: float) -> None:
        """Put one step's arrivals into the inboxes of this sender's streams. Any thread."""
        with self._wake:
            for stream, arrival in arrivals:
                if stream.accept(arrival, now):
                    self._schedule(stream)

    def fail(self, stream: Stream, failure: Failure) -> None:
        """End a stream with an error. Only the first failure of a stream counts."""
        with self._wake:
            if stream.failure is None and not stream.ended:
                stream.failure = failure
                self._schedule(stream)

    def finish(self, stream: Stream, result: Result) -> None:
        """End a stream with its whole answer, unless it has failed."""
        with self._wake:
            if stream.failure is None and not stream.ended:
                stream.result = result
                self._schedule(stream)

    def hold(self, stream: Stream) -> None:
        """Mark a stream as ended; it now waits for its release."""
        with self._wake:
            stream.ended = True
            self._num_held += 1

    def release(self, stream: Stream) -> None:
        """Schedule the last response of an ended stream. Any thread; does not block."""
        with self._wake:
            stream.released = True
            self._num_held -= 1
            self._schedule(stream)

    def check_thread(self) -> None:
        """Raise RuntimeError on any thread but this sender's."""
        if threading.get_ident() != self._thread.ident:
            raise RuntimeError("a response may be sent only by the sender its request is pinned to")

    def close(self, timeout_s: float) -> None:
        """Send all waiting responses, the held ones too, then end the thread."""
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
            except Exception:  # a bug in a callback must not affect the other streams
                traceback.print_exc()
            del stream, inbox, failure  # else these objects live until the next stream's turn


def one_token_each(inbox: list[Arrival]) -> Iterator[list[Arrival]]:
    """Cut an inbox into parts with at most one token of each sequence."""
    part: list[Arrival] = []
    for arrival in inbox:
        if any(arrival.choice == earlier.choice for earlier in part):
            yield part
            part = []
        part.append(arrival)
    yield part


def _result_tensors(result: Result, names: Container[str]) -> list[Any]:
    arrays = {"text_output": _bytes([result.text])}
    if result.token_ids is not None:
        arrays["num_input_tokens"] = np.array([len(result.token_ids)], np.uint32)
        arrays["token_ids"] = np.array(result.token_ids, np.int32)
    return [pb_utils.Tensor(name, array) for name, array in arrays.items() if name in names]


def _logprobs_json(entries: Sequence[dict[int, dict[str, Any]] | None] | None) -> str:
    """JSON of one {token id: {logprob, rank, decoded_token}} for each token; "null" for None."""
    for entry in entries or []:
        for about in (entry or {}).values():
            about["logprob"] = max(about["logprob"], LEAST_LOGPROB)
    return json.dumps(entries)


def _bytes(values: Iterable[str]) -> np.ndarray[Any, Any]:
    return np.array([value.encode("utf-8") for value in values], np.object_)


def _code(status: str) -> int:
    """Triton's error code. Triton has none for a deadline; its own queue uses UNAVAILABLE."""
    codes: dict[str, int] = {
        "invalid": pb_utils.TritonError.INVALID_ARG,
        "unavailable": pb_utils.TritonError.UNAVAILABLE,
        "deadline": pb_utils.TritonError.UNAVAILABLE,
        "cancelled": pb_utils.TritonError.CANCELLED,
    }
    internal: int = pb_utils.TritonError.INTERNAL
    return codes.get(status, internal)
