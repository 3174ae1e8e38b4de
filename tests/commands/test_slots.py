"""``pt-jax grpo --slots``: the same samples, rewards and updates, by a queue."""

import json

import jax
import numpy as np
import pytest

from pt_jax import models
from pt_jax.commands import common, grpo
from pt_jax.tracking import metrics

OPTIONS = {
    "steps": 2, "batch_size": 8, "learning_rate": 1e-2, "group": 3, "max_new_tokens": 12, "kl": 0.1, "eval_every": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(folder, data, tmp_path_factory):
    """By the number of slots: the trained parameters, the records, the samples that were shown, and who drew them."""
    at = tmp_path_factory.mktemp("slots")
    (at / "mine.py").write_text("def length(completion, row):\n    return float(len(completion) % 7) + 0.35\n")
    real, out = common.sample_queue, {}
    for slots in (None, 5):
        asked = []

        def queue(*given, slots, asked=asked, **more):
            asked.append((len(given[1]), slots))
            return real(*given, slots=slots, **more)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(common, "sample_queue", queue)
            grpo.run(grpo.GRPO(
                model=str(folder), data=data["question"], eval_data=data["held_out"], out=str(at / str(slots)),
                reward=f"{at}/mine.py:length", slots=slots, **OPTIONS,
            ))  # fmt: skip
        folder_of = at / str(slots)
        records = metrics.read(folder_of / "metrics.jsonl")
        shown = [json.loads(line) for line in (folder_of / "samples.jsonl").read_text().splitlines()]
        out[slots] = models.load(folder_of)[0], records, shown, asked
    return out


def test_a_queue_draws_them_all(runs):
    """Two rollouts of 8 prompts and three evaluations of 5, for which it is not cut into parts."""
    assert runs[None][3] == [] and sorted(runs[5][3]) == [(5, 5)] * 3 + [(8, 5)] * 2


def test_samples_rewards_and_updates_are_those_of_the_plain_loop(runs):
    """To the last bit: the trainer scores the samples itself, so only the sampler's own scores may differ."""
    (params, records, shown, _), (expected, plain, said, _) = runs[5], runs[None]
    assert shown == said and len({len(sample["completion"]) for sample in said}) > 2
    own = lambda record: {name: x for name, x in record.items() if not name.startswith("sampling/")}
    assert [own(record) for record in records] == [own(record) for record in plain]
    assert all(record["sampling/sampling_logp_difference/max"] < 1e-5 for record in records if "entropy" in record)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
