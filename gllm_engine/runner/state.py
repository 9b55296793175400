"""What the runner remembers of each slot, on the device: one row a slot, changed only by diffs.

Owns the page table, lengths, last tokens, sampling parameters and token counts, and turns the
parameters of some slots into a SamplingBatch. Arrays that end in _cpu are what the host must know
to choose a path without waiting for the device. Knows nothing of the model or of who asks.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from gllm_engine.ops import PlainSampling
from gllm_engine.runner.sampler import FORBIDDEN, MAX_PARTIAL_SORT, Penalties, SamplingBatch
from gllm_engine.sampling import SamplingParams
from gllm_engine.types import NewPages, NewSequence

# A lower temperature means greedy (vLLM's limit); a lower repetition penalty acts like this one:
# it would carry scores out of float32.
SMALLEST = 1e-5

# Bits of features_cpu: what a slot's sampling asks for.
RANDOM, GREEDY, MIN_P, TRUNCATED, BIAS, PENALTIES, REPETITION = (1 << bit for bit in range(7))


class PlanError(ValueError):
    """A plan contradicts what the runner was told before; the message names the slot."""


def int_array(*lists: list[int]) -> np.ndarray[Any, Any]:
    """An int64 array of all lists, read-only; np.array takes two to three times as long."""
    packed = [struct.pack(f"{len(values)}q", *values) for values in lists]
    return np.frombuffer(b"".join(packed), np.int64)


def pack(device: torch.device, *arrays: np.ndarray[Any, Any]) -> Tensor:
    """Arrays of one type and one dimension after each other on the host, in memory from which
    copies to `device` need not be waited for."""
    dtype = torch.from_numpy(np.empty(0, arrays[0].dtype)).dtype
    packed = torch.empty(sum(map(len, arrays)), dtype=dtype, pin_memory=device.type != "cpu")
    np.concatenate(arrays, out=packed.numpy())
    return packed


def to_device(device: torch.device, *arrays: np.ndarray[Any, Any]) -> tuple[Tensor, ...]:
    """Arrays of one type and one dimension, in a single copy that the host does not wait for."""
    there = pack(device, *arrays).to(device, non_blocking=True)
    return there.split([len(array) for array in arrays])


class Additions:
    """A short list of (token id, number to add to its logit) for some slots.

    ids and values are [slots, width], as wide as the longest list; the rest adds 0 to token 0.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self.ids = torch.zeros(num_slots, 0, dtype=torch.int64, device=device)
        self.values = torch.zeros(num_slots, 0, dtype=torch.float32, device=device)

    def set(self, slot: int, added: dict[int, float]) -> None:
        width = self.ids.shape[1]
        if len(added) > width:
            more = (0, max(len(added), 2 * width) - width)
            self.ids, self.values = pad(self.ids, more), pad(self.values, more)
        fill = (0, self.ids.shape[1] - len(added))
        ids = np.pad(np.array(list(added), np.int64), fill)
        values = np.pad(np.array(list(added.values()), np.float32), fill)
        self.ids[slot] = to_device(self.ids.device, ids)[0]
        self.values[slot] = to_device(self.ids.device, values)[0]


