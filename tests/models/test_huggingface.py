"""Model folders: what transformers wrote is computed as torch computes it, what cannot be is refused by name.

No torch here: the folders are written file by file, and the expected logits of ``reference/decoder.json`` were
recorded from transformers (``test_parity.py`` does that, and compares with live torch much more widely).
"""

import dataclasses
import functools
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from pt_jax.models import Config, apply, init, load, placing, save, tensors
from pt_jax.models.huggingface import read_config
from pt_jax.training import sharding

REFERENCE = json.loads((pathlib.Path(__file__).parents[1] / "reference" / "decoder.json").read_text())

# heads * head_width is not the width, and no two sizes are equal: a matrix in the wrong orientation does not fit
SMALL = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 23,
    "hidden_size": 10,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "intermediate_size": 14,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
OURS = Config(
    vocab=23, layers=2, width=10, heads=3, kv_heads=1, head_width=4, hidden=14, max_length=64, rope_base=5e5,
    eps=1e-3, tied=False, qk_norm=True, bos_token=1, end_tokens=(2,), pad_token=0,
)  # fmt: skip


def tensors_of(fields, seed=0):
    """The tensors that such a folder holds, named and shaped as transformers does."""
    d, f, v, c = (fields[n] for n in ("hidden_size", "intermediate_size", "vocab_size", "head_dim"))
    q, k = fields["num_attention_heads"] * c, fields["num_key_value_heads"] * c
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,)}
    if not fields["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, d)
    for i in range(fields["num_hidden_layers"]):
        layer = {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
        attention = {"q": (q, d), "k": (k, d), "v": (k, d), "o": (d, q)}
        layer |= {f"self_attn.{n}_proj": s for n, s in attention.items()}
        layer |= {f"mlp.{n}_proj": s for n, s in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f)))}
        if fields["model_type"] == "qwen3":
            layer |= {"self_attn.q_norm": (c,), "self_attn.k_norm": (c,)}
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return derived(shapes, seed)


def derived(shapes, seed):
    """Weights that are the same everywhere, and far from initial ones; ``test_parity.py`` derives them alike."""
    draw = np.random.RandomState(seed).standard_normal  # a stream that numpy has promised never to change
    around = lambda name, shape: 1.0 if len(shape) == 1 and not name.endswith("bias") else 0.0
    return {name: (around(name, s) + 0.3 * draw(s)).astype(np.float32) for name, s in sorted(shapes.items())}


def write(folder, fields=SMALL, tensors=None, shards=None, **other):
    """A folder as a download leaves it: config.json, the weights in one file or in shards, other JSON files."""
    folder.mkdir(exist_ok=True)
    tensors = tensors_of(fields) if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(fields))
    if shards is None:
        save_file(tensors, folder / "model.safetensors")
    else:
        for i in range(shards):
            save_file({n: tensors[n] for n in sorted(tensors)[i::shards]}, folder / f"model-{i}.safetensors")
        place = {n: f"model-{i}.safetensors" for i in range(shards) for n in sorted(tensors)[i::shards]}
        other["model.safetensors.index"] = {"metadata": {}, "weight_map": place}
    for name, content in other.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


class Tokenizer:
    def get_vocab(self):
        return {"first": 0, "last": SMALL["vocab_size"] - 1}


def refused(folder, *words):
    """One sentence, that names the file or folder and all of the words."""
    with pytest.raises(ValueError) as e:
        load(folder)
    message = str(e.value)
    assert message.startswith(str(folder)) and "\n" not in message and len(message) < 400, message
    for word in words:
        assert re.search(word, message), message


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "model"


# ---- reading


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


MESHED = Config(
    vocab=24, layers=2, width=16, heads=4, kv_heads=2, head_width=4, hidden=32, tied=False, family="qwen3",
)  # fmt: skip


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


# ---- refusing


def test_no_folder(folder):
    refused(folder, "no such folder")
    folder.write_text("a file")
    refused(folder, "no such folder")


def test_no_config(folder):
    (write(folder) / "config.json").unlink()
    refused(folder, "has no config.json")


def test_options_of_another_form(folder):
    write(folder)
    with pytest.raises(ValueError, match=r"^dtype is int8; weights are of a float type"):
        load(folder, dtype=jnp.int8)
    with pytest.raises(ValueError, match=r"^quantize is 'int8'; give a function, such as models.quantize.int8$"):
        load(folder, quantize="int8")


