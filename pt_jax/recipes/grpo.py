"""Group relative policy optimisation: sample a group of answers a prompt, compare them, reinforce the better ones."""

import jax
import jax.numpy as jnp
import numpy as np

from pt_jax import advantages, divergences, logps, weights
from pt_jax.objectives import clipped
from pt_jax.sampling import Sampling, scored_logits


def make_loss(apply, *, how: Sampling | None = None, kl=0.0, clip_low=0.2, clip_high=0.2):
    """The clipped surrogate on group advantages, plus ``kl`` times the k3 estimate of the KL to the reference.

    On the first update after sampling (``fresh``), the old log-probabilities are this program's own, held constant:
    the ratio is exactly 1 and nothing is clipped. They come back as the metric ``logps`` [B, T], to be the batch's
    ``old_logps`` in further updates on the same samples.

    Args:
      apply: ``(params, tokens, seen) -> (logits, cache)``.
      how: the distribution that the tokens were sampled from; temperature 1 when None.
      kl: weight of the penalty; with 0 the batch needs no ``ref_logps``.
      clip_low, clip_high: see ``objectives.clipped_surrogate``.

    Returns:
      A loss for ``make_train_step``. Its metrics are TRL's: ``kl`` (when there is a reference), ``entropy``,
      ``clip_ratio/low_mean``, ``clip_ratio/high_mean``, and ``logps``.
    """
    how = Sampling() if how is None else how

    def loss_fn(params, frozen, batch, key):
        tokens, seen, mask = (batch[name] for name in ("tokens", "seen", "mask"))
        logits = scored_logits(apply(params, tokens, seen)[0], tokens, seen, mask, how)
        now = logps.token_logps(logits, tokens)
        old = jnp.where(batch["fresh"][:, None], jax.lax.stop_gradient(now), batch["old_logps"])
        mean = lambda x: weights.weighted_sum(x, batch["weights"])
        clip = {"clip_low": clip_low, "clip_high": clip_high}
        loss = mean(clipped.clipped_surrogate(now, old, batch["advantages"], mask, **clip))
        low, high = clipped.clip_indicators(now, old, batch["advantages"], mask, **clip)
        metrics = {
            "entropy": mean(logps.token_entropies(logits)),
            "clip_ratio/low_mean": mean(low),
            "clip_ratio/high_mean": mean(high),
            "logps": jax.lax.stop_gradient(jnp.where(mask, now, 0)),
        }
        if "ref_logps" in batch:
            metrics["kl"] = mean(divergences.k3(now, batch["ref_logps"], mask))
            loss = loss + kl * metrics["kl"]
        return loss, metrics

    return loss_fn


def make_batch(prompts, seen, completions, rewards, *, weigh=weights.token_mean, advantage=advantages.group_relative):
    """What was sampled is what is trained on: the arrays of the sampler, prompt in front, seen but not scored.

    Args:
      prompts: [P, T] int32, left-padded.
      seen: [P, T] bool.
      completions: ``sampling.Completions`` of P * G rows.
      rewards: [P, G] float32, NaN where there is no verdict.
      weigh: mask -> weights, over the whole batch.
      advantage: rewards [P, G] -> advantages [P, G].

    Returns:
      tokens, seen, mask, weights, advantages, old_logps [B, T + N] and fresh [B], in the order of the completions.
    """
    T, group = prompts.shape[1], rewards.shape[1]
    in_front = lambda x: np.pad(x, ((0, 0), (T, 0)))
    gain = np.asarray(advantage(jnp.asarray(rewards, jnp.float32))).reshape(-1, 1)
    out = jax.device_get(completions)
    tokens = np.concatenate([np.repeat(prompts, group, 0), out.tokens], 1)
    return {
        "tokens": tokens,
        "seen": np.concatenate([np.repeat(seen, group, 0), out.alive], 1),
        "mask": in_front(out.alive),
        "weights": in_front(np.asarray(weigh(jnp.asarray(out.alive)))),
        "advantages": np.broadcast_to(gain, tokens.shape).astype(np.float32),
        "old_logps": in_front(out.logps),
        "fresh": np.ones(len(tokens), bool),
    }


def group_metrics(rewards, completions, end_tokens) -> dict:
    """What the samples of a step say, under TRL's names.

    Args:
      rewards: [P, G].
      completions: ``sampling.Completions`` of P * G rows.
      end_tokens: ids that end a completion.

    Returns:
      ``reward``, ``reward_std`` (mean of the groups' deviations), ``frac_reward_zero_std`` (groups that teach nothing
      because all their answers did equally well), ``completions/mean_length`` in tokens and
      ``completions/clipped_ratio`` (those that were cut off before their end).
    """
    rewards, out = np.asarray(rewards), jax.device_get(completions)
    deviation = np.nanstd(rewards, -1)
    ended = (np.isin(out.tokens, list(end_tokens)) & out.alive).any(-1)
    return {
        "reward": float(np.nanmean(rewards)),
        "reward_std": float(np.mean(deviation)),
        "frac_reward_zero_std": float(np.mean(np.isclose(deviation, 0))),
        "completions/mean_length": float(out.alive.sum(-1).mean()),
        "completions/clipped_ratio": float(1 - ended.mean()),
    }


def sampler_agreement(batch, logps) -> dict:
    """How far the trainer's log-probabilities of the sampled tokens are from the sampler's, under TRL's names.

    Both come from one model and one distribution, so anything above float32 rounding is a bug.

    Args:
      batch: of ``make_batch``, with the sampler's ``old_logps``.
      logps: [B, T], the metric of the first update.
    """
    gap = np.abs(np.asarray(batch["old_logps"]) - np.asarray(logps))[np.asarray(batch["mask"])]
    return {
        "sampling/sampling_logp_difference/max": float(gap.max(initial=0)),
        "sampling/sampling_logp_difference/mean": float(gap.mean()) if gap.size else 0.0,
    }
