"""Folders of mixtures of experts, without torch: names and fields as published, and what is refused by name."""

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pt_jax.models import Config, load, parameters, save
from pt_jax.models.huggingface import read_config

REFERENCE = json.loads((pathlib.Path(__file__).parents[1] / "reference" / "decoder.json").read_text())
FAMILIES = ("mixtral", "qwen3_moe", "ernie4_5_moe")
GATES = {"mixtral": "block_sparse_moe.gate.weight", "qwen3_moe": "mlp.gate.weight", "ernie4_5_moe": "mlp.gate.weight"}


def folder(tmp_path, family, fields=None, without=(), tensors=None, dtype=np.float32):
    """A folder as transformers writes it, of small random weights; ``fields`` changed, some left out."""
    rng, case = np.random.default_rng(0), REFERENCE[family]
    made = {name: rng.normal(size=shape).astype(dtype) for name, shape in case["shapes"].items()}
    made = {name: x for name, x in (made | (tensors or {})).items() if x is not None}
    given = {name: x for name, x in (case["config"] | (fields or {})).items() if name not in without}
    (tmp_path / "model").mkdir(exist_ok=True)
    (tmp_path / "model" / "config.json").write_text(json.dumps(given))
    save_file(made, tmp_path / "model" / "model.safetensors")
    return tmp_path / "model", made


def refused(path, *words):
    with pytest.raises(ValueError) as e:
        load(path)
    for word in words:
        assert word in str(e.value), str(e.value)
    assert "\n" not in str(e.value) and str(path) in str(e.value)


# ---- tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_is_where_it_belongs(tmp_path, family):
    path, made = folder(tmp_path, family)
    params, config = load(path)
    names = {"mixtral": ("w1", "w3", "w2")}.get(family, ("gate_proj", "up_proj", "down_proj"))
    module = {"mixtral": "block_sparse_moe"}.get(family, "mlp")
    numbers = [i for i, has in enumerate(config.has_experts) if has]
    assert len(numbers) > 1 and params["layers"]["expert_up"].shape[:2] == (len(numbers), config.experts)
    for m, i in enumerate(numbers):
        np.testing.assert_array_equal(params["layers"]["router"][m], made[f"model.layers.{i}.{GATES[family]}"].T)
        for e in range(config.experts):
            for leaf, name in zip(("expert_gate", "expert_up", "expert_down"), names):
                expected = made[f"model.layers.{i}.{module}.experts.{e}.{name}.weight"].T
                np.testing.assert_array_equal(params["layers"][leaf][m, e], expected)
    dense = [i for i, has in enumerate(config.has_experts) if not has]
    for m, i in enumerate(dense):
        np.testing.assert_array_equal(params["layers"]["up"][m], made[f"model.layers.{i}.mlp.up_proj.weight"].T)
    assert ("up" in params["layers"]) == bool(dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_router_stays_float32_in_memory_and_on_disk(tmp_path, family):
    path, _ = folder(tmp_path, family, dtype=ml_dtypes.bfloat16)
    params, config = load(path, dtype=jnp.bfloat16)
    for name, x in params["layers"].items():
        assert x.dtype == (jnp.float32 if name in ("router", "router_bias") else jnp.bfloat16), name
    assert jax.tree.map(jnp.result_type, params) == jax.tree.map(
        lambda x: x.dtype, jax.eval_shape(lambda: parameters.init(config, jax.random.key(0), jnp.bfloat16))
    )
    save(tmp_path / "ours", params, config)
    written = load_file(tmp_path / "ours" / "model.safetensors")
    for name, x in written.items():
        wide = name.endswith((GATES[family], "e_score_correction_bias"))
        assert x.dtype == (np.float32 if wide else ml_dtypes.bfloat16), name
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_has_the_names_shapes_and_numbers_of_what_was_read(tmp_path, family):
    path, made = folder(tmp_path, family)
    params, config = load(path)
    save(tmp_path / "ours", params, config)
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == made.keys()
    for name, x in made.items():
        np.testing.assert_array_equal(written[name], x, err_msg=name)
    assert load(tmp_path / "ours")[1] == config


def test_heads_that_guess_ahead_are_passed_over(tmp_path):
    """As transformers does, for ERNIE alone."""
    more = {"model.mtp_block.0.input_layernorm.weight": np.ones(24, np.float32)}
    load(folder(tmp_path, "ernie4_5_moe", tensors=more)[0])
    refused(folder(tmp_path, "mixtral", tensors=more)[0], "unexpected tensor model.mtp_block.0")


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("mixtral", "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
        ("qwen3_moe", "model.layers.1.mlp.experts.5.gate_proj.weight"),
        ("ernie4_5_moe", "model.layers.2.mlp.moe_statics.e_score_correction_bias"),
        ("ernie4_5_moe", "model.layers.1.mlp.shared_experts.up_proj.weight"),
    ],
)
def test_a_missing_turned_or_surplus_tensor_is_named(tmp_path, family, name):
    shape = REFERENCE[family]["shapes"][name]
    refused(folder(tmp_path, family, tensors={name: None})[0], "lack", name)
    turned = np.zeros(shape[::-1], np.float32)
    refused(folder(tmp_path, family, tensors={name: turned})[0], name, "asks for")
    if ".experts." in name:
        more = name.replace(".experts.", ".experts.1")  # one of ten and more
        refused(folder(tmp_path, family, tensors={more: np.zeros(shape, np.float32)})[0], "unexpected tensor", more)