class TokenCounts:
    """Which tokens a prompt has and how often its output has each, for slots with penalties.

    A row as long as the vocabulary is expensive: only such slots have one, until the slot's next
    owner needs none. Repetition looks at both tables, the other penalties at `output` alone.
    """

    def __init__(self, num_slots: int, vocab: int, device: torch.device) -> None:
        self.rows_cpu = np.full(num_slots, -1, np.int64)
        self.free: list[int] = []
        self.in_prompt = torch.zeros(0, vocab, dtype=torch.bool, device=device)
        self.output = torch.zeros(0, vocab, dtype=torch.int32, device=device)

    def release(self, slot: int) -> None:
        if self.rows_cpu[slot] >= 0:
            self.free.append(int(self.rows_cpu[slot]))
            self.rows_cpu[slot] = -1

    def start(self, slot: int, prompt: list[int], output: list[int]) -> None:
        """Count these tokens, and nothing before them, for `slot`, which has no row."""
        if not self.free:
            num_rows, vocab = self.output.shape
            more = max(1, num_rows)
            self.in_prompt = torch.cat([self.in_prompt, self.in_prompt.new_zeros(more, vocab)])
            self.output = torch.cat([self.output, self.output.new_zeros(more, vocab)])
            self.free.extend(range(num_rows, num_rows + more))
        row = self.free.pop()
        self.rows_cpu[slot] = row
        device = self.output.device
        arrays = (np.asarray(tokens, np.int64) for tokens in (prompt, output))
        prompt_ids, output_ids = to_device(device, *arrays)
        self.in_prompt[row].zero_().index_fill_(0, prompt_ids, True)
        ones = torch.ones(len(output), dtype=torch.int32, device=device)
        self.output[row].zero_().index_add_(0, output_ids, ones)

    def add(self, rows: Tensor, tokens: Tensor) -> None:
        """One more of tokens[i] in the output of rows[i]; no row twice."""
        self.output[rows, tokens] += 1


