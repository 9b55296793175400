"""A runner without a model: it answers every step with made-up tokens, at once or at a set pace.

It serves to measure everything around the model (`device: "none"`): scheduler, channels, front
ends, tritonserver. It honours the runner's contract, logprobs included.
"""

from __future__ import annotations

import math
import time
from random import Random
from typing import NamedTuple

from gllm_engine.config import EngineConfig
from gllm_engine.sampling import SamplingParams
from gllm_engine.types import (
    ImagePixels,
    LandingHandle,
    RankSpans,
    StepPlan,
    StepResult,
    TokenLogprobs,
)

DEFAULT_PAGES = 65_536
DEFAULT_SNAPSHOTS = 1024


class NullStep(NamedTuple):
    result: StepResult
    due: float  # on the monotonic clock

    def wait(self) -> StepResult:
        time.sleep(max(0.0, self.due - time.monotonic()))
        return self.result


class NullRunner:
    """Draws uniform tokens of the vocabulary from a fixed random sequence."""

    def __init__(self, vocab: int, config: EngineConfig) -> None:
        self.num_pages = config.num_pages or DEFAULT_PAGES
        snapshots = config.num_snapshots
        self.num_snapshots = DEFAULT_SNAPSHOTS if snapshots is None else snapshots
        self._tokens_per_s = config.null_tokens_per_s or math.inf
        self._due = 0.0  # when the last step ends
        self._tokens = range(vocab)
        self._random = Random(1)
        self._sampling: dict[int, SamplingParams] = {}  # by slot

    def launch(self, plan: StepPlan) -> NullStep:
        for new in plan.new:
            self._sampling[new.slot] = new.sampling
        slots = plan.decode_slots + [chunk.slot for chunk in plan.chunks if chunk.samples]
        tokens = self._random.choices(self._tokens, k=len(slots))
        scored = zip(slots, tokens, strict=True)
        logprobs = {
            slot: self._score(token)
            for slot, token in scored
            if self._sampling[slot].logprobs is not None
        }
        prompts = {c.slot: [self._score(t) for t in c.targets] for c in plan.chunks if c.targets}
        self._due = max(self._due, time.monotonic()) + len(tokens) / self._tokens_per_s
        return NullStep(StepResult(plan.step, tokens, logprobs, prompts), self._due)

    def put_images(self, images: list[ImagePixels]) -> None:
        """Does nothing: no token depends on them."""

    @property
    def landings(self) -> list[LandingHandle]:
        """None: it has no encoders."""
        return []

    def land(self, place: int, embeddings: bytes) -> None:
        """Does nothing: as put_images."""

    def is_alive(self) -> bool:
        return True

    def check(self) -> None:
        """Does nothing: this runner never fails."""

    def spans(self) -> list[RankSpans]:
        """None: no device computes."""
        return []

    def close(self) -> None:
        self._sampling.clear()

    def _score(self, token: int) -> TokenLogprobs:
        return TokenLogprobs([token], [-math.log(len(self._tokens))], [1])
