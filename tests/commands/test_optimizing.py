"""What is done around a step, asked for on the command line: averages, LoRA+, spikes, a reference that moves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tyro
from run_folders import same_runs, state_of

from pt_jax import models, signals
from pt_jax.commands import dpo, export, grpo, keeping, optimizing, sft
from pt_jax.models import peft
from pt_jax.recipes import sft as sft_recipe
from pt_jax.tracking import metrics
from pt_jax.training import init_state, specs

pytestmark = pytest.mark.usefixtures("programs_are_kept")
COMMANDS = {
    "sft": (sft, sft.SFT, "completion", {}),
    "dpo": (dpo, dpo.DPO, "preference", {}),
    "grpo": (grpo, grpo.GRPO, "question", {"group": 2, "max_new_tokens": 4, "reward": "number"}),
}
BASE = {"steps": 4, "batch_size": 8, "learning_rate": 1e-2, "checkpoint_every": 1, "keep": 9, "log_every": 3}


@pytest.fixture(scope="module")
def options(folder, data):
    def make(command, out, **changes):
        _, kind, lines, more = COMMANDS[command]
        return kind(**{"model": str(folder), "data": data[lines], "out": str(out)} | BASE | more | changes)

    return make


def params_of(out, step):
    """What was trained, by name, at a step of a run."""
    return {name: x for name, x in state_of(out, step).items() if name.startswith("params.")}


def losses(out):
    return [record["loss"] for record in metrics.read(out / "metrics.jsonl") if record["step"]]


# ---- averages


@pytest.fixture(scope="module")
def averaged(train, data):
    """A run with averages, and the same without."""
    more = {"eval_data": data["completion"], "eval_every": 1}
    return train("sft", average=0.5, **more), train("sft", **more)


def test_the_average_of_the_parameters_is_written_and_they_are_trained_as_without(averaged, tmp_path):
    out, plain = averaged
    for step in (1, 4):
        for name, x in params_of(plain, step).items():
            np.testing.assert_array_equal(x, params_of(out, step)[name], name)
    assert losses(out) == losses(plain)
    export.run(export.Export(checkpoint=str(out / "checkpoints/3"), out=str(tmp_path / "three")))
    for folder, steps in ((out, 4), (tmp_path / "three", 3)):
        shares, path = 0.5 ** np.arange(steps)[::-1], [params_of(out, step) for step in range(1, steps + 1)]
        for name, x in specs.flat({"params": models.load(folder)[0]}).items():
            mean = np.average([np.float64(params[name]) for params in path], axis=0, weights=shares)
            np.testing.assert_allclose(x, mean, rtol=1e-5, atol=1e-7, err_msg=name)


def test_the_average_is_what_is_evaluated(averaged):
    """After the first update it is the parameters; after that it is not."""
    mean, last = ([record["eval_loss"] for record in metrics.read(out / "metrics.jsonl")] for out in averaged)
    np.testing.assert_allclose(mean[:2], last[:2], rtol=1e-6)
    assert all(abs(a - b) > 1e-4 for a, b in zip(mean[2:], last[2:]))


@pytest.mark.slow
def test_adapters_are_averaged_too(train, folder):
    out = train("sft", average=0.5, lora_rank=2)
    got, _ = peft.load(out, models.load(folder)[1])
    for name, x in specs.flat({"averages": got}).items():
        np.testing.assert_array_equal(x, state_of(out, 4)[name], name)
        assert np.abs(x - state_of(out, 4)[name.replace("averages", "params")]).max() > 0


# ---- rates and decays


PARAMS = {"embed": (4, 3), "layers": {"attn_norm": (2, 3), "up": {"a": (2, 8, 3), "b": (2, 3, 5)}}}


def moved(**given):
    """What a step of the optimiser takes each parameter by, of one gradient."""
    rng = np.random.default_rng(0)
    params, slopes = (
        jax.tree.map(lambda shape: np.float32(rng.normal(size=shape)), PARAMS, is_leaf=lambda x: isinstance(x, tuple))
        for _ in range(2)
    )
    rule = optimizing.optimizer_of(sft.SFT(model="", data="", out="", weight_decay=0.1, **given), 5)
    return specs.flat(rule.update(slopes, rule.init(params), params)[0])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    ("given", "factors"),
    [
        ({"lora_plus": 4.0}, {"layers.up.b": 4}),
        ({"rates": (("layers.*norm", 0.0), ("embed", 0.5))}, {"layers.attn_norm": 0, "embed": 0.5}),
        ({"rates": (("*.up.*", 0.5),), "lora_plus": 4.0}, {"layers.up.a": 0.5, "layers.up.b": 2}),
    ],
)
def test_rates_are_said_by_path_and_lora_plus_is_the_rate_of_the_second_matrix(optimizer, given, factors):
    plain, other = moved(optimizer=optimizer), moved(optimizer=optimizer, **given)
    for name, x in plain.items():
        np.testing.assert_allclose(other[name], factors.get(name, 1) * x, rtol=1e-6, err_msg=name)


def test_rates_are_pairs_of_words():
    words = "--model m --data d --out o --rates embed 0.1 layers.*norm 0 --no-decay embed unembed"
    options = tyro.cli(sft.SFT, args=words.split())
    assert (options.rates, options.no_decay) == ((("embed", 0.1), ("layers.*norm", 0.0)), ("embed", "unembed"))


def test_what_is_not_decayed_is_said_by_path():
    kept, norms, never = moved(no_decay=("embed",)), moved(), moved(no_decay=("*",))
    assert {name for name in kept if np.array_equal(kept[name], never[name])} == {"embed"}
    assert {name for name in kept if np.array_equal(norms[name], never[name])} == {"layers.attn_norm"}


# ---- spikes


def test_a_spike_is_skipped_where_that_is_asked_for(options, tmp_path, monkeypatch):
    make, made = sft_recipe.make_batch, []

    def with_spike(examples, **how):
        """In the sixth step; the first batch is made once more, to compile for it."""
        made.append(make(examples, **how))
        return made[-1] | ({"weights": made[-1]["weights"] * 1000} if len(made) == 7 else {})

    monkeypatch.setattr(sft_recipe, "make_batch", with_spike)
    sft.run(options("sft", tmp_path / "out", steps=7, skip_spikes=50.0, spike_window=3))
    records = metrics.read(tmp_path / "out/metrics.jsonl")
    assert [record["skipped"] for record in records] == [0, 0, 0, 0, 0, 1, 0] and records[5]["loss"] > 1000
    moved = [params_of(tmp_path / "out", step)["params.embed"] for step in (5, 6, 7)]
    assert np.array_equal(moved[0], moved[1]) and not np.array_equal(moved[1], moved[2])


# ---- a reference that moves


@pytest.mark.parametrize(("every", "lora_rank"), [(2, None), (1, 2)])
def test_the_reference_is_the_policy_after_each_step_that_it_takes_in_full(train, data, every, lora_rank):
    """Then all margins are 0, and the loss is log 2 whatever the batch: also of what is evaluated after the step."""
    more = {"sync_alpha": 1.0, "lora_rank": lora_rank, "eval_data": data["preference"], "eval_every": 1}
    out = train("dpo", sync_reference=every, **more)
    records, moves = metrics.read(out / "metrics.jsonl"), every > 1
    assert [abs(record["rewards/margins"]) > 1e-4 for record in records[1:]] == [False, moves, False, moves]
    assert [abs(record["eval_rewards/margins"]) > 1e-4 for record in records] == [False, moves, False, moves, False]
    np.testing.assert_allclose(losses(out)[::2], np.log(2), rtol=1e-5)


def test_until_it_moves_the_reference_is_the_model_before_training_and_then_it_goes_as_far_as_is_said(train, folder):
    """ref = alpha params + (1 - alpha) ref, once."""
    late, never = train("dpo", sync_reference=4, sync_alpha=0.25), train("dpo")
    np.testing.assert_allclose(losses(late), losses(never), rtol=1e-5)  # there it is scored once for all
    state = state_of(late, 4)
    for name, x in specs.flat({"reference": models.load(folder)[0]}).items():
        expected = 0.25 * state[name.replace("reference", "params")] + 0.75 * np.asarray(x)
        np.testing.assert_allclose(state[name], expected, rtol=1e-5, atol=1e-7, err_msg=name)
    assert not any(name.startswith("reference") for name in state_of(never, 4))


def test_the_reference_goes_six_tenths_of_the_way_unless_said_otherwise():
    state = init_state({"w": jnp.float32(1)}, optax.sgd(1.0), jax.random.key(0), reference={"w": jnp.float32(0)})
    step = dpo.follow_of(dpo.DPO(model="", data="", out="", sync_reference=1))
    assert float(step(state, {}).reference["w"]) == np.float32(0.6)


# ---- all of them


ALL = {
    "sft": {
        "average": 0.9, "skip_spikes": 50.0, "spike_window": 2, "lora_rank": 2, "lora_plus": 4.0, "optimizer": "lion",
        "moments": "bfloat16", "schedule": "wsd", "rates": (("*.wq.a", 0.5),),
    },
    "dpo": {"average": 0.5, "sync_reference": 2, "optimizer": "muon", "schedule": "cosine"},
    "grpo": {"average": 0.5, "optimizer": "adafactor", "kl": 0.1, "updates": 2},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("command", ALL)
def test_a_run_with_all_of_it_that_was_stopped_goes_on_to_the_last_bit(options, train, tmp_path, monkeypatch, command):
    whole, more = train(command, **ALL[command]), ALL[command]
    with monkeypatch.context() as patched, pytest.raises(signals.Stopped):
        patched.setattr(keeping, "stop", lambda options: lambda at: "SIGTERM" if at == 3 else None)
        COMMANDS[command][0].run(options(command, tmp_path / "out", **more))
    COMMANDS[command][0].run(options(command, tmp_path / "out", resume="auto", **more))
    same_runs(whole, tmp_path / "out")


@pytest.mark.parametrize(
    ("command", "changes", "said"),
    [
        ("sft", {"average": 0.0}, "--average must be above 0, got 0"),
        ("sft", {"average": 1.0}, r"--average must be in \[0.0, 1.0\), got 1.0"),
        ("sft", {"lora_plus": 16.0}, "--lora-plus is of adapters; give --lora-rank"),
        ("sft", {"lora_plus": -1.0, "lora_rank": 2}, "--lora-plus must be above 0, got -1"),
        ("sft", {"no_decay": ("embed",)}, "--no-decay embed is of --weight-decay, which is 0"),
        ("sft", {"rates": (("embd", 0.1),)}, "'embd' matches none of the parameters: embed, "),
        ("sft", {"rates": (("embed", 0.1), ("embed", 0.9))}, "--rates has embed more than once; give each pattern one"),
        ("sft", {"rates": (("embed", -0.1),)}, r"the factor of 'embed' must be in \[0.0, inf\), got -0.1"),
        ("sft", {"skip_spikes": 0.0}, "--skip-spikes must be above 0, got 0"),
        ("sft", {"spike_window": 8}, "--spike-window 8 is of spikes; give --skip-spikes"),
        ("sft", {"skip_spikes": 6.0}, "--skip-spikes 6 looks back at 128 updates, and the run has 4; give a shorter"),
        ("sft", {"skip_spikes": 6.0, "spike_window": 4}, "looks back at 4 updates, and the run has 4"),
        ("dpo", {"sync_alpha": 0.5}, "--sync-alpha 0.5 is of a reference that moves; give --sync-reference"),
        ("dpo", {"sync_reference": 0}, "--sync-reference must be above 0, got 0"),
        ("dpo", {"sync_reference": 2, "sync_alpha": 0.0}, "--sync-alpha must be above 0, got 0"),
        ("dpo", {"sync_reference": 2, "sync_alpha": 1.5}, r"--sync-alpha must be in \[0, 1\], got 1.5"),
        (
            "dpo",
            {"sync_reference": 2, "share_prompts": True},
            "--share-prompts is of a reference that stays; leave it out",
        ),
        ("dpo", {"sync_reference": 5}, "--sync-reference 5: the run has 4 updates; give fewer"),
    ],
)
def test_what_makes_no_sense_is_told_before_anything_is_compiled(options, tmp_path, command, changes, said):
    with pytest.raises(ValueError, match=said):
        COMMANDS[command][0].run(options(command, tmp_path / "out", **changes))
    assert not [*tmp_path.iterdir()]
