"""Losses of supervised and preference tuning: arrays in, one unreduced value a token or a row out."""

from pt_jax.losses import distillation, likelihood, on_policy_distillation, preference, reward_model, value

__all__ = ["distillation", "likelihood", "on_policy_distillation", "preference", "reward_model", "value"]
