"""Hugging Face folders in and out: config.json, safetensors, tokenizer files.

Reading is strict: a family, a field or a tensor that this decoder would compute differently is refused by name,
because a checkpoint that loads with one wrong number looks like a checkpoint that trains badly.
"""

import json
import pathlib

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pt_jax import folders
from pt_jax.models import decoder
from pt_jax.models.config import Config

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# our leaf of a layer -> module inside model.layers.{i}, and how many of our leading axes are its inputs;
# a Linear of Hugging Face is stored [out, in]
LAYER = {
    "attn_norm": ("input_layernorm", 0),
    "wq": ("self_attn.q_proj", 1),
    "wk": ("self_attn.k_proj", 1),
    "wv": ("self_attn.v_proj", 1),
    "wo": ("self_attn.o_proj", 2),
    "q_norm": ("self_attn.q_norm", 0),
    "k_norm": ("self_attn.k_norm", 0),
    "mlp_norm": ("post_attention_layernorm", 0),
    "gate": ("mlp.gate_proj", 1),
    "up": ("mlp.up_proj", 1),
    "down": ("mlp.down_proj", 1),
}
WHOLE = {"embed": "model.embed_tokens.weight", "norm": "model.norm.weight", "unembed": "lm_head.weight"}

# fields that change the arithmetic, with the only value that this decoder computes
ONLY = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "rope_scaling": None,
}


def load(path, *, dtype=jnp.float32):
    """Reads a model folder.

    Args:
      path: a local folder with config.json and model.safetensors (or its sharded form with an index).
      dtype: of the parameters; float32 keeps master weights whatever the file holds.

    Returns:
      params, config.

    Raises:
      ValueError: the folder, a field of its config or a tensor is not what this decoder can take; the message names
        the file and what was expected.
    """
    folder = pathlib.Path(path)
    config = read_config(folder)
    tensors = _read_tensors(folder)
    head = tensors.pop(WHOLE["unembed"], None) if config.tied else None
    if head is not None and not np.array_equal(head, tensors.get(WHOLE["embed"])):
        raise ValueError(f"{folder}: config.json ties the embeddings, but lm_head.weight differs from the embedding")
    flat = {}
    for leaf, shape in flatten_dict(decoder.shapes(config)).items():
        if leaf[0] == "layers":
            layers = [_take(folder, tensors, name, leaf[1], shape[1:]) for name in _layer_names(config, leaf[1])]
            flat[leaf] = jnp.asarray(np.stack(layers), dtype)
        else:
            flat[leaf] = jnp.asarray(_take(folder, tensors, WHOLE[leaf[0]], leaf[0], shape), dtype)
    extra = [name for name in tensors if not name.endswith("rotary_emb.inv_freq")]  # a buffer of old files
    if extra:
        raise ValueError(f"{folder}: unexpected tensor {extra[0]} (and {len(extra) - 1} more); this family has none")
    return unflatten_dict(flat), config


