"""From rewards to advantages: how much better an answer, or a token, did than was to be expected.

Functions of groups take rewards [P, G] and return [P, G]; functions of tokens take a mask [B, T]. To use the former in
an objective of tokens, repeat them along the row: ``advantages.reshape(-1, 1) * mask``.
"""

from pt_jax.advantages.baselines import greedy_baseline, optimal_baseline, pass_at_k
from pt_jax.advantages.batch import (
    batch_normalised,
    leave_one_out_normalised,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    whiten,
    whiten_keeping_mean,
)
from pt_jax.advantages.groups import (
    group_centred,
    group_deviation,
    group_relative,
    group_relative_article,
    group_relative_deepseek,
    group_relative_inside_root,
    group_relative_trl,
    group_relative_verl,
    leave_one_out,
)
from pt_jax.advantages.returns import (
    gae,
    gae_bootstrapped,
    kl_penalised_rewards,
    kl_penalised_scores,
    length_adaptive_gae,
    reward_to_go,
    score_at_end,
)
from pt_jax.advantages.several import per_reward_normalised, summed_rewards

__all__ = [
    "batch_normalised",
    "gae",
    "gae_bootstrapped",
    "greedy_baseline",
    "group_centred",
    "group_deviation",
    "group_relative",
    "group_relative_article",
    "group_relative_deepseek",
    "group_relative_inside_root",
    "group_relative_trl",
    "group_relative_verl",
    "kl_penalised_rewards",
    "kl_penalised_scores",
    "leave_one_out",
    "leave_one_out_normalised",
    "length_adaptive_gae",
    "optimal_baseline",
    "pass_at_k",
    "per_reward_normalised",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "reward_to_go",
    "score_at_end",
    "summed_rewards",
    "whiten",
    "whiten_keeping_mean",
]
