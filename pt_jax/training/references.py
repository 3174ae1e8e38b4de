"""A reference that follows the policy by a schedule (TR-DPO): it is part of the state, and an argument of the loss.

    state = init_state(params, optimizer, key, reference=params)
    step = make_train_step(loss_fn, optimizer, frozen_of=references.beside, after=[references.follow(every=512)])

Gorbatovski et al. 2024, https://arxiv.org/abs/2404.09656. With adapters (``lora.adapted``) the reference may be a copy
of the adapters; then ``frozen_of=lambda state, frozen: (frozen[0], state.reference)``.
"""

from functools import partial

import jax
import jax.numpy as jnp

from pt_jax import checks
from pt_jax.losses.preference import soft_update


def beside(state, frozen):
    """For ``frozen_of``: the loss is given the pair (reference, frozen)."""
    return state.reference, frozen


def follow(*, every: int = 512, alpha: float = 0.6):
    """After every so many updates the reference takes a step towards the policy.

        ref = alpha params + (1 - alpha) ref

    The defaults are TRL's. The paper's soft update is a small alpha after every update, its hard one alpha = 1. An
    update that was skipped does not count.

    Args:
      every: updates between two steps, >= 1.
      alpha: in [0, 1].

    Returns:
      A function for ``after``.

    Raises:
      ValueError: a number is out of range.
    """
    checks.positive("every", every)
    checks.share("alpha", alpha)

    def after(state, metrics):
        if state.reference is None:
            raise ValueError("the state has no reference; make it with init_state(..., reference=params)")
        due = state.updates % every == 0
        moved = soft_update(state.params, state.reference, alpha=alpha)
        return state.replace(reference=jax.tree.map(partial(jnp.where, due), moved, state.reference))

    return after
