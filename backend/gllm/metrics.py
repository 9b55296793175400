"""Metrics on Triton's /metrics page: counted in the stub, written to the server by one thread.

Every update is a round trip of 20-80 us to the server. So no metric is updated per token, and only
the metrics thread writes updates. It writes every FLUSH_S seconds, and at once when a request's
last response is ready, so that the page counts a request before its client has the last response.
The last response waits for the write; no thread waits. Requests that end meanwhile share the next
write:

    sender thread                       metrics thread
    count(), observe()  -- counts -->
    after_flush(call)   -- call ----->  write all counts to the server, then call():
    (takes the next stream)               Sender.release puts the stream in line again
    send(response, FINAL)  <------------

Front ends of one model share the metric families. Each front end adds its own counts; the engine's
gauges are set only by the front end that receives the engine's statistics. Must not know of
requests' contents or of how responses are sent.
"""

from __future__ import annotations

import threading
import traceback
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import triton_python_backend_utils as pb_utils

from gllm_engine import Stats, TenantStats

FLUSH_S = 0.1
_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120]
_TOKENS = [step * 10**power for power in range(6) for step in (1, 2, 5)] + [10**6]
# Bounds of a histogram's buckets, by name.
BUCKETS: dict[str, list[float]] = {
    "time_to_first_token_seconds": _SECONDS,
    "time_per_output_token_seconds": _SECONDS,
    "e2e_request_latency_seconds": _SECONDS,
    "request_queue_time_seconds": _SECONDS,
    "request_prefill_time_seconds": _SECONDS,
    "request_decode_time_seconds": _SECONDS,
    "request_prompt_tokens": _TOKENS,
    "request_generation_tokens": _TOKENS,
    "request_params_n": [1, 2, 5, 10, 20, 50],
}

