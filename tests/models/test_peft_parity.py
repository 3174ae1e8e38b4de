"""PEFT itself: its folders read here, ours read there, the same logits and gradients; every family, LoRA to DoRA."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from model_cases import CASES
from safetensors.numpy import load_file
from small_models import jit

from pt_jax.models import apply, load, lora, peft

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
theirs = pytest.importorskip("peft")
torch.set_num_threads(1)

FIRST = {family: next(case for case in CASES if CASES[case][0] == family) for family, _ in CASES.values()}
MORE = ["gemma2/no caps", "phi3/part of a head, window"]  # untied; several key heads in a fused matrix
KINDS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
VOCAB = 37

forward = jit(lambda config, *a: apply(config, *a)[0], static_argnums=0)
fold = jit(lora.fold, static_argnums=2)


def make(case):
    """A torch model of a case, with weights far from initial ones."""
    family, fields = CASES[case]
    config = transformers.AutoConfig.for_model(
        family, vocab_size=VOCAB, dtype="float32", bos_token_id=1, eos_token_id=None, pad_token_id=None,
        **copy.deepcopy(fields),
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.named_parameters():
            x.normal_(0, 0.2, generator=generator)
            x += x.ndim == 1 and not name.endswith("bias")
    return model


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """case -> (torch model, folder, params, config), read once."""

    @functools.cache
    def read(case):
        model, folder = make(case), tmp_path_factory.mktemp("base") / "model"
        model.save_pretrained(folder)
        return model, folder, *load(folder)

    return read


def batch():
    rng = np.random.default_rng(7)
    seen = np.arange(9) >= np.array([0, 5, 3])[:, None]
    return rng.integers(0, VOCAB, seen.shape).astype(np.int32), seen


def logits_of_torch(model):
    tokens, seen = batch()
    position = np.maximum(np.cumsum(seen, 1) - 1, 0)
    tokens, seen, position = (torch.from_numpy(x).long() for x in (tokens, seen, position))
    return model(tokens, attention_mask=seen, position_ids=position, use_cache=False).logits


def assert_same(model, config, params, before):
    """Logits of an adapted torch model and of our weights, which must be far from what they were before."""
    seen = batch()[1]
    with torch.no_grad():
        expected = logits_of_torch(model).numpy()[seen]
    got, was = (np.asarray(forward(config, p, *batch()))[seen] for p in (params, before))
    scale = np.abs(expected).max()
    assert np.abs(was - expected).max() > 0.05 * scale
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * scale)


def wrap(model, **options):
    """A copy of a torch model with PEFT's adapters, none of them at its start."""
    options = {"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM"} | options
    adapted = theirs.get_peft_model(copy.deepcopy(model), theirs.LoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, x in adapted.named_parameters():
            if "lora_magnitude" in name:
                x *= 1 + 0.3 * torch.rand(x.shape, generator=generator)
            elif "lora_" in name:
                x.normal_(0, 0.3, generator=generator)
    return adapted.eval()


def trained(params, how, seed=3):
    """Our adapters, none of them at its start."""
    rng = np.random.default_rng(seed)
    fresh = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, how))
    noise = lambda path, x: 0.3 * rng.normal(size=x.shape) + (path[-1].key == "m") * 1.5
    return jax.tree_util.tree_map_with_path(lambda *x: jnp.asarray(noise(*x), jnp.float32), fresh)


def read_by_peft(model, folder):
    adapted = theirs.PeftModel.from_pretrained(copy.deepcopy(model), folder)
    return adapted.eval()


def adapter(kind, **more):
    return lora.Adapter(**{"rank": 2, "alpha": 3.0, "rslora": kind == "rslora", "dora": kind == "dora"} | more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [*FIRST.values(), *MORE])
def test_what_we_save_peft_loads(opened, tmp_path, case, kind):
    model, base, params, config = opened(case)
    how = adapter(kind, targets=("w[qkvo]",) if config.experts else None)
    a = trained(params, how)
    peft.save(tmp_path / "ours", a, config, how, base=base)
    assert_same(read_by_peft(model, tmp_path / "ours"), config, fold(params, a, how), params)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", [*FIRST.values(), *MORE])
def test_what_peft_saves_we_load(opened, tmp_path, case, kind):
    model, _, params, config = opened(case)
    targets = ATTENTION if config.experts else "all-linear"
    adapted = wrap(model, target_modules=targets, **KINDS[kind])
    adapted.save_pretrained(tmp_path)
    a, how = peft.load(tmp_path, config)
    assert (how.rslora, how.dora, how.rank, how.alpha) == (kind == "rslora", kind == "dora", 3, 5.0)
    assert_same(adapted, config, fold(params, a, how), params)


