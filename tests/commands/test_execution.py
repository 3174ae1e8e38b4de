"""``--remat``, ``--dtype`` and ``--packing``: less memory, 16-bit products and fewer rows, for the same training."""

import jax
import numpy as np
import pytest

from pt_jax import models
from pt_jax.commands import common, dpo, fitting, grpo, sft
from pt_jax.data import rows
from pt_jax.recipes import sft as recipe
from pt_jax.sampling import Sampling
from pt_jax.tracking import tables

BASE = {"steps": 2, "batch_size": 8, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def train(folder, data, tmp_path_factory):
    """(options) -> (parameters, what the command returned), each run once."""
    done = {}

    def run(**options):
        name = str(sorted(options.items()))
        if name not in done:
            out = tmp_path_factory.mktemp("runs") / "out"
            said = sft.run(
                sft.SFT(**{"model": str(folder), "data": data["completion"], "out": str(out)} | BASE | options)
            )
            done[name] = models.load(out)[0], said
        return done[name]

    return run


def furthest(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))


# ---- how a model is computed


def test_recomputing_changes_no_result(train):
    assert furthest(train(remat="layer")[0], train()[0]) < 2e-5


def test_a_run_in_bfloat16_is_near_and_keeps_its_parameters_in_float32(train):
    (plain, _), (coarse, _) = train(), train(dtype="bfloat16")
    assert 0 < furthest(coarse, plain) < 0.04 and {x.dtype for x in jax.tree.leaves(coarse)} == {np.dtype(np.float32)}


def test_the_options_reach_the_model(folder):
    options = sft.SFT(model=str(folder), data="", out="", remat="layer", dtype="bfloat16")
    for how, recomputes, dtype in [(options.execution, True, "bfloat16"), (models.Execution(), False, "float32")]:
        model = common.open_model(options.model, options.quantize, how)
        assert model.init_cache(1, 2)["k"].dtype == dtype
        logits = lambda p, model=model: model.apply(p, np.zeros((1, 3), np.int32), np.ones((1, 3), bool))[0]
        assert jax.eval_shape(logits, model.params).dtype == dtype
        program = jax.make_jaxpr(jax.grad(lambda p, logits=logits: logits(p).astype(np.float32).sum()))(model.params)
        assert ("remat" in str(program)) == recomputes


def test_a_gpu_samples_the_same_layer_by_layer(folder, monkeypatch):
    model = common.open_model(folder)
    prompts = np.array([[5, 6, 7]], np.int32), np.ones((1, 3), bool)
    draw = lambda: model.sampler(6, Sampling())(model.params, *prompts, jax.random.key(0), group=2)
    expected, taken = draw(), []
    by_layer = models.by_layer
    monkeypatch.setattr(models, "by_layer", lambda *x: taken.append(1) or by_layer(*x))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_array_equal(draw().tokens, expected.tokens)
    assert taken


@pytest.mark.parametrize("module", [sft, dpo, grpo])
def test_every_command_opens_its_model_so(folder, data, tmp_path, monkeypatch, module):
    asked = []
    monkeypatch.setattr(common, "open_model", lambda *args: asked.append(args) or 1 / 0)
    name, kind = {sft: ("SFT", "completion"), dpo: ("DPO", "preference"), grpo: ("GRPO", "question")}[module]
    more = {"reward": "number"} if module is grpo else {}
    options = getattr(module, name)(
        model=str(folder), data=data[kind], out=str(tmp_path / "out"), remat="dots", dtype="bfloat16", **BASE, **more
    )
    with pytest.raises(ZeroDivisionError):
        module.run(options)
    [(*given, place)] = asked
    assert given == [str(folder), None, models.Execution(remat="dots", dtype="bfloat16")]
    assert place.keywords["mesh"].size == 8


def test_with_fsdp_no_device_holds_the_whole_model_or_its_moments(folder, data):
    """From the moment they are read, and made: a model that needs eight devices is on one of them at no time."""
    options = sft.SFT(model=str(folder), data=data["completion"], out="", fsdp=8, steps=1, batch_size=8)
    model = common.open_to_train(options)
    in_eight = lambda tree: [x for x in jax.tree.leaves(tree) if x.ndim > 1 and x.size > 500]
    share = lambda x: x.size // x.addressable_shards[0].data.size
    on_one = lambda x: x.addressable_shards[0].data.nbytes
    read = jax.tree.leaves(model.params)
    assert {share(x) for x in in_eight(read)} == {8}
    fit = fitting.Fit(options, model, recipe.make_loss(model.apply), 8)
    for tree in (fit.state.params, fit.state.opt_state):
        assert {share(x) for x in in_eight(tree)} == {8}
    assert all(x.is_deleted() for x in read)  # their memory is that of what is trained
    table = {line.split()[0]: line.split()[1:] for line in tables.text(fitting.held(fit.state)).splitlines() if line}
    for name, tree in (("trained", fit.state.params), ("moments", fit.state.opt_state)):
        sizes = [sum(of(x) for x in jax.tree.leaves(tree)) for of in (lambda x: x.nbytes, on_one)]
        assert table[name] == [f"{size:,}" for size in sizes] and sizes[1] < sizes[0] / 6