def test_whole_numbers_are_no_parameters(folder, model):
    params, config = model
    with pytest.raises(ValueError, match=r"^params\['embed'\] is of type int32; a folder holds float types$"):
        save(folder, params | {"embed": params["embed"].astype(jnp.int32)}, config)


def test_a_share_of_a_head_that_the_class_does_not_rotate_is_not_written(folder, model):
    params, config = model
    with pytest.raises(
        ValueError, match=rf"^{folder}: rope_fraction is 0.5, which a config.json of the family \w+ cannot"
    ):
        save(folder, params, dataclasses.replace(config, rope_fraction=0.5))


def test_an_adapter_is_no_model(folder):
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, "is a PEFT folder of an adapter; read the model it is of, and it by models.peft.load")


def test_a_config_that_is_cut_off(folder):
    file = write(folder) / "config.json"
    file.write_text(file.read_text()[:-30])
    refused(folder, r"config\.json: is not JSON")


@pytest.mark.parametrize("family", ["gpt_neox", "granite", "gemma3", None])
def test_a_family_that_is_not_known(folder, family):
    write(folder, SMALL | {"model_type": family}, tensors_of(SMALL))
    refused(folder, "model_type", str(family), "llama, mistral")


LINEAR = {"rope_type": "linear", "factor": 2.0}
UNKNOWN = {"rope_type": "proportional", "rope_theta": 5e5, "factor": 8.0}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_parameters": UNKNOWN}, ["rope_type is 'proportional'", "only 'default', 'linear', .* computed"]),
        ({"rope_parameters": None, "rope_scaling": {"type": "ntk"}}, ["rope_type is 'ntk'"]),
        ({"hidden_act": "relu"}, ["hidden_act is 'relu'; only 'silu' or .* is computed"]),
        ({"layer_types": ["full_attention", "linear_attention"]}, ["layer_types holds 'linear_attention'"]),
        # the classes of transformers pass over it, so neither rotating a share nor all would be what was meant
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor is 0.5; only 1 is computed"]),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, ["partial_rotary_factor is 0.5"]),
        ({"is_causal": False}, ["is_causal is False; only True is computed"]),
        ({"rms_norm_eps": None}, ["eps must be at least 0, got None"]),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {
                    "full_attention": {"rope_theta": 1e4},
                    "sliding_attention": {"rope_theta": 1e4} | LINEAR,
                },
            },
            ["sliding_attention: rope_type is 'linear'; only 'default' is computed"],
        ),
        ({"rope_parameters": {"rope_theta": 7e4}, "rope_scaling": LINEAR}, ["has no rope_theta, which there is 70000"]),
    ],
    ids=str,
)
def test_arithmetic_that_is_not_computed(folder, fields, words):
    refused(write(folder, SMALL | fields), r"config\.json", *words)


@pytest.mark.parametrize(
    ("rope", "missing"),
    [
        ({"rope_type": "default"}, "rope_theta"),
        ({"rope_type": "linear", "rope_theta": 1e4}, "factor"),
        ({"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}, "low_freq_factor"),
        ({"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0}, "short_factor"),
    ],
)
def test_a_scaling_without_one_of_its_numbers(folder, rope, missing):
    refused(write(folder, SMALL | {"rope_parameters": rope}), "rope_parameters: lacks the field", missing)


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


def test_biases_that_the_config_announces_are_needed(folder):
    """transformers would initialise them to 0."""
    refused(write(folder, SMALL | {"attention_bias": True}), "lack the tensor .*q_proj.bias")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"vocab_size": SMALL["vocab_size"] + 0.0}, "vocab must be a whole number, got"),
        ({"eos_token_id": "</s>"}, "end_tokens must be a number of a token, got '</s>'"),
        ({"model_type": ["qwen3"]}, "model_type is"),
        ({"layer_types": ["full_attention"] * 9}, "layer_types has 9 entries for"),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
        ({"rope_parameters": {"rope_theta": 0.0}}, "rope_base must be above 0, got 0.0"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": -2.0}}, "factor .* must be above 0"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "longrope", "short_factor": [1], "long_factor": [1, 2]}},
         "longrope has 1 short and 2 long divisors for"),
    ],
    ids=str,
)  # fmt: skip
def test_numbers_that_no_model_has(folder, fields, words):
    """Some would be read as another model, and others fail in the middle of a program."""
    refused(write(folder, SMALL | fields, tensors_of(SMALL)), r"config\.json", words)


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"])
def test_a_field_of_another_form(folder, field):
    refused(write(folder, SMALL | {field: "many"}, tensors_of(SMALL)), r"config\.json")


