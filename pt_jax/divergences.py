"""How far a policy has gone from a reference: estimates from sampled tokens, and exactly, over the whole vocabulary.

With p the policy, q the reference, r = q(token) / p(token), and tokens drawn from p (Schulman 2020,
http://joschu.net/blog/kl-approx.html). "In the reward" means that the value is taken as a number and multiplies
grad log p(token); "in the loss" means that it is differentiated itself:

    ==========  =================  ===========================  ==========================  ========================
    name        value a token      mean over samples            gradient, in the reward     gradient, in the loss
    ==========  =================  ===========================  ==========================  ========================
    k1          -log r             exactly KL(p||q)             exactly that of KL(p||q)    0: no pull towards q
    k2          (log r)^2 / 2      biased, little when near     biased                      exactly that of KL(p||q)
    k3          r - 1 - log r      exactly KL(p||q), never < 0  that of KL(p||q) - KL(q||p) that of KL(q||p)
    k3_plus     as k3              exactly KL(p||q), never < 0  as k3                       exactly that of KL(p||q)
    ==========  =================  ===========================  ==========================  ========================

So k1 belongs into a reward; k2 or k3_plus, or k3 if it is the reversed KL that is meant, into a loss (Tang and Munos
2025, https://arxiv.org/abs/2506.09477; Liu et al. 2025, https://arxiv.org/abs/2510.01555). The tests compare every cell
with enumeration. All of it is about one token given those before it: how p changes which prefixes come up is in no
gradient of a loss. And tokens that another policy drew need an importance weight.

Where both give a token probability 0 (logps of -inf, as under the same top-k), all are 0. Where only one of them does,
the gap is infinite, and the value says so; k2 and k3 have no gradient there, so that no NaN reaches the other tokens.
Nothing is clamped: in float32 the exponential of k3 is finite up to a gap of 88 nats, and so is its gradient.

The exact divergences have no variance and cost the logits of both models: ``kl_to_reference``, ``kl_from_reference``
and ``generalized_jsd``, from which ``losses.distillation`` is made.
"""

import jax
import jax.numpy as jnp

from pt_jax import checks, weights
from pt_jax.logps import align


def _gap(logps, ref_logps, mask):
    """log r, and where it is infinite; 0 where not scored, and where both give the token probability 0."""
    logps, ref_logps = weights.scored(mask, logps=logps, ref_logps=ref_logps)
    return weights.log_ratio(ref_logps, logps)


def k1(logps, ref_logps, mask):
    """k1 = log p - log p_ref, a token: unbiased, of either sign. See the module for when to use which.

    Args:
      logps: [B, T] of the policy that sampled the tokens, in nats.
      ref_logps: [B, T] of the reference, in nats.
      mask: [B, T] bool, the scored tokens.

    Returns:
      [B, T] float32, in nats; 0 where not scored.

    >>> logps, ref_logps, mask = jnp.log(jnp.array([[[0.5, 0.8]], [[0.25, 0.8]], [[1, 1]]]))
    >>> print(k1(logps, ref_logps, mask == 0).round(4))  # log 2, 0
    [[0.6931 0.    ]]
    """
    return 0 - _gap(logps, ref_logps, mask)


def k2(logps, ref_logps, mask):
    """k2 = (log p - log p_ref)^2 / 2, a token; arguments as ``k1``.

    >>> logps, ref_logps, mask = jnp.log(jnp.array([[[0.5, 0.8]], [[0.25, 0.8]], [[1, 1]]]))
    >>> print(k2(logps, ref_logps, mask == 0).round(4))
    [[0.2402 0.    ]]
    """
    gap = _gap(logps, ref_logps, mask)
    infinite = jnp.isinf(gap)
    return jnp.where(infinite, jnp.inf, jnp.square(jnp.where(infinite, 0, gap)) / 2)


