"""From rewards to advantages: how much better an answer, or a token, did than was to be expected."""

from pt_jax.advantages.groups import group_centred, group_relative

__all__ = ["group_centred", "group_relative"]
