"""PEFT folders without PEFT: what is written is read back, and what is wrong is named."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from pt_jax.models import lora, parameters, peft
from pt_jax.models.config import Config

QWEN = Config(vocab=29, layers=3, width=20, heads=6, kv_heads=2, head_width=4, hidden=18, tied=False)
PHI = dataclasses.replace(QWEN, family="phi3", qk_norm=False)
GPT2 = dataclasses.replace(
    QWEN, family="gpt2", kv_heads=6, qk_norm=False, gated=False, norm="layer", learned_positions=True, qkv_bias=True,
    out_bias=True, mlp_bias=True,
)  # fmt: skip
MIXTRAL = dataclasses.replace(QWEN, family="mixtral", qk_norm=False, experts=4, expert_hidden=10)
HOW = lora.Adapter(rank=2, alpha=6.0)


def shapes(config):
    return jax.eval_shape(lambda: parameters.init(config, jax.random.key(0)))


def trained(config, how, seed=0):
    rng = np.random.default_rng(seed)
    fresh = jax.eval_shape(lambda: lora.init(jax.random.key(0), parameters.init(config, jax.random.key(0)), how))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), fresh)


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "adapter"
    peft.save(path, trained(QWEN, HOW), QWEN, HOW, base="somebody/model")
    return path


def changed(folder, **fields):
    """Other fields in the config of an adapter; None takes one out."""
    file = folder / peft.CONFIG
    given = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in given.items() if v is not None}))


def rewritten(folder, change):
    """Other tensors in its file."""
    file = folder / peft.WEIGHTS
    held = safetensors.numpy.load_file(file)
    change(held)
    safetensors.numpy.save_file(held, file)


KINDS = {
    "lora": HOW,
    "rslora": dataclasses.replace(HOW, rslora=True),
    "dora": dataclasses.replace(HOW, dora=True),
    "own ranks": dataclasses.replace(HOW, overrides=(("wo", 3, 1.5),)),
    "embeddings": dataclasses.replace(HOW, targets=("embed", "unembed", "wo")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_is_read_back_bit_for_bit(tmp_path, kind):
    how = KINDS[kind]
    a = trained(QWEN, how)
    peft.save(tmp_path / "a", a, QWEN, how, base="somebody/model")
    again, read = peft.load(tmp_path / "a", QWEN)
    assert flatten_dict(again).keys() == flatten_dict(a).keys()
    jax.tree.map(np.testing.assert_array_equal, again, a)
    assert read == dataclasses.replace(how, targets=read.targets)
    assert set(read.targets) == {path[-1] for path in lora.targeted(shapes(QWEN), how)}


@pytest.mark.parametrize("config", [PHI, GPT2], ids=["phi3", "gpt2"])
def test_fused_adapters_read_back_compute_the_same(tmp_path, config):
    params = parameters.init(config, jax.random.key(1))
    a = trained(config, HOW)
    peft.save(tmp_path / "a", a, config, HOW, base="somebody/model")
    again, how = peft.load(tmp_path / "a", config)
    assert how.of("wq") == (6, 18.0) and how.of("wo") == (2, 6.0)  # three ranks of two, on the same scale
    for x, y in zip(jax.tree.leaves(lora.fold(params, again, how)), jax.tree.leaves(lora.fold(params, a, HOW))):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)


def test_names_are_those_of_peft(folder):
    with safetensors.safe_open(folder / peft.WEIGHTS, "np") as f:
        assert f.get_slice("base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight").get_shape() == [2, 20]
        assert f.get_slice("base_model.model.model.layers.0.mlp.down_proj.lora_B.weight").get_shape() == [20, 2]
        assert len(f.keys()) == 3 * 7 * 2
    fields = json.loads((folder / peft.CONFIG).read_text())
    assert fields["target_modules"] == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert (fields["r"], fields["lora_alpha"], fields["base_model_name_or_path"]) == (2, 6, "somebody/model")


def test_a_name_that_two_modules_share_is_written_in_full(tmp_path):
    peft.save(tmp_path / "a", trained(GPT2, HOW), GPT2, HOW, base="gpt2")
    fields = json.loads((tmp_path / "a" / peft.CONFIG).read_text())
    assert fields["target_modules"] == ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"] and fields["fan_in_fan_out"]


def test_the_base_is_found_from_the_adapter(folder, tmp_path):
    assert peft.is_adapter(folder) and not peft.is_adapter(tmp_path)
    assert peft.base(folder) == "somebody/model"
    (tmp_path / "base").mkdir()
    changed(folder, base_model_name_or_path="../base")
    assert peft.base(folder) == str(tmp_path / "base")
    changed(folder, base_model_name_or_path=None)
    with pytest.raises(ValueError, match=r"adapter_config.json: lacks base_model_name_or_path"):
        peft.base(folder)


KEY = "base_model.model.model.layers.1.self_attn.k_proj.lora_B.weight"
BAD = {
    "no config": (lambda f: (f / peft.CONFIG).unlink(), "has no adapter_config.json, so it is no PEFT folder"),
    "no weights": (lambda f: (f / peft.WEIGHTS).unlink(), "has no adapter_model.safetensors; other formats"),
    "cut off": (lambda f: (f / peft.WEIGHTS).write_bytes((f / peft.WEIGHTS).read_bytes()[:-9]),
                r"adapter_model.safetensors: cannot be read \(base_model"),
    "not json": (lambda f: (f / peft.CONFIG).write_text("{"), "adapter_config.json: is not JSON"),
    "another method": (lambda f: changed(f, peft_type="IA3"), "adapter_config.json: peft_type is 'IA3'; only 'LORA'"),
    "bias": (lambda f: changed(f, bias="all"), "adapter_config.json: bias is 'all', which is not computed"),
    "of the future": (lambda f: changed(f, use_magic=True), "adapter_config.json: use_magic is True"),
    "no rank": (lambda f: changed(f, r=None), "adapter_config.json: r is None, expected a number above 0"),
    "another start": (lambda f: changed(f, init_lora_weights="olora"), "'olora', which changes the base as well"),
    "ranks of layers": (lambda f: changed(f, rank_pattern={"model.layers.1.self_attn.q_proj": 7}),
                        "adapter_config.json: rank_pattern or alpha_pattern gives q_proj another one in some layers"),
    "another rank": (lambda f: changed(f, r=4), r"lora_A.weight has shape \(2, \d+\); .* ask for \(4, \d+\)"),
    "half": (lambda f: rewritten(f, lambda x: x.pop(KEY)), f"adapter_model.safetensors: lacks {KEY}, though"),
    "of nothing": (lambda f: rewritten(f, lambda x: x.update({KEY.replace("k_proj", "kv_proj"): np.ones(2)})),
                   r"adapter_model.safetensors: \S+kv_proj.lora_B.weight is of no product of this qwen3"),
    "a layer too many": (lambda f: rewritten(f, lambda x: x.update({KEY.replace("s.1", "s.3"): x[KEY]})),
                         r"layers.3.self_attn.k_proj.lora_B.weight is of no product"),
    "other names": (lambda f: rewritten(f, lambda x: x.update({KEY.removeprefix("base_model."): x.pop(KEY)})),
                    r"model.model.layers.1.self_attn.k_proj.lora_B.weight does not begin with base_model.model."),
    "nothing": (lambda f: rewritten(f, lambda x: x.clear()), "adapter_model.safetensors: holds no adapter"),
    "a target without one": (lambda f: changed(f, target_modules=["k_proj", "v_proj", "lm_head"]),
                             r"lacks base_model.model.lm_head, which target_modules of adapter_config.json names"),
    "a pattern without one": (lambda f: changed(f, target_modules=r".*k_proj|lm_\w+"),
                              r"lacks \S+lm_head, which target_modules"),
    "no magnitudes": (lambda f: changed(f, use_dora=True), "lacks base_model.model.*lora_magnitude_vector"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_folder_that_is_wrong_is_one_sentence(folder, case):
    spoil, message = BAD[case]
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        peft.load(folder, QWEN)


@pytest.mark.parametrize("other,message", [
    ({"width": 24}, r"k?q_proj.lora_A.weight has shape \(2, 20\); the model .* \(2, 24\)"),
    ({"kv_heads": 3}, r"k_proj.lora_B.weight has shape \(8, 2\); the model .* \(12, 2\)"),
    ({"layers": 2}, r"layers.2.\S+ is of no product"),
    ({"layers": 4}, r"lacks \S+layers.3.\S+, though"),
    ({"family": "phi3", "qk_norm": False}, r"_proj.lora_\S+ is of no product of this phi3; is the adapter of another"),
])  # fmt: skip
def test_an_adapter_of_another_model_is_refused(folder, other, message):
    with pytest.raises(ValueError, match=rf"adapter_model.safetensors: .*{message}"):
        peft.load(folder, dataclasses.replace(QWEN, **other))


@pytest.mark.parametrize("config,how,message", [
    (MIXTRAL, lora.Adapter(targets=("wq", "expert_up")), "target 'expert_up': PEFT has no settled form .* fold"),
    (MIXTRAL, lora.Adapter(targets=("router",)), "target 'router': PEFT has no settled form"),
    (dataclasses.replace(MIXTRAL, family="ernie4_5_moe", shared_hidden=6),
     lora.Adapter(targets=("w[qkvo]", "shared_*")),
     r"target 'shared_\w+': in a model with experts, PEFT takes .* \((w[qkvo](, )?){4}\), or fold"),
    (PHI, lora.Adapter(targets=("wq", "wv"), dora=True), "target 'wk' is missing: phi3 keeps wq, wk, wv in one matrix"),
    (dataclasses.replace(GPT2, tied=True), lora.Adapter(targets=("embed",)), "only one side of GPT-2's tied"),
    (dataclasses.replace(QWEN, head="score"), lora.Adapter(), "scores texts has no PEFT folder"),
])  # fmt: skip
def test_what_peft_could_not_read_is_not_written(tmp_path, config, how, message):
    with pytest.raises(ValueError, match=message):
        peft.save(tmp_path / "a", trained(config, how), config, how, base="somebody/model")
    assert not [*tmp_path.iterdir()]


def test_adapters_of_another_record_are_not_written(tmp_path):
    with pytest.raises(
        ValueError, match=r"adapters\['layers/\w+/a'\] is \(3, .*2\); the model and the adapter ask for"
    ):
        peft.save(tmp_path / "a", trained(QWEN, HOW), QWEN, lora.Adapter(rank=5), base="x")
    assert not [*tmp_path.iterdir()]


def test_a_folder_is_replaced_only_when_asked_and_only_by_a_whole_one(folder, monkeypatch):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    other = trained(QWEN, HOW, seed=5)
    with pytest.raises(ValueError, match="exists and is not empty"):
        peft.save(folder, other, QWEN, HOW, base="x")

    class Tokenizer:
        def get_vocab(self):
            return {"a": 0}

        def save_pretrained(self, path):
            raise OSError("no tokenizer")

    with pytest.raises(OSError, match="no tokenizer"):
        peft.save(folder, other, QWEN, HOW, base="x", tokenizer=Tokenizer(), overwrite=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    peft.save(folder, other, QWEN, HOW, base="x", overwrite=True)
    assert (folder / peft.WEIGHTS).read_bytes() != before[peft.WEIGHTS]
    shutil.rmtree(folder)
