"""Objectives of policy-gradient methods: one loss a token, to be minimised; the mean is taken by ``weights``."""

from pt_jax.objectives.clipped import clip_indicators, clipped_surrogate, dual_clip
from pt_jax.objectives.corrections import (
    geometric_ratio,
    importance_weighted,
    off_policy_sequence_mask,
    sequence_ratio,
    token_ratio,
    truncated,
    within,
)
from pt_jax.objectives.overlong import soft_overlong, without_unfinished
from pt_jax.objectives.sequence import gmpo, gspo, gspo_token, rloo, sequence_log_ratio
from pt_jax.objectives.soft import (
    cispo,
    gpg,
    gpg_scale,
    on_policy,
    reinforce,
    sapo,
    unclipped_surrogate,
    vespo,
    vespo_weights,
)
from pt_jax.objectives.tokens import (
    at_least,
    clip_cov,
    clip_cov_choice,
    clip_cov_rate,
    covariances,
    entropy_bonus,
    kl_cov,
    token_quantile,
)

__all__ = [
    "at_least",
    "cispo",
    "clip_cov",
    "clip_cov_choice",
    "clip_cov_rate",
    "clip_indicators",
    "clipped_surrogate",
    "covariances",
    "dual_clip",
    "entropy_bonus",
    "geometric_ratio",
    "gmpo",
    "gpg",
    "gpg_scale",
    "gspo",
    "gspo_token",
    "importance_weighted",
    "kl_cov",
    "off_policy_sequence_mask",
    "on_policy",
    "reinforce",
    "rloo",
    "sapo",
    "sequence_log_ratio",
    "sequence_ratio",
    "soft_overlong",
    "token_quantile",
    "token_ratio",
    "truncated",
    "unclipped_surrogate",
    "vespo",
    "vespo_weights",
    "within",
    "without_unfinished",
]
