"""The layout of a step against a naive one and, the kernel, against its slow twin.

The kernel runs on a GPU (-m gpu) or, with TRITON_INTERPRET=1 where Triton is installed, on a CPU.
Inputs are new in every run; what is returned begins as the largest integer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from devices import DEVICES
from torch import Tensor

from gllm_engine.ops import reference

# Decode rows, and the lengths of chunks.
MIXES = {
    "one row": (1, []), "decode": (37, []), "many": (1100, []), "chunk": (0, [19]),
    "chunks": (0, [1, 512, 513, 2, 3000]), "both": (700, [5, 1, 1025]), "long": (3, [8192]),
}  # fmt: skip


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.seed()


def draw(low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape)


def make_case(
    num_decode: int, lens: list[int], page_size: int, num_groups: int = 1
) -> dict[str, Any]:
    """Arguments of prepare_inputs; pages and tokens are arbitrary, so a wrong place is seen."""
    num_slots, num_chunks = num_decode + len(lens) + 5, len(lens)
    max_pages = 12_000 // page_size
    slots = torch.randperm(num_slots)[: num_decode + num_chunks]
    return {
        "page_table": draw(0, 1 << 40, num_groups, num_slots, max_pages),
        "page_size": page_size,
        "lengths": draw(0, 12_000 - max(lens, default=1), num_slots),
        "last_tokens": draw(0, 1 << 20, num_slots),
        "slots": slots,
        "starts": draw(0, 12_000 - max(lens, default=1), num_chunks),
        "ends": torch.tensor(lens, dtype=torch.int64).cumsum(0),
        "known": draw(0, 1 << 20, sum(lens)),
        "longest": max(lens, default=0),
    }


def naive(case: dict[str, Any]) -> tuple[list[int], ...]:
    """Row by row, token by token; the lengths afterwards come last."""
    tokens, positions, context_lens = [], [], []
    cache_index: list[list[int]] = [[] for _ in case["page_table"]]
    lengths, known = case["lengths"].tolist(), case["known"].tolist()
    num_decode = len(case["slots"]) - len(case["starts"])
    begin = 0
    for row, slot in enumerate(case["slots"].tolist()):
        start, inputs = lengths[slot], [int(case["last_tokens"][slot])]
        if row >= num_decode:
            end = int(case["ends"][row - num_decode])
            start, inputs = int(case["starts"][row - num_decode]), known[begin:end]
            begin = end
        for position, token in enumerate(inputs, start):
            tokens.append(token)
            positions.append(position)
            for table, index in zip(case["page_table"], cache_index, strict=True):
                page = int(table[slot, position // case["page_size"]])
                index.append(page * case["page_size"] + position % case["page_size"])
        lengths[slot] = start + len(inputs)
        context_lens.append(lengths[slot])
    return tokens, positions, cache_index, context_lens, lengths


@pytest.mark.parametrize(("page_size", "num_groups"), [(1, 1), (16, 3)])
@pytest.mark.parametrize("mix", MIXES)
def test_the_twin_is_right(mix: str, page_size: int, num_groups: int) -> None:
    case = make_case(*MIXES[mix], page_size, num_groups)
    expected = naive(case)
    found = reference.prepare_inputs(**case)
    assert tuple(t.tolist() for t in (*found, case["lengths"])) == expected


@pytest.mark.parametrize(("page_size", "num_groups"), [(1, 2), (16, 1)])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("device", DEVICES)
def test_the_kernel_is_its_twin(device: str, mix: str, page_size: int, num_groups: int) -> None:
    from gllm_engine.ops import triton

    case = make_case(*MIXES[mix], page_size, num_groups)
    there = {k: v.clone().to(device) if isinstance(v, Tensor) else v for k, v in case.items()}
    before = {k: v.clone() for k, v in there.items() if isinstance(v, Tensor)}
    # The step's numbers come as parts of one tensor, at whatever alignment.
    parts = torch.cat([there["starts"], there["ends"], there["known"]])
    sizes = [len(there["starts"]), len(there["ends"]), len(there["known"])]
    there["starts"], there["ends"], there["known"] = parts.split(sizes)
    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives
    try:
        found = triton.prepare_inputs(**there)
    finally:
        torch.use_deterministic_algorithms(False)
    expected = reference.prepare_inputs(**case)
    for tensor, wanted in zip(found, expected, strict=True):
        assert torch.equal(tensor.cpu(), wanted)
        for row in tensor.view(-1, tensor.shape[-1]) if tensor.dim() == 1 else tensor:
            assert row.data_ptr() % 16 == 0 and row.is_contiguous()
    assert torch.equal(there["lengths"].cpu(), case["lengths"])
    for name in ("page_table", "last_tokens", "slots", "known"):
        assert torch.equal(there[name], before[name]), name


@pytest.mark.parametrize("device", DEVICES)
def test_spare_rows_share_a_slot(device: str) -> None:
    """A decode graph's spare rows: all of one slot, whose pages are one page; nobody else's."""
    from gllm_engine.ops import triton

    case = make_case(600, [], 16)
    spare = int(case["slots"][5])
    case["slots"][5:] = spare
    case["page_table"][:, spare] = 77
    case["lengths"][spare] = 0
    there = {k: v.clone().to(device) if isinstance(v, Tensor) else v for k, v in case.items()}
    lengths = case["lengths"].clone()
    tokens, positions, cache_index, _ = triton.prepare_inputs(**there)
    own = case["slots"][:5]
    assert torch.equal(tokens[:5].cpu(), case["last_tokens"][own])
    assert torch.equal(positions[:5].cpu(), lengths[own])
    assert (cache_index[0, 5:] // 16 == 77).all()
    others = torch.arange(len(lengths)) != spare
    lengths[own] += 1
    assert torch.equal(there["lengths"].cpu()[others], lengths[others])
