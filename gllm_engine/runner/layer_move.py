"""A rank's part in a move of layers between neighbouring pipeline stages, while the engine serves.

A move has two parts. Steps go on during the first; the second lies between the same two steps on
all ranks, so each token is computed by the layers of all stages once:

    stage 0    0 .. 32 | step 7 | step 8 | sends K, V and states of 32 |     0 .. 31 | step 9 |
    stage 1    33 .. 63 | step 7 | step 8 | receives them | captures graphs | 32 .. 63 | step 9 |
                         load the weights of 32 ....... |

The pages of a layer keep their numbers, so neither the scheduler nor the slot table knows of a
move. A layer that has come has pages of its own, although layers of different cache groups may
share memory: memory that is shared cannot be replaced as a whole.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate

import torch

from gllm_engine.model import Decoder, LayerCache, States
from gllm_engine.parallel import RankGroups
from gllm_engine.runner.runner import Runner


class LayerMove:
    """The layers that this rank is to have, in memory beside those that it has."""

    def __init__(
        self,
        runner: Runner,
        ranks: RankGroups,
        cut: tuple[int, ...],
        fill: Callable[[Decoder], None],
    ) -> None:
        """Load the layers that come. The runner may run steps meanwhile, in another thread.

        `cut`: layers of each stage; of two neighbouring stages other numbers than now. `fill`:
        loads a decoder's weights. Raises its errors, and torch.OutOfMemoryError.
        """
        self._runner = runner
        self._ranks = ranks
        decoder = runner.decoder
        held = decoder.shard
        first, end = list(accumulate(cut, initial=0))[ranks.stage : ranks.stage + 2]
        self._shard = replace(held, first=first, end=end)
        coming = [i for i in range(first, end) if not held.first <= i < held.end]
        self._arrived: Decoder | None = None
        self._cache: dict[int, LayerCache] = {}  # of the layers that come
        if coming:
            self._arrived = decoder.with_layers(coming[0], coming[-1] + 1)
            fill(self._arrived)
            runner.compile_kernels(self._arrived)
        with torch.inference_mode():
            if self._arrived is not None:
                self._cache = dict(zip(coming, runner.new_cache(self._arrived), strict=True))
            layers = self._shard.of(decoder.arch)
            rows = len(runner.states.flat)
            self._states = States(layers, rows, decoder.dtype, decoder.device)
        for i, state in self._states.layers.items():
            if first + i in self._cache:
                self._cache[first + i] = state

    @torch.inference_mode()
    def finish(self) -> None:
        """Send and receive what layers have cached. The runner's next step computes them."""
        runner = self._runner
        runner.forget_graphs()
        old = runner.decoder.shard
        new = self._shard
        cache = dict(enumerate(runner.cache, old.first))
        stage = self._ranks.stage
        for first, end in ((old.first, new.first), (new.end, old.end)):
            neighbour = stage - 1 if first == old.first else stage + 1
            for i in range(first, end):
                for part in cache.pop(i):
                    self._ranks.send(part, neighbour)
        for first, end in ((new.first, old.first), (old.end, new.end)):
            neighbour = stage - 1 if first == new.first else stage + 1
            for i in range(first, end):
                for part in self._cache[i]:
                    self._ranks.receive(part, neighbour)
        for i, state in self._states.layers.items():
            if new.first + i in cache:
                for part, kept in zip(state, cache[new.first + i], strict=True):
                    part.copy_(kept)
                cache[new.first + i] = state
        cache |= self._cache
        decoder = runner.decoder.with_layers(new.first, new.end, self._arrived)
        runner.take(decoder, [cache[i] for i in range(new.first, new.end)], self._states)
