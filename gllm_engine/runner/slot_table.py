"""Where each sequence of the runner stands: its pages and the tokens in them, its length and its
last token.

A sequence has a slot, and a slot is a row of the tensors here; plans change rows by diffs. Arrays
that end in _cpu are what the host must know to check a plan without waiting for the device. Knows
nothing of the model or of sampling.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from gllm_engine.ops import HostInts
from gllm_engine.runner.host_arrays import int_array, to_device
from gllm_engine.types import NewPages, StepPlan


class PlanError(ValueError):
    """A plan contradicts what the runner was told before; the message names the slot."""


@dataclass(frozen=True)
class StepRows:
    """What the host knows of a step: whose rows it has and how long they are after it."""

    slots_cpu: HostInts  # in the plan's order of rows
    context_lens_cpu: HostInts


class SlotTable:
    """One row a slot: the tensors are [slots] or, the page table, [slots, max_pages]; int64.

    `cached_tokens` has the token of every place in the cache, [num_pages * page_size].
    """

    def __init__(
        self, num_slots: int, max_pages: int, num_pages: int, page_size: int, device: torch.device
    ) -> None:
        """`max_pages`: of one sequence; `num_pages`: of the cache."""
        self.page_size = page_size
        self.device = device
        self.page_table = torch.zeros(num_slots, max_pages, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(num_slots, dtype=torch.int64, device=device)  # in the cache
        self.last_tokens = torch.zeros(num_slots, dtype=torch.int64, device=device)
        # Shared, freed and found again by other sequences with the pages.
        self.cached_tokens = torch.zeros(num_pages * page_size, dtype=torch.int64, device=device)
        self.lengths_cpu = np.zeros(num_slots, np.int64)
        self.num_pages_cpu = np.zeros(num_slots, np.int64)

    def begin(self, plan: StepPlan) -> StepRows | None:
        """Apply a plan's diff, and count its tokens into the lengths that the host keeps.

        None if the plan computes nothing. Raises PlanError for pages that are not the slot's next
        ones, and for a slot whose pages do not hold its tokens.
        """
        if plan.new:
            self._clear([one.slot for one in plan.new])
        if plan.new_pages:
            self._append(plan.new_pages)
        if not plan.decode_slots and not plan.chunks:
            return None
        return self._count(plan)

    def _clear(self, of_new_owners: list[int]) -> None:
        slots_cpu = int_array(of_new_owners)
        (slots,) = to_device(self.device, slots_cpu)
        self.page_table.index_fill_(0, slots, 0)
        self.lengths.index_fill_(0, slots, 0)
        self.lengths_cpu[slots_cpu] = 0
        self.num_pages_cpu[slots_cpu] = 0

    def _append(self, new_pages: list[NewPages]) -> None:
        max_pages = self.page_table.shape[1]
        places: list[int] = []
        pages: list[int] = []
        for one in new_pages:
            slot = one.slot
            first = one.first
            end = one.first + len(one.pages)
            if first != self.num_pages_cpu[slot] or end > max_pages:
                raise PlanError(
                    f"slot {slot}: {len(one.pages)} pages at index {first}, it has "
                    f"{self.num_pages_cpu[slot]} of at most {max_pages}"
                )
            self.num_pages_cpu[slot] = end
            places += range(slot * max_pages + first, slot * max_pages + end)
            pages += one.pages
        index, values = to_device(self.device, int_array(places), int_array(pages))
        self.page_table.view(-1).index_copy_(0, index, values)

    def _count(self, plan: StepPlan) -> StepRows:
        chunks = plan.chunks
        slots_cpu = int_array(plan.decode_slots, [chunk.slot for chunk in chunks])
        contexts_cpu = self.lengths_cpu[slots_cpu] + 1
        contexts_cpu[len(plan.decode_slots) :] = [c.start + len(c.tokens) for c in chunks]
        room = self.num_pages_cpu[slots_cpu] * self.page_size
        if (contexts_cpu > room).any():  # beyond its pages the table has page 0, another's
            row = int((contexts_cpu > room).argmax())
            raise PlanError(
                f"slot {slots_cpu[row]}: {contexts_cpu[row]} tokens, its pages hold {room[row]}"
            )
        self.lengths_cpu[slots_cpu] = contexts_cpu
        return StepRows(slots_cpu, contexts_cpu)