def k3(logps, ref_logps, mask):
    """k3 = p_ref / p - 1 - log(p_ref / p), a token; never negative; arguments as ``k1``.

    The penalty of Shao et al. 2024 (GRPO), https://arxiv.org/abs/2402.03300, equation 4.

    >>> logps, ref_logps, mask = jnp.log(jnp.array([[[0.5, 0.8]], [[0.25, 0.8]], [[1, 1]]]))
    >>> print(k3(logps, ref_logps, mask == 0).round(4))  # 1/2 - 1 + log 2
    [[0.1931 0.    ]]
    """
    gap = _gap(logps, ref_logps, mask)
    infinite = jnp.isinf(gap)
    finite = jnp.where(infinite, 0, gap)
    return jnp.where(infinite, jnp.inf, jnp.expm1(finite) - finite)


def k3_plus(logps, ref_logps, mask):
    """The value of k3 with the gradient of k2: k2 + (k3 - k2), the bracket without gradient.

    Unbiased both as a number and in the loss. verl's "k3+" (https://github.com/volcengine/verl, ``kl_penalty``).
    Arguments as ``k1``.

    >>> logps, ref_logps, mask = jnp.log(jnp.array([[[0.5, 0.8]], [[0.25, 0.8]], [[1, 1]]]))
    >>> print(k3_plus(logps, ref_logps, mask == 0).round(4))
    [[0.1931 0.    ]]
    >>> print(jax.grad(lambda x: k3_plus(x, ref_logps, mask == 0).sum())(logps)[0, 0].round(4))  # log p - log p_ref
    0.6931
    """
    value, slope = k3(logps, ref_logps, mask), k2(logps, ref_logps, mask)
    slope = jnp.where(jnp.isinf(slope), 0, slope)
    return jax.lax.stop_gradient(value) + (slope - jax.lax.stop_gradient(slope))


# ---- exactly, over the vocabulary


def _log_probabilities(mask, **logits):
    """What rows 0 to T - 2 predict, [B, T - 1, V] each; uniform where the token that they speak of is not scored."""
    checks.shapes(**{name: (x, "B T V") for name, x in logits.items()}, mask=(mask, "B T"))
    rows = (x[:, :-1] for x in checks.floats(**logits))
    return tuple(jax.nn.log_softmax(x) for x in weights.zero_unscored(jnp.asarray(mask)[:, 1:, None], *rows))


def _onto_tokens(mask, x):
    """Onto the tokens that they speak of, and exactly 0 where not scored."""
    return weights.zero_unscored(mask, align(x))[0]


def _shares(p, q):
    """p (log p - log q) a token of the vocabulary, from the logarithms: 0 where p is 0, inf where only q is.

    Both are told apart beforehand, because 0 * inf is NaN, in the gradient of a branch that is not taken as well.
    """
    impossible = jnp.isneginf(p)
    infinite = jnp.isneginf(q) & ~impossible
    gap = jnp.where(impossible | infinite, 0, p) - jnp.where(impossible | infinite, 0, q)
    return jnp.where(infinite, jnp.inf, jnp.exp(p) * gap)


def kl_to_reference(logits, ref_logits, mask):
    """KL(policy || reference), exactly, over the whole vocabulary.

        kl = sum_v p_v (log p_v - log q_v),   p = softmax(logits),   q = softmax(ref_logits)

    What k1, k2 and k3 estimate; the "reverse" KL of the literature on distillation. It forbids the policy what the
    reference does not do: infinite where q_v = 0 < p_v. Kullback and Leibler 1951,
    https://doi.org/10.1214/aoms/1177729694.

    Args:
      logits: [B, T, V] of the policy; row t speaks of token t + 1. A logit of -inf is a token that cannot be drawn.
      ref_logits: [B, T, V] of the reference.
      mask: [B, T] bool, the scored tokens.

    Returns:
      [B, T] float32, in nats; 0 where not scored, and for the first token, which nothing predicts.

    Raises:
      ValueError: the shapes disagree, or the logits are whole numbers.

    >>> p, q = jnp.log(jnp.array([[[[0.5, 0.5], [1, 1]]], [[[0.25, 0.75], [1, 1]]]]))
    >>> print(kl_to_reference(p, q, jnp.array([[False, True]])).round(4))  # (log 2 + log 2/3) / 2
    [[0. 0.1438]]
    """
    p, q = _log_probabilities(mask, logits=logits, ref_logits=ref_logits)
    return _onto_tokens(mask, _shares(p, q).sum(-1))


