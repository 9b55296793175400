"""Counts the most memory that tensors take at once, for tensors on torch's meta device.

Knows no models: it watches every operation of torch while its context is open.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class PeakMemory(TorchDispatchMode):
    """`now`: bytes of tensors made in the context that are still alive; `peak`: the most so far."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._alive: set[int] = set()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled in the context, and importing torch's compiler takes seconds."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor) and x.device.type == "meta":
                memory = _memory(x)
                # A view, or a result in place, has the memory of an argument.
                is_known = memory._cdata in self._alive
                if not is_known and not _have(memory, (*args, *(kwargs or {}).values())):
                    self._count(memory)
        return result

    def _count(self, memory: Any) -> None:
        key = memory._cdata
        num_bytes = memory.nbytes()
        self._alive.add(key)
        self.now += num_bytes
        self.peak = max(self.peak, self.now)
        weakref.finalize(memory, self._free, key, num_bytes)

    def _free(self, key: int, num_bytes: int) -> None:
        self._alive.discard(key)
        self.now -= num_bytes


def _memory(x: Tensor) -> Any:
    return x.untyped_storage()


def _have(memory: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether an argument has this memory; an argument may be a list of tensors."""
    tensors = (x for part in arguments for x in (part if isinstance(part, list) else (part,)))
    return any(isinstance(x, Tensor) and _memory(x)._cdata == memory._cdata for x in tensors)
