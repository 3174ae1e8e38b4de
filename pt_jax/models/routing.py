"""What is asked of routers beside the task: that they use their experts evenly, and that their logits stay small.

Functions of ``Routing.logits`` [M, B, T, E], of the M layers with experts; masked tokens do not exist. The first two
are unreduced, so that they are weighed like any other loss and parts of a batch add up; ``load_balancing`` looks at
the whole batch at once, as transformers does. Which experts a router would choose is read from its logits: neither a
bias that corrects the choice nor replayed choices count.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pt_jax import checks


def _shares(logits, mask, per_token):
    """Probabilities [M, B, T, E], and 1 where an expert is among the ``per_token`` likeliest; 0 where masked."""
    checks.shapes(logits=(logits, "M B T E"), mask=(mask, "B T"))
    (logits,) = checks.floats(logits=logits)
    experts = logits.shape[-1]
    if not 1 <= per_token <= experts:
        raise ValueError(f"per_token must be from 1 to the number of experts, {experts}, got {per_token}")
    mask = jnp.asarray(mask, bool)[None, :, :, None]
    p = jax.nn.softmax(jnp.where(mask, logits, 0))
    chosen = jax.nn.one_hot(jax.lax.top_k(jax.lax.stop_gradient(p), per_token)[1], experts).sum(-2)
    return jnp.where(mask, p, 0), jnp.where(mask, chosen, 0)


def balance(logits, mask, *, per_token):
    """How unevenly each row uses the experts of each layer; 1 when evenly.

        loss = sum over e of f_e P_e,   f_e = E / (K T) sum over t of [e is chosen],   P_e = 1 / T sum over t of p_e

    The gradient goes through P. DeepSeek-V3, https://arxiv.org/abs/2412.19437, equations 17 to 20, of one layer and
    without its factor alpha; theirs are sigmoids divided by their sum, here p is the softmax.

    Args:
      logits: [M, B, T, E] of the routers.
      mask: [B, T] bool, the tokens that count.
      per_token: K, experts a token.

    Returns:
      [M, B] float32, from 0 to E; 0 for a row without tokens.

    Raises:
      ValueError: the shapes disagree, or per_token is out of range.

    >>> logits = jnp.array([[[[9.0, 0.0], [9.0, 0.0]], [[9.0, 0.0], [0.0, 9.0]]]])  # both to expert 0; one to each
    >>> print(balance(logits, jnp.ones((2, 2), bool), per_token=1).round(2))
    [[2. 1.]]
    """
    p, chosen = _shares(logits, mask, per_token)
    tokens = jnp.maximum(jnp.asarray(mask).sum(-1), 1).astype(jnp.float32)[None, :, None]
    return p.shape[-1] / per_token * ((chosen.sum(2) / tokens) * (p.sum(2) / tokens)).sum(-1)


def z(logits, mask):
    """The square of the routers' log-partition: keeps logits small, where float16 and softmax round less.

        loss = (log sum over e of exp(logit_e))^2

    Zoph et al. 2022 (ST-MoE), https://arxiv.org/abs/2202.08906, equation 5, of one token.

    Args:
      logits: [M, B, T, E] of the routers.
      mask: [B, T] bool, the tokens that count.

    Returns:
      [M, B, T] float32; 0 where masked.

    Raises:
      ValueError: the shapes disagree.

    >>> print(z(jnp.zeros((1, 1, 2, 4)), jnp.array([[True, False]])).round(3))  # log(4)^2
    [[[1.922 0.   ]]]
    """
    checks.shapes(logits=(logits, "M B T E"), mask=(mask, "B T"))
    (logits,) = checks.floats(logits=logits)
    mask = jnp.asarray(mask, bool)[None]
    return jnp.where(mask, jax.nn.logsumexp(jnp.where(mask[..., None], logits, 0), -1) ** 2, 0)


def load_balancing(logits, mask, *, per_token):
    """``load_balancing_loss_func`` of transformers, the ``aux_loss`` of its models: over all layers and rows at once.

        loss = E sum over e of f_e P_e,   f_e, P_e: means over the tokens of all layers, f_e counting all K experts

    Fedus et al. 2021 (Switch Transformers), https://arxiv.org/abs/2101.03961, equations 4 to 6. With K experts a token
    it is K when they are used evenly. It is no sum over rows: of parts of a batch it is another number.

    Args:
      logits: [M, B, T, E] of the routers.
      mask: [B, T] bool, the tokens that count.
      per_token: K, experts a token.

    Returns:
      A scalar, float32.

    Raises:
      ValueError: the shapes disagree, or per_token is out of range.

    >>> print(load_balancing(jnp.zeros((3, 1, 2, 4)), jnp.ones((1, 2), bool), per_token=4))
    4.0
    """
    p, chosen = _shares(logits, mask, per_token)
    tokens = jnp.maximum(len(p) * jnp.asarray(mask).sum(), 1)
    return p.shape[-1] * ((chosen.sum((0, 1, 2)) / tokens) * (p.sum((0, 1, 2)) / tokens)).sum()


def loads(choices, mask, experts):
    """How often each row used each expert of each layer.

    Args:
      choices: [M, B, T, K] of ``Routing``.
      mask: [B, T] bool, the tokens that count.
      experts: E.

    Returns:
      [B, M, E] float32, rows first, as metrics of a training step have them.

    >>> print(loads(jnp.array([[[[0, 2], [0, 1]]]]), jnp.array([[True, True]]), 4))
    [[[2. 1. 1. 0.]]]
    """
    checks.shapes(choices=(choices, "M B T K"), mask=(mask, "B T"))
    used = jax.nn.one_hot(choices, experts).sum(3)
    return jnp.where(jnp.asarray(mask, bool)[None, :, :, None], used, 0).sum(2).swapaxes(0, 1)


def load_metrics(loads) -> dict:
    """What ``loads`` of a batch say, for a log.

    Args:
      loads: [B, M, E].

    Returns:
      ``router/max_load``: the busiest expert's load over the mean load, a mean over layers (1 is even, E is all on
      one); ``router/dead_experts``: the share of experts that no token used.

    >>> load_metrics(np.array([[[2.0, 1.0, 1.0, 0.0]]]))
    {'router/max_load': 2.0, 'router/dead_experts': 0.25}
    """
    total = np.asarray(loads).sum(0)
    share = total.max(-1) / np.maximum(total.mean(-1), 1e-9)
    return {"router/max_load": float(share.mean()), "router/dead_experts": float((total == 0).mean())}
