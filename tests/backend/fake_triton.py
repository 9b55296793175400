"""Triton's Python stub as far as the backend uses it, strict where the real one would crash.

`module()` is what `import triton_python_backend_utils` gives. A response sender notes every rule
that was broken in `violations`, because an exception could be swallowed by the code under test.
"""

from __future__ import annotations

import json
import threading
import types
from typing import Any

import numpy as np

FINAL = 1


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        assert isinstance(array, np.ndarray)
        self._name, self._array = name, array

    def name(self) -> str:
        return self._name

    def as_numpy(self) -> np.ndarray:
        return self._array


class TritonError:
    UNKNOWN, INTERNAL, NOT_FOUND, INVALID_ARG = range(4)
    UNAVAILABLE, UNSUPPORTED, ALREADY_EXISTS, CANCELLED = range(4, 8)

    def __init__(self, message: str, code: int = INTERNAL) -> None:
        self._message, self._code = message, code

    def message(self) -> str:
        return self._message

    def code(self) -> int:
        return self._code


class InferenceResponse:
    def __init__(self, output_tensors: list[Tensor] = (), error: TritonError | None = None) -> None:
        assert error is None or not output_tensors
        self.tensors = {tensor.name(): tensor.as_numpy() for tensor in output_tensors}
        self.error = error

    def text(self) -> str:
        return b"".join(self.tensors["text_output"]).decode()


class ClientGone(RuntimeError):
    pass


class Record:
    """What the server has seen of one request; outlives the response sender."""

    def __init__(self) -> None:
        self.sent: list[tuple[InferenceResponse | None, int]] = []
        self.final = threading.Event()
        self.threads: set[int] = set()
        self.violations: list[str] = []
        self.cancelled = False
        self.fail_at: int | None = None  # this send and all later ones raise
        self.before_send: Any = lambda number: None
        self.during_poll: Any = lambda: None
        self.attempts = 0

    def wait(self) -> Record:
        assert self.final.wait(10), "FINAL was never sent"
        assert not self.violations
        return self

    @property
    def error(self) -> TritonError | None:
        return self.sent[-1][0].error if self.sent[-1][0] is not None else None

    @property
    def data(self) -> list[InferenceResponse]:
        return [r for r, _ in self.sent if r is not None and r.error is None]

    def text(self) -> str:
        return "".join(response.text() for response in self.data)

    def check(self) -> None:
        assert not self.violations
        assert len(self.threads) <= 1
        assert [flags for _, flags in self.sent].count(FINAL) == 1
        assert self.sent[-1][1] == FINAL


class ResponseSender:
    def __init__(self, record: Record) -> None:
        self._record = record
        self._busy = threading.Lock()
        self._closed = False

    def send(self, response: InferenceResponse | None = None, flags: int = 0) -> None:
        record = self._record
        record.threads.add(threading.get_ident())
        if len(record.threads) > 1:
            record.violations.append("sends from two threads")
        if not self._busy.acquire(blocking=False):
            record.violations.append("two sends at a time")
            return
        try:
            if self._closed:
                record.violations.append("send after FINAL")
                raise RuntimeError("Response sender has been closed.")
            self._closed = flags == FINAL  # as the real one: before anything can go wrong
            record.attempts += 1
            record.before_send(record.attempts)
            if record.fail_at is not None and record.attempts >= record.fail_at:
                if self._closed:
                    record.final.set()
                raise ClientGone("the client is gone")
            record.sent.append((response, flags))
            if self._closed:
                record.final.set()
        finally:
            self._busy.release()

    def is_cancelled(self) -> bool:
        if self._closed:
            self._record.violations.append("is_cancelled after FINAL")
        self._record.during_poll()
        if self._closed:
            self._record.violations.append("FINAL during is_cancelled")
        return self._record.cancelled


