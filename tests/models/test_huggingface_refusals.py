"""Model folders: what cannot be computed, or is not whole, is refused by name."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from model_folders import LINEAR, SMALL, refused, tensors_of, write
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from pt_jax.models import load, save


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
