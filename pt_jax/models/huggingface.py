"""Hugging Face folders in and out: config.json, safetensors, tokenizer files.

Reading is strict: a family, a field or a tensor that this decoder would compute differently is refused by name,
because a checkpoint that loads with one wrong number looks like a checkpoint that trains badly.
"""

import json
import pathlib
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pt_jax import folders
from pt_jax.models import families, parameters
from pt_jax.models.config import Config

# buffers that old files hold beside the weights
BUFFERS = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(bias|masked_bias)$")
SHARD = 5 * 2**30  # bytes of a file


def load(path, *, dtype=jnp.float32, place=None):
    """Reads a model folder, tensor by tensor, each straight to where it will live.

    Beside what is placed, no more than the largest tensor is in the host's memory.

    Args:
      path: a local folder with config.json and model.safetensors (or its sharded form with an index); or the name of a
        model on the Hugging Face hub, "owner/name", which is downloaded.
      dtype: of the parameters; float32 keeps master weights whatever the file holds.
      place: shapes of the parameters -> their shardings, such as ``partial(training.sharding.by_name, mesh=mesh)``;
        None: the default device.

    Returns:
      params, config.

    Raises:
      ValueError: the folder, a field of its config or a tensor is not what this decoder can take; the message names
        the file and what was expected.
    """
    folder = _local(path)
    config = read_config(folder)
    family, tensors = families.FAMILIES[config.family], Tensors(folder)
    tensors.prefixed(family.whole["embed"])
    shapes = flatten_dict(parameters.shapes(config))
    shardings = _shardings(shapes, dtype, place)
    if config.tied:
        _check_tied(folder, tensors, family)
    out = {
        leaf: jax.device_put(tensors.take(family.whole[leaf[0]], shape).astype(dtype), shardings[leaf])
        for leaf, shape in shapes.items()
        if leaf[0] != "layers"
    }
    out |= {leaf: _zeros(shape, dtype, shardings[leaf]) for leaf, shape in shapes.items() if leaf[0] == "layers"}
    for i in range(config.layers):
        for tensor in family.layer:
            leaves = [("layers", leaf) for leaf in tensor.leaves]
            if leaves[0] in shapes:
                given = [shapes[leaf][1:] for leaf in leaves]
                whole = tensors.take(family.prefix.format(i) + tensor.name, _on_disk(tensor, given))
                for leaf, part in zip(leaves, _split(tensor, whole, given)):
                    out[leaf] = _put(out[leaf], part.astype(dtype), i)
    tensors.all_taken()
    return unflatten_dict(out), config


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
    _check_tree(params, config)
    dtype = str(params["embed"].dtype)
    with folders.appear_whole(path, overwrite=overwrite, keep=keep) as folder:
        _write_tensors(folder, _tensors(params, config))
        (folder / "config.json").write_text(json.dumps(to_json(config, dtype), indent=2) + "\n")
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
    given = _read_json(file)
    name = given.get("model_type")
    if name not in families.FAMILIES:
        known = ", ".join(sorted(families.FAMILIES))
        raise ValueError(f"{file}: model_type is {name!r}; this version knows {known}")
    family = families.FAMILIES[name]
    generation = folder / "generation_config.json"
    ends = (_read_json(generation) if generation.is_file() else {}).get("eos_token_id", given.get("eos_token_id"))
    fields = families.Fields(family.defaults | given, file)
    common = _gpt2_names(fields) if name == "gpt2" else _common(fields)
    try:
        return Config(
            family=name,
            bos_token=fields.get("bos_token_id"),
            end_tokens=() if ends is None else tuple(ends) if isinstance(ends, list) else (ends,),
            pad_token=fields.get("pad_token_id"),
            tied=bool(fields.get("tie_word_embeddings", False)),
            **common | {"qk_norm": False} | family.choices(fields),
        )
    except (TypeError, AttributeError, KeyError) as e:
        raise ValueError(f"{file}: has a field of another form than expected ({type(e).__name__}: {e})") from e
    except ValueError as e:
        raise e if str(e).startswith(str(file)) else ValueError(f"{file}: {e}") from e


def _common(fields) -> dict:
    heads, width = fields.need("num_attention_heads"), fields.need("hidden_size")
    out = {
        "vocab": fields.need("vocab_size"),
        "layers": fields.need("num_hidden_layers"),
        "width": width,
        "heads": heads,
        "kv_heads": fields.get("num_key_value_heads") or heads,
        "head_width": fields.get("head_dim") or width // heads,
        "hidden": fields.need("intermediate_size"),
        "max_length": fields.get("max_position_embeddings") or 2048,
        "eps": fields.get("rms_norm_eps", 1e-6),
        "activation": families.activation(fields, "hidden_act"),
    }
    return out | families.rope(fields)


