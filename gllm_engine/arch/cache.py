"""Cache groups: the layers of a model that share a page table.

Layers that see the same window need the same tokens in the cache, so they share a page table. All
groups take pages from one pool, so a page must serve any of them: it has room for `page_size`
tokens of as many layers as the largest group has. If a model has many more layers of one window
than of another, its layers are divided among several groups, or most of each page would be empty.
Gemma 3 27B has 10 layers that see all tokens, and 52 layers with a window of 1,024 tokens:

    groups                         10 layers; 11, 11, 10, 10 and 10 layers with the window
    a page                         16 tokens of 11 layers
    a sequence of 16,384 tokens    1,024 + 5 * 65 pages of 11 layers, in place of 1,024 of 62
"""

from __future__ import annotations

from dataclasses import dataclass

from gllm_engine.arch.model import Model

# The length, in windows, of the sequence that should take the least memory.
_WINDOWS = 8


@dataclass(frozen=True)
class CacheGroup:
    """Layers with one page table. `window`: tokens that they see; None: all.

    A group without layers keeps only token ids, in pages of its own.
    """

    window: int | None = None
    layers: tuple[int, ...] = (0,)  # indices in the model

    def num_pages(self, of_layers: int) -> int:
        """Pages of the group's pool, if the pool of the groups with layers has `of_layers`.

        Token ids take less than a thousandth of the memory of K and V, and they are kept for tokens
        that no window shows any more.
        """
        return of_layers if self.layers else 8 * of_layers


def cache_groups(model: Model, max_model_len: int) -> tuple[CacheGroup, ...]:
    """The groups of a model's layers, the same for every pipeline stage.

    A window of `max_model_len` tokens or more counts as none. One group keeps all tokens, even if
    no layer does: penalties count the tokens of a sequence by its pages.
    """
    by_window: dict[int | None, list[int]] = {}
    for i, layer in enumerate(model.layers):
        if not layer.mixer.cache_shapes(1):
            continue  # it keeps a state per sequence
        window = layer.mixer.window
        if window is not None and window >= max_model_len:
            window = None
        by_window.setdefault(window, []).append(i)
    if not by_window:
        return (CacheGroup(None, ()),)
    most = _layers_per_page({window: len(layers) for window, layers in by_window.items()})
    groups = []
    for window, layers in by_window.items():
        # Every n-th layer, so that the groups of each pipeline stage have about equally many.
        count = -(-len(layers) // most)
        groups += [CacheGroup(window, tuple(layers[i::count])) for i in range(count)]
    if None not in by_window:
        groups.append(CacheGroup(None, ()))
    return tuple(groups)


def _layers_per_page(counts: dict[int | None, int]) -> int:
    """The number of layers of a page, for so many layers of each window.

    It takes the least memory for a sequence of _WINDOWS windows, if a group counts as a tenth of
    the model's layers with one window.
    """

    def num_groups(layers: int) -> dict[int | None, int]:
        return {window: -(-count // layers) for window, count in counts.items()}

    def cost(layers: int) -> float:
        groups = num_groups(layers)
        pages = sum(n * (_WINDOWS if window is None else 1) for window, n in groups.items())
        return layers * pages + sum(groups.values()) * sum(counts.values()) / 10

    return min(range(max(counts.values()), 0, -1), key=cost)
