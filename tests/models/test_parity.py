"""The same numbers as transformers and torch: logits, gradients and greedy texts, folders in both directions.

Weights are far from initial ones, norms too: with norms of 1 and deviations of 0.02, leaving out the norm of the
queries moves the logits by 1e-7. Sizes are odd, and eps and theta are not the defaults, for the same reason.

Run as a program, this file records ``reference/decoder.json``, which tests the same without torch.
"""

import copy
import dataclasses
import functools
import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import CASES
from model_folders import derived
from safetensors.numpy import load_file, save_file
from small_models import jit

from pt_jax import models
from pt_jax.models import apply, bind, load, routing, save, vocabulary
from pt_jax.sampling import Sampling, sample

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # on a busy machine, two threads that wait for each other take a hundred times as long

REFERENCE = pathlib.Path(__file__).parents[1] / "reference" / "decoder.json"
FIRST = {family: next(case for case in CASES if CASES[case][0] == family) for family, _ in CASES.values()}
# for what takes long to compile: one case of each family
ONE_EACH = pytest.mark.parametrize("both", FIRST.values(), indirect=True)
# written out: soft-caps need it, and so do experts whose rows are not of a multiple of 16 bytes
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
VOCAB, LENGTHS = 37, (17, 9, 1, 12)


def make(case, seed=0):
    """A torch model of a case (its name, or itself), without a pad token, whose gradient torch would cut off."""
    family, fields = CASES[case] if isinstance(case, str) else case
    config = transformers.AutoConfig.for_model(
        family, vocab_size=VOCAB, dtype="float32", bos_token_id=1, eos_token_id=None, pad_token_id=None,
        **copy.deepcopy(fields),
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    with tempfile.TemporaryDirectory() as folder:
        shapes = {name: x.shape for name, x in in_the_file(model, folder).items()}
        save_file(derived(shapes, seed), f"{folder}/model.safetensors", {"format": "pt"})
        return type(model).from_pretrained(folder, **EAGER).eval()


def in_the_file(model, folder=None):
    """The tensors that transformers writes: those of experts have other names and shapes than in memory."""
    with tempfile.TemporaryDirectory() as other:
        model.save_pretrained(folder or other)
        return load_file(f"{folder or other}/model.safetensors")


def batch(left, lengths=LENGTHS, vocab=VOCAB, seed=7):
    """tokens, seen; rubbish where nothing is seen."""
    rng = np.random.default_rng(seed)
    column = np.arange(max(lengths))
    seen = column < np.array(lengths)[:, None]
    return rng.integers(0, vocab, seen.shape).astype(np.int32), seen[:, ::-1] if left else seen


def of_torch(model, tokens, seen, **kwargs):
    position = np.maximum(np.cumsum(seen, 1) - 1, 0)
    tokens, seen, position = (torch.from_numpy(np.ascontiguousarray(x)).long() for x in (tokens, seen, position))
    return model(tokens, attention_mask=seen, position_ids=position, use_cache=False, **kwargs).logits


def logits_of_torch(model, tokens, seen):
    with torch.no_grad():
        return of_torch(model, tokens, seen).float().numpy()


forward = jit(lambda config, *a: apply(config, *a)[0], static_argnums=0)
routed = jit(lambda config, *a: models.forward(config, *a).routing.logits, static_argnums=0)


def nll(config, params, tokens, seen):
    """Summed over the tokens that are seen and have a seen one before them."""
    logps = jax.nn.log_softmax(apply(config, params, tokens, seen)[0][:, :-1])
    logps = jnp.take_along_axis(logps, tokens[:, 1:, None], 2)[..., 0]
    return -jnp.where(seen[:, 1:] & seen[:, :-1], logps, 0).sum()


gradient = jit(jax.value_and_grad(nll, 1), static_argnums=0)


def saved_and_read(model, folder):
    model.save_pretrained(folder)
    return model, *load(folder)


@pytest.fixture(scope="module", params=CASES)
def both(request, tmp_path_factory):
    """A torch model, and what we read from the folder that it saved."""
    return saved_and_read(make(request.param), tmp_path_factory.mktemp("torch") / "model")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return saved_and_read(make("qwen3/one kv head"), tmp_path_factory.mktemp("torch") / "model")


def close(got, expected, share):
    expected = np.asarray(expected)
    np.testing.assert_allclose(got, expected, rtol=0, atol=share * np.abs(expected).max())


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_logits(both, left):
    model, params, config = both
    tokens, seen = batch(left)
    expected = logits_of_torch(model, tokens, seen)
    assert np.abs(expected[seen]).max() > 1  # and no tolerance is generous
    close(np.asarray(forward(config, params, tokens, seen))[seen], expected[seen], 2e-5)


def test_what_we_save_transformers_loads(both, tmp_path):
    _, params, config = both
    params = jax.tree.map(lambda x: x * 1.01, params)
    save(tmp_path / "ours", params, config)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True, **EAGER
    )
    assert not any(report.values()), report
    assert model.dtype == torch.float32
    for left in (True, False):
        tokens, seen = batch(left)
        got = forward(config, params, tokens, seen)
        np.testing.assert_allclose(logits_of_torch(model, tokens, seen)[seen], got[seen], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", [case for case in CASES if "experts" in str(CASES[case][1])])
def test_no_choice_of_experts_hangs_on_rounding(case, tmp_path):
    """Of the tests here: where two experts are equally good, either choice is right, and the logits far apart."""
    _, params, config = saved_and_read(make(case), tmp_path / "model")
    for left in (True, False):
        tokens, seen = batch(left)
        logits = np.asarray(routed(config, params, tokens, seen))[:, seen]
        prefer = np.asarray(jax.nn.softmax(logits))
        if config.router_bias:
            prefer = prefer + np.asarray(params["layers"]["router_bias"])[:, None]
        prefer = -np.sort(-prefer, -1)
        k = config.experts_per_token
        assert k == config.experts or (prefer[..., k - 1] - prefer[..., k]).min() > 1e-4


@pytest.mark.parametrize("case", [case for case in FIRST.values() if "experts" in str(CASES[case][1])])
@pytest.mark.parametrize("masked", [True, False])
def test_the_loss_of_unbalanced_routers(case, masked, tmp_path):
    model, params, config = saved_and_read(make(case), tmp_path / "model")
    tokens, seen = batch(left=False) if masked else batch(left=False, lengths=(9, 9, 9))
    with torch.no_grad():
        given, mask = (torch.from_numpy(x).long() for x in (tokens, seen))
        expected = model(given, attention_mask=mask, output_router_logits=True).aux_loss.item()
        if not masked:
            assert model(given, output_router_logits=True).aux_loss.item() == pytest.approx(expected, rel=1e-6)
    logits = routed(config, params, tokens, seen)
    got = routing.load_balancing(logits, seen, per_token=config.experts_per_token)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@ONE_EACH
def test_gradients(both, tmp_path):
    model, params, config = both
    tokens, seen = batch(left=True)
    model.zero_grad()
    expected = of_torch(model, tokens, seen)[:, :-1].log_softmax(-1)
    expected = -expected.gather(2, torch.from_numpy(tokens[:, 1:, None]).long())[..., 0]
    expected = expected[torch.from_numpy(seen[:, 1:] & seen[:, :-1])].sum()
    expected.backward()
    zeros = torch.zeros_like  # of the bias that only chooses experts
    of_names = {name: zeros(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    model.save_pretrained(tmp_path / "gradient", state_dict=of_names)  # they turn as the weights do
    of_torch_in_our_shape, _ = load(tmp_path / "gradient")
    loss, got = gradient(config, params, tokens, seen)
    close(loss, expected.item(), 1e-5)
    for path, g in jax.tree_util.tree_leaves_with_path(of_torch_in_our_shape):
        mine = functools.reduce(lambda tree, k: tree[k.key], path, got)
        if config.learned_positions and path[-1].key == "wk_bias":
            # the same number is added to all scores of a query, unless keys are rotated: softmax does not see it
            np.testing.assert_allclose(mine, g, rtol=0, atol=1e-5)
            continue
        assert path[-1].key == "router_bias" or np.abs(g).max() > 1e-3, path
        close(mine, g, 1e-4)


def test_greedy_texts(both):
    """Forty tokens through the cache, from ragged prompts; and where a row ends, the others go on.

    The longest prompt is longer than every ``original_max_position_embeddings``: where longrope turns from its short
    list to its long one, transformers reads a cache with other frequencies than it was written with.
    """
    model, params, config = both
    prompts, seen = batch(left=True, lengths=(12, 3, 1, 9))
    tokens, mask = (torch.from_numpy(np.ascontiguousarray(x)).long() for x in (prompts, seen))
    greedy = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 0}
    bound = bind(config)

    @jit
    def ours(params, end):
        return sample(
            params, prompts, seen, jax.random.key(0), apply=bound.apply, init_cache=bound.init_cache, length=40,
            end_tokens=[end], pad_token=0, how=Sampling(temperature=0.0),
        ).tokens  # fmt: skip

    with torch.no_grad():
        expected = model.generate(tokens, attention_mask=mask, **greedy)[:, 12:].numpy()
        assert expected.shape == (4, 40) and len(np.unique(expected)) > 4
        np.testing.assert_array_equal(ours(params, -1), expected)
        end = int(expected[0, 20])
        ended = model.generate(tokens, attention_mask=mask, eos_token_id=end, **greedy)[:, 12:].numpy()
    got = np.asarray(ours(params, end))
    np.testing.assert_array_equal(got[:, : ended.shape[1]], ended)
    assert (got[:, ended.shape[1] :] == 0).all()


@pytest.mark.parametrize("original", [10, 17, 30])
def test_dynamic_positions_are_of_the_longest_text_that_there_is_room_for(original, tmp_path):
    """Not among the cases: while it generates, transformers reads a cache with other frequencies than it wrote."""
    family, fields = CASES["llama/linear, gelu"]
    rope = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1e3}
    model = make((family, fields | {"rope_parameters": rope, "max_position_embeddings": original}))
    _, params, config = saved_and_read(model, tmp_path / "model")
    save(tmp_path / "ours", params, config)
    assert load(tmp_path / "ours")[1] == config
    plain = dataclasses.replace(config, rope_scaling=None)
    for left in (True, False):
        tokens, seen = batch(left)
        got = np.asarray(forward(config, params, tokens, seen))[seen]
        close(got, logits_of_torch(model, tokens, seen)[seen], 2e-5)
        changed = np.abs(got - np.asarray(forward(plain, params, tokens, seen))[seen]).max()
        assert changed > 0.1 if original < 17 else changed == 0


def test_shards(one, tmp_path):
    model, params, _ = one
    model.save_pretrained(tmp_path / "shards", max_shard_size="3KB")
    assert len([*(tmp_path / "shards").glob("*.safetensors")]) > 3
    for a, b in zip(jax.tree.leaves(load(tmp_path / "shards")[0]), jax.tree.leaves(params)):
        np.testing.assert_array_equal(a, b)


def test_a_bfloat16_checkpoint_is_float32_here(one, tmp_path):
    _, _, config = one
    make("qwen3/one kv head", seed=1).bfloat16().save_pretrained(tmp_path / "coarse")
    params, _ = load(tmp_path / "coarse")
    # read anew: .bfloat16() rounds the frequencies of the positions as well, and .float() does not bring them back
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "coarse", dtype=torch.float32)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    tokens, seen = batch(left=False)
    close(forward(config, params, tokens, seen)[seen], logits_of_torch(model, tokens, seen)[seen], 2e-5)