def _gpt2_names(fields) -> dict:
    width = fields.need("n_embd")
    return {
        "vocab": fields.need("vocab_size"),
        "layers": fields.need("n_layer"),
        "width": width,
        "heads": fields.need("n_head"),
        "kv_heads": fields.need("n_head"),
        "head_width": width // fields.need("n_head"),
        "hidden": fields.get("n_inner") or 4 * width,
        "max_length": fields.need("n_positions"),
        "eps": fields.need("layer_norm_epsilon"),
    }


def to_json(config: Config, dtype: str) -> dict:
    """The fields of config.json."""
    family = families.FAMILIES[config.family]
    out = {"architectures": [family.architecture], "model_type": config.family, "vocab_size": config.vocab}
    if config.family != "gpt2":
        names = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}
        out |= {
            "hidden_size": config.width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_width,
            "intermediate_size": config.hidden,
            "max_position_embeddings": config.max_length,
            "hidden_act": names[config.activation],
            "rms_norm_eps": config.eps,
        } | families.rope_fields(config)
    ends = list(config.end_tokens)
    return out | family.fields(config) | {
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_token,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": config.pad_token,
        "dtype": dtype,
        "torch_dtype": dtype,
    }  # fmt: skip


# ---- tensors


class Tensors:
    """The tensors of a folder by name, read one at a time when they are taken."""

    def __init__(self, folder):
        from safetensors import SafetensorError, safe_open

        self.folder, self.where, self.prefix = folder, {}, ""
        for file in _files(folder):
            try:
                opened = safe_open(folder / file, framework="np")
            except (SafetensorError, OSError) as e:
                raise ValueError(f"{folder / file}: cannot be read ({e}); copy or download it again") from e
            self.where |= {name: (file, opened) for name in opened.keys()}  # noqa: SIM118 (it is not a dict)
        self.left = {name for name in self.where if not BUFFERS.search(name)}

    def prefixed(self, name):
        """Files of the base model alone leave out the first word of every name: GPT-2 on the hub."""
        first, rest = name.split(".", 1)
        if name not in self.where and rest in self.where:
            self.prefix = f"{first}."

    def __contains__(self, name):
        return name.removeprefix(self.prefix) in self.where

    def take(self, name, shape):
        """A tensor as a numpy array, once; its shape must be this one."""
        name = name.removeprefix(self.prefix)
        if name not in self.where:
            raise ValueError(f"{self.folder}: the weights lack the tensor {name}")
        file, opened = self.where[name]
        array = opened.get_tensor(name)
        if array.shape != tuple(shape):
            raise ValueError(
                f"{self.folder / file}: {name} has shape {array.shape}, config.json asks for {tuple(shape)}"
            )
        self.left.discard(name)
        return array

    def all_taken(self):
        if self.left:
            extra = sorted(self.left)
            file = self.folder / self.where[extra[0]][0]
            raise ValueError(f"{file}: unexpected tensor {extra[0]} (and {len(extra) - 1} more); this family has none")


def _check_tied(folder, tensors, family):
    """A file may hold the unembedding though it is tied; then it must be the embedding."""
    name = family.whole["unembed"]
    if name in tensors:
        embed = family.whole["embed"].removeprefix(tensors.prefix)
        shape = tensors.where[embed][1].get_slice(embed).get_shape() if embed in tensors.where else ()
        if not shape or not np.array_equal(tensors.take(name, shape), tensors.where[embed][1].get_tensor(embed)):
            raise ValueError(f"{folder}: config.json ties the embeddings, but {name} differs from the embedding")


def _on_disk(tensor, shapes):
    """The shape of a tensor that holds leaves of these shapes side by side."""
    if not tensor.inputs:
        return (sum(int(np.prod(shape)) for shape in shapes),)
    rows = int(np.prod(shapes[0][: tensor.inputs]))
    columns = sum(int(np.prod(shape[tensor.inputs :])) for shape in shapes)
    return (columns, rows) if tensor.out_in else (rows, columns)


