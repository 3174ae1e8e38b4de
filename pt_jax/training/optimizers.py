"""The usual optimisers, as optax transformations; any other transformation does as well.

    optimizers.adamw(schedules.cosine(1e-4, steps, warmup=0.1), weight_decay=0.1)
    optax.chain(optimizers.adamw(1e-4), optimizers.scale_by_path({"*.b": 16.0}))        # LoRA+
    optimizers.each(policy=optimizers.adamw(1e-6), value=optimizers.adamw(1e-5))        # PPO
    moments.in_8_bits(optimizers.adamw(1e-4))

A rate is a number or a schedule (``schedules``). The gradient is clipped by its global norm first; infinity does not
clip. Weight decay is decoupled and times the rate. What is decayed is said by a function of the tree, by default all
but norms and biases. Where one matrix ends and the next begins in a stack of layers is known; nothing reaches across.
"""

import fnmatch
import functools

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from pt_jax import checks
from pt_jax.models import linear, parameters


def all_but_norms(tree):
    """Which leaves are decayed by default: all but norms and biases, by the end of their names, and flax's "scale".

    >>> all_but_norms({"wq": 0.0, "attn_norm": 0.0, "wq_bias": 0.0})
    {'attn_norm': False, 'wq': True, 'wq_bias': False}
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: not _is_norm(path), tree)


def all_but(*patterns: str):
    """Which leaves are decayed: all but those whose paths match one of the patterns, such as "embed" or "layers.*norm".

    Raises:
      ValueError: when called with a tree in which a pattern matches nothing.

    >>> all_but("*norm", "embed")({"embed": 0.0, "layers": {"wq": 0.0, "attn_norm": 0.0}})
    {'embed': False, 'layers': {'attn_norm': False, 'wq': True}}
    """

    def decayed(tree):
        found = _first_match(tree, patterns)
        return jax.tree_util.tree_map_with_path(lambda path, _: found[_name(path)] is None, tree)

    return decayed


def adamw(rate, *, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, decayed=all_but_norms, clip=1.0):
    """AdamW.

    Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101.

    Args:
      rate: a number > 0, or a schedule.
      b1, b2: in [0, 1), of the first and the second moment.
      eps: added to the root of the second moment.
      weight_decay: times the rate, >= 0.
      decayed: tree -> a tree of bool, what is decayed.
      clip: largest global norm of the gradient, > 0.

    Raises:
      ValueError: a number is out of range.
    """
    _check(rate, weight_decay, clip, b1=b1, b2=b2)
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.adamw(rate, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decayed),
    )


def lion(rate, *, b1=0.9, b2=0.99, weight_decay=0.0, decayed=all_but_norms, clip=1.0):
    """Lion: the sign of a mixture of the gradient and its average. Its rates are 3 to 10 times lower than AdamW's.

    Chen et al. 2023, https://arxiv.org/abs/2302.06675, algorithm 2. Arguments as ``adamw``; b1 is of the mixture, b2 of
    the average.
    """
    _check(rate, weight_decay, clip, b1=b1, b2=b2)
    return optax.chain(
        optax.clip_by_global_norm(clip), optax.lion(rate, b1=b1, b2=b2, weight_decay=weight_decay, mask=decayed)
    )


def sgd(rate, *, momentum=0.0, weight_decay=0.0, decayed=all_but_norms, clip=1.0):
    """Gradient descent, with heavy-ball momentum in [0, 1) when it is not 0. Arguments as ``adamw``."""
    _check(rate, weight_decay, clip, momentum=momentum)
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.trace(momentum) if momentum else optax.identity(),
        _decay_and_descend(rate, weight_decay, decayed),
    )


def adafactor(rate, *, decay_rate=0.8, threshold=1.0, weight_decay=0.0, decayed=all_but_norms, clip=1.0):
    """Adafactor without first moment: of the second one, the means over the rows and the columns alone.

    Shazeer and Stern 2018, https://arxiv.org/abs/1804.04235, algorithm 4, with the rate that is given in the place of
    the relative one (as TRL does), so that AdamW's rates carry over. Two axes of an array that are of 128 or more are
    factored; a smaller one has whole moments. Updates are clipped matrix by matrix, also in a stack.

    Args:
      rate, weight_decay, decayed, clip: as ``adamw``.
      decay_rate: in [0, 1): the second moment's decay at step t is 1 - t^-decay_rate.
      threshold: the largest root of the mean square of a matrix's update, before the rate, > 0.
    """
    _check(rate, weight_decay, clip, decay_rate=decay_rate)
    checks.positive("threshold", threshold)
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.scale_by_factored_rms(decay_rate=decay_rate),
        _clip_by_matrix(threshold),
        _decay_and_descend(rate, weight_decay, decayed),
    )


def muon(rate, *, momentum=0.95, rms=0.2, weight_decay=0.0, decayed=all_but_norms, clip=1.0):
    """Muon for the matrices between the embeddings, AdamW for the rest.

        update = rms sqrt(max(inputs, outputs)) NewtonSchulz(momentum),

    of each matrix of each layer, whose axes are known from its equation (``models.parameters``): heads lie side by
    side, experts are matrices of their own, an adapter's A and B too. A flax ``kernel`` of two axes is one as it is.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; the scale, with which AdamW's rates and decays carry
    over: Liu et al. 2025, https://arxiv.org/abs/2502.16982, equation 4.

    Args:
      rate, weight_decay, decayed, clip: as ``adamw``, of both.
      momentum: in [0, 1), Nesterov's.
      rms: the root of the mean square of an update, before the rate, > 0.
    """
    _check(rate, weight_decay, clip, momentum=momentum)
    checks.positive("rms", rms)
    matrices = optax.chain(scale_by_muon(beta=momentum, weight_dimension_numbers=dimensions), _scale_to_rms(rms))
    label = lambda path, x: "adam" if _sides(path, x) is None else "muon"
    labels = functools.partial(jax.tree_util.tree_map_with_path, label)
    return optax.chain(
        optax.clip_by_global_norm(clip),
        optax.partition({"muon": matrices, "adam": optax.scale_by_adam()}, labels),
        _decay_and_descend(rate, weight_decay, decayed),
    )


# ---- combinations


def each(**optimizers):
    """Several trees, each with an optimiser, a clip and a rate of its own: ``each(policy=..., value=...)``.

    Args:
      **optimizers: name to optax transformation; the parameters are a dict of the same names.

    Returns:
      An optax transformation; its state has the same names.

    Raises:
      ValueError: when the parameters have other names.
    """

    def check(tree):
        if not isinstance(tree, dict) or tree.keys() != optimizers.keys():
            have = sorted(tree) if isinstance(tree, dict) else type(tree).__name__
            raise ValueError(f"params are {have}; there are optimisers for {sorted(optimizers)}")

    def init(params):
        check(params)
        return {name: one.init(params[name]) for name, one in optimizers.items()}

    def update(updates, state, params=None, **more):
        check(updates)
        of = lambda name: None if params is None else params[name]
        done = {
            name: optax.with_extra_args_support(one).update(updates[name], state[name], of(name), **more)
            for name, one in optimizers.items()
        }
        return {name: new for name, (new, _) in done.items()}, {name: kept for name, (_, kept) in done.items()}

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_path(factors: dict[str, float]):
    """At the end of a chain: other rates for the leaves whose paths match a pattern, as factors of the common rate.

    LoRA+ is {"*.b": 16.0} (Hayou et al. 2024, https://arxiv.org/abs/2402.12354, section 4); {"embed": 0.1} slows the
    embeddings, 0 freezes. Weight decay goes with the rate, and the schedule is the same.

    Args:
      factors: pattern to factor, >= 0; of several that match, the first counts.

    Raises:
      ValueError: a factor is negative, or, when called with parameters, a pattern matches nothing.
    """
    for pattern, factor in factors.items():
        checks.between(f"the factor of {pattern!r}", factor, 0.0, float("inf"))

    def init(params):
        _first_match(params, factors)
        return optax.EmptyState()

    def update(updates, state, params=None):
        found = _first_match(updates, factors)
        scale = lambda path, u: u if found[_name(path)] is None else u * factors[found[_name(path)]]
        return jax.tree_util.tree_map_with_path(scale, updates), state

    return optax.GradientTransformation(init, update)


# ---- parts


def _check(rate, weight_decay, clip, **shares):
    if not callable(rate):
        checks.positive("learning_rate", rate)
    checks.positive("clip", clip)
    checks.between("weight_decay", weight_decay, 0.0, float("inf"))
    for name, value in shares.items():
        checks.between(name, value, 0.0, 1.0)


def _decay_and_descend(rate, weight_decay, decayed):
    return optax.chain(optax.add_decayed_weights(weight_decay, decayed), optax.scale_by_learning_rate(rate))


def dimensions(tree):
    """Which axes of each matrix are its inputs and outputs, for Muon; None for what is no matrix of a layer.

    >>> dimensions({"layers": {"wo": jnp.zeros((2, 4, 8, 32)), "attn_norm": jnp.zeros((2, 32))}})
    {'layers': {'attn_norm': None, 'wo': MuonDimensionNumbers(reduction_axis=(-3, -2), output_axis=(-1,))}}
    """

    def of(path, x):
        sides = _sides(path, x)
        return None if sides is None else MuonDimensionNumbers(*sides)

    return jax.tree_util.tree_map_with_path(of, tree)


def _sides(path, x):
    """The axes of the inputs and of the outputs of a matrix, from behind; None for what is no matrix of a layer."""
    names = [str(getattr(entry, "key", entry)) for entry in path]
    part = names.pop() if names[-1] in ("a", "b", "m") and len(names) > 1 else ""
    if names[-1] == "kernel" and x.ndim == 2:
        return (-2,), (-1,)
    if names[-1] not in parameters.PRODUCTS or names[-1] in ("embed", "unembed") or part == "m":
        return None
    weight, inputs, outputs, _ = linear.sides(parameters.PRODUCTS[names[-1]])
    if part:
        n = len(inputs if part == "a" else outputs)
        many, one = tuple(range(-n, 0)), (-n - 1,)
        return (tuple(i - 1 for i in many), (-1,)) if part == "a" else (one, many)
    at = lambda letters: tuple(weight.index(letter) - len(weight) for letter in letters)
    return at(inputs), at(outputs)


def _by_matrix(change):
    """A transformation without state: ``change(leaf, axes of inputs, axes of outputs)``."""

    def every(updates, params=None):
        whole = lambda x: ((), tuple(range(x.ndim)))
        return jax.tree_util.tree_map_with_path(lambda path, u: change(u, *(_sides(path, u) or whole(u))), updates)

    return optax.stateless(every)


def _scale_to_rms(rms):
    size = lambda u, axes: functools.reduce(lambda n, i: n * u.shape[i], axes, 1)
    return _by_matrix(lambda u, inputs, outputs: u * rms * max(size(u, inputs), size(u, outputs)) ** 0.5)


def _clip_by_matrix(threshold):
    def clipped(u, inputs, outputs):
        root = jnp.sqrt(jnp.mean(jnp.square(u), inputs + outputs, keepdims=True))
        return u / jnp.maximum(1.0, root / threshold)

    return _by_matrix(clipped)


def _first_match(tree, patterns) -> dict:
    """The path of each leaf, and the first pattern that it matches."""
    names = [_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"{pattern!r} matches none of the parameters: {', '.join(names)}")
    return {name: next((p for p in patterns if fnmatch.fnmatchcase(name, p)), None) for name in names}


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_norm(path) -> bool:
    name = jax.tree_util.keystr(path[-1:], simple=True)
    return name.endswith(("norm", "bias")) or name == "scale"