def test_what_we_save_in_bfloat16_transformers_loads_in_bfloat16(one, tmp_path):
    _, params, config = one
    save(tmp_path / "ours", jax.tree.map(lambda x: x.astype(jnp.bfloat16), params), config)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert model.dtype == torch.bfloat16
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    coarse, _ = load(tmp_path / "ours")
    tokens, seen = batch(left=False)
    close(forward(config, coarse, tokens, seen)[seen], logits_of_torch(model, tokens, seen)[seen], 2e-5)


def test_special_tokens_arrive(one, tmp_path):
    _, params, config = one
    config = dataclasses.replace(config, bos_token=3, end_tokens=(5, 9), pad_token=5)
    save(tmp_path / "ours", params, config)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    for c in (model.config, model.generation_config):
        assert (c.bos_token_id, c.eos_token_id, c.pad_token_id) == (3, [5, 9], 5)


@pytest.mark.parametrize("case", ["qwen3/one kv head", "qwen3/all kv heads, tied"])
def test_what_was_resized_is_saved_and_transformers_computes_it(case, tmp_path):
    _, params, config = saved_and_read(make(case), tmp_path / "model")
    params, grown = vocabulary.resize(params, config, VOCAB + 1, jax.random.key(0), multiple_of=16)
    save(tmp_path / "grown", params, grown)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "grown", **EAGER)
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == 48
    tokens, seen = batch(left=False)
    close(forward(grown, params, tokens, seen)[seen], logits_of_torch(model, tokens, seen)[seen], 2e-5)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "grown")[0], params)


