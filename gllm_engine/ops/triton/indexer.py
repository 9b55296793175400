"""The indexer of sparse attention: keys to the cache, scores of tokens, and the choice of tokens.

Knows the cache layout, [num_pages, 1, page_size, 1, dim]. One kernel computes the scores of a row's
whole context, in parts as in decode_attention.py. Another one finds the exact k-th largest score by
its digits, from the highest on, and then lists the tokens above it:

    float32 score -> uint32 in the same order -> 4 digits of 8 bits

    pass 1   counts of the highest digit       |.....|###|        the k-th largest has digit a
    pass 2   counts of the next digit, for scores that begin with a
    ...      the k-th largest is known bit by bit, and how many equal scores belong to the k

Both kernels read lengths on the device only, and cost nothing for rows that attend to everything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gllm_engine.ops.protocol import AttentionPlan, IndexQueries, PagedPlan, RotaryInputs
from gllm_engine.ops.triton.decode_attention import KvSplits, split_kv
from gllm_engine.ops.triton.fp8 import from_float8
from gllm_engine.ops.triton.launch_sizes import next_power_of_2
from gllm_engine.ops.triton.memory import load, load_wide, program, stored
from gllm_engine.ops.triton.pdl import begin_alone, overlapping

# Tokens of the cache in one iteration of `_score_tokens`.
_BLOCK = 64
# Parts of contexts beyond one per row.
_PARTS = 256
# Scores in one iteration of `_choose_tokens`.
_SCORES = 4096
# Rows of scores begin at multiples of so many numbers.
_ALIGNED = 128
# Values of a digit.
_DIGITS = 256


@dataclass(frozen=True)
class Choice:
    """How the tokens of a step's rows are chosen, the same for all layers."""

    top_k: int
    # Of consecutive rows. A length is the context of a row with more than top_k tokens, else 0.
    scans: list[KvSplits]
    scores: Tensor  # [rows of a scan, tokens] float32, memory for one scan after another


