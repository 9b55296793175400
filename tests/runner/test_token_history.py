from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

from gllm_engine.runner import token_history
from gllm_engine.runner.token_history import TokenHistory

PAGE_SIZE, VOCAB = 4, 23


def make_history(known: list[list[int]], prompt_lens: list[int], shared: int) -> TokenHistory:
    """All sequences have the first one's `shared` first pages; what no sequence has is token 22."""
    num_pages = -(-max(map(len, known)) // PAGE_SIZE)
    table = torch.randperm(len(known) * num_pages).view(-1, num_pages)
    table[:, :shared] = table[0, :shared]
    cached_tokens = torch.full((table.numel() * PAGE_SIZE,), VOCAB - 1)
    for pages, tokens in zip(table, known, strict=True):
        places = (pages[:, None] * PAGE_SIZE + torch.arange(PAGE_SIZE)).flatten()
        cached_tokens[places[: len(tokens)]] = torch.tensor(tokens, dtype=torch.int64)
    lens = [len(tokens) for tokens in known]
    return TokenHistory(
        cached_tokens=cached_tokens,
        page_table=table.flip(0),
        page_size=PAGE_SIZE,
        slots=torch.arange(len(known)).flip(0),
        prompt_lens=torch.tensor(prompt_lens),
        lens=torch.tensor(lens),
        prompt_lens_cpu=np.array(prompt_lens),
        lens_cpu=np.array(lens),
    )


@pytest.mark.parametrize("at_once", [1, 7, 10**6])
def test_counts_are_those_of_each_row(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_history, "MAX_LOOKED_UP", at_once)
    rng = np.random.default_rng(0)
    prefix = rng.integers(0, VOCAB - 1, 2 * PAGE_SIZE).tolist()
    tails = [0, 1, 17, 3, 0, 9]  # prompts and outputs of no tokens too
    known = [prefix + rng.integers(0, VOCAB - 1, n).tolist() for n in tails]
    prompt_lens = [8, 8, 9, 11, 3, 0]
    history = make_history(known, prompt_lens, 2)
    for rows in (slice(0, 6), slice(1, 3), slice(4, 100)):
        counts = history.count_output(rows, VOCAB)
        found = history.find_in_prompt(rows, VOCAB)
        expected = list(zip(known, prompt_lens, strict=True))[rows]
        assert len(counts) == len(found) == len(expected)
        for row, (tokens, prompt_len) in enumerate(expected):
            output = Counter(tokens[prompt_len:])
            assert counts[row].tolist() == [output[i] for i in range(VOCAB)]
            assert set(found[row].nonzero().flatten().tolist()) == set(tokens[:prompt_len])
