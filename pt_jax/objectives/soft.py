"""Objectives without a hard clip: plain policy gradients, and those that weigh a token down instead of dropping it.

    ======================  ==========================================================  ==========================
    function                what multiplies -A d log p, a token                         gradient of a far ratio
    ======================  ==========================================================  ==========================
    ``reinforce``, ``gpg``  1                                                           stays, uncorrected
    ``on_policy``           1                                                           stays, uncorrected
    ``unclipped_surrogate`` ratio                                                       grows with the ratio
    ``cispo``               min(ratio, cap), held constant                              stays, at most cap
    ``sapo``                4 p (1 - p) ratio, p = sigmoid(temperature (ratio - 1))      fades smoothly
    ``vespo``               a gamma density of the answer's ratio, held constant        fades smoothly
    ======================  ==========================================================  ==========================

At ratio 1 the multiplier is 1 for every one of them, and that of a clipped surrogate too: they are the same method on
the first update after sampling.
"""

import jax
import jax.numpy as jnp

from pt_jax import checks, weights

# From here on the sigmoid of SAPO is 1 to the last digit for every temperature above 1e-10, while the ratio and its
# square are still finite in float32: so nothing changes, and 0 x inf cannot come up.
_FAR = 40.0


def reinforce(logps, advantages, mask):
    """REINFORCE: reinforce what was sampled by its advantage.

        loss = -A log p

    The value says nothing (it falls as the policy becomes more certain); the gradient is the policy gradient as long as
    the tokens were sampled from the policy that is trained.

    Williams 1992, https://doi.org/10.1007/BF00992696.

    Args:
      logps: [B, T] of the tokens under the policy being trained, in nats.
      advantages: [B, T]; no gradient flows into it.
      mask: [B, T] bool, the scored tokens.

    Returns:
      [B, T] float32; 0 where not scored.

    Raises:
      ValueError: the shapes disagree.

    >>> print(reinforce(jnp.array([[-1.0, -2.0]]), jnp.array([[3.0, -1.0]]), jnp.ones((1, 2), bool)))
    [[ 3. -2.]]
    """
    logps, advantages = weights.scored(mask, logps=logps, advantages=advantages)
    return 0 - weights.times(jax.lax.stop_gradient(advantages), logps)


def on_policy(logps, advantages, mask):
    """The surrogate of an update right after sampling, when the old policy is the one that is trained.

        loss = -exp(logps - sg(logps)) A = -A,   with the gradient -A d log p

    sg holds its argument constant. The gradient is ``reinforce``'s; the value is minus the mean advantage, comparable
    with the surrogates of later updates. Shao et al. 2024, https://arxiv.org/abs/2402.03300, section 4.1, with one
    update a batch. Arguments as ``reinforce``.

    >>> print(on_policy(jnp.array([[-1.0, -2.0]]), jnp.array([[3.0, -1.0]]), jnp.ones((1, 2), bool)))
    [[-3. 1.]]
    """
    return unclipped_surrogate(logps, jax.lax.stop_gradient(logps), advantages, mask)


def unclipped_surrogate(logps, old_logps, advantages, mask):
    """The importance-weighted policy gradient without any bound: unbiased, of unbounded variance.

        loss = -exp(logps - old_logps) A

    The conservative policy iteration objective, equation 6 of Schulman et al. 2017, https://arxiv.org/abs/1707.06347.

    Args:
      logps: [B, T] of the tokens under the policy being trained, in nats.
      old_logps: [B, T] under the policy that sampled them; no gradient flows into it.
      advantages: [B, T]; no gradient flows into it.
      mask: [B, T] bool, the scored tokens.

    Returns:
      [B, T] float32; 0 where not scored.

    >>> logps, A = jnp.log(jnp.array([[2.0, 0.5]])), jnp.array([[1.0, -1.0]])
    >>> print(unclipped_surrogate(logps, jnp.zeros((1, 2)), A, jnp.ones((1, 2), bool)))
    [[-2. 0.5]]
    """
    logps, old_logps, advantages = weights.scored(mask, logps=logps, old_logps=old_logps, advantages=advantages)
    return 0 - jnp.exp(weights.log_ratio(logps, jax.lax.stop_gradient(old_logps))) * jax.lax.stop_gradient(advantages)