def _split(tensor, whole, shapes):
    """The leaves of a tensor."""
    whole = whole.T if tensor.inputs and tensor.out_in else whole
    sizes = [int(np.prod(shape[tensor.inputs :])) for shape in shapes]
    parts = np.split(whole, np.cumsum(sizes)[:-1], -1)
    return [part.reshape(shape) for part, shape in zip(parts, shapes)]


def _joined(tensor, leaves):
    """The tensor of some leaves: the inverse of ``_split``."""
    if not tensor.inputs:
        return np.concatenate([leaf.reshape(-1) for leaf in leaves])
    rows = int(np.prod(leaves[0].shape[: tensor.inputs]))
    whole = np.concatenate([leaf.reshape(rows, -1) for leaf in leaves], -1)
    return whole.T if tensor.out_in else whole


def _tensors(params, config):
    """Names and arrays as they go on disk, one at a time."""
    family = families.FAMILIES[config.family]
    for leaf, name in family.whole.items():
        if leaf in params:
            yield name, np.asarray(params[leaf])
    for i in range(config.layers):
        for tensor in family.layer:
            if tensor.leaves[0] in params["layers"]:
                leaves = [np.asarray(params["layers"][leaf][i]) for leaf in tensor.leaves]
                yield family.prefix.format(i) + tensor.name, _joined(tensor, leaves)


def _write_tensors(folder, tensors):
    """One file, or several with an index; each is read back and compared."""
    from safetensors.numpy import load_file, save_file

    files, size, total = [{}], 0, 0
    # save_file of safetensors 0.8.0 writes the bytes of a transposed array in the wrong order
    for name, array in ((name, np.ascontiguousarray(array)) for name, array in tensors):
        if size + array.nbytes > SHARD and files[-1]:
            files.append({})
            size = 0
        files[-1][name] = array
        size, total = size + array.nbytes, total + array.nbytes
    names = ["model.safetensors"]
    if len(files) > 1:
        names = [f"model-{i:05}-of-{len(files):05}.safetensors" for i in range(1, len(files) + 1)]
        index = {"metadata": {"total_size": total}}
        index["weight_map"] = {name: file for file, held in zip(names, files) for name in held}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for file, held in zip(names, files):
        save_file(held, folder / file, metadata={"format": "pt"})
        back = load_file(folder / file)
        wrong = [n for n, x in held.items() if x.tobytes() != back[n].tobytes()]
        if wrong:
            raise OSError(f"{folder / file}: {wrong[0]} did not read back as it was written; do not trust this disk")


def _shardings(shapes, dtype, place):
    if place is None:
        return dict.fromkeys(shapes)
    tree = unflatten_dict({leaf: jax.ShapeDtypeStruct(shape, dtype) for leaf, shape in shapes.items()})
    return flatten_dict(place(tree))


def _zeros(shape, dtype, sharding):
    return jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=sharding)()


@partial(jax.jit, donate_argnums=0)
def _put(stack, layer, i):
    return jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)


def _check_tree(params, config):
    """A folder whose config.json does not speak of its weights looks like a good one until it is read."""
    given, expected = flatten_dict(params, sep="/"), flatten_dict(parameters.shapes(config), sep="/")
    for name in sorted(expected.keys() ^ given.keys()):
        who = "the config has none" if name in given else "the config asks for it"
        raise ValueError(f"params {'has' if name in given else 'lacks'} {name}, but {who}")
    for name, shape in expected.items():
        if given[name].shape != shape:
            raise ValueError(f"params[{name!r}] has shape {given[name].shape}, the config asks for {shape}")


def _local(path) -> pathlib.Path:
    """The folder itself, or the one that a name on the hub is downloaded to."""
    folder = pathlib.Path(path)
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        return folder
    from huggingface_hub import snapshot_download

    try:
        return pathlib.Path(
            snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt"])
        )
    except Exception as e:  # of the network, the hub and its cache: a dozen kinds
        why = f"{type(e).__name__}: {e}".split("\n")[0]
        raise ValueError(f"{path}: no such folder, and not to be had from the hub ({why})") from e


def _files(folder):
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return ["model.safetensors"]
    if not index.is_file():
        raise ValueError(f"{folder}: has neither model.safetensors nor model.safetensors.index.json")
    files = sorted(set(_read_json(index)["weight_map"].values()))
    for file in files:
        if not (folder / file).is_file():
            raise ValueError(f"{folder}: {index.name} names {file}, which is not there")
    return files


def _read_json(file) -> dict:
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as e:
        raise ValueError(f"{file}: is not JSON ({e})") from e
