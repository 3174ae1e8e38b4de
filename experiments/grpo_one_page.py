"""GRPO on one page: teach a tiny model to say 7. Every choice is here, and every function is the library's.

    python experiments/grpo_one_page.py

Expected: the share of sevens in the samples rises from about 0.06 (one in sixteen) to above 0.9 in 40 steps, which
takes less than a minute on two CPU cores; ``tests/test_experiments.py`` runs it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pt_jax import models, training
from pt_jax.recipes import grpo
from pt_jax.sampling import sample

STEPS, PROMPTS, GROUP, LENGTH, SEVEN, END = 40, 8, 16, 6, 7, 1


def main(steps: int = STEPS, seed: int = 0) -> list[float]:
    """Trains, prints a line a step, and returns the mean reward of each step."""
    config = models.Config(vocab=16, layers=2, width=32, heads=4, kv_heads=2, head_width=8, hidden=64)
    model = models.bind(config)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-3))
    state = training.init_state(models.init(config, jax.random.key(seed)), optimizer, jax.random.key(seed))
    train_step = training.make_train_step(grpo.make_loss(model.apply), optimizer, microbatches=2)
    prompts = np.arange(3, 3 + PROMPTS, dtype=np.int32)[:, None]
    seen, history = np.ones_like(prompts, bool), []
    for step in range(steps):
        key = jax.random.fold_in(jax.random.key(seed), step)
        out = sample(
            state.params, prompts, seen, key, apply=model.apply, init_cache=model.init_cache,
            length=LENGTH, end_tokens=[END], pad_token=0, group=GROUP,
        )  # fmt: skip
        sevens = jnp.sum((out.tokens == SEVEN) & out.alive, -1) / LENGTH
        rewards = np.asarray(sevens).reshape(PROMPTS, GROUP)
        state, metrics = train_step(state, None, grpo.make_batch(prompts, seen, out, rewards))
        history.append(float(rewards.mean()))
        print(f"step {step + 1:2d}  reward {history[-1]:.3f}  entropy {metrics['entropy']:.3f}")
    return history


if __name__ == "__main__":
    main()