@pytest.mark.parametrize(("more", "names"), [
    ({}, {"trained", "moments"}),
    ({"kl": 0.1}, {"trained", "moments", "reference"}),
    ({"kl": 0.1, "lora_rank": 2}, {"trained", "moments", "frozen"}),  # of which the reference is a part
])  # fmt: skip
def test_the_reference_of_a_penalty_is_told_with_what_is_held(folder, data, tmp_path, monkeypatch, more, names):
    held, tables_of = fitting.held, []

    def told(*given):
        tables_of.append(tables.text(held(*given)))
        raise ZeroDivisionError

    monkeypatch.setattr(fitting, "held", told)
    options = {"model": str(folder), "data": data["question"], "out": str(tmp_path / "out"), "max_new_tokens": 4}
    with pytest.raises(ZeroDivisionError):
        grpo.run(grpo.GRPO(**options | BASE | more))
    table = {line.split()[0]: line.split()[1:] for line in tables_of[0].splitlines() if line}
    assert names == table.keys() & {"trained", "frozen", "moments", "averages", "reference"}
    assert table.get("reference", table["trained"]) == table["trained"]


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_what_was_read_is_not_held_beside_what_is_trained(folder, data, tmp_path, monkeypatch, lora_rank):
    options = sft.SFT(
        model=str(folder), data=data["completion"], out=str(tmp_path / "out"), lora_rank=lora_rank, **BASE
    )
    before, run, seen = jax.live_arrays(), fitting.Fit.run, []

    def looked_at(fit, *given, **more):
        size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
        old = {id(x) for x in before}
        seen.append(size([x for x in jax.live_arrays() if id(x) not in old]) - size(fit.state) - size(fit.frozen))
        run(fit, *given, **more)

    monkeypatch.setattr(fitting.Fit, "run", looked_at)
    sft.run(options)
    assert seen[0] < 2000  # a key, a schedule's number: the weights are of 27,000 bytes


# ---- packing


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """Questions of very different lengths."""
    file = tmp_path_factory.mktemp("data") / "ragged.jsonl"
    lines = [{"prompt": "what is " + "very " * (5 * (i % 4 == 0)), "completion": "x" * (1 + i % 3)} for i in range(16)]
    rows.write_jsonl(file, lines)
    return str(file)


@pytest.mark.parametrize("mean", ["token", "sequence"])
def test_packing_makes_fewer_rows_and_the_same_model(train, ragged, monkeypatch, mean):
    shapes, make = set(), recipe.make_packed_batch

    def recorded(*args, **kwargs):
        batch = make(*args, **kwargs)
        shapes.add(batch["tokens"].shape)
        return batch

    monkeypatch.setattr(recipe, "make_packed_batch", recorded)
    options = {"batch_size": 16, "mean": mean, "data": ragged}
    (apart, said), (packed, said_of_packed) = train(**options), train(packing=True, **options)
    assert {shape[0] for shape in shapes} == {8}  # one shape, so one trace
    assert furthest(packed, apart) < 2e-5 and said["num_tokens"] == said_of_packed["num_tokens"]
    np.testing.assert_allclose(said_of_packed["loss"], said["loss"], rtol=1e-4)
    assert 0.4 < said_of_packed["packing/filled"] <= 1 and "packing/filled" not in said


def test_packed_rows_are_dealt_to_devices_and_microbatches(train, ragged):
    """Sixteen rows, of which half or more are empty."""
    options = {"packing": True, "batch_size": 16, "data": ragged, "mean": "sequence"}
    assert furthest(train(**options)[0], train(**options, microbatches=2)[0]) < 2e-5


def test_prompts_that_are_shared_make_smaller_batches_and_the_same_model(folder, tmp_path, monkeypatch):
    prompt = "what is " + "very " * 12
    lines = [{"prompt": prompt[i:], "chosen": "y" * (1 + i % 3), "rejected": "n" * (1 + i % 2)} for i in range(11)]
    data = str(tmp_path / "pairs.jsonl")
    rows.write_jsonl(data, lines)
    sizes, said, place = [], [], fitting.Fit.place
    monkeypatch.setattr(fitting.Fit, "place", lambda fit, x: sizes.append(x) or place(fit, x))
    for shared in (False, True):
        given = {"model": str(folder), "data": data, "eval_data": data, "out": str(tmp_path / str(shared))} | BASE
        said.append(dpo.run(dpo.DPO(**given, share_prompts=shared)))
    assert furthest(*(models.load(tmp_path / str(shared))[0] for shared in (False, True))) < 2e-5
    for name, x in said[0].items():
        np.testing.assert_allclose(said[1][name], x, rtol=1e-3, atol=1e-4, err_msg=name)
    apart = next(x for x in sizes if "chosen" in x and "tokens" in x["chosen"])["chosen"]["tokens"]
    together = next(x for x in sizes if "chosen" in x and "tokens" not in x["chosen"])["tokens"]
    assert together.size < 0.7 * 2 * apart.size
