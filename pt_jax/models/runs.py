"""Which layers are computed by one loop: neighbours of one kind, so that compile time does not grow with depth.

Layers are of a kind when the same program computes them: with experts or without; and in a cache, with a window or
without, as their keys lie in arrays of different lengths. Kinds that take turns, such as five layers with a window and
one without, over and over, are a loop in a loop.
"""

import itertools
from typing import NamedTuple

import jax
import numpy as np

from pt_jax.models import parameters, rotary
from pt_jax.models.config import Config


class Run(NamedTuple):
    """Neighbouring layers of one kind, from ``first`` to ``end``; of their kind, they are those from ``of_kind`` on."""

    first: int
    end: int
    of_kind: int
    has_experts: bool

    def xs(self, config, layers, routes):
        """What a scan over these layers is handed: numbers, weights, choices, routes."""
        size, mine = self.end - self.first, "experts" if self.has_experts else "dense"

        def part(tree, first):
            return jax.tree.map(lambda x: x if len(x) == size else x[first : first + size], tree)

        firsts = {"all": self.first, mine: self.of_kind}
        of = {name: parameters.kind(name) for name in layers}
        weights = {name: part(w, firsts[of[name]]) for name, w in layers.items() if of[name] in firsts}
        routes = part(routes, self.of_kind) if self.has_experts else None
        return weights, part(choices(config), self.first), routes

    def one_by_one(self, config, layers, routes):
        """The same of each layer, of ``by_layer``."""
        for i in range(self.first, self.end):
            route = routes[self.of_kind + i - self.first] if self.has_experts and routes is not None else None
            yield layers[i], {name: x[i] for name, x in choices(config).items()}, route


def of(config: Config) -> list[Run]:
    """The runs of a model without a cache."""
    has, runs, counts = config.has_experts, [], [0, 0]
    for i in range(config.layers):
        if runs and has[i] == runs[-1].has_experts:
            runs[-1] = runs[-1]._replace(end=i + 1)
        else:
            runs.append(Run(i, i + 1, counts[has[i]], has[i]))
        counts[has[i]] += 1
    return runs


def choices(config: Config) -> dict:
    """What differs from layer to layer, as arrays [L] that the scan hands to each; nothing where nothing does."""
    choice = {}
    if len(set(config.windows)) > 1:
        choice["window"] = np.int32(config.windows)
    if not config.learned_positions and (tables := rotary.of_layers(config)) is not None:
        choice["rotation"] = tables
    if config.scale_by_layer:
        choice["scale"] = 1 / np.arange(1, config.layers + 1, dtype=np.float32)
    return choice


class Layer(NamedTuple):
    """A layer of a model with a cache, by its numbers: among all, among those of its kind of network, and among those
    of its kind of cache. The numbers may be arrays, of several layers."""

    index: int
    of_network: int
    of_cache: int

    def weights(self, layers, has_experts: bool):
        """Those of the layer."""
        if isinstance(layers, tuple):
            return layers[self.index]
        at = {"all": self.index, "experts" if has_experts else "dense": self.of_network}
        return {name: take(w, at[kind]) for name, w in layers.items() if (kind := parameters.kind(name)) in at}

    def each(self):
        """The layers of arrays of numbers, one by one."""
        return (Layer(*map(int, numbers)) for numbers in zip(*map(np.ravel, self)))


def take(tree, index):
    """Of every array, what stands at an index of its first axis."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def by_layer(config: Config, params: dict) -> dict:
    """The same parameters with every layer's weights as arrays of their own, which the model computes one by one.

    A loop over stacked weights copies each layer's out of the stack before it multiplies. For a token a row that takes
    twice the time of reading them, so ``sampling`` does better with these, and with a cache that is by layer as well
    (``Execution``); a program of them grows with the layers.

    Args:
      config: the model.
      params: the tree of ``init`` or ``load``, with or without adapters.

    Returns:
      The tree with a tuple of L dicts for ``layers``. It is for ``apply`` and all that is made of it.
    """
    layers = tuple(
        layer.weights(params["layers"], kind[0]) for turns in in_cache(config) for kind, layer in turns.one_by_one()
    )
    return params | {"layers": layers}


class Turns(NamedTuple):
    """Runs of layers, ((has_experts, near), Layer of arrays [times, n]) each, that take turns ``times`` times."""

    times: int
    runs: tuple[tuple[tuple[bool, bool], Layer], ...]

    def one_by_one(self):
        """((has_experts, near), Layer) of each layer, in order."""
        for i in range(self.times):
            for kind, layers in self.runs:
                for layer in jax.tree.map(lambda x: x[i], layers).each():  # noqa: B023, used before i goes on
                    yield kind, layer


def in_cache(config: Config) -> list[Turns]:
    """The runs of a model with a cache.

    >>> sizes = dict(vocab=8, width=8, heads=2, kv_heads=1, head_width=4, hidden=8)
    >>> for turns in in_cache(Config(**sizes, layers=7, windows=(4, 4, 0, 4, 4, 0, 4))):
    ...     print(turns.times, [layers.index.tolist() for _, layers in turns.runs])
    2 [[[0, 1], [3, 4]], [[2], [5]]]
    1 [[[6]]]
    """
    near = tuple(map(bool, config.windows)) or (False,) * config.layers
    kinds = list(zip(config.has_experts, near))
    numbers = np.int32([
        (i, config.has_experts[:i].count(kind[0]), near[:i].count(kind[1])) for i, kind in enumerate(kinds)
    ])  # fmt: skip
    starts = [i for i in range(len(kinds)) if i == 0 or kinds[i] != kinds[i - 1]] + [len(kinds)]
    signs = [(kinds[a], b - a) for a, b in itertools.pairwise(starts)]
    out, at = [], 0
    while at < len(signs):
        span, times = _turns(signs[at:])
        layers = numbers[starts[at] : starts[at + span * times]].reshape(times, -1, 3)
        cuts = np.cumsum([size for _, size in signs[at : at + span]])[:-1]
        parts = [Layer(*np.moveaxis(part, 2, 0)) for part in np.split(layers, cuts, 1)]
        out.append(Turns(times, tuple(zip((kind for kind, _ in signs[at : at + span]), parts))))
        at += span * times
    return out


def _turns(signs):
    """How many of these take turns from the first on, and how often: what covers most; else the first alone, once."""
    best = 1, 1
    for span in range(2, len(signs) // 2 + 1):
        times = 1
        while signs[span * times : span * (times + 1)] == signs[:span]:
            times += 1
        if times > 1 and span * times > best[0] * best[1]:
            best = span, times
    return best
