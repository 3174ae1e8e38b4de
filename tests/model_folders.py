"""Model folders as transformers writes them, made file by file without it."""

import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from pt_jax.models import Config, load

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
MESHED = Config(
    vocab=24, layers=2, width=16, heads=4, kv_heads=2, head_width=4, hidden=32, tied=False, family="qwen3",
)  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.0}


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
    """Weights that are the same everywhere, and far from initial ones."""
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