# ---- the record for tests without torch

RECORDED = FIRST


def of_record(case, seed=11):
    """What the record holds of a case; its batch has padding on both sides."""
    model = make(case, seed)
    tokens, seen = batch(left=False, lengths=(7, 4, 1), seed=seed)
    seen = np.stack([np.roll(row, i) for i, row in enumerate(seen)])
    logits = logits_of_torch(model, tokens, seen)
    return {
        "config": json.loads(model.config.to_json_string(use_diff=True)),
        "seed": seed,
        "shapes": {name: [*x.shape] for name, x in in_the_file(model).items()},
        "tokens": tokens.tolist(),
        "seen": seen.astype(int).tolist(),
        "logits": [[[float(f"{x:.7g}") for x in row] for row in text] for text in logits],
    }


@pytest.mark.parametrize("family", RECORDED)
def test_the_record_is_what_torch_computes(family):
    recorded, live = json.loads(REFERENCE.read_text())[family], of_record(RECORDED[family])
    seen = np.array(recorded["seen"], bool)
    close(np.array(live.pop("logits"))[seen], np.array(recorded.pop("logits"))[seen], 1e-5)
    for record in (recorded, live):
        record.pop("config")  # grows fields with every version of transformers
    assert recorded == live


if __name__ == "__main__":
    REFERENCE.write_text(json.dumps({family: of_record(case) for family, case in RECORDED.items()}) + "\n")
