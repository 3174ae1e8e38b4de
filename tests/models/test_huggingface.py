"""Model folders: what transformers wrote is computed as torch computes it.

No torch here: the folders are written file by file, and the expected logits of ``reference/decoder.json`` were
recorded from transformers (``test_parity.py`` does that, and compares with live torch much more widely).
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from model_folders import LINEAR, MESHED, OURS, SMALL, contents, derived, refused, same, tensors_of, write

from pt_jax.models import apply, init, load, placing, save
from pt_jax.models.huggingface import read_config
from pt_jax.training import sharding

REFERENCE = json.loads((pathlib.Path(__file__).parents[1] / "reference" / "decoder.json").read_text())


@pytest.mark.parametrize("family", REFERENCE)
def test_the_logits_are_those_that_torch_computed(folder, family):
    case = REFERENCE[family]
    shapes = {name: tuple(shape) for name, shape in case["shapes"].items()}
    params, config = load(write(folder, case["config"], derived(shapes, case["seed"])))
    seen, expected = np.array(case["seen"], bool), np.array(case["logits"])
    logits, _ = jax.jit(apply, static_argnums=0)(config, params, np.array(case["tokens"], np.int32), seen)
    np.testing.assert_allclose(logits[seen], expected[seen], rtol=0, atol=2e-5 * np.abs(expected).max())


def test_every_number_of_the_config_is_read(folder):
    assert load(write(folder))[1] == OURS


@pytest.mark.parametrize(
    ("field", "value", "change"),
    [
        ("rms_norm_eps", 1e-5, {"eps": 1e-5}),
        ("max_position_embeddings", 4096, {"max_length": 4096}),
        ("eos_token_id", [2, 5], {"end_tokens": (2, 5)}),
        ("eos_token_id", None, {"end_tokens": ()}),
        ("eos_token_id", 0, {"end_tokens": (0,)}),
        ("bos_token_id", None, {"bos_token": None}),
        ("pad_token_id", None, {"pad_token": None}),
        ("pad_token_id", 2, {"pad_token": 2}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e6}, {"rope_base": 1e6}),
        ("rope_scaling", None, {}),
        ("layer_types", ["full_attention", "full_attention"], {}),
        ("sliding_window", 4096, {}),  # Qwen3 files name one, and do not use it
        ("use_sliding_window", False, {}),
    ],
)
def test_fields_that_are_understood(folder, field, value, change):
    assert load(write(folder, SMALL | {field: value}))[1] == dataclasses.replace(OURS, **change)


def test_files_of_transformers_4_are_read(folder):
    fields = {n: x for n, x in SMALL.items() if n != "rope_parameters"}
    fields |= {"rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "bfloat16"}
    assert load(write(folder, fields))[1] == OURS


@pytest.mark.parametrize("rope", [None, {"type": "linear", "factor": 3.0}, {"rope_type": "yarn", "factor": 4.0}])
def test_fields_of_transformers_4_are_those_of_5(folder, rope):
    """Most checkpoints in the world were written by 4: rope_theta beside rope_scaling."""
    fields = {n: x for n, x in SMALL.items() if n not in ("rope_parameters", "rope_theta")}
    old = read_config(write(folder, fields | {"rope_theta": 3e4, "rope_scaling": rope}))
    new = {"rope_type": "default"} | (rope or {})
    new = {"rope_type": new.pop("type", new["rope_type"]), **{n: x for n, x in new.items() if n != "rope_type"}}
    (folder / "config.json").write_text(json.dumps(fields | {"rope_parameters": new | {"rope_theta": 3e4}}))
    assert read_config(folder) == old
    assert old.rope_base == 3e4 and (old.rope_scaling is None) == (rope is None)


def test_a_scaling_that_was_added_to_a_new_file_is_computed(folder):
    """As the cards of models ask for; transformers takes it before rope_parameters."""
    plain = {"rope_type": "default", "rope_theta": 3e4}
    for added in (LINEAR | {"rope_theta": 3e4}, LINEAR):
        fields = SMALL | {"rope_parameters": plain, "rope_theta": 3e4, "rope_scaling": added}
        config = read_config(write(folder, fields))
        assert config.rope_scaling.kind == "linear" and config.rope_base == 3e4


PHI3 = SMALL | {"model_type": "phi3", "head_dim": 8, "max_position_embeddings": 64}
LONGROPE = {"type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize("old", ["su", "yarn"])
def test_old_names_of_the_scaling_of_phi3(folder, old):
    config = read_config(write(folder, PHI3 | {"rope_scaling": LONGROPE | {"type": old}}, {}))
    assert config.rope_scaling.kind == "longrope" and config.rope_scaling.long == (2.0,) * 4


@pytest.mark.parametrize(("beside", "within", "taken"), [(16, 8, 16), (16, None, 16), (None, 8, 8), (None, None, 64)])
def test_which_length_of_before_counts(folder, beside, within, taken):
    """As transformers has it."""
    name = "original_max_position_embeddings"
    rope = LONGROPE | {"type": "longrope", name: within}
    fields = SMALL | {"max_position_embeddings": 64, "head_dim": 8, "rope_parameters": None, "rope_scaling": rope}
    assert read_config(write(folder, fields | {name: beside}, {})).rope_scaling.original == taken


def test_a_llama_without_head_dim_and_kv_heads_has_those_of_its_width(folder):
    fields = SMALL | {"model_type": "llama", "hidden_size": 12, "num_key_value_heads": 3}
    tensors = tensors_of(fields)
    for name in ("head_dim", "num_key_value_heads", "tie_word_embeddings", "rope_parameters", "rms_norm_eps"):
        fields.pop(name)
    params, config = load(write(folder, fields, tensors))
    assert (config.head_width, config.kv_heads, config.qk_norm, config.tied) == (4, 3, False, False)
    assert (config.rope_base, config.eps) == (10_000.0, 1e-6)
    assert "q_norm" not in params["layers"] and "unembed" in params


def test_a_chat_model_ends_where_its_generation_config_says(folder):
    """The config names <|endoftext|> alone; who samples by it never sees the end of a turn."""
    assert load(write(folder, generation_config={"eos_token_id": [7, 2]}))[1].end_tokens == (7, 2)
    assert load(write(folder, generation_config={"temperature": 0.6}))[1].end_tokens == (2,)


@pytest.mark.parametrize(
    "config",
    [
        MESHED,
        dataclasses.replace(MESHED, family="phi3", qk_norm=False),  # several leaves from one tensor
        dataclasses.replace(
            MESHED, family="qwen3_moe", experts=4, expert_hidden=8, layers=3, expert_layers=(True, False, True)
        ),
    ],
    ids=lambda config: config.family,
)
@pytest.mark.parametrize("axes", [(2, 2, 2), (1, 8, 1)], ids=str)
def test_a_model_is_read_straight_into_its_layout(folder, tmp_path, monkeypatch, config, axes):
    """In pieces smaller than any share; and what is spread is written as what is not."""
    monkeypatch.setattr(placing, "CHUNK", 48)
    params = jax.tree.map(lambda x: x + 1, init(config, jax.random.key(0)))
    save(folder, params, config)
    layout = dict.fromkeys(("embed", "wq", "wk"), P(None, "fsdp")) | {"wo": P(None, "tensor"), "unembed": P("data")}
    layout |= {"expert_gate": P(None, None, "fsdp"), "expert_down": P(None, "data", None, "tensor")}
    mesh = sharding.make_mesh(*axes)
    place = functools.partial(sharding.by_name, mesh=mesh, layout=layout)
    got, _ = load(folder, place=place)
    same(got, params)
    assert jax.tree.map(lambda x: x.sharding, got) == place(params)
    save(tmp_path / "again", got, config)
    assert contents(tmp_path / "again") == contents(folder)


def test_layers_may_be_spread_over_devices(folder):
    """As a pipeline has them."""
    params = init(MESHED, jax.random.key(0))
    save(folder, params, MESHED)
    mesh = jax.make_mesh((2,), ("stage",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
    place = functools.partial(sharding.by_name, mesh=mesh, layout=dict.fromkeys(params["layers"], P("stage")))
    got, _ = load(folder, place=place)
    same(got, params)
    assert {x.sharding.spec for x in got["layers"].values()} == {P("stage")}


def test_shards_are_one_model(folder, tmp_path):
    whole, config = load(write(tmp_path / "whole"))
    params, sharded_config = load(write(folder, shards=3))
    same(params, whole)
    assert sharded_config == config


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_is_read_into_float32_without_loss(folder, dtype):
    coarse = {n: x.astype(dtype) for n, x in tensors_of(SMALL).items()}
    params, _ = load(write(folder, tensors=coarse))
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(params["embed"], coarse["model.embed_tokens.weight"].astype(np.float32))
    np.testing.assert_array_equal(
        params["layers"]["down"][1], coarse["model.layers.1.mlp.down_proj.weight"].astype(np.float32).T
    )


def test_the_dtype_may_be_chosen(folder):
    params, _ = load(write(folder), dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_a_tied_model_may_hold_its_embedding_twice(folder):
    fields = SMALL | {"tie_word_embeddings": True}
    once = tensors_of(fields)
    twice = once | {"lm_head.weight": once["model.embed_tokens.weight"]}
    assert "unembed" not in load(write(folder, fields, twice))[0]
    different = twice | {"lm_head.weight": once["model.embed_tokens.weight"] + 1}
    refused(write(folder, fields, different), "ties the embeddings", "lm_head.weight differs")


def test_a_buffer_of_old_files_is_passed_over(folder):
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(2, np.float32)}
    load(write(folder, tensors=tensors_of(SMALL) | buffer))
