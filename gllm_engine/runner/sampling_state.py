"""The sampling parameters of every slot, on the device.

Owns these parameters, and builds the SamplingBatch of a step's slots. Arrays whose names end in
_cpu are host copies: the host uses them to choose a code path without waiting for the device. Knows
nothing of the model.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gllm_engine.arch import MAX_EOS_TOKEN_IDS
from gllm_engine.ops import HostInts, PlainSampling
from gllm_engine.runner.host_arrays import to_device
from gllm_engine.runner.sampler import FORBIDDEN, MAX_PARTIAL_SORT, Penalties, SamplingBatch
from gllm_engine.runner.slot_table import PlanError, SlotTable
from gllm_engine.runner.token_history import TokenHistory
from gllm_engine.sampling import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS, SamplingParams
from gllm_engine.types import NewSequence, StepPlan

# A lower temperature means greedy sampling (vLLM's limit). A lower repetition penalty is raised to
# this value: it would overflow float32 logits.
SMALLEST = 1e-5

# Bits of features_cpu: the sampling features that a slot uses.
RANDOM, GREEDY, MIN_P, TRUNCATED, BIAS, PENALTIES, REPETITION = (1 << bit for bit in range(7))


class Additions:
    """For each slot a list of at most `width` token ids, and of the value to add to each logit.

    `ids`, `values`: [slots, width]; padding adds 0. All memory is allocated at the start, so that
    no request's list can exhaust the device's memory later.
    """

    def __init__(self, num_slots: int, width: int, device: torch.device) -> None:
        self.ids = torch.zeros(num_slots, width, dtype=torch.int64, device=device)
        self.values = torch.zeros(num_slots, width, dtype=torch.float32, device=device)
        self.lens_cpu = np.zeros(num_slots, np.int64)  # of the lists

    def set(self, slot: int, added: dict[int, float]) -> None:
        """Replace a slot's list. Raises PlanError for a list longer than `width`."""
        width = self.ids.shape[1]
        length = len(added)
        if length > width:
            raise PlanError(f"slot {slot}: values for {length} tokens, at most {width} fit")
        self.lens_cpu[slot] = length
        ids = np.array(list(added), np.int64)
        values = np.array(list(added.values()), np.float32)
        self.values[slot, length:] = 0.0
        self.ids[slot, :length] = to_device(self.ids.device, ids)[0]
        self.values[slot, :length] = to_device(self.ids.device, values)[0]

    def of(self, slots_cpu: HostInts, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and values of `slots` (the same on host and device): [slots, longest list]."""
        longest = int(self.lens_cpu[slots_cpu].max())
        return self.ids[:, :longest][slots], self.values[:, :longest][slots]


class SamplingState:
    """Tensors of shape [..., slots].

    Token ids of a bias or a stop that are not below `vocab` have no effect here; the engine rejects
    such requests.
    """

    def __init__(self, table: SlotTable, vocab: int) -> None:
        num_slots = len(table.lengths)
        device = table.device
        self.vocab = vocab
        self._table = table
        self._device = device
        # temperature, min_p, top_p, presence, frequency, repetition
        self._reals = torch.zeros(6, num_slots, dtype=torch.float64, device=device)
        # top_k, seed, prompt_len
        self._integers = torch.zeros(3, num_slots, dtype=torch.int64, device=device)
        self.plain = PlainSampling(
            temperature=self._reals[0],
            seeds=self._integers[1],
            prompt_lens=self._integers[2],
            lengths=table.lengths,
            last_tokens=table.last_tokens,
        )
        self.bias = Additions(num_slots, min(MAX_LOGIT_BIAS, vocab), device)
        # Tokens that min_tokens forbids: the request's, the checkpoint's, and the tokenizer's one.
        most_stops = MAX_STOP_TOKEN_IDS + MAX_EOS_TOKEN_IDS + 1
        self.stops = Additions(num_slots, min(most_stops, vocab), device)
        self.features_cpu = np.zeros(num_slots, np.int64)
        self.top_k_cpu = np.zeros(num_slots, np.int64)
        self.prompt_lens_cpu = np.zeros(num_slots, np.int64)
        self.min_len_cpu = np.zeros(num_slots, np.int64)  # stops are forbidden below this length
        self.logprobs_cpu = np.full(num_slots, -1, np.int64)  # -1: not requested
        self.prompt_logprobs_cpu = np.zeros(num_slots, np.int64)

    def set_owners(self, new: list[NewSequence]) -> None:
        """Store the sampling parameters of new sequences in their slots."""
        if not new:
            return
        for sequence in new:
            self._describe(sequence)
        slots_cpu = np.array([one.slot for one in new])
        reals = np.array([_reals(one.sampling) for one in new]).T.ravel()
        # Seeds wrap around to int64.
        integers = [
            (self.top_k_cpu[one.slot], (one.seed + 2**63) % 2**64 - 2**63, one.prompt_len)
            for one in new
        ]
        slots, there, bits = to_device(
            self._device, slots_cpu, np.array(integers, np.int64).T.ravel(), reals.view(np.int64)
        )
        self._integers.index_copy_(1, slots, there.view(3, -1))
        self._reals.index_copy_(1, slots, bits.view(torch.float64).view(6, -1))

    def _describe(self, new: NewSequence) -> None:
        """Fill the host arrays of a slot, and its bias and stops if it has any."""
        slot = new.slot
        sampling = new.sampling
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
        ids = (*new.eos_token_ids, *sampling.stop_token_ids)
        stops = {i: FORBIDDEN for i in ids if 0 <= i < self.vocab}
        self.min_len_cpu[slot] = 0
        if sampling.min_tokens and stops:
            self.min_len_cpu[slot] = new.prompt_len + sampling.min_tokens
            self.stops.set(slot, stops)
        self.features_cpu[slot] = features
        self.top_k_cpu[slot] = top_k
        self.prompt_lens_cpu[slot] = new.prompt_len
        self.logprobs_cpu[slot] = -1 if sampling.logprobs is None else sampling.logprobs
        self.prompt_logprobs_cpu[slot] = sampling.prompt_logprobs or 0

    # ------------------------------------------------------------ one step

    def check_masks(self, plan: StepPlan) -> None:
        """Raise PlanError for a mask that allows no token, or of a slot that samples nothing.

        Reads nothing but the plan, so all ranks agree; only the last stage uses the masks.
        """
        if not plan.masks:
            return
        sampling = {*plan.decode_slots, *(chunk.slot for chunk in plan.chunks if chunk.samples)}
        for slot, mask in plan.masks.items():
            if slot not in sampling:
                raise PlanError(f"slot {slot}: a token mask, but no token is sampled for it")
            if not _allows_any(mask, self.vocab):
                raise PlanError(f"slot {slot}: its token mask allows no token")

    def is_plain(self, slots_cpu: HostInts, masks: dict[int, bytes]) -> bool:
        """Whether all slots use plain sampling: a temperature or greedy, and no other feature."""
        special = self.features_cpu[slots_cpu] & ~(RANDOM | GREEDY)
        too_short = self._table.lengths_cpu[slots_cpu] < self.min_len_cpu[slots_cpu]
        return not (masks or special.any() or too_short.any())

    def batch(self, slots_cpu: HostInts, slots: Tensor, masks: dict[int, bytes]) -> SamplingBatch:
        """The sampling parameters of `slots` (the same on host and device) at their lengths now."""
        features = self.features_cpu[slots_cpu]
        used = int(np.bitwise_or.reduce(features))
        reals = self._reals[:, slots]
        singles = reals.float()
        top_k, seeds, prompt_lens = self._integers[:, slots].unbind()
        penalties = None
        if used & PENALTIES:
            penalties = self._penalties(slots_cpu, slots, prompt_lens, singles, used)
        return SamplingBatch(
            temperature=singles[0],
            min_p=singles[1],
            top_p=reals[2],
            top_k=top_k,
            seeds=seeds,
            output_lens=self._table.lengths[slots] - prompt_lens,
            has_random=bool(used & RANDOM),
            has_greedy=bool(used & GREEDY),
            has_min_p=bool(used & MIN_P),
            truncations=self._truncations(slots_cpu) if used & TRUNCATED else (),
            added=self._added(slots_cpu, used),
            masks=self._masks(slots_cpu, masks) if masks else None,
            penalties=penalties,
        )

    def _truncations(self, slots_cpu: HostInts) -> tuple[tuple[Tensor, int], ...]:
        top_k = self.top_k_cpu[slots_cpu]
        truncated = (self.features_cpu[slots_cpu] & TRUNCATED) > 0
        partial = truncated & (top_k <= MAX_PARTIAL_SORT)
        groups = (partial, int(top_k[partial].max(initial=0))), (truncated & ~partial, self.vocab)
        return tuple(
            (to_device(self._device, np.flatnonzero(rows))[0], num_ranked)
            for rows, num_ranked in groups
            if rows.any()
        )

    def _added(self, slots_cpu: HostInts, used: int) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
        """The biases, and the stops of slots whose output is still shorter than min_tokens."""
        tables: list[tuple[Additions, HostInts]] = []
        if used & BIAS:
            tables.append((self.bias, self.features_cpu[slots_cpu] & BIAS))
        too_short = self._table.lengths_cpu[slots_cpu] < self.min_len_cpu[slots_cpu]
        if too_short.any():
            tables.append((self.stops, too_short))
        added = []
        for table, chosen in tables:
            at = np.flatnonzero(chosen)
            rows, slots = to_device(self._device, at, slots_cpu[at])
            added.append((rows, *table.of(slots_cpu[at], slots)))
        return tuple(added)

    def _masks(self, slots_cpu: HostInts, masks: dict[int, bytes]) -> tuple[Tensor, Tensor]:
        """Ignores bits beyond the vocabulary. Tokens beyond the end of a short mask are banned."""
        at = np.flatnonzero(np.isin(slots_cpu, list(masks)))
        packed = np.zeros((len(at), -(-self.vocab // 8)), np.uint8)
        for row, slot in zip(packed, slots_cpu[at].tolist(), strict=True):
            mask = np.frombuffer(masks[slot], np.uint8)[: len(row)]
            row[: len(mask)] = mask
        (bits,) = to_device(self._device, packed.ravel())
        return to_device(self._device, at)[0], bits.view(packed.shape)

    def _penalties(
        self,
        slots_cpu: HostInts,
        slots: Tensor,
        prompt_lens: Tensor,
        singles: Tensor,
        used: int,
    ) -> Penalties:
        """`slots`, `prompt_lens`: [rows]. `singles`: _reals of these slots, [6, rows] float32."""
        table = self._table
        at = np.flatnonzero(self.features_cpu[slots_cpu] & PENALTIES)
        (rows,) = to_device(self._device, at)
        presence, frequency, repetition = singles[3:, rows].unbind()
        history = TokenHistory(
            cached_tokens=table.cached_tokens,
            page_table=table.page_table[table.whole],
            page_size=table.page_size,
            slots=slots[rows],
            prompt_lens=prompt_lens[rows],
            lens=table.lengths[slots[rows]],
            prompt_lens_cpu=self.prompt_lens_cpu[slots_cpu[at]],
            lens_cpu=table.lengths_cpu[slots_cpu[at]],
        )
        return Penalties(
            rows=rows,
            history=history,
            has_repetition=bool(used & REPETITION),
            presence=presence,
            frequency=frequency,
            repetition=repetition,
        )


def _allows_any(mask: bytes, vocab: int) -> bool:
    """Whether a bit below `vocab` is set."""
    num_whole, num_bits = divmod(vocab, 8)
    if np.frombuffer(mask, np.uint8)[:num_whole].any():
        return True
    last = mask[num_whole : num_whole + 1]  # the byte in which the vocabulary ends
    return any(byte & (1 << num_bits) - 1 for byte in last)


def _reals(sampling: SamplingParams) -> tuple[float, ...]:
    return (
        sampling.temperature if sampling.temperature >= SMALLEST else 0.0,
        sampling.min_p,
        sampling.top_p,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        max(sampling.repetition_penalty, SMALLEST),
    )
