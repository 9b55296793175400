"""A rank's part in a move of layers between neighbouring pipeline stages, while the engine serves.

A move has two parts. Steps go on during the first; the second lies between the same two steps on
all ranks, so each token is computed by the layers of all stages once:

    stage 0    0 .. 32 | step 7 | step 8 | sends K, V and states of 32 | graphs | 0 .. 31 | step 9 |
    stage 1    33 .. 63 | step 7 | step 8 | receives them | graphs |     32 .. 63 | step 9 |
                     load the weights of 32 |

The pages of a layer keep their numbers, so neither the scheduler nor the slot table knows of a
move. It is for models with one cache group: the layers of several groups share memory, which could
not be replaced as a whole.
"""

from __future__ import annotations

import torch

from gllm_engine.model import Decoder, LayerCache, States
from gllm_engine.parallel import RankGroups
from gllm_engine.runner.runner import Runner


class LayerMove:
    """The layers that this rank is to have, in memory beside those that it has."""

    def __init__(self, runner: Runner, ranks: RankGroups, cut: tuple[int, ...]) -> None:
        """Load the layers that come. The runner may run steps meanwhile, in another thread.

        `cut`: layers of each stage; of two neighbouring stages other numbers than now. Raises
        LoadError, or torch.OutOfMemoryError.
        """
        if runner.device.type == "cuda":
            torch.cuda.set_device(runner.device)
        self._runner = runner
        self._ranks = ranks
        decoder = runner.decoder
        first = sum(cut[: ranks.stage])
        self._layers = range(first, first + cut[ranks.stage])
        held = range(decoder.shard.first, decoder.shard.end)
        coming = [i for i in self._layers if i not in held]
        self._arrived: Decoder | None = None
        self._cache: dict[int, LayerCache] = {}  # of the layers that come
        self._states: States | None = None
        if self._layers == held:
            return
        if coming:
            self._arrived = decoder.with_layers(coming[0], coming[-1] + 1)
            runner.fill(self._arrived)
        with torch.inference_mode():
            if self._arrived is not None:
                self._cache = dict(zip(coming, runner.new_cache(self._arrived), strict=True))
            layers = decoder.layers_of_all_stages()[first : self._layers.stop]
            rows = len(runner.states.flat)
            self._states = States(layers, rows, decoder.dtype, decoder.device)
        for i, state in self._states.layers.items():
            if first + i in self._cache:
                self._cache[first + i] = state

    @torch.inference_mode()
    def finish(self) -> None:
        """Send and receive what layers have cached. The runner's next step computes them."""
        if self._states is None:
            return
        runner = self._runner
        runner.forget_graphs()
        stage = self._ranks.stage
        first = self._layers[0]
        old_first = runner.decoder.shard.first
        cache = dict(enumerate(runner.cache, old_first))
        for i in [i for i in cache if i not in self._layers]:
            for part in cache.pop(i):
                self._ranks.send(part, stage - 1 if i < first else stage + 1)
        for i, parts in self._cache.items():
            for part in parts:
                self._ranks.receive(part, stage - 1 if i < old_first else stage + 1)
        for i, state in self._states.layers.items():
            for part, kept in zip(state, cache.get(first + i, ()), strict=False):
                part.copy_(kept)
            self._cache[first + i] = state
        cache |= self._cache
        decoder = runner.decoder.with_layers(first, self._layers.stop, self._arrived)
        runner.take(decoder, [cache[i] for i in self._layers], self._states)