class State:
    """One row a slot: the tensors below are [slots, ...] or [..., slots].

    `max_pages` is the room of a page table row. Token ids of a bias or a stop that are not below
    `vocab` have no effect here; the engine refuses such requests.
    """

    def __init__(
        self,
        num_slots: int,
        max_pages: int,
        page_size: int,
        vocab: int,
        eos_token_ids: tuple[int, ...],
        device: torch.device,
    ) -> None:
        self.page_size, self.vocab, self.device = page_size, vocab, device
        self.eos_token_ids = eos_token_ids
        long = {"dtype": torch.int64, "device": device}
        self.page_table = torch.zeros(num_slots, max_pages, **long)
        self.lengths = torch.zeros(num_slots, **long)  # tokens in the cache
        self.last_tokens = torch.zeros(num_slots, **long)
        # temperature, min_p, top_p, presence, frequency, repetition
        self.reals = torch.zeros(6, num_slots, dtype=torch.float64, device=device)
        self.integers = torch.zeros(3, num_slots, **long)  # top_k, seed, prompt_len
        self.plain_sampling = PlainSampling(
            temperature=self.reals[0],
            seeds=self.integers[1],
            prompt_lens=self.integers[2],
            lengths=self.lengths,
            last_tokens=self.last_tokens,
        )
        self.bias = Additions(num_slots, device)
        self.stops = Additions(num_slots, device)  # what min_tokens forbids
        self.counts = TokenCounts(num_slots, vocab, device)
        self.lengths_cpu = np.zeros(num_slots, np.int64)
        self.num_pages_cpu = np.zeros(num_slots, np.int64)
        self.features_cpu = np.zeros(num_slots, np.int64)
        self.top_k_cpu = np.zeros(num_slots, np.int64)
        self.min_len_cpu = np.zeros(num_slots, np.int64)  # stops are forbidden below this length
        self.logprobs_cpu = np.full(num_slots, -1, np.int64)  # -1: not asked for
        self.prompt_logprobs_cpu = np.zeros(num_slots, np.int64)

    # ------------------------------------------------------------ the plan's diff

    def apply(self, new: list[NewSequence], new_pages: list[NewPages]) -> None:
        """Give slots their new owners, then append pages."""
        if new:
            self._own(new)
        if new_pages:
            self._grow(new_pages)

    def _own(self, new: list[NewSequence]) -> None:
        for sequence in new:
            self._describe(sequence)
        slots_cpu = np.array([one.slot for one in new])
        reals = np.array([_reals(one.sampling) for one in new]).T.ravel()
        # Seeds wrap, so that counting up from any seed is fine.
        integers = [
            (self.top_k_cpu[one.slot], (one.seed + 2**63) % 2**64 - 2**63, one.prompt_len)
            for one in new
        ]
        slots, there, bits = to_device(
            self.device, slots_cpu, np.array(integers, np.int64).T.ravel(), reals.view(np.int64)
        )
        self.integers.index_copy_(1, slots, there.view(3, -1))
        self.reals.index_copy_(1, slots, bits.view(torch.float64).view(6, -1))
        self.page_table.index_fill_(0, slots, 0)
        self.lengths.index_fill_(0, slots, 0)
        self.lengths_cpu[slots_cpu] = 0
        self.num_pages_cpu[slots_cpu] = 0

    def _describe(self, new: NewSequence) -> None:
        """Fill what the host keeps of a slot, and the rare tables."""
        slot, sampling = new.slot, new.sampling
        self.counts.release(slot)
        top_k = min(sampling.top_k, self.vocab) if sampling.top_k > 0 else self.vocab
        features = RANDOM if sampling.temperature >= SMALLEST else GREEDY
        if sampling.min_p > 0:
            features |= MIN_P
        if top_k < self.vocab or sampling.top_p < 1:
            features |= TRUNCATED
        bias = {i: value for i, value in sampling.logit_bias.items() if 0 <= i < self.vocab}
        if bias:
            features |= BIAS
            self.bias.set(slot, bias)
        if _reals(sampling)[3:] != (0.0, 0.0, 1.0):
            features |= PENALTIES
            if sampling.repetition_penalty != 1:
                features |= REPETITION
            self.counts.start(slot, new.tokens[: new.prompt_len], new.tokens[new.prompt_len :])
        ids = (*self.eos_token_ids, *sampling.stop_token_ids)
        stops = {i: FORBIDDEN for i in ids if 0 <= i < self.vocab}
        self.min_len_cpu[slot] = 0
        if sampling.min_tokens and stops:
            self.min_len_cpu[slot] = new.prompt_len + sampling.min_tokens
            self.stops.set(slot, stops)
        self.features_cpu[slot] = features
        self.top_k_cpu[slot] = top_k
        self.logprobs_cpu[slot] = -1 if sampling.logprobs is None else sampling.logprobs
        self.prompt_logprobs_cpu[slot] = sampling.prompt_logprobs or 0

    def _grow(self, new_pages: list[NewPages]) -> None:
        max_pages = self.page_table.shape[1]
        places: list[int] = []
        pages: list[int] = []
        for one in new_pages:
            slot, first, end = one.slot, one.first, one.first + len(one.pages)
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

    def check_room(
        self, slots_cpu: np.ndarray[Any, Any], contexts_cpu: np.ndarray[Any, Any]
    ) -> None:
        """Raise PlanError where a slot's pages do not hold its tokens: page 0 is not its own."""
        room = self.num_pages_cpu[slots_cpu] * self.page_size
        if (contexts_cpu > room).any():
            row = int((contexts_cpu > room).argmax())
            raise PlanError(
                f"slot {slots_cpu[row]}: {contexts_cpu[row]} tokens, its pages hold {room[row]}"
            )

    # ------------------------------------------------------------ sampling

    def is_plain(self, slots_cpu: np.ndarray[Any, Any], masks: dict[int, bytes]) -> bool:
        """Whether `slots` ask for nothing but a temperature, or the most likely token."""
        special = self.features_cpu[slots_cpu] & ~(RANDOM | GREEDY)
        too_short = self.lengths_cpu[slots_cpu] < self.min_len_cpu[slots_cpu]
        return not (masks or special.any() or too_short.any())

    def sampling_batch(
        self, slots_cpu: np.ndarray[Any, Any], slots: Tensor, masks: dict[int, bytes]
    ) -> SamplingBatch:
        """What `slots` (the same on host and device) ask for at their present lengths."""
        features = self.features_cpu[slots_cpu]
        used = int(np.bitwise_or.reduce(features))
        reals = self.reals[:, slots]
        singles = reals.float()
        top_k, seeds, prompt_lens = self.integers[:, slots].unbind()
        return SamplingBatch(
            temperature=singles[0],
            min_p=singles[1],
            top_p=reals[2],
            top_k=top_k,
            seeds=seeds,
            output_lens=self.lengths[slots] - prompt_lens,
            has_random=bool(used & RANDOM),
            has_greedy=bool(used & GREEDY),
            has_min_p=bool(used & MIN_P),
            truncations=self._truncations(slots_cpu) if used & TRUNCATED else (),
            added=self._added(slots_cpu, used),
            masks=self._masks(slots_cpu, masks) if masks else None,
            penalties=self._penalties(slots_cpu, singles, used) if used & PENALTIES else None,
        )

    def _truncations(self, slots_cpu: np.ndarray[Any, Any]) -> tuple[tuple[Tensor, int], ...]:
        top_k = self.top_k_cpu[slots_cpu]
        truncated = (self.features_cpu[slots_cpu] & TRUNCATED) > 0
        partial = truncated & (top_k <= MAX_PARTIAL_SORT)
        groups = (partial, int(top_k[partial].max(initial=0))), (truncated & ~partial, self.vocab)
        return tuple(
            (to_device(self.device, np.flatnonzero(rows))[0], num_ranked)
            for rows, num_ranked in groups
            if rows.any()
        )

    def _added(
        self, slots_cpu: np.ndarray[Any, Any], used: int
    ) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
        """The bias, and the stops of slots that are still shorter than min_tokens demands."""
        tables = []
        if used & BIAS:
            tables.append((self.bias, self.features_cpu[slots_cpu] & BIAS))
        too_short = self.lengths_cpu[slots_cpu] < self.min_len_cpu[slots_cpu]
        if too_short.any():
            tables.append((self.stops, too_short))
        added = []
        for table, chosen in tables:
            at = np.flatnonzero(chosen)
            rows, slots = to_device(self.device, at, slots_cpu[at])
            added.append((rows, table.ids[slots], table.values[slots]))
        return tuple(added)

    def _masks(
        self, slots_cpu: np.ndarray[Any, Any], masks: dict[int, bytes]
    ) -> tuple[Tensor, Tensor]:
        """Bits beyond the vocabulary are dropped; tokens beyond a short mask are not allowed."""
        at = np.flatnonzero(np.isin(slots_cpu, list(masks)))
        if len(at) != len(masks):
            unused = sorted(set(masks) - set(slots_cpu[at].tolist()))
            raise PlanError(f"slot {unused[0]}: a token mask, but no token is sampled for it")
        packed = np.zeros((len(at), -(-self.vocab // 8)), np.uint8)
        for row, slot in zip(packed, slots_cpu[at].tolist(), strict=True):
            mask = np.frombuffer(masks[slot], np.uint8)[: len(row)]
            row[: len(mask)] = mask
            row[-1] &= 0xFF >> (-self.vocab % 8)
            if not row.any():
                raise PlanError(f"slot {slot}: its token mask allows no token")
        (bits,) = to_device(self.device, packed.ravel())
        return to_device(self.device, at)[0], bits.view(packed.shape)

    def _penalties(self, slots_cpu: np.ndarray[Any, Any], singles: Tensor, used: int) -> Penalties:
        rows, count_rows = self._counted(slots_cpu)
        presence, frequency, repetition = singles[3:, rows].unbind()
        return Penalties(
            rows=rows,
            in_prompt=self.counts.in_prompt[count_rows] if used & REPETITION else None,
            output_counts=self.counts.output[count_rows],
            presence=presence,
            frequency=frequency,
            repetition=repetition,
        )

    def _counted(self, slots_cpu: np.ndarray[Any, Any]) -> tuple[Tensor, ...]:
        """Rows of the batch with penalties, and their rows of the counts."""
        count_rows = self.counts.rows_cpu[slots_cpu]
        at = np.flatnonzero(count_rows >= 0)
        return to_device(self.device, at, count_rows[at])

    def record(self, slots_cpu: np.ndarray[Any, Any], slots: Tensor, tokens: Tensor) -> None:
        """Remember what was sampled, one token a slot."""
        self.last_tokens[slots] = tokens
        if (self.features_cpu[slots_cpu] & PENALTIES).any():
            rows, count_rows = self._counted(slots_cpu)
            self.counts.add(count_rows, tokens[rows])


def _reals(sampling: SamplingParams) -> tuple[float, ...]:
    return (
        sampling.temperature if sampling.temperature >= SMALLEST else 0.0,
        sampling.min_p,
        sampling.top_p,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        max(sampling.repetition_penalty, SMALLEST),
    )