def kl_from_reference(logits, ref_logits, mask):
    """KL(reference || policy), exactly, over the whole vocabulary; arguments as ``kl_to_reference``.

        kl = sum_v q_v (log q_v - log p_v),   p = softmax(logits),   q = softmax(ref_logits)

    The "forward" KL of the literature on distillation. It wants the policy to do all that the reference does: infinite
    where p_v = 0 < q_v. Its gradient in the logits is p - q.

    >>> p, q = jnp.log(jnp.array([[[[0.5, 0.5], [1, 1]]], [[[0.25, 0.75], [1, 1]]]]))
    >>> print(kl_from_reference(p, q, jnp.array([[False, True]])).round(4))  # log 1/2 / 4 + 3 log 3/2 / 4
    [[0. 0.1308]]
    """
    p, q = _log_probabilities(mask, logits=logits, ref_logits=ref_logits)
    return _onto_tokens(mask, _shares(q, p).sum(-1))


def generalized_jsd(logits, ref_logits, mask, *, beta=0.5):
    """Generalised Jensen-Shannon divergence: of reference and policy from their mixture.

        m = beta q + (1 - beta) p
        jsd = beta KL(q || m) + (1 - beta) KL(p || m)   for 0 < beta < 1;   KL(q || p) for 0;   KL(p || q) for 1

    At the ends the formula itself is 0; what stands there is what jsd / beta and jsd / (1 - beta) tend to. Inside, it
    is at most -beta log beta - (1 - beta) log(1 - beta), however far apart the two are.
    Agarwal et al. 2023 (GKD), https://arxiv.org/abs/2306.13649, equation 1.

    Args:
      logits: [B, T, V] of the policy p; row t speaks of token t + 1.
      ref_logits: [B, T, V] of the reference q.
      mask: [B, T] bool, the scored tokens.
      beta: in [0, 1], the share of the reference in the mixture.

    Returns:
      [B, T] float32, in nats; 0 where not scored.

    Raises:
      ValueError: the shapes disagree, or a number is out of range.

    >>> p, q = jnp.array([[[[0, -jnp.inf], [0, 0]]], [[[-jnp.inf, 0], [0, 0]]]])
    >>> print(generalized_jsd(p, q, jnp.array([[False, True]])).round(4))  # nothing in common: log 2
    [[0. 0.6931]]
    """
    return generalized_jsd_shares(logits, ref_logits, mask, beta=beta).sum(-1)


def generalized_jsd_shares(logits, ref_logits, mask, *, beta=0.5):
    """What each token of the vocabulary adds to the divergence: generalized_jsd = sum_v shares_v; arguments as there.

    For those who clip or log them. A share may be negative; only their sum never is.

    Returns:
      [B, T, V] float32, in nats; ``shares[:, t]`` speaks of the token t.

    >>> p, q = jnp.log(jnp.array([[[[0.5, 0.5], [1, 1]]], [[[0.25, 0.75], [1, 1]]]]))
    >>> print(generalized_jsd_shares(p, q, jnp.array([[False, True]]), beta=1.0)[0, 1])  # p (log p - log q)
    [ 0.347 -0.203]
    """
    checks.share("beta", beta)
    p, q = _log_probabilities(mask, logits=logits, ref_logits=ref_logits)
    inside = jnp.where((beta > 0) & (beta < 1), beta, 0.5)  # the logarithms are finite at the ends as well
    neither = jnp.isneginf(p) & jnp.isneginf(q)
    m = jnp.logaddexp(jnp.where(neither, 0, p) + jnp.log1p(-inside), jnp.where(neither, 0, q) + jnp.log(inside))
    shares = inside * _shares(q, m) + (1 - inside) * _shares(p, m)
    shares = jnp.where(beta == 0, _shares(q, p), jnp.where(beta == 1, _shares(p, q), shares))
    return weights.zero_unscored(jnp.asarray(mask)[..., None], align(shares))[0]