@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"])
def test_a_field_that_is_missing(folder, field):
    write(folder)
    (folder / "config.json").write_text(json.dumps({n: x for n, x in SMALL.items() if n != field}))
    refused(folder, rf"config\.json: lacks the field {field}")


@pytest.mark.parametrize("name", [n for n in tensors_of(SMALL) if "layers.0" not in n])
def test_every_tensor_is_needed(folder, name):
    """transformers would load it, and initialise the missing one anew."""
    write(folder, tensors={n: x for n, x in tensors_of(SMALL).items() if n != name})
    refused(folder, "lack", re.escape(name))


@pytest.mark.parametrize("tied_too", ["lm_head.weight", None])
def test_a_tied_model_needs_its_embedding(folder, tied_too):
    fields = SMALL | {"tie_word_embeddings": True}
    tensors = tensors_of(fields)
    embedding = tensors.pop("model.embed_tokens.weight")
    if tied_too:
        tensors[tied_too] = embedding
    refused(write(folder, fields, tensors), r"model\.embed_tokens\.weight|the embedding")


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.bias", "model.layers.2.input_layernorm.weight", "score.weight"]
)
def test_no_tensor_is_left_over(folder, name):
    write(folder, tensors=tensors_of(SMALL) | {name: np.ones(10, np.float32)})
    refused(folder, "unexpected", re.escape(name))


def test_norms_of_another_family_are_left_over(folder):
    write(folder, SMALL | {"model_type": "llama"}, tensors_of(SMALL))
    refused(folder, "unexpected", r"self_attn\.[kq]_norm")


@pytest.mark.parametrize("name", [n for n in tensors_of(SMALL) if "layers.1" not in n])
def test_every_shape_is_compared(folder, name):
    """Turned, too: a matrix that holds the same numbers in another order loads, and is nonsense."""
    tensors = tensors_of(SMALL)
    for wrong in (tensors[name][:-1], tensors[name].T if tensors[name].ndim > 1 else tensors[name][None]):
        bad = tensors | {name: np.ascontiguousarray(wrong)}
        refused(write(folder, tensors=bad), re.escape(name), re.escape(str(wrong.shape)), "asks for")


@pytest.mark.parametrize("left", [0, 5, 200])
@pytest.mark.parametrize("shards", [None, 2])
def test_weights_that_are_cut_off_in_the_header(folder, left, shards):
    file = write(folder, shards=shards) / ("model.safetensors" if shards is None else "model-1.safetensors")
    file.write_bytes(file.read_bytes()[:left])
    refused(folder, re.escape(file.name), "cannot be read .*ends within its header.* download it again")


@pytest.mark.parametrize("left", [-1, -57])
@pytest.mark.parametrize("shards", [None, 2])
def test_weights_that_are_cut_off_in_a_tensor(folder, left, shards):
    """Of the norm, which is last in the file, and of a larger tensor before it."""
    file = write(folder, shards=shards) / ("model.safetensors" if shards is None else "model-1.safetensors")
    with safe_open(file, "np") as f:
        last = list(f.offset_keys())[-1]
    file.write_bytes(file.read_bytes()[:left])
    named = re.escape(last) if left == -1 else r"model\."
    refused(folder, re.escape(file.name), rf"cannot be read \({named}\S* goes .* and the file ends at")


def test_a_file_that_goes_on_behind_its_last_tensor(folder):
    file = write(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"x")
    refused(folder, re.escape(file.name), "goes on behind its last tensor")


@pytest.mark.parametrize(
    "header",
    [
        b"{", b"[]", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b"\xff\xfe",
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [null, 4]}}',
        b'{"a": {"dtype": "F32", "shape": ["1"], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
        b' "b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
    ],
    ids=str,
)  # fmt: skip
def test_a_header_of_something_else(folder, header):
    file = write(folder) / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    refused(folder, re.escape(file.name), "cannot be read")