@pytest.mark.parametrize("case", ["phi3/fused", "gpt2/plain", "qwen3/one kv head"])
def test_from_peft_and_back_is_the_same_bit_for_bit(opened, tmp_path, case):
    """Where three products share a matrix, too: one adapter does not become three."""
    model, base, _, config = opened(case)
    wrap(model, target_modules="all-linear", use_dora=True).save_pretrained(tmp_path / "theirs")
    a, how = peft.load(tmp_path / "theirs", config)
    peft.save(tmp_path / "ours", a, config, how, base=base)
    one, two = (load_file(tmp_path / who / peft.WEIGHTS) for who in ("theirs", "ours"))
    assert one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("case,targets", [
    ("phi3/fused", ("wq", "wv", "up")), ("phi3/fused", ("wk", "gate", "up")), ("gpt2/plain", ("wv", "down")),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_a_part_of_a_fused_matrix_is_adapted_exactly(opened, tmp_path, case, targets, kind):
    """With ranks and scales of their own as well."""
    model, base, params, config = opened(case)
    how = adapter(kind, targets=targets, overrides=((targets[-1], 4, 7.0),))
    a = trained(params, how)
    peft.save(tmp_path / "ours", a, config, how, base=base)
    assert_same(read_by_peft(model, tmp_path / "ours"), config, fold(params, a, how), params)
    again, how_again = peft.load(tmp_path / "ours", config)
    assert_same(read_by_peft(model, tmp_path / "ours"), config, fold(params, again, how_again), params)


def test_ranks_and_alphas_of_some_modules_arrive(opened, tmp_path):
    model, base, params, config = opened("qwen3/one kv head")
    options = {"target_modules": [*ATTENTION, "up_proj"], "use_rslora": True}
    options |= {"rank_pattern": {"q_proj": 2, r"mlp\.up_proj": 5}, "alpha_pattern": {"o_proj": 9}}
    adapted = wrap(model, **options)
    adapted.save_pretrained(tmp_path / "theirs")
    a, how = peft.load(tmp_path / "theirs", config)
    assert how.of("wq") == (2, 5.0) and how.of("wo") == (3, 9.0) and how.of("up") == (5, 5.0)
    assert how.of("wk") == (3, 5.0)
    assert_same(adapted, config, fold(params, a, how), params)
    peft.save(tmp_path / "ours", a, config, how, base=base)
    assert_same(read_by_peft(model, tmp_path / "ours"), config, fold(params, a, how), params)


@pytest.mark.parametrize("case", ["qwen3/one kv head", "qwen3/all kv heads, tied", "gpt2/gelu, untied"])
def test_embeddings_arrive(opened, tmp_path, case):
    """Untied, the two have adapters of their own; tied, one serves both, as PEFT's ensure_weight_tying has it."""
    model, base, params, config = opened(case)
    names = ["wte"] if config.family == "gpt2" else ["embed_tokens"]
    targets = ("embed",) if config.tied else ("embed", "unembed")
    options = {"ensure_weight_tying": True} if config.tied else {}
    adapted = wrap(model, target_modules=names + ([] if config.tied else ["lm_head"]), **options)
    adapted.save_pretrained(tmp_path / "theirs")
    a, how = peft.load(tmp_path / "theirs", config, params)
    assert how.targets == targets
    assert_same(adapted, config, fold(params, a, how), params)
    with pytest.raises(ValueError, match=r"holds base_model.model.*base_layer.weight; give params"):
        peft.load(tmp_path / "theirs", config)
    with pytest.raises(ValueError, match=r"base_layer.weight differs from the base's"):
        peft.load(tmp_path / "theirs", config, params | {"embed": params["embed"] + 1})
    peft.save(tmp_path / "ours", a, config, how, base=base)
    assert_same(read_by_peft(model, tmp_path / "ours"), config, fold(params, a, how), params)


def test_an_embedding_that_is_tied_and_adapted_on_one_side_is_refused(opened, tmp_path):
    model, _, params, config = opened("qwen3/all kv heads, tied")
    wrap(model, target_modules=["embed_tokens"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter_config.json: adapts the embedding, which the model ties"):
        peft.load(tmp_path, config, params)
    wrap(model, target_modules=["lm_head"]).save_pretrained(tmp_path / "head")
    with pytest.raises(ValueError, match=r"base_model.model.lm_head.* is of no product"):
        peft.load(tmp_path / "head", config, params)


@pytest.mark.parametrize("options,name", [
    ({"bias": "lora_only"}, "bias is 'lora_only'"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is "),
    ({"layers_to_transform": [0]}, "layers_to_transform is "),
    ({"lora_bias": True}, "lora_bias is True"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
    ({"layer_replication": [[0, 1], [0, 2]]}, "layer_replication is "),
])  # fmt: skip
def test_an_option_that_is_not_computed_is_refused_by_name(opened, tmp_path, options, name):
    model, _, _, config = opened("qwen3/biases, window")
    wrap(model, target_modules=["q_proj"], **options).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"adapter_config.json: {name}"):
        peft.load(tmp_path, config)


@functools.partial(jit, static_argnums=(0, 3))
def gradients(config, params, adapters, how):
    def loss(adapters):
        tokens, seen = batch()
        logits = apply(config, lora.attach(params, adapters, how), tokens, seen)[0]
        logps = jnp.take_along_axis(jax.nn.log_softmax(logits)[:, :-1], tokens[:, 1:, None], 2)[..., 0]
        return -jnp.where(seen[:, 1:] & seen[:, :-1], logps, 0).sum()

    return jax.grad(loss)(adapters)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(opened, tmp_path, kind):
    model, _, params, config = opened("qwen3/one kv head")
    adapted = wrap(model, target_modules="all-linear", **KINDS[kind])
    adapted.save_pretrained(tmp_path / "weights")
    logps = logits_of_torch(adapted).log_softmax(-1)[:, :-1]
    tokens, seen = map(torch.from_numpy, batch())
    logps = logps.gather(2, tokens[:, 1:, None].long())[..., 0]
    (-logps[seen[:, 1:] & seen[:, :-1]].sum()).backward()
    with torch.no_grad():  # they turn as the weights do
        for name, x in adapted.named_parameters():
            if "lora_" in name:
                x.copy_(x.grad)
    adapted.save_pretrained(tmp_path / "gradients")
    a, how = peft.load(tmp_path / "weights", config)
    expected, got = flatten_dict(peft.load(tmp_path / "gradients", config)[0]), gradients(config, params, a, how)
    assert expected.keys() == flatten_dict(got).keys() and len(expected) == 7 * (3 if kind == "dora" else 2)
    for path, x in flatten_dict(got).items():
        assert np.abs(expected[path]).max() > 1e-3, path
        np.testing.assert_allclose(x, expected[path], rtol=0, atol=1e-4 * np.abs(expected[path]).max())
