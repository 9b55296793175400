"""A runner without a model: it answers every step at once with made-up tokens.

It serves to measure everything around the model (`device: "none"`): scheduler, channels, front
ends, tritonserver. It honours the runner's contract, logprobs included.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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


@dataclass(frozen=True)
class NullStep:
    result: StepResult

    def wait(self) -> StepResult:
        return self.result


class NullRunner:
    """Draws uniform tokens of the vocabulary from a fixed linear congruential sequence."""

    def __init__(self, vocab: int, num_pages: int | None, num_snapshots: int | None) -> None:
        """`num_pages`, `num_snapshots`: None: DEFAULT_PAGES, DEFAULT_SNAPSHOTS."""
        self.num_pages = num_pages or DEFAULT_PAGES
        self.num_snapshots = DEFAULT_SNAPSHOTS if num_snapshots is None else num_snapshots
        self._vocab = vocab
        self._last = 1
        self._sampling: dict[int, SamplingParams] = {}  # by slot

    def launch(self, plan: StepPlan) -> NullStep:
        for new in plan.new:
            self._sampling[new.slot] = new.sampling
        slots = plan.decode_slots + [chunk.slot for chunk in plan.chunks if chunk.samples]
        tokens = [self._draw() for _ in slots]
        scored = zip(slots, tokens, strict=True)
        logprobs = {
            slot: self._score(token)
            for slot, token in scored
            if self._sampling[slot].logprobs is not None
        }
        prompts = {c.slot: [self._score(t) for t in c.targets] for c in plan.chunks if c.targets}
        return NullStep(StepResult(plan.step, tokens, logprobs, prompts))

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

    def _draw(self) -> int:
        self._last = (self._last * 1_103_515_245 + 12_345) & 0x7FFF_FFFF
        return (self._last >> 8) % self._vocab

    def _score(self, token: int) -> TokenLogprobs:
        return TokenLogprobs([token], [-math.log(self._vocab)], [1])