class InferenceRequest:
    def __init__(
        self,
        tensors: dict[str, np.ndarray],
        *,
        request_id: str = "r1",
        parameters: dict[str, Any] | None = None,
        outputs: set[str],
        timeout: int = 0,
    ) -> None:
        self._tensors = [Tensor(name, array) for name, array in tensors.items()]
        self._id, self._outputs, self._timeout = request_id, outputs, timeout
        self._parameters = json.dumps(parameters) if parameters else ""
        self.record = Record()

    def inputs(self) -> list[Tensor]:
        return self._tensors

    def parameters(self) -> str:
        return self._parameters

    def requested_output_names(self) -> set[str]:
        return self._outputs

    def request_id(self) -> str:
        return self._id

    def timeout(self) -> int:
        return self._timeout

    def get_response_sender(self) -> ResponseSender:
        return ResponseSender(self.record)


class Server:
    """One tritonserver's /metrics and log, shared by its stubs."""

    def __init__(self) -> None:
        self.metrics: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self.observed: dict[str, list[float]] = {}
        self.kinds: dict[str, int] = {}
        self.metric_threads: set[str] = set()
        self.metrics_disabled = False
        self.log: list[tuple[str, str]] = []
        self.unloaded: list[str] = []
        self.refuses_unload = False

    def value(self, name: str, **labels: str) -> float:
        found = [v for (n, ls), v in self.metrics.items() if n == name and labels.items() <= {*ls}]
        return sum(found)


class Metric:
    def __init__(self, server: Server, family: MetricFamily, labels: dict[str, str]) -> None:
        self._server, self._family = server, family
        self._key = (family.name, tuple(sorted(labels.items())))
        if family.kind != MetricFamily.HISTOGRAM:
            server.metrics.setdefault(self._key, 0.0)

    def increment(self, amount: float) -> None:
        assert self._family.kind == MetricFamily.COUNTER and amount > 0
        self._write(self._server.metrics[self._key] + amount)

    def set(self, value: float) -> None:
        assert self._family.kind == MetricFamily.GAUGE
        self._write(value)

    def observe(self, value: float) -> None:
        assert self._family.kind == MetricFamily.HISTOGRAM
        self._server.metric_threads.add(threading.current_thread().name)
        self._server.observed.setdefault(self._family.name, []).append(value)

    def _write(self, value: float) -> None:
        self._server.metric_threads.add(threading.current_thread().name)
        self._server.metrics[self._key] = value


class MetricFamily:
    COUNTER, GAUGE, HISTOGRAM = range(3)
    server: Server

    def __init__(self, name: str, description: str, kind: int) -> None:
        if self.server.metrics_disabled:
            raise RuntimeError("metrics are disabled")
        assert self.server.kinds.setdefault(name, kind) == kind
        self.name, self.kind = name, kind

    def Metric(self, labels: dict[str, str], buckets: list[float] | None = None) -> Metric:  # noqa: N802
        assert (buckets is not None) == (self.kind == self.HISTOGRAM)
        return Metric(self.server, self, labels)


class Logger:
    server: Server

    @classmethod
    def log_info(cls, line: str) -> None:
        cls.server.log.append(("info", line))

    @classmethod
    def log_warn(cls, line: str) -> None:
        cls.server.log.append(("warn", line))

    @classmethod
    def log_error(cls, line: str) -> None:
        cls.server.log.append(("error", line))


def unload_model(name: str) -> None:
    if Logger.server.refuses_unload:
        raise RuntimeError("explicit model load / unload is not allowed")
    Logger.server.unloaded.append(name)


def new_server() -> Server:
    MetricFamily.server = Logger.server = Server()
    return MetricFamily.server


def module() -> types.ModuleType:
    fake = types.ModuleType("triton_python_backend_utils")
    for thing in (Tensor, TritonError, InferenceResponse, MetricFamily, Logger):
        setattr(fake, thing.__name__, thing)
    fake.unload_model = unload_model
    fake.TRITONSERVER_RESPONSE_COMPLETE_FINAL = FINAL
    return fake
