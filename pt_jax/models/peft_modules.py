"""What PEFT puts an adapter on: its modules, their names, and which of our products share one.

Where a family keeps several of our products in one matrix (Phi-3's qkv_proj and gate_up_proj, GPT-2's c_attn), PEFT
has one adapter for all. Read, each product gets the rows of B that are its own, and a copy of A. Written, adapters with
the same A become one again; others stand side by side in one of their ranks' sum, with zeros where one has no part in
the other's outputs, which computes the same.
"""

from typing import NamedTuple

import numpy as np

from pt_jax.models import families, linear, parameters
from pt_jax.models.config import Config


class Module(NamedTuple):
    """What PEFT puts one adapter on, in every layer that has it.

    Args:
      names: its path in each of these layers, in the order of our stacks.
      leaves: in our tree; several where they share a matrix.
      target: how target_modules calls it.
    """

    names: tuple[str, ...]
    leaves: tuple[str, ...]
    target: str

    @property
    def path(self):
        """Of our leaves, before their names."""
        return () if self.leaves[0] in ("embed", "unembed") else ("layers",)


def modules(config: Config) -> list[Module]:
    """What can have an adapter in PEFT: all products but those of experts and routers."""
    family, found = families.FAMILIES[config.family], {}
    for part in family.parts(config):
        if part.tensor.leaves[0] in parameters.PRODUCTS and not of_experts(part.tensor.leaves[0]):
            found.setdefault(part.tensor, []).append(part.name.removesuffix(".weight"))
    last = [_last(tensor.name) for tensor in family.layer if tensor.inputs]
    out = []
    for tensor, names in found.items():
        name = tensor.name.removesuffix(".weight")
        out.append(Module(tuple(names), tensor.leaves, _last(name) if last.count(_last(name)) == 1 else name))
    for leaf in ("embed", "unembed"):
        tied_apart = leaf == "embed" and config.tied and config.family == "gpt2"  # see peft.check
        if leaf in parameters.shapes(config) and not tied_apart:
            name = family.whole[leaf].removesuffix(".weight")
            out.append(Module((name,), (leaf,), name.split(".")[-1]))
    return out


def _last(name):
    return name.removesuffix(".weight").split(".")[-1]


def of_experts(leaf):
    return leaf.startswith(("router", "expert_"))


class Size(NamedTuple):
    leaf: str
    inputs: int
    outputs: int
    shapes: dict  # of a, b and m, of one layer; their rank is -1


def sizes(module, config):
    """The sizes of a module's leaves, of one layer."""
    whole, out = parameters.shapes(config), []
    for leaf in module.leaves:
        shape = whole["layers"][leaf][1:] if module.path else whole[leaf]
        weight, inputs, outputs, _ = linear.sides(parameters.PRODUCTS[leaf])
        of = dict(zip(weight, shape))
        i, o = tuple(of[n] for n in inputs), tuple(of[n] for n in outputs)
        shapes = {"a": (*i, -1), "b": (-1, *o), "m": o}
        out.append(Size(leaf, int(np.prod(i)), int(np.prod(o)), shapes))
    return out


def joined(flat, module, there, config, how):
    """The one adapter of a module.

    Args:
      flat: our adapters, by path.
      module: of ``modules``.
      there: which of its leaves have an adapter.
      config: the model that they are of.
      how: the adapters' record.

    Returns:
      rank, alpha, and for each layer the matrices as PEFT has them, by part.
    """
    of = lambda leaf, part: flat[(*module.path, leaf, part)]
    layers = lambda x: x if module.path else x[None]
    widths = {size.leaf: size.outputs for size in sizes(module, config)}
    a = {leaf: layers(of(leaf, "a")) for leaf in there}
    a = {leaf: x.reshape(len(x), -1, x.shape[-1]) for leaf, x in a.items()}  # [layers, inputs, rank]
    b = {leaf: layers(of(leaf, "b")) for leaf in there}
    b = {leaf: x.reshape(len(x), x.shape[1], -1) for leaf, x in b.items()}  # [layers, rank, outputs]
    first = there[0]
    if module.leaves == ("embed",):
        return *how.of(first), [{"a": x, "b": y} for x, y in zip(a[first], b[first])]
    one = len(there) == len(module.leaves) and all(
        how.of(leaf) == how.of(first) and np.array_equal(a[leaf], a[first]) for leaf in there
    )
    if one:
        rank, alpha = how.of(first)
        A, B = a[first], np.concatenate([b[leaf] for leaf in module.leaves], -1)
    else:
        rank, scale = sum(x.shape[-1] for x in a.values()), how.scale(first)
        alpha = scale * (rank**0.5 if how.rslora else rank)
        A, B = np.concatenate([a[leaf] for leaf in there], -1), np.zeros((len(a[first]), rank, 0), np.float32)
        row = 0
        for leaf in module.leaves:
            block = np.zeros((len(A), rank, widths[leaf]), np.float32)
            if leaf in there:
                end = row + a[leaf].shape[-1]
                block[:, row:end] = b[leaf] * np.float32(how.scale(leaf) / scale)
                row = end
            B = np.concatenate([B, block], -1)
    out = [{"a": x.T, "b": y.T} for x, y in zip(A, B)]
    if how.dora:
        m = np.concatenate([layers(of(leaf, "m")).reshape(len(A), -1) for leaf in module.leaves], -1)
        out = [parts | {"m": x} for parts, x in zip(out, m)]
    return rank, alpha, out