def save(path, params, config: Config, tokenizer=None, *, overwrite=False, keep=()):
    """Writes a folder that ``transformers.AutoModelForCausalLM.from_pretrained`` and vLLM load.

    The folder appears whole or not at all: everything is written beside it, read back, and renamed.

    Args:
      path: the folder to make.
      params: the tree of ``init`` or ``load``.
      config: its model.
      tokenizer: a transformers tokenizer to put beside the weights, or None.
      overwrite: whether an existing folder may be replaced.
      keep: names of files that a replaced folder passes on, such as logs.

    Raises:
      ValueError: the folder exists and is not empty, or cannot be written; or the parameters are not this model's.
    """
    from safetensors.numpy import load_file, save_file

    _check_tree(params, config)
    tensors = {}
    for leaf, value in flatten_dict(params).items():
        array = np.asarray(value)
        if leaf[0] == "layers":
            for name, one in zip(_layer_names(config, leaf[1]), array):
                tensors[name] = _out_in(one, LAYER[leaf[1]][1])
        else:
            tensors[WHOLE[leaf[0]]] = array
    # save_file of safetensors 0.8.0 writes the bytes of a transposed array in the wrong order
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}

    with folders.appear_whole(path, overwrite=overwrite, keep=keep) as folder:
        file = folder / "model.safetensors"
        save_file(tensors, file, metadata={"format": "pt"})
        back = load_file(file)
        wrong = [n for n, x in tensors.items() if x.tobytes() != back[n].tobytes()]
        if wrong:
            raise OSError(
                f"{file}: {wrong[0]} did not read back as it was written; the file system is not to be trusted"
            )
        dtype = str(tensors[WHOLE["embed"]].dtype)
        (folder / "config.json").write_text(json.dumps(_to_json(config, dtype), indent=2) + "\n")
        generation = {"bos_token_id": config.bos_token, "eos_token_id": list(config.end_tokens) or None}
        generation |= {"pad_token_id": config.pad_token}
        generation = {k: v for k, v in generation.items() if v is not None}
        (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def read_config(path) -> Config:
    """The model that a folder's config.json describes; see ``load`` for what is refused."""
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give a local folder with config.json and model.safetensors")
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder}: has no config.json, so it is not a model folder")
    fields = _read_json(file)
    family = fields.get("model_type")
    if family not in ARCHITECTURES:
        raise ValueError(f"{file}: model_type is {family!r}; this version knows {', '.join(sorted(ARCHITECTURES))}")
    for name, value in ONLY.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{file}: {name} is {fields[name]!r}; only {value!r} is computed")
    if set(fields.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(
            f"{file}: layer_types holds {sorted(set(fields['layer_types']))}; only 'full_attention' is computed"
        )
    rope = fields.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"{file}: rope_type is {rope['rope_type']!r}; only 'default' is computed")

    def need(name):
        if name not in fields:
            raise ValueError(f"{file}: lacks the field {name}")
        return fields[name]

    heads, width = need("num_attention_heads"), need("hidden_size")
    generation = folder / "generation_config.json"
    ends = (_read_json(generation) if generation.is_file() else {}).get("eos_token_id", fields.get("eos_token_id"))
    return Config(
        vocab=need("vocab_size"),
        layers=need("num_hidden_layers"),
        width=width,
        heads=heads,
        kv_heads=fields.get("num_key_value_heads") or heads,
        head_width=fields.get("head_dim") or (128 if family == "qwen3" else width // heads),
        hidden=need("intermediate_size"),
        max_length=fields.get("max_position_embeddings") or (32768 if family == "qwen3" else 2048),
        rope_base=float(rope.get("rope_theta") or fields.get("rope_theta") or 10_000.0),
        eps=fields.get("rms_norm_eps", 1e-6),
        tied=fields.get("tie_word_embeddings", False),
        qk_norm=family == "qwen3",
        bos_token=fields.get("bos_token_id"),
        end_tokens=() if ends is None else tuple(ends) if isinstance(ends, list) else (ends,),
        pad_token=fields.get("pad_token_id"),
    )


def _to_json(config: Config, dtype: str) -> dict:
    family = "qwen3" if config.qk_norm else "llama"
    return {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.hidden,
        "max_position_embeddings": config.max_length,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": config.eps,
        # transformers 5 reads rope_parameters; transformers 4 and others read rope_theta
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "rope_theta": config.rope_base,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_token,
        "eos_token_id": config.end_tokens[0] if len(config.end_tokens) == 1 else list(config.end_tokens) or None,
        "pad_token_id": config.pad_token,
        "dtype": dtype,
        "torch_dtype": dtype,
    }


def _check_tree(params, config):
    """A folder whose config.json does not speak of its weights looks like a good one until it is read."""
    given, expected = flatten_dict(params, sep="/"), flatten_dict(decoder.shapes(config), sep="/")
    for name in expected.keys() ^ given.keys():
        who = "the config has none" if name in given else "the config asks for it"
        raise ValueError(f"params {'has' if name in given else 'lacks'} {name}, but {who}")
    for name, shape in expected.items():
        if given[name].shape != shape:
            raise ValueError(f"params[{name!r}] has shape {given[name].shape}, the config asks for {shape}")


def _layer_names(config, leaf):
    return [f"model.layers.{i}.{LAYER[leaf][0]}.weight" for i in range(config.layers)]


def _out_in(array, inputs):
    """Our [*in, *out] as a Linear's [out, in]; a norm (no input axes) as it is."""
    if not inputs:
        return array
    return array.reshape(int(np.prod(array.shape[:inputs])), -1).T


def _take(folder, tensors, name, leaf, shape):
    """Removes a tensor from those read, and turns it to the shape of our leaf."""
    if name not in tensors:
        raise ValueError(f"{folder}: the weights lack the tensor {name}")
    array = tensors.pop(name)
    inputs = LAYER[leaf][1] if leaf in LAYER else 0
    expected = _out_in(np.broadcast_to(np.int8(0), shape), inputs).shape
    if array.shape != expected:
        raise ValueError(f"{folder}: {name} has shape {array.shape}, config.json asks for {expected}")
    return (array.T if inputs else array).reshape(shape)


def _read_tensors(folder) -> dict:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files = ["model.safetensors"]
    elif index.is_file():
        files = sorted(set(_read_json(index)["weight_map"].values()))
    else:
        raise ValueError(f"{folder}: has neither model.safetensors nor model.safetensors.index.json")
    tensors = {}
    for file in files:
        if not (folder / file).is_file():
            raise ValueError(f"{folder}: {index.name} names {file}, which is not there")
        try:
            tensors |= load_file(folder / file)
        except SafetensorError as e:
            raise ValueError(f"{folder / file}: cannot be read ({e}); copy or download it again") from e
    return tensors


def _read_json(file) -> dict:
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as e:
        raise ValueError(f"{file}: is not JSON ({e})") from e