def gpg(logps, advantages, mask, *, scale=1.0):
    """Group policy gradient: REINFORCE on group-centred rewards, scaled up for the groups that teach nothing.

        loss = -scale A log p,   A = advantages.group_centred(rewards)

    Groups of equal rewards have A = 0 and dilute the mean; ``gpg_scale`` is what makes up for them.

    Chu et al. 2025, https://arxiv.org/abs/2504.02546. Arguments as ``reinforce``, and

    Args:
      scale: > 0, the paper's alpha.

    Returns:
      [B, T] float32; 0 where not scored.

    Raises:
      ValueError: the shapes disagree, or scale is not above 0.

    >>> print(gpg(jnp.array([[-1.0, -2.0]]), jnp.array([[3.0, -1.0]]), jnp.ones((1, 2), bool), scale=2.0))
    [[ 6. -4.]]
    """
    checks.positive("scale", scale)
    return scale * reinforce(logps, advantages, mask)


def gpg_scale(rewards):
    """GPG's alpha of a batch: how many groups there are over how many have rewards that differ.

        alpha = P / (P - M),   M groups of equal rewards

    Chu et al. 2025, https://arxiv.org/abs/2504.02546. It is a number of the whole batch: compute it once, before the
    batch is dealt to microbatches and devices.

    Args:
      rewards: [P, G], NaN for an answer without verdict; a group without any verdict does not count.

    Returns:
      A scalar, float32, from 1; P where no group teaches anything (their advantages are 0 anyway).

    >>> print(gpg_scale(jnp.array([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]])))
    2.0
    """
    checks.shapes(rewards=(rewards, "P G"))
    (rewards,) = checks.floats(rewards=rewards)
    judged = ~jnp.isnan(rewards)
    highest = jnp.where(judged, rewards, -jnp.inf).max(-1)
    lowest = jnp.where(judged, rewards, jnp.inf).min(-1)
    groups, teaching = judged.any(-1).sum(), (highest > lowest).sum()
    return (jnp.maximum(groups, 1) / jnp.maximum(teaching, 1)).astype(rewards.dtype)


def cispo(logps, old_logps, advantages, mask, *, cap=5.0):
    """CISPO: REINFORCE weighted by a ratio that is cut off above and held constant; no token loses its gradient.

        loss = -sg(min(ratio, cap)) A log p,   ratio = exp(logps - old_logps)

    sg holds its argument constant: without it the gradient would have the factor 1 + log p and turn round where
    log p < -1.

    MiniMax 2025 (MiniMax-M1), https://arxiv.org/abs/2506.13585, equations 4 and 5, where cap is 1 + epsilon_high and
    there is, as here, no bound below in effect; the default is that of Khatri et al. 2025 (ScaleRL),
    https://arxiv.org/abs/2510.13786. Their mean is ``weights.token_mean``.

    Args:
      logps: [B, T] of the tokens under the policy being trained, in nats.
      old_logps: [B, T] under the policy that sampled them; no gradient flows into it.
      advantages: [B, T]; no gradient flows into it.
      mask: [B, T] bool, the scored tokens.
      cap: > 0, the largest ratio that counts.

    Returns:
      [B, T] float32; 0 where not scored.

    Raises:
      ValueError: the shapes disagree, or cap is not above 0.

    >>> logps, old_logps = jnp.array([[-1.0, -1.0]]), jnp.array([[-1.0, -9.0]])  # ratios 1 and e^8
    >>> print(cispo(logps, old_logps, jnp.ones((1, 2)), jnp.ones((1, 2), bool)))
    [[1. 5.]]
    """
    logps, old_logps, advantages = weights.scored(mask, logps=logps, old_logps=old_logps, advantages=advantages)
    checks.positive("cap", cap)
    ratio = jnp.exp(jnp.minimum(weights.log_ratio(logps, old_logps), jnp.log(cap)))
    return reinforce(logps, ratio * advantages, mask)  # which holds what it is given as advantages constant


def sapo(logps, old_logps, advantages, mask, *, temperature_pos=1.0, temperature_neg=1.05):
    """Soft adaptive policy optimisation: a sigmoid gate in place of the clip.

        loss = -(4 / temperature) sigmoid(temperature (ratio - 1)) A
        temperature = temperature_pos where A > 0, temperature_neg elsewhere

    The gradient at ratio 1 is that of ``unclipped_surrogate``; it fades on both sides, faster for a higher temperature
    and above more than below.

    Gao et al. 2025, https://arxiv.org/abs/2511.20347.

    Args:
      logps: [B, T] of the tokens under the policy being trained, in nats.
      old_logps: [B, T] under the policy that sampled them; no gradient flows into it.
      advantages: [B, T]; no gradient flows into it.
      mask: [B, T] bool, the scored tokens.
      temperature_pos, temperature_neg: > 0, for tokens of positive and of other advantage.

    Returns:
      [B, T] float32; 0 where not scored.

    Raises:
      ValueError: the shapes disagree, or a temperature is not above 0.

    >>> print(sapo(jnp.zeros((1, 2)), jnp.zeros((1, 2)), jnp.array([[1.0, -2.1]]), jnp.ones((1, 2), bool)))
    [[-2. 4.]]
    """
    logps, old_logps, advantages = weights.scored(mask, logps=logps, old_logps=old_logps, advantages=advantages)
    checks.positive("temperature_pos", temperature_pos)
    checks.positive("temperature_neg", temperature_neg)
    advantages = jax.lax.stop_gradient(advantages)
    temperature = jnp.where(advantages > 0, temperature_pos, temperature_neg).astype(advantages.dtype)
    ratio = jnp.exp(jnp.minimum(weights.log_ratio(logps, jax.lax.stop_gradient(old_logps)), _FAR))
    # exp(log p), because the slope of a sigmoid loses its digits where p is nearly 1
    return 0 - 4 / temperature * jnp.exp(jax.nn.log_sigmoid(temperature * (ratio - 1))) * advantages


