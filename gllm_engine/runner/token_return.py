"""Sampled tokens on their way from the last pipeline stage back to the first.

The last stage samples a token; the first stage needs it as the input of the sequence's next decode
row. Owns the receives under way, in the order of the steps. A step waits, on the device, only for
the tokens that it needs. Knows nothing of the layers.

    first stage                                    last stage

    step 1   forward  ------- hidden states ----->  forward, sample slots 0 and 1
             expect(slots 0, 1)  <--- tokens -----  return_tokens
    step 2   forward  ------- hidden states ----->  forward, sample slots 2 and 3
             expect(slots 2, 3)  <--- tokens -----  return_tokens
    step 3   settle(slots 0, 1): wait for the tokens of step 1, not for those of step 2
                                 last_tokens[0, 1] = tokens of step 1
             forward of decode rows 0 and 1 reads last_tokens

`expect` only posts the receive, so step 2 starts while step 1 is still on the later stages.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gllm_engine.parallel import Awaited, Pipe
from gllm_engine.runner.host_arrays import int_array, to_device
from gllm_engine.runner.slot_table import SlotTable


class _ReturnedTokens(NamedTuple):
    step: int
    slots: Tensor  # [n]
    tokens: Tensor  # [n] filled when `work` has been waited for
    work: Awaited


class TokenReturn:
    """`depth`: steps in flight. Step i starts after step i - `depth` ended on all stages."""

    def __init__(self, pipe: Pipe, table: SlotTable, depth: int) -> None:
        self._pipe = pipe
        self._table = table
        self._depth = depth
        self._awaited: deque[_ReturnedTokens] = deque()
        self._steps = 0
        self._sampled_by = np.zeros(len(table.lengths_cpu), np.int64)  # by slot: last sampling step

    def expect(self, slots_cpu: np.ndarray[Any, Any]) -> None:
        """Count one more step and post the receive of its tokens, one for each of these slots."""
        self._steps += 1
        if len(slots_cpu):
            self._sampled_by[slots_cpu] = self._steps
            (slots,) = to_device(self._table.device, slots_cpu)
            tokens = torch.empty_like(slots)
            work = self._pipe.await_tokens(tokens)
            self._awaited.append(_ReturnedTokens(self._steps, slots, tokens, work))

    def settle(self, decode_slots: list[int]) -> None:
        """Before a step: put the last tokens of its `decode_slots` into the slot table.

        Tokens of steps that have ended are put there too; that wait costs nothing.
        """
        needed = self._steps - self._depth
        if decode_slots:
            needed = max(needed, int(self._sampled_by[int_array(decode_slots)].max()))
        while self._awaited and self._awaited[0].step <= needed:
            _, slots, tokens, work = self._awaited.popleft()
            work.wait()
            self._table.last_tokens[slots] = tokens
