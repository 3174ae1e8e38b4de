"""Losses that learn from what people prefer: pairs of answers, or single answers judged good or bad."""

from pt_jax.losses.preference.paired import dpo, implicit_reward

__all__ = ["dpo", "implicit_reward"]