@pytest.mark.parametrize("dtype", [np.int8, np.int64, bool])
def test_numbers_that_are_no_weights(folder, dtype):
    """Of a quantised checkpoint, whose scales would be left out."""
    name = "model.layers.1.mlp.up_proj.weight"
    changed = tensors_of(SMALL)
    changed[name] = changed[name].astype(dtype)
    refused(write(folder, tensors=changed), r"model\.safetensors", re.escape(name), "is of type [IB].*one of .*F16")


def test_no_weights(folder):
    (write(folder) / "model.safetensors").unlink()
    refused(folder, r"neither model\.safetensors nor")


def test_a_shard_that_is_not_there(folder):
    (write(folder, shards=3) / "model-1.safetensors").unlink()
    refused(folder, r"model\.safetensors\.index\.json names model-1\.safetensors for model\.", "not there")


@pytest.mark.parametrize("place", ["../model-1.safetensors", "/etc/passwd"])
def test_a_shard_is_beside_its_index(folder, place):
    index = write(folder, shards=2) / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-1.safetensors", place))
    refused(folder, "not there")


def test_a_tensor_that_is_not_in_the_shard_that_the_index_says(folder):
    index = write(folder, shards=2) / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = {
        "model-0.safetensors": "model-1.safetensors", "model-1.safetensors": "model-0.safetensors",
    }[content["weight_map"]["model.norm.weight"]]  # fmt: skip
    index.write_text(json.dumps(content))
    refused(folder, r"model-\d\.safetensors: lacks the tensor model\.norm\.weight")


def test_a_tensor_that_is_in_two_shards(folder):
    write(folder, shards=2)
    held = load_file(folder / "model-1.safetensors") | load_file(folder / "model-0.safetensors")
    save_file(held, folder / "model-1.safetensors")
    refused(folder, r"model-1\.safetensors: \S+ is in model-0\.safetensors as well")


@pytest.mark.parametrize("index", ["{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[]", "{"])
def test_an_index_that_is_none(folder, index):
    (write(folder, shards=2) / "model.safetensors.index.json").write_text(index)
    refused(folder, r"index\.json: (lacks weight_map|holds list|is not JSON)")


# ---- writing


@pytest.fixture
def model(tmp_path):
    return load(write(tmp_path / "downloaded"))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_has_the_names_shapes_and_numbers_of_what_was_read(folder, tmp_path, family, tied):
    fields = SMALL | {"model_type": family, "tie_word_embeddings": tied}
    params, config = load(write(tmp_path / "downloaded", fields))
    save(folder, params, config)
    written, expected = load_file(folder / "model.safetensors"), tensors_of(fields)
    assert sorted(written) == sorted(expected)
    for name, x in expected.items():
        np.testing.assert_array_equal(written[name], x, err_msg=name)
    again, again_config = load(folder)
    same(again, params)
    assert again_config == config


def test_config_json_is_what_transformers_reads(folder, model):
    save(folder, *model)
    written = json.loads((folder / "config.json").read_text())
    assert {n: written.get(n) for n in SMALL} == SMALL
    assert written["rope_theta"] == 5e5 and written["dtype"] == written["torch_dtype"] == "float32"


@pytest.mark.parametrize(
    "change",
    [
        {"max_length": 77}, {"rope_base": 123.0}, {"eps": 0.5}, {"bos_token": None}, {"bos_token": 0},
        {"end_tokens": ()}, {"end_tokens": (0,)}, {"end_tokens": (4, 2, 9)}, {"pad_token": None}, {"pad_token": 2},
    ],
    ids=str,
)  # fmt: skip
def test_every_field_survives(folder, model, change):
    """Those of the sizes and of the family are in the test above: their tensors change too."""
    params, config = model
    save(folder, params, dataclasses.replace(config, **change))
    assert load(folder)[1] == dataclasses.replace(config, **change)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_a_dtype_survives(folder, model, dtype):
    params, config = model
    params = jax.tree.map(lambda x: x.astype(dtype), params)
    save(folder, params, config)
    assert {x.dtype for x in load_file(folder / "model.safetensors").values()} == {jnp.dtype(dtype)}
    assert json.loads((folder / "config.json").read_text())["dtype"] == jnp.dtype(dtype).name
    same(load(folder, dtype=dtype)[0], params)


