"""Counts the tokens of sequences for penalties. It reads them from the pages of the KV cache.

Every cache place has the token id of its K and V in `cached_tokens`. Counts over the vocabulary for
every slot would take much memory. So each step counts anew, only for rows with penalties, a few
rows at once, and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gllm_engine.ops.batch import HostInts

# Most tokens looked up at once; the temporaries take about 60 bytes per token.
MAX_LOOKED_UP = 2**22


@dataclass(frozen=True)
class TokenHistory:
    """The tokens of prompt and output of m rows of a batch. Tensors are int64."""

    cached_tokens: Tensor  # [num_pages * page_size] token of each cache place
    page_table: Tensor  # [slots, max_pages]
    page_size: int
    slots: Tensor  # [m]
    prompt_lens: Tensor  # [m]
    lens: Tensor  # [m] tokens of prompt and output
    prompt_lens_cpu: HostInts  # [m] host copies of the two fields above
    lens_cpu: HostInts

    def count_output(self, rows: slice, vocab: int) -> Tensor:
        """The number of occurrences of each token in the output of n `rows`: [n, vocab] int32."""
        num_tokens = int((self.lens_cpu[rows] - self.prompt_lens_cpu[rows]).sum())
        counts = torch.zeros(self._num(rows), vocab, dtype=torch.int32, device=self.slots.device)
        firsts = self.prompt_lens[rows]
        ends = self.lens[rows]
        for index in self._find(rows, firsts, ends, num_tokens, vocab):
            counts.view(-1).index_add_(0, index, torch.ones_like(index, dtype=torch.int32))
        return counts

    def find_in_prompt(self, rows: slice, vocab: int) -> Tensor:
        """Whether each token occurs in the prompt of n `rows`: [n, vocab] bool."""
        num_tokens = int(self.prompt_lens_cpu[rows].sum())
        found = torch.zeros(self._num(rows), vocab, dtype=torch.bool, device=self.slots.device)
        ends = self.prompt_lens[rows]
        for index in self._find(rows, torch.zeros_like(ends), ends, num_tokens, vocab):
            found.view(-1).index_fill_(0, index, True)
        return found

    def _num(self, rows: slice) -> int:
        return len(range(*rows.indices(len(self.lens_cpu))))

    def _find(
        self, rows: slice, firsts: Tensor, ends: Tensor, num_tokens: int, vocab: int
    ) -> Iterator[Tensor]:
        """Yield row * vocab + token for the tokens at positions firsts .. ends - 1 of each row.

        There are `num_tokens` of them in all, and at most MAX_LOOKED_UP in each tensor.
        """
        slots = self.slots[rows]
        after = (ends - firsts).cumsum(0)
        for begin in range(0, num_tokens, MAX_LOOKED_UP):
            end = min(begin + MAX_LOOKED_UP, num_tokens)
            at = torch.arange(begin, end, device=slots.device)
            row = torch.searchsorted(after, at, right=True)
            position = at + (ends - after)[row]
            page = self.page_table[slots[row], position // self.page_size]
            token = self.cached_tokens[page * self.page_size + position % self.page_size]
            yield row * vocab + token
