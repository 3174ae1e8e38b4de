"""Whole runs of TRL's trainers on a tiny Qwen3: losses, gradient norms, metrics and the weights that come out.

``reference/trl_end_to_end.{json,npz}`` were recorded from TRL 1.16.0 and transformers 5.23, unmodified, in float32 on a
CPU. Adam divides a gradient by its own size, so that of a weight that hardly matters the rounding is blown up to a
part of the learning rate, 1e-3 a step: that is why the weights agree to 1e-4 and not to the last digits.
"""

import copy
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from end_to_end import _of_reference, read_model, replay_run

REFERENCE = pathlib.Path(__file__).parent / "reference"
ENTRIES = json.loads((REFERENCE / "trl_end_to_end.json").read_text())["entries"]
ARRAYS = dict(np.load(REFERENCE / "trl_end_to_end.npz"))
BY_TRAINER = {entry["trainer"]: entry for entry in ENTRIES}


def test_the_logits_of_a_padded_batch_are_those_of_transformers():
    model = read_model(_of_reference({}, "config"), ARRAYS)
    seen = ARRAYS["forward/attention_mask"].astype(bool)
    logits, _ = jax.jit(model.apply)(model.params, jnp.asarray(ARRAYS["forward/input_ids"], jnp.int32), seen)
    np.testing.assert_allclose(logits[seen], ARRAYS["forward/logits"][seen], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e["name"])
def test_a_run_is_trls_run_step_by_step_to_the_last_weight(entry):
    log, weights = replay_run(entry | {"name": "a name says nothing"}, ARRAYS)
    assert len(log) == len(entry["log"])
    for step, (got, expected) in enumerate(zip(log, entry["log"])):
        for name, value in expected.items():
            # implicit rewards are differences of sums of some 30 nats, at beta of 0.1
            exact = {"rewards/chosen", "rewards/rejected", "rewards/margins"}
            rtol, atol = (1e-4, 2e-6) if name in exact else (2e-5, 1e-6)
            np.testing.assert_allclose(got[name], value, rtol=rtol, atol=atol, err_msg=f"step {step}: {name}")
    final = {k.split("/final/")[1]: x for k, x in ARRAYS.items() if k.startswith(f"{entry['name']}/final/")}
    assert weights.keys() == final.keys()
    for name, expected in final.items():
        np.testing.assert_allclose(weights[name], expected, rtol=0, atol=5e-5, err_msg=name)
        # and nothing but a handful of weights without influence is off by more than a hundredth of a step
        off = np.abs(weights[name] - expected) > 1e-5
        assert off.mean() < 2e-3, name
        assert np.abs(expected - ARRAYS[f"weights/{name}"]).max() > 1e-3, f"{name} was not trained"


@pytest.mark.parametrize(
    ("trainer", "option", "value"),
    [
        ("SFTTrainer", "loss_type", "chunked"),
        ("SFTTrainer", "packing", True),
        ("SFTTrainer", "lr_scheduler_type", "sawtooth"),
        ("DPOTrainer", "loss_type", ["sigmoid", "kto_pair"]),
        ("DPOTrainer", "squared", True),
        ("GRPOTrainer", "loss_type", "ppo"),
        ("GRPOTrainer", "per_device_train_batch_size", 3),
        ("GRPOTrainer", "squared", True),
    ],
)
def test_what_is_not_known_is_refused(trainer, option, value):
    entry = copy.deepcopy(BY_TRAINER[trainer])
    entry["options"] = entry.get("options", {}) | {option: value}
    with pytest.raises(ValueError, match=option if option != "per_device_train_batch_size" else "3 rows"):
        replay_run(entry, ARRAYS)


def test_a_trainer_that_is_not_known_is_refused():
    with pytest.raises(ValueError, match="AlchemyTrainer"):
        replay_run(ENTRIES[0] | {"trainer": "AlchemyTrainer"}, ARRAYS)