def test_a_router_stays_float32_among_bfloat16_and_numbers_lie_at_multiples_of_their_width(folder):
    """Readers that map the file into memory cannot look at others."""
    config = dataclasses.replace(
        MESHED, vocab=23, width=5, hidden=7, family="qwen3_moe", experts=3, expert_hidden=3, qk_norm=True
    )
    save(folder, init(config, jax.random.key(0), jnp.bfloat16), config)
    content = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    assert {x["dtype"] for name, x in header.items() if ".gate.weight" in name} == {"F32"}
    assert {x["dtype"] for name, x in header.items() if ".gate.weight" not in name} == {"BF16"}
    assert all(x["data_offsets"][0] % (4 if x["dtype"] == "F32" else 2) == 0 for x in header.values())
    assert load_file(folder / "model.safetensors").keys() == header.keys()
    same(load(folder, dtype=jnp.bfloat16)[0], init(config, jax.random.key(0), jnp.bfloat16))


@pytest.mark.parametrize("turned", ["transposed", "fortran", "strided", "jax"])
def test_arrays_in_any_order_of_bytes_are_written_as_they_read(folder, model, turned):
    params, config = model
    turn = {
        "transposed": lambda x: np.ascontiguousarray(x.T).T,
        "fortran": np.asfortranarray,
        "strided": lambda x: np.repeat(x, 2, -1)[..., ::2],
        "jax": lambda x: jnp.asarray(np.asarray(x).T).T,
    }[turned]
    odd = jax.tree.map(lambda x: turn(np.asarray(x)), params)
    save(folder, odd, config)
    same(load(folder)[0], params)


def test_a_tokenizer_is_put_beside_the_weights(folder, model):
    class Whole(Tokenizer):
        def save_pretrained(self, path):
            (pathlib.Path(path) / "tokenizer.json").write_text("{}")

    save(folder, *model, Whole())
    assert sorted(contents(folder)) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip


def test_a_folder_with_something_in_it_is_not_touched(folder, model):
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="model: exists and is not empty"):
        save(folder, *model)
    assert contents(folder) == {"notes.txt": b"mine"}


def test_a_folder_may_be_replaced_and_pass_on_what_is_to_be_kept(folder, model):
    params, config = model
    save(folder, params, config)
    for name in ("metrics.jsonl", "old.txt"):
        (folder / name).write_text("mine")
    new = jax.tree.map(lambda x: x + 1, params)
    save(folder, new, config, overwrite=True, keep=["metrics.jsonl"])
    same(load(folder)[0], new)
    assert (folder / "metrics.jsonl").read_text() == "mine" and not (folder / "old.txt").exists()


def no_space(file):
    file.write_bytes(b"half")
    raise OSError(28, "No space left on device")


def swaps_two_bytes(file):
    """Between the writing and the reading back."""
    data = bytearray(file.read_bytes())
    data[-1], data[-9] = data[-9] ^ 1, data[-1]
    file.write_bytes(data)
    return REAL_HEADER(file)


REAL_HEADER = tensors.read_header


@pytest.mark.parametrize(
    ("fails", "message"),
    [(no_space, "No space left"), (swaps_two_bytes, r"model\.safetensors.* did not read back")],
)
@pytest.mark.parametrize("exists", [True, False])
def test_a_save_that_fails_leaves_what_was_there(folder, model, monkeypatch, fails, message, exists):
    params, config = model
    if exists:
        save(folder, params, config)
    siblings = sorted(folder.parent.iterdir())
    before = contents(folder) if exists else None
    monkeypatch.setattr(tensors, "read_header", fails)
    with pytest.raises(OSError, match=message):
        save(folder, jax.tree.map(lambda x: x + 1, params), config, overwrite=True)
    assert sorted(folder.parent.iterdir()) == siblings
    assert (contents(folder) if exists else None) == before


def test_a_tokenizer_that_fails_leaves_nothing(folder, model):
    class Broken(Tokenizer):
        def save_pretrained(self, path):
            raise OSError("no tokenizer")

    with pytest.raises(OSError, match="no tokenizer"):
        save(folder, *model, Broken())
    assert not folder.exists() and [p.name for p in folder.parent.iterdir()] == ["downloaded"]


@pytest.mark.parametrize(
    "change", [{"layers": 1}, {"layers": 3}, {"tied": True}, {"qk_norm": False}, {"hidden": 15}], ids=str
)
def test_parameters_of_another_config_are_not_written(folder, model, change):
    """A folder whose config.json does not speak of its weights looks like a good one until it is read."""
    params, config = model
    with pytest.raises(ValueError):
        save(folder, params, dataclasses.replace(config, **change))
    assert not folder.exists()
