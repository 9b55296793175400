"""Compares each kernel's time with an H200's limits: scripts/bench kernels --model NAME.

Times the operations of a model's layers at their sizes in decode and prefill. Calls rotate through
inputs that together exceed the L2 cache, so that inputs are read from memory. On a GPU the calls
are replayed from a CUDA graph, without the host. A kernel's floor is the time in which the chip
could move its bytes or do its arithmetic, whichever is longer.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import starmap
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gllm_benchmarks.offline import model_directory
from gllm_benchmarks.record import Figures, make_parser, print_table, record
from gllm_engine.arch import GatedDelta, Mla, Model, Moe, read_arch
from gllm_engine.arch.formats import (
    FP8_BLOCK,
    FP8_ROW,
    Format,
    Fp8,
    Int8,
    Integers,
    Mxfp4,
    Widened,
)
from gllm_engine.arch.model import HEAD
from gllm_engine.ops import (
    Batch,
    Fp8Weight,
    HeadNorm,
    Int8Weight,
    PackedWeight,
    PlainSampling,
    RecurrentState,
    Rows,
    Weight,
    best_device,
    pack_codes,
    quantize_fp8,
    quantize_int8,
    select_ops,
)
from gllm_engine.ops.batch import made_up_step
from gllm_engine.ops.kernels import rounds_chunks
from gllm_engine.ops.timing import times

# Measured on one H200: a copy in memory, and a bf16 product of random matrices.
BYTES_PER_S = 4.3e12
OPS_PER_S = 790e12
FP8_OPS_PER_S = 2 * OPS_PER_S  # as the data sheet has it
ROTATED_BYTES = 256 << 20  # several times the L2 cache
MAX_CALLS = 1000  # kernels that would need more are bounded by launch latency
MIN_CALLS = 8
REPLAYS = 15
PAGE_SIZE = 16
TOKENS = (1, 64, 256, 1024, 8192)
GEMM_TOKENS = (1, 8, 64, 256, 512, 2048, 8192)
FP8_TOKENS = (1, 16, 64, 256, 4096)
# Formats of the products that are timed for every model.
FORMS: dict[str, Format] = {"FP8 row": FP8_ROW, "FP8 block": FP8_BLOCK, "INT8": Int8()}
DEPTH = 512  # of a product beside the one that is timed
MOE_TOKENS = (1, 4, 16, 64, 256, 512, 4096, 16384)
ROWS = (1, 64, 512, 1024)  # rows sampled in one step
DECODE = ((1, 1024), (64, 1024), (256, 4096), (512, 1536), (1024, 512))  # rows, context
# Rows, context of a row, tokens of a row in this step.
PREFILL = ((1, 8192, 8192), (2, 8192, 8192), (16, 1024, 1024), (64, 256, 256), (4, 8192, 2048))
# Rows, and tokens of a row in this step: of layers with the gated delta rule.
DELTA = ((1, 1), (64, 1), (1, 2048), (1, 8192), (8, 1024))
DELTA_BLOCK = 64  # tokens that are computed at once
LATENT_DECODE = (
    *((rows, context) for rows in (1, 8, 64, 256) for context in (512, 1024, 4096, 32768)),
    (1024, 512),
)
# Of latent attention in both forms; the last ones are near the length that decides between them.
LATENT_PREFILL = ((1, 8192, 8192), (8, 1024, 1024), (4, 8192, 2048), (8, 4096, 64), (64, 4096, 32))
# Name of a product -> a weight of it.
_WEIGHTS = {
    "qkv": "self_attn.q_proj.weight",
    "out": "self_attn.o_proj.weight",
    "gate_up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
    "experts": "mlp.experts.up_proj.weight",
    "logits": HEAD,
}
_ROUNDING = (Fp8, Int8)  # formats for which a product rounds its inputs to 8 bits


Call = Callable[[], Any]


class Case(NamedTuple):
    """One kernel at one size. `make` returns a call with its own inputs.

    `bytes` and `ops` are the minimum of bytes moved and arithmetic operations of a call.
    """

    kernel: str
    size: str
    bytes: float
    ops: float
    make: Callable[[], Call]
    ops_per_s: float = OPS_PER_S

    @property
    def floor_s(self) -> float:
        return max(self.bytes / BYTES_PER_S, self.ops / self.ops_per_s)


@dataclass
class Shape:
    """Makes cases for one model on one device; every layer is taken to be like the first of its
    kind.
    """

    arch: Model
    device: torch.device
    dtype: torch.dtype
    cache_dtype: torch.dtype

    def __post_init__(self) -> None:
        mixers = [layer.mixer for layer in self.arch.layers]
        # Gqa or Mla
        self.mixer: Any = next(mixer for mixer in mixers if not isinstance(mixer, GatedDelta))
        self.delta = next((mixer for mixer in mixers if isinstance(mixer, GatedDelta)), None)
        self.ffn = self.arch.layers[0].ffn
        self.ops = select_ops(self.device)
        self.planner = self.ops.make_planner(self.device, self.dtype)
        self.item = self.dtype.itemsize

    def randn(self, *size: int) -> Tensor:
        return torch.randn(size, dtype=self.dtype, device=self.device)

    def kind_of(self, name: str) -> Format | None:
        """The format in which the model holds a product's weight; None: plain. `name`: as in
        `matrices`, or "logits" or "experts".
        """
        layer = self.arch.layers[0]
        formats = dict(self.arch.vocab_formats) | dict(self.mixer.formats) | dict(layer.ffn.formats)
        kind = formats.get(_WEIGHTS[name])
        return None if isinstance(kind, Widened) else kind

    def weight(self, kind: Format | None, *size: int) -> Weight:
        """A random weight [..., width, depth]. As in layers, each row has a scale of its own if the
        format has one for all.
        """
        match kind:
            case None:
                return self.randn(*size)
            case Mxfp4() | Integers():
                return self.packed(kind, *size)
            case Int8():
                return Int8Weight(*quantize_int8(self.randn(*size), 1))
        assert isinstance(kind, Fp8)
        return self.fp8(kind, *size)

    def packed(self, kind: Mxfp4 | Integers, *size: int) -> PackedWeight:
        """Random 4-bit numbers [..., width, depth]."""
        *lead, depth = size
        codes = torch.randint(16, size, dtype=torch.uint8, device=self.device)
        if isinstance(kind, Mxfp4):
            groups = (*lead, depth // kind.group)
            exponents = torch.randint(118, 122, groups, dtype=torch.uint8, device=self.device)
            return pack_codes(codes, exponents, True)
        groups = (*lead, depth // kind.held_group(depth))
        dtype = torch.float16 if kind.scale_dtype == "F16" else torch.bfloat16
        scales = (torch.rand(groups, device=self.device) / 100).to(dtype)
        zeros = torch.randint_like(scales, 16).to(torch.uint8) if kind.zeros else None
        return pack_codes(codes, scales, False, zeros)

    def fp8(self, kind: Fp8, *size: int) -> Fp8Weight:
        """A random float8 matrix, or several; one at a time is in a wider dtype."""
        *lead, width, depth = size
        rows = kind.rows or 1
        columns = kind.columns or depth
        if not lead:
            return Fp8Weight(*quantize_fp8(self.randn(*size), rows, columns), rows, columns)
        parts = [quantize_fp8(self.randn(width, depth), rows, columns) for _ in range(lead[0])]
        numbers, scales = (torch.stack(part) for part in zip(*parts, strict=True))
        return Fp8Weight(numbers, scales, rows, columns)

    def number_bytes(self, kind: Format | None, depth: int) -> float:
        """Bytes of a number of a weight of this depth, with its share of the scales of groups."""
        match kind:
            case None:
                return self.item
            case Mxfp4():
                return 0.5 + 1 / kind.group
            case Integers():
                return 0.5 + (4 if kind.zeros else 2) / kind.held_group(depth)
        return 1

    def rows_cases(self, tokens: int) -> Iterator[Case]:
        """Operations that process each token separately."""
        dim = self.arch.dim
        hidden = self.ffn.hidden
        m = self.mixer
        ops = self.ops
        item = self.item

        size = f"{tokens} tokens"
        yield Case(
            "rms_norm",
            size,
            (2 * tokens + 1) * dim * item,
            0,
            lambda: partial(ops.rms_norm, self.randn(tokens, dim), self.randn(dim), self.arch.eps),
        )
        if not isinstance(self.ffn, Moe):
            yield Case(
                "silu_mul",
                size,
                3 * tokens * hidden * item,
                0,
                lambda: partial(ops.activate, self.randn(tokens, 2 * hidden), "silu", gated=True),
            )
        batch = self.batch([(1, 1)] * tokens if tokens <= max(ROWS) else [(tokens, tokens)])
        store = self.attention(batch, attends=False)
        # Reads q, k and v and the position's cosines and sines; writes q, and k and v to the cache.
        numbers = 2 * (m.heads + m.kv_heads) * item
        numbers += 2 * m.kv_heads * self.cache_dtype.itemsize + 4
        yield Case("rotate_and_store", size, tokens * numbers * m.head_dim, 0, store)

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Name -> (width, depth) of a layer's matrices, without those of experts."""
        m = self.mixer
        dim = self.arch.dim
        hidden = self.ffn.hidden
        q = m.heads * m.head_dim
        kv = m.kv_heads * m.head_dim
        matrices = {"qkv": (q + 2 * kv, dim), "out": (dim, q)}
        if not isinstance(self.ffn, Moe):
            matrices |= {"gate_up": (2 * hidden, dim), "down": (dim, hidden)}
        return matrices

    def gemm_cases(self, tokens: int) -> Iterator[Case]:
        """Matrix products of the model; of those of one token, all that the layers compute."""
        products = self.matrices | {"logits": (self.arch.vocab, self.arch.dim)}
        for name, size in products.items():
            if name != "logits" or tokens <= max(ROWS):
                kind = self.kind_of(name)
                title = f"GEMM {name}" if kind is None else f"GEMM {name}, {kind}"
                whole = tokens == 1 and name != "logits"
                yield self.product_case(title, name, kind, tokens, *size, whole)

    def form_cases(self, tokens: int) -> Iterator[Case]:
        """Products with FP8 and int8 weights, with all that the layers compute with them."""
        for name, size in self.matrices.items():
            for form, kind in FORMS.items():
                yield self.product_case(f"{form} {name}", name, kind, tokens, *size, True)

    def product_case(
        self, title: str, name: str, kind: Format | None, tokens: int, n: int, k: int, whole: bool
    ) -> Case:
        """A product with a weight [n, k]. "out" and "down" add to the residual stream. `whole`: in
        one call with the norm and rounding of its inputs, and the activation.
        """

        def make() -> Call:
            rows: Rows = self.randn(tokens, k)
            weight = self.weight(kind, n, k)
            ops = self.ops
            if whole and name == "down":  # takes its rows as the product before it leaves them
                made = self.randn(tokens, DEPTH)
                rows = ops.gated_linear(made, self.weight(kind, 2 * k, DEPTH), None, None, weight)
            if adds:
                return partial(ops.add_linear, self.randn(tokens, n), rows, weight, None)
            norm = (self.randn(k), self.arch.eps) if whole else None
            if gates:
                down = self.weight(kind, DEPTH, n // 2)
                return partial(ops.gated_linear, rows, weight, None, norm, down)
            return partial(ops.linear, rows, weight, None, norm)

        adds = name in ("out", "down")
        gates = whole and name == "gate_up"
        moved = tokens * (k + (n // 2 if gates else n) * (1 + adds)) * self.item
        moved += round(n * k * self.number_bytes(kind, k))
        speed = FP8_OPS_PER_S if isinstance(kind, _ROUNDING) else OPS_PER_S
        return Case(title, f"{tokens} x {k} x {n}", moved, 2 * tokens * n * k, make, speed)

    def moe_case(self, moe: Moe, tokens: int) -> Case:
        """Router, routing and experts, added to a sum; all experts are equally likely."""
        dim = self.arch.dim
        num = moe.num_experts
        top_k = moe.routing.top_k
        ops = self.ops

        def mixture() -> Call:
            x, total = self.randn(2, tokens, dim)
            router = self.randn(num, dim)
            bias = self.randn(num).float() if moe.routing.biased else None
            matrices = self.experts  # each call reads another part of them

            def call() -> Tensor:
                routing = ops.route(ops.linear(x, router), moe.routing, bias)
                return ops.sum_experts(x, *routing, *matrices, 0, num, total)

            return call

        expert = 3 * moe.hidden * dim
        read = num * (1 - (1 - top_k / num) ** tokens)  # expected number of experts in use
        moved = read * expert * self.number_bytes(self.kind_of("experts"), dim)
        moved += (num * dim + 3 * tokens * dim) * self.item
        done = 2 * tokens * (top_k * expert + num * dim)
        return Case("experts", f"{tokens} tokens", moved, done, mixture)

    @cached_property
    def experts(self) -> tuple[Weight, Weight]:
        """The expert weights of one layer, which are larger than the L2 cache."""
        num = self.ffn.num_experts
        dim = self.arch.dim
        hidden = self.ffn.hidden
        kind = self.kind_of("experts")
        return self.weight(kind, num, 2 * hidden, dim), self.weight(kind, num, dim, hidden)

    def sample_case(self, rows: int) -> Case:
        vocab = self.arch.vocab
        device = self.device

        def draw() -> Call:
            heat = torch.ones(rows, dtype=torch.float64, device=device)
            seeds = torch.randint(1 << 60, (rows,), device=device)
            lens, last = torch.zeros(2, rows, dtype=torch.int64, device=device)
            state = PlainSampling(heat, seeds, lens, lens, last)
            slots = torch.arange(rows, device=device)
            return partial(self.ops.sample_plain, self.randn(rows, vocab), slots, state)

        return Case("sample", f"{rows} x {vocab}", rows * vocab * self.item, 0, draw)

    def attention_case(self, rows: int, context: int, chunk: int = 1) -> Case:
        """Causal attention of the last `chunk` tokens of each of `rows` rows."""
        m = self.mixer
        window = self.mixer.window or context
        rounds = chunk > 1 and rounds_chunks(True, self.dtype, self.cache_dtype, m.softcap)
        read = 2 * m.kv_heads * min(context, chunk - 1 + window) * self.cache_dtype.itemsize
        q_item = self.cache_dtype.itemsize if rounds else self.item
        moved = rows * m.head_dim * (read + m.heads * chunk * (q_item + self.item))
        pairs = rows * sum(min(p + 1, window) for p in range(context - chunk, context))
        make = self.attention(self.batch([(context, chunk)] * rows))
        done = 4 * pairs * m.heads * m.head_dim
        if chunk == 1:
            return Case("attention, decode", f"{rows} rows x {context}", moved, done, make)
        speed = FP8_OPS_PER_S if rounds else OPS_PER_S
        return Case("attention, prefill", told(rows, context, chunk), moved, done, make, speed)

    def delta_case(self, delta: GatedDelta, rows: int, tokens: int) -> Case:
        """The gated delta rule with its convolution, for rows of `tokens` tokens each."""
        heads = delta.v_heads
        plan = self.planner.plan_recurrent(self.batch([(tokens, tokens)] * rows))
        width = delta.conv_width
        total = rows * tokens

        def rule() -> Call:
            inputs = (self.randn(total, width), *self.randn(2, total, heads))
            conv = self.randn(width, delta.conv)
            a_log, dt_bias = self.randn(2, heads).float()
            last_inputs = self.randn(rows, width, delta.conv - 1)
            matrix = self.randn(rows, heads, delta.k_dim, delta.v_dim).float()
            state = RecurrentState(last_inputs, matrix)
            return partial(self.ops.gated_delta, *inputs, conv, a_log, dt_bias, state, plan)

        square = delta.k_dim * delta.v_dim
        state_bytes = heads * square * 4 + width * (delta.conv - 1) * self.item
        moved = total * (width + heads * (delta.v_dim + 2)) * self.item + 2 * rows * state_bytes
        # Three products with the state; and, in blocks, four with a square of tokens.
        done = 6 * square + (4 * DELTA_BLOCK * (delta.k_dim + delta.v_dim) if tokens > 1 else 0)
        kind = "prefill" if tokens > 1 else "decode"
        done *= total * heads
        return Case(f"gated delta rule, {kind}", f"{rows} x {tokens}", moved, done, rule)

    def batch(self, rows: list[tuple[int, int]], contexts: list[int] | None = None) -> Batch:
        """A step of rows of (context, tokens in this step), on pages in random order. `contexts`:
        of sequences, which rows take in turn; None: each row is a sequence.
        """
        contexts = contexts or [context for context, _ in rows]
        counts = [-(-context // PAGE_SIZE) for context in contexts]
        pages = torch.randperm(sum(counts)).split(counts)
        table = torch.nn.utils.rnn.pad_sequence(list(pages), batch_first=True)
        return made_up_step(rows, table.to(self.device), PAGE_SIZE).of_group(0)

    def attention(self, batch: Batch, attends: bool = True) -> Callable[[], Call]:
        """Make calls that attend over their own caches, or rotate and store into them."""
        m = self.mixer
        ops = self.ops
        shape = (int(batch.page_table.max()) + 1, 2, PAGE_SIZE, m.kv_heads, m.head_dim)
        like = torch.empty(shape, dtype=self.cache_dtype, device=self.device)
        plan = self.planner.plan(batch, like, m.attention)
        cos, sin = torch.rand(2, batch.context_lens_cpu.max(), m.head_dim // 2, device=self.device)
        interleaved = m.rope is not None and m.rope.interleaved
        rotary = ops.rotary_inputs(cos, sin, batch.positions, self.dtype, interleaved)
        num_heads = m.heads + 2 * m.kv_heads
        gains = self.randn(m.heads + m.kv_heads, m.head_dim)
        norm = HeadNorm(gains, self.arch.eps) if m.qk_norm else None
        sinks = self.randn(m.heads) if m.sinks else None

        def make() -> Call:
            cache = self.randn(*shape).to(self.cache_dtype)
            qkv = self.randn(len(batch.tokens), num_heads, m.head_dim)
            store = partial(ops.rotate_and_store, qkv, m.heads, norm, rotary, cache, plan)
            return partial(ops.attend, store(), cache, plan, sinks=sinks) if attends else store

        return make

    def latent_case(self, rows: int, context: int, chunk: int, absorbed: bool) -> Case:
        """Latent attention of the last `chunk` tokens of each of `rows` rows. `absorbed`: each
        token is a decode row.
        """
        m: Mla = self.mixer
        attention = replace(m.attention, top_k=None)
        ends = range(context - chunk + 1, context + 1)
        # A token of each row in turn, as rows take their pages in turn.
        step = [(end, 1) for end in ends for _ in range(rows)] if absorbed else None
        batch = self.batch(step or [(context, chunk)] * rows, [context] * rows)
        shape = (int(batch.page_table.max()) + 1, 1, PAGE_SIZE, 1, m.latent_width)
        like = torch.empty(shape, dtype=self.cache_dtype, device=self.device)
        plan = self.planner.plan_latent(batch, like, attention)
        tokens = rows * chunk

        def make() -> Call:
            q = self.randn(tokens, m.heads, attention.key_dim)
            kv_up = self.randn(m.heads, m.nope_dim + m.v_dim, m.kv_rank)
            cache = self.randn(*shape).to(self.cache_dtype)
            return partial(self.ops.attend_latent, q, kv_up, cache, plan)

        moved = rows * context * m.latent_width * self.cache_dtype.itemsize
        moved += tokens * m.heads * (attention.key_dim + m.v_dim) * self.item
        width = m.latent_width + m.kv_rank if absorbed else attention.key_dim + m.v_dim
        multiplied = tokens if absorbed else rows * context  # by W_UK and W_UV
        moved += m.heads * (m.nope_dim + m.v_dim) * m.kv_rank * self.item
        done = rows * sum(ends) * width + multiplied * (m.nope_dim + m.v_dim) * m.kv_rank
        form = "absorbed" if absorbed else "expanded"
        done *= 2 * m.heads
        return Case(f"latent attention, {form}", told(rows, context, chunk), moved, done, make)

    def latent_cases(self) -> Iterator[Case]:
        for rows in LATENT_DECODE:
            yield self.latent_case(*rows, 1, True)
        for rows in LATENT_PREFILL:
            yield self.latent_case(*rows, True)
            yield self.latent_case(*rows, False)

    def cases(self) -> Iterator[Case]:
        """All cases. Time each case before making the next one, because plans share memory."""
        if isinstance(self.mixer, Mla):
            yield from self.latent_cases()
            return
        for tokens in TOKENS:
            yield from self.rows_cases(tokens)
        yield from map(self.sample_case, ROWS)
        yield from starmap(self.attention_case, (*DECODE, *PREFILL))
        if self.delta is not None:
            yield from starmap(partial(self.delta_case, self.delta), DELTA)
        for tokens in GEMM_TOKENS:
            yield from self.gemm_cases(tokens)
        for tokens in FP8_TOKENS:
            yield from self.form_cases(tokens)
        if isinstance(self.ffn, Moe):
            yield from map(partial(self.moe_case, self.ffn), MOE_TOKENS)


def told(rows: int, context: int, chunk: int) -> str:
    """The size of a step: each row's tokens, and those before them."""
    return f"{rows} x {chunk}" + (f" after {context - chunk}" if chunk < context else "")


def seconds_of(case: Case, device: torch.device) -> float:
    """Median seconds of one call."""
    on_gpu = device.type == "cuda"
    count = min(MAX_CALLS, -(-ROTATED_BYTES // int(case.bytes))) if on_gpu else 1
    calls = [case.make() for _ in range(count)]
    calls *= -(-MIN_CALLS // count)

    def run() -> None:
        for call in calls:
            call()

    return statistics.median(times(run, device, REPLAYS + 2)[2:]) / len(calls)


def describe(case: Case, seconds: float) -> Figures:
    return {
        "kernel": case.kernel,
        "size": case.size,
        "us": seconds * 1e6,
        "bytes": case.bytes,
        "ops": case.ops,
        "floor_us": case.floor_s * 1e6,
        "share": case.floor_s / seconds,
    }


def make_row(about: Figures) -> list[str]:
    us = about["us"]
    return [
        about["kernel"],
        about["size"],
        f"{us:,.1f}",
        f"{about['bytes'] / us / 1e6:.2f}",
        f"{about['ops'] / us / 1e6:.0f}" if about["ops"] else "",
        f"{about['floor_us']:,.1f}",
        f"{about['share']:.0%}",
    ]


def parse_arguments() -> Namespace:
    parser = make_parser("kernels", __doc__)
    parser.add_argument("--model", default="llama-3.1-8b", help="a directory or a known shape")
    parser.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto")
    parser.add_argument("--only", default="", help="kernels with one of these words: GEMM,sample")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    arguments = parse_arguments()
    path = model_directory(arguments.model)
    device = best_device()
    if device.type != "cuda":
        raise SystemExit("scripts/bench kernels: no GPU with its kernels installed is here")
    dtype = torch.bfloat16
    cache_dtype = torch.float8_e4m3fn if arguments.kv_cache_dtype == "fp8" else dtype
    shape = Shape(read_arch(path).quantized(), device, dtype, cache_dtype)
    words = arguments.only.split(",")
    found = []
    for case in shape.cases():
        if any(word in case.kernel for word in words):
            found.append(describe(case, seconds_of(case, device)))
            print(" | ".join(make_row(found[-1])), flush=True)
    header = ["kernel", "size", "us", "TB/s", "TFLOP/s", "floor us", "of the floor"]
    print_table(path.name, header, [make_row(about) for about in found])
    suffix = "" if cache_dtype == dtype else "-fp8-kv"
    record(arguments, f"kernels-{path.name}{suffix}", {"kernels": found})


if __name__ == "__main__":
    main()