# Name after "gllm:" -> (kind, help).
FAMILIES = {
    "num_requests_running": ("GAUGE", "Sequences being computed."),
    "num_requests_waiting": ("GAUGE", "Sequences waiting for their first step or for pages."),
    "num_tokens_waiting": ("GAUGE", "Tokens to be computed before those that wait can go on."),
    "kv_cache_usage": ("GAUGE", "Share of KV-cache pages that live sequences use, 0 to 1."),
    "num_images_waiting": ("GAUGE", "Images of prompts that encoders have yet to encode."),
    "num_encoders": ("GAUGE", "Encoders that take images."),
    "num_encoders_stuck": ("GAUGE", "Encoders that do not end though they were killed."),
    "engine_failed_starts": ("GAUGE", "Failed attempts, so far, to get a lost engine back."),
    "prefix_cache_queries_total": ("COUNTER", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hits_total": ("COUNTER", "Prompt tokens found in the prefix cache."),
    "prefix_cache_kv_hits_total": (
        "COUNTER",
        "Prompt tokens whose keys and values were found, also where a state was lacking.",
    ),
    "prefix_cache_snapshot_hits_total": (
        "COUNTER",
        "Prompts that began from a copied state, by its place: prompt, branch or answer.",
    ),
    "images_encoded_total": ("COUNTER", "Images encoded."),
    "image_cache_hits_total": (
        "COUNTER",
        "Images of prompts that were not encoded for them, because another prompt had the same.",
    ),
    "tenant_requests_running": ("GAUGE", "Sequences of a tenant being computed."),
    "tenant_requests_waiting": ("GAUGE", "Sequences of a tenant that wait."),
    "tenant_prefill_tokens_total": (
        "COUNTER",
        "Tokens computed in chunks of prompts, by tenant; without prefix hits.",
    ),
    "tenant_decode_tokens_total": ("COUNTER", "Tokens of output computed, by tenant."),
    "num_preemptions_total": ("COUNTER", "Sequences that lost their pages to others."),
    "prompt_tokens_total": ("COUNTER", "Prompt tokens of ended requests that got a token."),
    "generation_tokens_total": ("COUNTER", "Tokens generated."),
    "request_success_total": ("COUNTER", "Sequences completed, by finish reason."),
    "request_cancellations_total": ("COUNTER", "Requests cancelled by their client."),
    "request_errors_total": ("COUNTER", "Requests ended by an error, by status."),
    "time_to_first_token_seconds": ("HISTOGRAM", "From a request's arrival to its first token."),
    "time_per_output_token_seconds": (
        "HISTOGRAM",
        "Mean time between a sequence's tokens after the first; one observation a request.",
    ),
    "e2e_request_latency_seconds": ("HISTOGRAM", "From a request's arrival to its last response."),
    "request_queue_time_seconds": ("HISTOGRAM", "From a request's arrival to its first step."),
    "request_prefill_time_seconds": (
        "HISTOGRAM",
        "From a request's first step to its first token.",
    ),
    "request_decode_time_seconds": ("HISTOGRAM", "From a request's first token to its last one."),
    "request_prompt_tokens": ("HISTOGRAM", "Prompt tokens of a request, once it is answered."),
    "request_generation_tokens": ("HISTOGRAM", "Tokens of a request's answers together."),
    "request_params_n": ("HISTOGRAM", "Answers that a request asked for, once it has them."),
}
_SNAPSHOT_HITS = "prefix_cache_snapshot_hits_total"
_TENANT_GAUGES = {"running": "tenant_requests_running", "waiting": "tenant_requests_waiting"}
_TENANT_COUNTERS = {
    "prefill_tokens": "tenant_prefill_tokens_total",
    "decode_tokens": "tenant_decode_tokens_total",
}
_LABELLED = (
    "request_success_total",
    "request_errors_total",
    _SNAPSHOT_HITS,
    *_TENANT_GAUGES.values(),
    *_TENANT_COUNTERS.values(),
)
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Metrics of one front end. `warn(sentence)` is called once if Triton takes no metrics.

    `shown` False: no metric appears on the page.
    """

    def __init__(self, model: str, version: str, warn: Any, shown: bool = True) -> None:
        self._base: Labels = (("model", model), ("version", version))
        self._warn = warn
        self._lock = threading.Lock()  # guards the six below
        self._counts: dict[tuple[str, Labels], float] = defaultdict(float)
        self._gauges: dict[tuple[str, Labels], float] = {}
        self._observed: list[tuple[str, float]] = []
        self._after_flush: list[Callable[[], None]] = []
        self._last = Stats()
        self._has_stats = False
        self._metrics: dict[tuple[str, Labels], Any] = {}
        self._families: dict[str, Any] = {}
        self._wake = threading.Event()
        self._stopping = False
        try:
            for name, (kind, text) in FAMILIES.items() if shown else ():
                self._families[name] = pb_utils.MetricFamily(
                    name=f"gllm:{name}",
                    description=text,
                    kind=getattr(pb_utils.MetricFamily, kind),
                )
                if name not in _LABELLED:
                    self._metric(name, ())  # shown from the start, at 0
        except Exception as error:
            self._families.clear()
            warn(f"no metrics: {error}")
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts[name, tuple(sorted(labels.items()))] += amount

    def observe(self, name: str, value: float) -> None:
        """Add an observation to a histogram."""
        with self._lock:
            self._observed.append((name, value))

    def after_flush(self, call: Callable[[], None]) -> None:
        """Make the metrics thread write all counts now, then call `call`, which must be quick.

        The thread calls it even if Triton takes no metrics or the write fails.
        """
        with self._lock:
            self._after_flush.append(call)
        self._wake.set()

    def gauge(self, name: str, value: float) -> None:
        """Set a gauge that is not one of the engine's statistics."""
        with self._lock:
            self._gauges[name, ()] = value

    def engine(self, stats: Stats) -> None:
        """Take the engine's statistics. Its counters start at 0 when it picks this front end."""
        names: dict[str, tuple[str, Labels]] = {
            "prefix_queries": ("prefix_cache_queries_total", ()),
            "prefix_hits": ("prefix_cache_hits_total", ()),
            "prefix_stored": ("prefix_cache_kv_hits_total", ()),
            "preemptions": ("num_preemptions_total", ()),
            "images_encoded": ("images_encoded_total", ()),
            "image_hits": ("image_cache_hits_total", ()),
        }
        for kind in ("prompt", "branch", "answer"):
            names[f"{kind}_snapshot_hits"] = (_SNAPSHOT_HITS, (("kind", kind),))
        with self._lock:
            self._has_stats = True
            for field, key in names.items():
                if amount := getattr(stats, field) - getattr(self._last, field):
                    self._counts[key] += amount
            for name, tenant in stats.tenants.items():
                last = self._last.tenants.get(name, TenantStats())
                for field, metric in _TENANT_COUNTERS.items():
                    amount = getattr(tenant, field) - getattr(last, field)
                    self._counts[metric, _of_tenant(name)] += amount
            self._set_gauges(stats)
            self._last = stats

    def engine_lost(self) -> None:
        """Set the engine's gauges to 0; the counters of the next engine start at 0."""
        with self._lock:
            tenants = {name: TenantStats() for name in self._last.tenants}
            self._last = Stats(tenants=tenants)
            if self._has_stats:
                self._set_gauges(self._last)

    def close(self, timeout_s: float) -> None:
        """Set the engine's gauges to 0, write a last time, and end the thread."""
        self.engine_lost()
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout_s)

    def _set_gauges(self, stats: Stats) -> None:
        self._gauges["num_requests_running", ()] = stats.running
        self._gauges["num_requests_waiting", ()] = stats.waiting
        self._gauges["num_tokens_waiting", ()] = stats.waiting_tokens
        self._gauges["kv_cache_usage", ()] = stats.kv_usage
        self._gauges["num_images_waiting", ()] = stats.images_waiting
        self._gauges["num_encoders", ()] = stats.encoders
        self._gauges["num_encoders_stuck", ()] = stats.stuck_encoders
        for name, tenant in stats.tenants.items():
            for field, metric in _TENANT_GAUGES.items():
                self._gauges[metric, _of_tenant(name)] = getattr(tenant, field)

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait(FLUSH_S)
            self._wake.clear()
            try:
                self._flush()
            except Exception:  # without this thread no last response would ever be sent
                traceback.print_exc()
        self._flush()

    def _flush(self) -> None:
        with self._lock:
            counts = self._counts
            self._counts = defaultdict(float)
            gauges = self._gauges
            self._gauges = {}
            observed = self._observed
            self._observed = []
            calls = self._after_flush
            self._after_flush = []
        try:
            if self._families:
                self._write(counts, gauges, observed)
        except Exception as error:  # a failure of metrics must not fail requests
            self._families.clear()
            self._warn(f"metrics stopped: {error}")
        finally:  # last responses wait for these calls
            for call in calls:
                call()

    def _write(
        self,
        counts: dict[tuple[str, Labels], float],
        gauges: dict[tuple[str, Labels], float],
        observed: list[tuple[str, float]],
    ) -> None:
        for (name, labels), amount in counts.items():
            if amount > 0:
                self._metric(name, labels).increment(amount)
        for (name, labels), value in gauges.items():
            self._metric(name, labels).set(value)
        for name, value in observed:
            self._metric(name, ()).observe(value)

    def _metric(self, name: str, labels: Labels) -> Any:
        key = (name, labels)
        if key not in self._metrics:
            family = self._families[name]
            everything = dict(self._base + labels)
            self._metrics[key] = (
                family.Metric(labels=everything, buckets=BUCKETS[name])
                if name in BUCKETS
                else family.Metric(labels=everything)
            )
        return self._metrics[key]


def _of_tenant(name: str) -> Labels:
    return (("tenant", name),)
