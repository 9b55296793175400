"""A runner without a model, which believes nothing: it checks each plan as it runs it.

It keeps what the real one keeps for each slot (page tables, length, last token) and, for each
cache cell, the (token, position, group) written there. "Attention" reads the cells of every group's
window through its page table and demands exactly the row's own history; the next token is a
function of that history. A token that is an image's is known by the image's pixels.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import msgspec

from gllm_engine.arch import CacheGroup
from gllm_engine.config import EngineConfig
from gllm_engine.sampling import SamplingParams
from gllm_engine.sched import Constraint
from gllm_engine.types import (
    NO_SNAPSHOT,
    Chunk,
    Image,
    ImagePixels,
    NewSequence,
    StepPlan,
    StepResult,
    TokenLogprobs,
)

VOCAB = 24
EOS = (0, 1)
STEP_BYTES = msgspec.msgpack.Encoder()
STEP_PLAN = msgspec.msgpack.Decoder(StepPlan)


def next_token(history: list[int], seed: int, mask: bytes | None) -> int:
    """Deterministic. Seeds of equal parity agree, so that outputs can be shared, too."""
    allowed = range(VOCAB)
    if mask is not None:
        allowed = [t for t in allowed if mask[t // 8] >> t % 8 & 1]
    return allowed[zlib.crc32(bytes(history), seed % 2) % len(allowed)]


def odd_or_even(tokens: list[int]) -> bytes | None:
    """A constraint that depends on the whole history; None now and then."""
    turn = sum(tokens) % 3
    return None if turn == 2 else bytes([0b01010101 << turn] * (VOCAB // 8))


def reference(
    prompt: list[int],
    sampling: SamplingParams,
    seed: int,
    constraint: Constraint | None,
    *,
    max_model_len: int,
    capacity: int,
) -> tuple[list[int], str]:
    """Output tokens and reason of one sequence alone, with no scheduler."""
    tokens = list(prompt)
    limit = max_model_len
    if sampling.max_tokens is not None:
        limit = min(limit, len(prompt) + sampling.max_tokens)
    while True:
        tokens.append(next_token(tokens, seed, constraint(tokens) if constraint else None))
        last = tokens[-1]
        if last in sampling.stop_token_ids or (last in EOS and not sampling.ignore_eos):
            return tokens[len(prompt) :], "stop"
        if len(tokens) == limit:
            return tokens[len(prompt) :], "length"
        if len(tokens) == capacity + 1:
            return tokens[len(prompt) :], "error"


def seen(pixels: bytes, row: int) -> int:
    """In place of a token: the embedding in this row of an image."""
    return 128 + zlib.crc32(pixels + bytes([row])) % 128


def history_of(prompt: list[int], images: tuple[Image, ...]) -> list[int]:
    """A prompt with the embeddings of its images in their places."""
    history = list(prompt)
    for image in images:
        for row in range(image.rows * image.columns):
            place = image.first + row // image.columns * image.stride + row % image.columns
            history[place] = seen(image.pixels, row)
    return history


@dataclass
class Slot:
    owner: NewSequence
    tables: list[dict[int, int]]  # of each group: index -> page
    state: list[int]  # all tokens so far, as layers without K and V would know them
    length: int = 0
    last: int | None = None


class PagedMock:
    def __init__(
        self,
        config: EngineConfig,
        num_pages: int,
        groups: tuple[CacheGroup, ...] = (CacheGroup(),),
        num_snapshots: int | None = None,
    ) -> None:
        self.config = config
        self.num_pages = num_pages
        self.groups = groups
        self.has_states = num_snapshots is not None
        self.num_snapshots = num_snapshots or 0
        self.slots: dict[int, Slot] = {}
        # (whether the group has layers, page * page_size + offset) -> (token, position, group)
        self.cells: dict[tuple[bool, int], tuple[int, int, int]] = {}
        self.states: dict[int, list[int]] = {}  # by snapshot
        self.pixels: dict[int, bytes] = {}  # of images to encode, by number
        self.embeddings: dict[int, bytes] = {}  # the pixels of encoded images
        self.landing: dict[int, bytes] = {}  # pixels of images that encoders have encoded, by place
        self.step = 0
        self.num_computed = 0

    def run(self, made: StepPlan) -> StepResult:
        plan = STEP_PLAN.decode(STEP_BYTES.encode(made))  # as it would arrive on another process
        assert plan.step == self.step + 1
        self.step = plan.step
        self._apply(plan)
        rows = self._rows(plan)
        for slot, start, tokens, _ in rows:
            state = self.slots[slot]
            for position, token in enumerate(tokens, start):
                for group in range(len(self.groups)):
                    self.cells[self._cell(state, group, position)] = (token, position, group)
        result = StepResult(plan.step, [])
        for slot, start, tokens, samples in rows:
            state = self.slots[slot]
            state.length = start + len(tokens)
            history = self._attend(state, start)
            state.state += tokens
            if self.has_states:
                assert state.state == history
            assert history[start:] == tokens
            state.last = None
            if samples:
                self._sample(state, history, plan.masks.get(slot), result)
        self._score_prompts(plan, result)
        assert set(plan.masks) <= {slot for slot, _, _, samples in rows if samples}
        return result

    def put_images(self, images: list[ImagePixels]) -> None:
        self.pixels |= {image.number: image.pixels for image in images}

    def _encode(self, plan: StepPlan) -> None:
        for number in plan.forget:
            self.embeddings.pop(number, None)
        fetched = {image.number: self.landing[image.place] for image in plan.arrived}
        assert [len(pixels) // 3 for pixels in fetched.values()] == [i.tokens for i in plan.arrived]
        for number, pixels in [(n, self.pixels.pop(n)) for n in plan.encode] + [*fetched.items()]:
            # Twice at most: schedules have two salts, which share nothing.
            assert list(self.embeddings.values()).count(pixels) <= 1
            self.embeddings[number] = pixels
        assert not self.pixels
        sizes = [len(pixels) // 3 for pixels in self.embeddings.values()]
        assert sum(sizes) <= self.config.image_cache_tokens
        fresh = [len(self.embeddings[number]) // 3 for number in plan.encode]
        assert sum(fresh) <= self.config.encoder_budget or len(fresh) == 1

    def _known(self, chunk: Chunk) -> list[int]:
        """The tokens of a chunk, with embeddings in their places."""
        assert len(chunk.rotary_positions) in (0, 12 * len(chunk.tokens))
        assert chunk.rotary_positions or not chunk.images
        tokens = list(chunk.tokens)
        for run in chunk.images:
            for i in range(run.count):
                tokens[run.offset + i] = seen(self.embeddings[run.image], run.first + i)
        return tokens

    def _apply(self, plan: StepPlan) -> None:
        self._encode(plan)
        assert len({snapshot for _, snapshot in plan.snapshots}) == len(plan.snapshots)
        for slot, snapshot in plan.snapshots:
            assert 0 <= snapshot < self.num_snapshots
            self.states[snapshot] = list(self.slots[slot].state)
        assert len({new.slot for new in plan.new}) == len(plan.new)
        for new in plan.new:
            assert 0 <= new.slot < self.config.max_num_seqs
            state = [] if new.snapshot == NO_SNAPSHOT else list(self.states[new.snapshot])
            self.slots[new.slot] = Slot(new, [{} for _ in self.groups], state)
        for new_pages in plan.new_pages:
            kind = self.groups[new_pages.group]
            table = self.slots[new_pages.slot].tables[new_pages.group]
            first = new_pages.first
            assert first == (max(table) + 1 if table else 0) or kind.window and not table
            limit = kind.num_pages(self.num_pages)
            assert all(0 <= page < limit for page in new_pages.pages)
            table.update(enumerate(new_pages.pages, first))

    def _rows(self, plan: StepPlan) -> list[tuple[int, int, list[int], bool]]:
        """(slot, start, tokens, samples) of each row, decode rows first."""
        rows = []
        for slot in plan.decode_slots:
            state = self.slots[slot]
            assert state.last is not None, "a decode row for a slot that has not just sampled"
            rows.append((slot, state.length, [state.last], True))
        fresh = {new.slot for new in plan.new}
        for chunk in plan.chunks:
            state = self.slots[chunk.slot]
            assert chunk.tokens and state.last is None
            # Only a new owner may start further on: where its cached pages end.
            assert chunk.start == state.length or chunk.slot in fresh
            assert chunk.start % self.config.page_size == 0 or chunk.slot not in fresh
            rows.append((chunk.slot, chunk.start, self._known(chunk), chunk.samples))
        slots = [row[0] for row in rows]
        assert slots or plan.arrived
        assert len(set(slots)) == len(slots) and fresh <= set(slots)
        num_tokens = sum(len(row[2]) for row in rows)
        assert num_tokens <= self.config.max_num_batched_tokens
        assert len(rows) <= self.config.max_num_seqs
        self.num_computed += num_tokens
        return rows

    def _cell(self, state: Slot, group: int, position: int) -> tuple[bool, int]:
        size = self.config.page_size
        page = state.tables[group][position // size]
        return bool(self.groups[group].layers), page * size + position % size

    def _attend(self, state: Slot, start: int) -> list[int]:
        """All tokens. Every group must have the tokens that those from `start` on see."""
        history: list[int] = []
        for group, kind in enumerate(self.groups):
            first = 0 if kind.window is None else max(0, start - kind.window + 1)
            seen = []
            for position in range(first, state.length):
                token, written_for, written_by = self.cells[self._cell(state, group, position)]
                assert (written_for, written_by) == (position, group)
                seen.append(token)
            history = max(history, seen, key=len)
        for kind in self.groups:
            assert kind.window or len(history) == state.length
        return history

    def _sample(
        self, state: Slot, history: list[int], mask: bytes | None, result: StepResult
    ) -> None:
        owner = state.owner
        token = next_token(history, owner.seed, mask)
        state.last = token
        result.tokens.append(token)
        if owner.sampling.logprobs is not None:
            result.logprobs[owner.slot] = TokenLogprobs([token], [-float(len(history))], [1])

    def _score_prompts(self, plan: StepPlan, result: StepResult) -> None:
        for chunk in plan.chunks:
            if chunk.targets:
                owner = self.slots[chunk.slot].owner
                assert owner.sampling.prompt_logprobs is not None
                assert chunk.start + len(chunk.targets) < owner.prompt_len
                result.prompt_logprobs[chunk.slot] = [
                    TokenLogprobs([target], [-float(position)], [1])
                    for position, target in enumerate(chunk.targets, chunk.start + 1)
                ]
