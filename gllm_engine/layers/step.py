"""What all layers of one forward pass share: computed once a step, not once a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gllm_engine.spec.rope import Rope


@dataclass(frozen=True)
class Step:
    """Filled by the decoder at the start of a forward pass."""

    plans: dict[int | None, Any]  # window -> the backend's attention plan
    rotations: dict[Rope, Any]  # what the backend's rotation() made of the positions
