"""Cache groups: the layers of a model that share a page table.

Layers that see the same window need the same tokens in the cache, so they share a page table. All
groups take pages from one pool, so a page must serve any of them: it has room for `page_size`
tokens of as many layers as the largest group has. If a model has many more layers of one window
than of another, its layers are divided among several groups, or most of each page would be empty.
Gemma 3 27B has 52 layers with a window and 10 without:

    groups                    10   9  9  9  9  8  8  layers
    a page                    10 layers of 16 tokens
    a context of 1,600 tokens,
    a window of 160 tokens    100 + 6 * 11 pages, in place of 100 * 62 / 10
"""

from __future__ import annotations

from dataclasses import dataclass

from gllm_engine.arch.model import Model

# Most groups of a model: each one costs time in every step, and memory for its page tables.
MAX_GROUPS = 8


@dataclass(frozen=True)
class CacheGroup:
    """Layers with one page table. `window`: tokens that they see; None: all.

    A group without layers keeps only token ids, in pages of its own.
    """

    window: int | None = None
    layers: tuple[int, ...] = (0,)  # indices in the model


def cache_groups(model: Model, max_model_len: int) -> tuple[CacheGroup, ...]:
    """The groups of a model's layers, the same for every pipeline stage.

    A window of `max_model_len` tokens or more counts as none. One group keeps all tokens, even if
    no layer does: penalties count the tokens of a sequence by its pages.
    """
    by_window: dict[int | None, list[int]] = {}
    for i, layer in enumerate(model.layers):
        window = layer.mixer.window
        if window is not None and window >= max_model_len:
            window = None
        by_window.setdefault(window, []).append(i)
    most = _layers_per_page([len(layers) for layers in by_window.values()])
    groups = []
    for window, layers in by_window.items():
        # Every n-th layer, so that the groups of each pipeline stage have about equally many.
        count = -(-len(layers) // most)
        groups += [CacheGroup(window, tuple(layers[i::count])) for i in range(count)]
    if None not in by_window:
        groups.append(CacheGroup(None, ()))
    return tuple(groups)


def _layers_per_page(counts: list[int]) -> int:
    """The number of layers of a page, for `counts` layers of each window.

    It wastes the least memory, summed over the windows as a share of each one's layers.
    """

    def groups(layers: int) -> int:
        return sum(-(-count // layers) for count in counts)

    def waste(layers: int) -> tuple[float, int]:
        shares = [-(-count // layers) * layers / count for count in counts]
        return sum(shares), groups(layers)

    allowed = max(MAX_GROUPS, len(counts))
    return min((n for n in range(1, max(counts) + 1) if groups(n) <= allowed), key=waste)


def num_token_pages(num_pages: int) -> int:
    """Pages of a group without layers, beside `num_pages` of the groups with layers.

    Token ids take less than a thousandth of the memory of K and V, and they are kept for tokens
    that no window shows any more.
    """
    return 8 * num_pages