# ---- fields


def test_the_files_of_the_hub_say_num_experts(tmp_path):
    without = ("num_local_experts",)
    old = read_config(folder(tmp_path, "qwen3_moe", {"num_experts": 6}, without)[0])
    assert old == read_config(folder(tmp_path, "qwen3_moe", {"num_local_experts": 6})[0])
    assert old.experts == 6
    both = folder(tmp_path, "qwen3_moe", {"num_local_experts": 6, "num_experts": 4})[0]
    refused(both, "num_experts is 4; only 6 is computed")
    refused(
        folder(tmp_path, "qwen3_moe", without=("num_local_experts", "num_experts"))[0], "lacks the field num_experts"
    )


@pytest.mark.parametrize(
    ("fields", "has"),
    [
        ({"decoder_sparse_step": 1}, [1, 1, 1, 1]),
        ({"decoder_sparse_step": 3}, [0, 0, 1, 0]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [0, 1, 0, 0]),
        ({"mlp_only_layers": None, "decoder_sparse_step": None}, [1, 1, 1, 1]),
    ],
    ids=str,
)
def test_which_layers_of_qwen_have_experts(tmp_path, fields, has):
    config = read_config(folder(tmp_path, "qwen3_moe", fields)[0])
    assert [*map(int, config.has_experts)] == has


@pytest.mark.parametrize(
    ("fields", "has"),
    [
        ({}, [0, 1, 1]),
        ({"moe_layer_start_index": 0}, [1, 1, 1]),
        ({"moe_layer_start_index": 0, "moe_layer_end_index": 1}, [1, 1, 0]),
        ({"moe_layer_start_index": 0, "moe_layer_interval": 2}, [0, 1, 0]),
        ({"moe_layer_start_index": 2, "moe_layer_interval": 3, "moe_layer_end_index": -1}, [0, 0, 1]),
    ],
    ids=str,
)
def test_which_layers_of_ernie_have_experts(tmp_path, fields, has):
    config = read_config(folder(tmp_path, "ernie4_5_moe", fields)[0])
    assert [*map(int, config.has_experts)] == has


def test_no_layer_with_experts_is_a_model_without(tmp_path):
    assert read_config(folder(tmp_path, "qwen3_moe", {"decoder_sparse_step": 9})[0]).experts == 0
    assert read_config(folder(tmp_path, "ernie4_5_moe", {"moe_layer_start_index": 9})[0]).experts == 0


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("mixtral", {"router_jitter_noise": 0.1}, ["router_jitter_noise is 0.1; only 0 is computed"]),
        ("ernie4_5_moe", {"use_bias": True}, ["use_bias is True; only False is computed"]),
        ("mixtral", {"num_experts_per_tok": 9}, ["experts_per_token=9 must be from 1 to experts=4"]),
        ("ernie4_5_moe", {"moe_layer_start_index": [1, 1]}, ["config.json: has a field of another form"]),
        ("qwen3_moe", {"hidden_act": "relu"}, ["hidden_act is 'relu'"]),
    ],
)
def test_arithmetic_that_is_not_computed(tmp_path, family, fields, words):
    refused(folder(tmp_path, family, fields)[0], *words)


SMALL = Config(
    vocab=13, layers=4, width=8, heads=2, kv_heads=1, head_width=4, hidden=6, experts=3, experts_per_token=2,
    expert_hidden=5, qk_norm=False, eps=1e-5,
)  # fmt: skip


def test_a_config_of_ones_own_is_of_the_family_that_computes_it(tmp_path):
    assert SMALL.family == "mixtral"
    params = parameters.init(SMALL, jax.random.key(0))
    save(tmp_path / "ours", params, SMALL)  # whose hidden is of no network
    for a, b in zip(jax.tree.leaves(load(tmp_path / "ours")[0]), jax.tree.leaves(params)):
        np.testing.assert_array_equal(a, b)
    assert Config(**{**SMALL.__dict__, "family": "", "qk_norm": True}).family == "qwen3_moe"


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("ernie4_5_moe", {"expert_layers": (True, True, False, True)}, "expert_layers: .* no constant interval"),
        ("ernie4_5_moe", {"shared_hidden": 7}, "shared_hidden=7 must be a multiple of expert_hidden=5"),
        ("mixtral", {"expert_layers": (True, True, False, True)}, "expert_layers is .*mixtral"),
        ("mixtral", {"norm_experts": False}, "norm_experts is False.*mixtral"),
        ("mixtral", {"qkv_bias": True}, "qkv_bias is True.*mixtral"),
        ("llama", {}, "experts is 3.*llama"),
    ],
)
def test_what_a_family_cannot_say_is_not_written(tmp_path, family, change, words):
    """Else transformers would read the same weights and compute something else."""
    config = Config(**{**SMALL.__dict__, "family": family} | change)
    if family == "ernie4_5_moe":
        config = Config(**{**config.__dict__, "router_bias": True, "rope_interleaved": True})
    params = jax.tree.map(
        lambda x: jnp.zeros(x.shape), jax.eval_shape(lambda: parameters.init(config, jax.random.key(0)))
    )
    with pytest.raises(ValueError, match=words):
        save(tmp_path / "ours", params, config)
    assert not (tmp_path / "ours").exists()
