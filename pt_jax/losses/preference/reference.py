"""A reference that follows the policy."""

import jax
import jax.numpy as jnp

from pt_jax import checks


def soft_update(params, ref_params, *, alpha=0.6):
    """TR-DPO's reference update: a step of the reference towards the policy.

        ref = alpha params + (1 - alpha) ref

    Gorbatovski et al. 2024, https://arxiv.org/abs/2404.09656. The soft update is this with a small alpha after every
    step; the hard one is alpha = 1, and TRL's is 0.6, both after some hundred steps. The sum is taken in float32 and
    stored in the type of the reference, where bfloat16 would swallow a step of less than 1/256.

    Args:
      params: any pytree of float arrays, the policy.
      ref_params: the same structure and shapes, the reference.
      alpha: in [0, 1].

    Returns:
      A pytree as ``ref_params``.

    Raises:
      ValueError: the structures or the shapes disagree, or alpha is out of range.

    >>> print(soft_update({"w": jnp.array([1.0])}, {"w": jnp.array([3.0])}, alpha=0.25)["w"])
    [2.5]
    """
    checks.share("alpha", alpha)
    if jax.tree.structure(params) != jax.tree.structure(ref_params):
        raise ValueError("ref_params has another structure than params")

    def step(path, new, ref):
        if jnp.shape(new) != jnp.shape(ref):
            where = jax.tree_util.keystr(path)
            raise ValueError(f"ref_params{where} has shape {jnp.shape(ref)}, expected that of params, {jnp.shape(new)}")
        ref_type = jnp.result_type(ref)
        new, ref = checks.floats(params=new, ref_params=ref)
        return (alpha * new + (1 - alpha) * ref).astype(ref_type)

    return jax.tree.map_with_path(step, params, ref_params)
