"""The tokens of sequences, counted where they lie: beside their K and V, in the pages of the cache.

Owns how tokens are counted for penalties. A count of the whole vocabulary for each slot would be
large; counts are made in each step for the rows that need them, some rows at a time, and not kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from gllm_engine.ops.batch import HostInts

# So many tokens are looked up at once; each takes about 60 bytes meanwhile.
MAX_LOOKED_UP = 2**22


@dataclass(frozen=True)
class TokenHistory:
    """Prompt and output of m rows of a batch. Tensors are int64."""

    cached_tokens: Tensor  # [num_pages * page_size] the token whose K and V are there
    page_table: Tensor  # [slots, max_pages]
    page_size: int
    slots: Tensor  # [m]
    prompt_lens: Tensor  # [m]
    lens: Tensor  # [m] of prompt and output
    prompt_lens_cpu: HostInts  # [m] what the host knows of the two above
    lens_cpu: HostInts

    def count_output(self, rows: slice, vocab: int) -> Tensor:
        """How often each token is in the output of `rows`: [n, vocab] int32."""
        num_tokens = int((self.lens_cpu[rows] - self.prompt_lens_cpu[rows]).sum())
        counts = torch.zeros(self._num(rows), vocab, dtype=torch.int32, device=self.slots.device)
        firsts = self.prompt_lens[rows]
        ends = self.lens[rows]
        for index in self._find(rows, firsts, ends, num_tokens, vocab):
            counts.view(-1).index_add_(0, index, torch.ones_like(index, dtype=torch.int32))
        return counts

    def find_in_prompt(self, rows: slice, vocab: int) -> Tensor:
        """Which tokens are in the prompt of `rows`: [n, vocab] bool."""
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
        """Indices row * vocab + token for the tokens at positions firsts .. ends - 1 of each row,
        `num_tokens` in all: tensors of at most MAX_LOOKED_UP of them.
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
