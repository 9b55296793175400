"""The runner's state of every sequence: its pages, their tokens, its length and its last token.

A sequence owns a slot, and a slot is a row of these tensors; plans change rows by diffs. Arrays
whose names end in _cpu are host copies: the host uses them to check a plan without waiting for the
device. Knows nothing of the model or of sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gllm_engine.arch import CacheGroup
from gllm_engine.ops import HostInts
from gllm_engine.runner.host_arrays import int_array, to_device
from gllm_engine.types import Chunk, NewPages, NewSequence, StepPlan


class PlanError(ValueError):
    """A plan contradicts earlier plans; the message names the slot."""


@dataclass(frozen=True)
class StepRows:
    """The rows of a step, as host arrays [rows]."""

    slots_cpu: HostInts  # in the plan's order of rows
    context_lens_cpu: HostInts  # tokens in the cache after the step

    def work(self, chunks: list[Chunk]) -> tuple[int, ...]:
        """See Span.work. `chunks`: of the last rows; other rows compute one token."""
        contexts = self.context_lens_cpu
        ones = [1] * (len(contexts) - len(chunks))
        counts = int_array(ones, [len(chunk.tokens) for chunk in chunks])
        attended = counts * contexts - counts * (counts - 1) // 2
        return (*map(int, map(np.sum, (counts, attended, contexts))), len(contexts))


class SlotTable:
    """int64 tensors [slots]; the page tables are [groups, slots, max_pages].

    `rotary_offsets`: of decode rows, see NewSequence; None for a model without Rope.sections.
    `cached_tokens`: [pages * page_size] the token whose K and V each cache place holds, of group
    `whole`, which keeps all tokens. `num_pages`: pages of each group's pool.
    """

    def __init__(
        self,
        num_slots: int,
        max_pages: int,
        num_pages: int,
        page_size: int,
        device: torch.device,
        groups: Sequence[CacheGroup] = (CacheGroup(),),
        has_sections: bool = False,
    ) -> None:
        """`max_pages`: pages of one sequence; `num_pages`: pages of the groups with layers."""
        self.page_size = page_size
        self.device = device
        self.num_pages = [group.num_pages(num_pages) for group in groups]
        self._windows = [group.window for group in groups]
        self.whole = self._windows.index(None)
        shape = (len(groups), num_slots, max_pages)
        self.page_table = torch.zeros(shape, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(num_slots, dtype=torch.int64, device=device)  # in the cache
        self.last_tokens = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self.rotary_offsets = torch.zeros_like(self.lengths) if has_sections else None
        # Belongs to pages and not to slots: sequences that share or reuse a page share its tokens.
        num_places = self.num_pages[self.whole] * page_size
        self.cached_tokens = torch.zeros(num_places, dtype=torch.int64, device=device)
        self.lengths_cpu = np.zeros(num_slots, np.int64)
        self.num_pages_cpu = np.zeros((len(groups), num_slots), np.int64)  # entries of each table

    def begin(self, plan: StepPlan) -> StepRows | None:
        """Apply a plan's diff, and add its tokens to the host's lengths.

        Returns None if the plan computes nothing. Raises PlanError for pages that do not follow the
        slot's pages, and for a slot whose pages have no room for its tokens.
        """
        if plan.new:
            self._clear(plan.new)
        if plan.new_pages:
            self._append(plan.new_pages)
        if not plan.decode_slots and not plan.chunks:
            return None
        return self._count(plan)

    def _clear(self, new: list[NewSequence]) -> None:
        slots_cpu = int_array([one.slot for one in new])
        if self.rotary_offsets is None:
            (slots,) = to_device(self.device, slots_cpu)
        else:
            offsets_cpu = int_array([one.rotary_offset for one in new])
            slots, offsets = to_device(self.device, slots_cpu, offsets_cpu)
            self.rotary_offsets.index_copy_(0, slots, offsets)
        self.page_table.index_fill_(1, slots, 0)
        self.lengths.index_fill_(0, slots, 0)
        self.lengths_cpu[slots_cpu] = 0
        self.num_pages_cpu[:, slots_cpu] = 0

    def _append(self, new_pages: list[NewPages]) -> None:
        _, num_slots, max_pages = self.page_table.shape
        places: list[int] = []
        pages: list[int] = []
        for one in new_pages:
            slot = one.slot
            first = one.first
            end = one.first + len(one.pages)
            known = self.num_pages_cpu[one.group, slot]
            # A cached prefix has no pages before the window of the token after it.
            begins_late = not known and self._windows[one.group] is not None
            if (first != known and not begins_late) or end > max_pages:
                raise PlanError(
                    f"slot {slot}: {len(one.pages)} pages at index {first} of group {one.group}, "
                    f"it has {known} of at most {max_pages}"
                )
            self.num_pages_cpu[one.group, slot] = end
            row = (one.group * num_slots + slot) * max_pages
            places += range(row + first, row + end)
            pages += one.pages
        index, values = to_device(self.device, int_array(places), int_array(pages))
        self.page_table.view(-1).index_copy_(0, index, values)

    def _count(self, plan: StepPlan) -> StepRows:
        chunks = plan.chunks
        slots_cpu = int_array(plan.decode_slots, [chunk.slot for chunk in chunks])
        contexts_cpu = self.lengths_cpu[slots_cpu] + 1
        contexts_cpu[len(plan.decode_slots) :] = [c.start + len(c.tokens) for c in chunks]
        room = self.num_pages_cpu[:, slots_cpu].min(0) * self.page_size
        if (contexts_cpu > room).any():  # tokens without a page would go to page 0
            row = int((contexts_cpu > room).argmax())
            raise PlanError(
                f"slot {slots_cpu[row]}: {contexts_cpu[row]} tokens, its pages hold {room[row]}"
            )
        self.lengths_cpu[slots_cpu] = contexts_cpu
        return StepRows(slots_cpu, contexts_cpu)