def vespo_weights(
    logps, old_logps, advantages, mask, *, k_pos=2.0, lambda_pos=3.0, k_neg=3.0, lambda_neg=2.0
):  # fmt: skip
    """How much VESPO lets each answer count: a gamma density of the ratio of whole answers, 1 where the ratio is 1.

        w = exp(sum_t (logps_t - old_logps_t))
        phi = w^k exp(lambda (1 - w)),   (k, lambda) by the sign of A, 0 counting as positive

    The ratio is a product over the answer, not a mean. phi falls to 0 on both sides and is largest at w = k / lambda.

    Shen et al. 2026, https://arxiv.org/abs/2602.10693. For a sampler that differs from the trainer, hand in the
    sampler's log-probabilities as old_logps: w is then the whole ratio.

    Args:
      logps: [B, T] of the tokens under the policy being trained, in nats.
      old_logps: [B, T] under the policy that sampled them.
      advantages: [B, T]; only the sign counts.
      mask: [B, T] bool, the scored tokens.
      k_pos, lambda_pos: > 0, for advantages from 0.
      k_neg, lambda_neg: > 0, for advantages below 0.

    Returns:
      [B, T] float32, at least 0, at each scored token of the row; 0 where not scored. No gradient flows through it.

    Raises:
      ValueError: the shapes disagree, or a number is not above 0.

    >>> logps, A, mask = jnp.log(jnp.array([[1.0], [2.0]])), jnp.ones((2, 1)), jnp.ones((2, 1), bool)
    >>> print(vespo_weights(logps, jnp.zeros((2, 1)), A, mask).round(4).T)  # 2^2 / e^3
    [[1.     0.1991]]
    """
    logps, old_logps, advantages = weights.scored(mask, logps=logps, old_logps=old_logps, advantages=advantages)
    numbers = {"k_pos": k_pos, "lambda_pos": lambda_pos, "k_neg": k_neg, "lambda_neg": lambda_neg}
    for name, x in numbers.items():
        checks.positive(name, x)
    log_w = jax.lax.stop_gradient(weights.log_ratio(logps, old_logps)).sum(-1, keepdims=True)
    k, rate = jnp.where(advantages >= 0, k_pos, k_neg), jnp.where(advantages >= 0, lambda_pos, lambda_neg)
    # A ratio that overflows makes the exponent -inf, and the weight the 0 that it should be.
    phi = jnp.exp(k * log_w - rate * jnp.expm1(log_w)).astype(logps.dtype)
    return jnp.where(mask, phi, 0)


def vespo(
    logps, old_logps, advantages, mask, *, k_pos=2.0, lambda_pos=3.0, k_neg=3.0, lambda_neg=2.0
):  # fmt: skip
    """Variational sequence-level soft policy optimisation: REINFORCE with each answer weighted by ``vespo_weights``.

        loss = -phi A log p

    Shen et al. 2026, https://arxiv.org/abs/2602.10693. Arguments, numbers and errors as ``vespo_weights``.

    Returns:
      [B, T] float32; 0 where not scored. phi is held constant.

    >>> logps = jnp.log(jnp.array([[0.5, 0.5]]))
    >>> print(vespo(logps, logps, jnp.ones((1, 2)), jnp.ones((1, 2), bool)).round(4))  # phi is 1: log 2
    [[0.6931 0.6931]]
    """
    numbers = {"k_pos": k_pos, "lambda_pos": lambda_pos, "k_neg": k_neg, "lambda_neg": lambda_neg}
    phi = vespo_weights(logps, old_logps, advantages, mask, **numbers)
    (advantages,) = weights.scored(mask, advantages=advantages)
    return reinforce(logps, phi * advantages, mask)