def plan_choice(
    page_table: Tensor, slots: Tensor, lens: Tensor, longest: int, top_k: int, memory: Tensor
) -> Choice:
    """Plan the choice for rows with contexts of `lens` [rows] tokens, `longest` or less.

    `memory`: float32 numbers for scores, at least for one row. The host does not wait.
    """
    width = -(-longest // _ALIGNED) * _ALIGNED
    rows = min(len(slots), len(memory) // width)
    scanned = torch.where(lens > top_k, lens, 0)
    parts = zip(slots.split(rows), scanned.split(rows), strict=True)
    scans = [
        split_kv(page_table, some, its_lens, 0, None, extra=_PARTS) for some, its_lens in parts
    ]
    return Choice(top_k, scans, memory[: rows * width].view(rows, width))


@triton.jit
def _rotate(first, second, c, s):
    """The channels of each pair, rotated. One thread has both: results may overwrite the inputs."""
    return first * c - second * s, second * c + first * s


@triton.jit
def _normed(source, gain, bias, at, mask, mean, scale):
    """Channels `at` of a layer norm, in float32 but rounded to the dtype of `source`."""
    raw = load(source + at, mask)
    g = load_wide(gain + at, mask)
    b = load_wide(bias + at, mask)
    return ((raw.to(tl.float32) - mean) * scale * g + b).to(raw.dtype).to(tl.float32)


@triton.jit
def _keep(place, value, mask, ROUND: tl.constexpr):
    """Store a value, rounded to the dtype ROUND first."""
    tl.store(place, stored(value.to(ROUND), place.dtype.element_ty), mask=mask)


@triton.jit
def _store_index_key(
    q, k, gain, bias, cos, sin, positions, cache_index, cache, eps,
    HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """One program per token: the queries' rotation in place, the key's norm and rotation."""
    token = program(0)
    pair, d = tl.arange(0, BLOCK_HALF), tl.arange(0, BLOCK_DIM)
    turned, inside = pair < HALF, d < DIM
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + HALF
    begin_alone()
    angle = tl.load(positions + token) * HALF + pair
    c = load(cos + angle, turned)
    s = load(sin + angle, turned)
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    row = q + (token * HEADS + head) * DIM
    wanted = (head < HEADS) & turned[None, :]
    x = load(row + first[None, :], wanted)
    y = load(row + second[None, :], wanted)
    new_x, new_y = _rotate(x.to(tl.float32), y.to(tl.float32), c[None, :], s[None, :])
    tl.store(row + first[None, :], new_x.to(x.dtype), mask=wanted)
    tl.store(row + second[None, :], new_y.to(x.dtype), mask=wanted)

    source = k + token * DIM
    wide = load_wide(source + d, inside)
    mean = tl.sum(wide, 0) / DIM
    centred = tl.where(inside, wide - mean, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / DIM + eps)
    line = cache + tl.load(cache_index + token) * DIM
    rest = inside & (d >= 2 * HALF)
    kind: tl.constexpr = k.dtype.element_ty
    _keep(line + d, _normed(source, gain, bias, d, rest, mean, scale), rest, kind)
    x = _normed(source, gain, bias, first, turned, mean, scale)
    y = _normed(source, gain, bias, second, turned, mean, scale)
    new_x, new_y = _rotate(x, y, c, s)
    _keep(line + first, new_x, turned, kind)
    _keep(line + second, new_y, turned, kind)


def store_index_key(
    q: Tensor,
    k: Tensor,
    norm: tuple[Tensor, Tensor, float],
    rotary: RotaryInputs,
    cache: Tensor,
    plan: AttentionPlan,
) -> Tensor:
    """See Ops.store_index_key. cos and sin: [max_model_len, rope_dim / 2] float32. q is
    overwritten.
    """
    assert isinstance(plan, PagedPlan)
    cos, sin, interleaved, positions = rotary
    tokens, heads, dim = q.shape
    half = cos.shape[1]
    gain, bias, eps = norm
    _store_index_key[(tokens,)](
        q, k, gain, bias, cos, sin, positions, plan.cache_index, cache, eps,
        HEADS=heads, DIM=dim, HALF=half, INTERLEAVED=interleaved,
        BLOCK_HEADS=next_power_of_2(heads),
        BLOCK_DIM=next_power_of_2(dim), BLOCK_HALF=next_power_of_2(half),
        **overlapping(),
    )  # fmt: skip
    return q


@triton.jit(do_not_specialize=["capacity"])
def _score_tokens(
    q, weights, keys, page_table, items, scores, capacity, num_pages, width,
    HEADS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """One program computes the scores of one part of one row's context."""
    item = tl.program_id(0)
    begin_alone()
    row = tl.load(items + item)
    if row >= 0:
        its = items + item
        first, end = tl.load(its + 3 * capacity), tl.load(its + 4 * capacity)
        table = page_table + tl.load(its + 5 * capacity).to(tl.int64) * num_pages
        head, d = tl.arange(0, BLOCK_HEADS), tl.arange(0, BLOCK_DIM)
        line = row.to(tl.int64) * HEADS + head
        wanted = (head < HEADS)[None, :] & (d < DIM)[:, None]
        x = load(q + line[None, :] * DIM + d[:, None], wanted)
        weight = load_wide(weights + line, head < HEADS)
        out = scores + row.to(tl.int64) * width
        for start in range(first, end, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < end
            page = tl.load(table + at // PAGE, mask=inside, other=0)
            place = (page * PAGE + at % PAGE) * DIM
            mask = inside[:, None] & (d < DIM)[None, :]
            key = load(keys + place[:, None] + d[None, :], mask)
            # Tokens are the rows, so that few threads share the sum of a token over heads.
            product = tl.dot(from_float8(key, x.dtype), x, input_precision="ieee")
            score = tl.sum(tl.maximum(product, 0.0) * weight[None, :], 1)
            # -0 equals 0, but has another order of bits.
            tl.store(out + at, tl.where(score == 0.0, 0.0, score), mask=inside)


@triton.jit
def _ordered(score):
    """Numbers of type uint32 in the order of the scores."""
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) == 1, ~bits, bits | 0x80000000)


@triton.jit
def _next_digit(
    line, length, least, wanted, SHIFT: tl.constexpr, BLOCK: tl.constexpr, DIGITS: tl.constexpr
):
    """Find the digit at SHIFT of the threshold.

    `least`: its higher digits; `wanted`: its rank among the scores with these digits. Returns both
    with one more digit.
    """
    digit, at = tl.arange(0, DIGITS), tl.arange(0, BLOCK)
    counts = tl.zeros((DIGITS,), tl.int32)
    for start in range(0, length, BLOCK):
        inside = start + at < length
        key = _ordered(load(line + start + at, inside))
        if SHIFT < 24:
            inside &= (key >> (SHIFT + 8)) == (least >> (SHIFT + 8))
        values = ((key >> SHIFT) & (DIGITS - 1)).to(tl.int32)
        counts += tl.histogram(values, DIGITS, mask=inside)
    at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
    found = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(digit == found, at_least - counts, 0), 0)
    return least | (found.to(tl.uint32) << SHIFT), wanted - above


@triton.jit
def _choose_tokens(
    scores, lens, chosen, width,
    TOP_K: tl.constexpr, BLOCK: tl.constexpr, DIGITS: tl.constexpr,
):  # fmt: skip
    """One program per row lists the positions of its TOP_K largest scores. Length 0: all tokens."""
    row = program(0)
    at = tl.arange(0, BLOCK)
    begin_alone()
    length = tl.load(lens + row).to(tl.int32)
    out = chosen + row * TOP_K
    if length == 0:
        for start in range(0, TOP_K, BLOCK):
            tl.store(out + start + at, start + at, mask=start + at < TOP_K)
    else:
        line = scores + row * width
        # The TOP_K-th largest score, and how many equal ones are among the TOP_K.
        least, wanted = tl.full((), 0, tl.uint32), tl.full((), TOP_K, tl.int32)
        for number in tl.static_range(4):
            least, wanted = _next_digit(
                line, length, least, wanted, 24 - 8 * number, BLOCK, DIGITS
            )  # fmt: skip
        listed, equals = 0, 0
        for start in range(0, length, BLOCK):
            inside = start + at < length
            key = _ordered(load(line + start + at, inside))
            equal = (inside & (key == least)).to(tl.int32)
            # Of equal scores, the first ones.
            early = (equal == 1) & (equals + tl.cumsum(equal, 0) <= wanted)
            kept = ((inside & (key > least)) | early).to(tl.int32)
            tl.store(out + listed + tl.cumsum(kept, 0) - 1, start + at, mask=kept == 1)
            listed += tl.sum(kept, 0)
            equals += tl.sum(equal, 0)


def choose_tokens(queries: IndexQueries, cache: Tensor, choice: Choice) -> Tensor:
    """As Ops.choose_tokens."""
    rows, heads, dim = queries.q.shape
    top_k, scores = choice.top_k, choice.scores
    chosen = queries.q.new_empty(rows, top_k, dtype=torch.int32)
    first = 0
    for scan in choice.scans:
        n, capacity = len(scan.lens), scan.items.shape[1]
        part = slice(first, first + n)
        _score_tokens[(capacity,)](
            queries.q[part], queries.weights[part], cache, scan.page_table, scan.items, scores,
            capacity, scan.page_table.shape[1], scores.shape[1],
            HEADS=heads, DIM=dim, PAGE=cache.shape[2], BLOCK=_BLOCK,
            BLOCK_HEADS=max(16, next_power_of_2(heads)),
            BLOCK_DIM=max(16, next_power_of_2(dim)), num_warps=4,
            num_stages=3, **overlapping(),
        )  # fmt: skip
        _choose_tokens[(n,)](
            scores, scan.lens, chosen[part], scores.shape[1],
            TOP_K=top_k, BLOCK=_SCORES, DIGITS=_DIGITS, num_warps=8,
            **overlapping(),
        )  # fmt: skip
        first += n
    return chosen
