"""Tokens on their way from the last stage, which samples them, to the first, which computes them.

Owns which steps' tokens have been put into the slot table. A later step waits, on the device, for
those it needs and for no others. Knows nothing of the layers between.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from gllm_engine.parallel import Pipe
from gllm_engine.runner.host_arrays import int_array, to_device
from gllm_engine.runner.slot_table import SlotTable


class _ReturnedTokens(NamedTuple):
    step: int
    slots: Tensor  # [n]
    tokens: Tensor  # [n], to be filled
    work: dist.Work


class TokenReturn:
    """`depth`: a step is launched when the one so many before it has ended, on every stage."""

    def __init__(self, pipe: Pipe, table: SlotTable, depth: int) -> None:
        self._pipe = pipe
        self._table = table
        self._depth = depth
        self._awaited: deque[_ReturnedTokens] = deque()
        self._steps = 0
        self._sampled_by = np.zeros(len(table.lengths_cpu), np.int64)  # by slot: the last step

    def expect(self, slots_cpu: np.ndarray[Any, Any]) -> None:
        """Another step samples a token for each of these slots."""
        self._steps += 1
        if len(slots_cpu):
            self._sampled_by[slots_cpu] = self._steps
            (slots,) = to_device(self._table.device, slots_cpu)
            tokens = torch.empty_like(slots)
            work = self._pipe.await_tokens(tokens)
            self._awaited.append(_ReturnedTokens(self._steps, slots, tokens, work))

    def settle(self, decode_slots: list[int]) -> None:
        """Before a step: let it find the last tokens of these slots in the table."""
        needed = self._steps - self._depth
        if decode_slots:
            needed = max(needed, int(self._sampled_by[int_array(decode_slots)].max()))
        while self._awaited and self._awaited[0].step <= needed:
            _, slots, tokens, work = self._awaited.popleft()
            work.wait()
            self._table.last_tokens[slots] = tokens
