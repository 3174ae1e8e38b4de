"""Hugging Face folders in and out: config.json, safetensors, tokenizer files.

Reading is strict: a family, a field or a tensor that this decoder would compute differently is refused by name,
because a checkpoint that loads with one wrong number looks like a checkpoint that trains badly.
"""

import dataclasses
import json
import math
import pathlib
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pt_jax import folders
from pt_jax.models import families, linear, parameters, vocabulary
from pt_jax.models.config import Config
from pt_jax.models.fields import Fields, activation, rope, rope_fields
from pt_jax.models.placing import Filling, default_sharding
from pt_jax.models.quantize import QuantizedFilling
from pt_jax.models.quantize import quantize as quantize_tree
from pt_jax.models.tensors import NAMES, Leaf, Made, Tensors, read_json, write


def load(path, *, dtype=jnp.float32, place=None, quantize=None):
    """Reads a model folder, tensor by tensor, each straight to where it will live.

    Beside what is placed, no more than the largest tensor is in the host's memory. Of several processes, each reads
    what its devices will hold; but the tensors that are quantised whole.

    Args:
      path: a local folder with config.json and model.safetensors (or its sharded form with an index); or the name of a
        model on the Hugging Face hub, "owner/name", which is downloaded.
      dtype: of the parameters; float32 keeps master weights whatever the file holds. Routers are float32 always.
      place: shapes of the parameters -> their shardings, such as ``partial(training.sharding.by_name, mesh=mesh)``;
        None: the default device.
      quantize: ``models.quantize.int8``, ``nf4`` or ``nf4_double``: the products of the layers become such records
        one tensor after the other, so that the model is never there in full. None: arrays.

    Returns:
      params, config.

    Raises:
      ValueError: the folder, a field of its config or a tensor is not what this decoder can take; the message names
        the file and what was expected.
    """
    if not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise ValueError(
            f"dtype is {jnp.dtype(dtype).name}; weights are of a float type, and quantize is for fewer bits"
        )
    if quantize is not None and not callable(quantize):
        raise ValueError(f"quantize is {quantize!r}; give a function, such as models.quantize.int8")
    folder = local(path)
    config, tensors = opened(folder)
    family, shapes = families.FAMILIES[config.family], flatten_dict(parameters.shapes(config))
    if config.tied:
        _check_tied(folder, tensors, family)
    out = _fillings(shapes, dtype, place, quantize)
    for leaf, shape in shapes.items():
        if leaf[0] != "layers":
            entry = tensors.check(family.whole[leaf[0]], _whole_on_disk(leaf[0], shape))
            out[leaf].put(Leaf(entry, shape, inputs=len(shape) - 1))
    for part in family.parts(config):
        entry = tensors.check(part.name, _on_disk(part.tensor, part.shapes))
        for name, piece in zip(part.tensor.leaves, _leaves(part.tensor, entry, part.shapes)):
            out["layers", name].put(piece, part.at)
    return unflatten_dict({leaf: filling.array() for leaf, filling in out.items()}), config


def save(path, params, config: Config, tokenizer=None, *, overwrite=False, keep=()):
    """Writes a folder that ``transformers.AutoModelForCausalLM.from_pretrained`` and vLLM load.

    Of a model that scores texts, one for ``AutoModelForSequenceClassification``, with one label.

    The folder appears whole or not at all: everything is written beside it, read back, and renamed.

    Args:
      path: the folder to make.
      params: the tree of ``init`` or ``load``.
      config: its model.
      tokenizer: a transformers tokenizer to put beside the weights, or None.
      overwrite: whether an existing folder may be replaced.
      keep: names of files that a replaced folder passes on, such as logs.

    Raises:
      ValueError: the folder exists and is not empty, or cannot be written; the parameters are not this model's; the
        tokenizer has ids that the embedding has not; or transformers has no class for such a model.
    """
    _check_tree(params, config)
    if config.head == "score" and families.FAMILIES[config.family].classifier is None:
        raise ValueError(
            f"{path}: transformers has no class for scores of the family {config.family}, so none is saved"
        )
    if tokenizer is not None:
        vocabulary.check(tokenizer, config, path)
    dtype = str(params["embed"].dtype)
    with folders.appear_whole(path, overwrite=overwrite, keep=keep) as folder:
        (folder / "config.json").write_text(json.dumps(to_json(config, dtype), indent=2) + "\n")
        if config.head == "tokens":
            generation = {"bos_token_id": config.bos_token, "eos_token_id": list(config.end_tokens) or None}
            generation |= {"pad_token_id": config.pad_token}
            generation = {k: v for k, v in generation.items() if v is not None}
            (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
        _check_said(path, config, read_config(folder))
        write(folder, _made(params, config))
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def read_config(path) -> Config:
    """The model that a folder's config.json describes; see ``load`` for what is refused."""
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give a local folder with config.json and model.safetensors")
    file = folder / "config.json"
    if not file.is_file() and (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder}: is a PEFT folder of an adapter; read the model it is of, and it by models.peft.load"
        )
    if not file.is_file():
        raise ValueError(f"{folder}: has no config.json, so it is not a model folder")
    given = read_json(file)
    name = given.get("model_type")
    if not isinstance(name, str) or name not in families.FAMILIES:
        known = ", ".join(sorted(families.FAMILIES))
        raise ValueError(f"{file}: model_type is {name!r}; this version knows {known}")
    family = families.FAMILIES[name]
    generation = folder / "generation_config.json"
    ends = (read_json(generation) if generation.is_file() else {}).get("eos_token_id", given.get("eos_token_id"))
    fields = Fields(family.defaults | given, file)
    fields.must_be("is_causal", True)
    try:
        common = _gpt2_names(fields) if name == "gpt2" else _common(fields, family)
        return Config(
            family=name,
            bos_token=fields.get("bos_token_id"),
            end_tokens=() if ends is None else tuple(ends) if isinstance(ends, list) else (ends,),
            pad_token=fields.get("pad_token_id"),
            tied=bool(fields.get("tie_word_embeddings", False)),
            head=_head(fields, family),
            **common | {"qk_norm": False} | family.choices(fields),
        )
    except (TypeError, AttributeError, KeyError) as e:
        raise ValueError(f"{file}: has a field of another form than expected ({type(e).__name__}: {e})") from e
    except ValueError as e:
        raise e if str(e).startswith(str(file)) else ValueError(f"{file}: {e}") from e


CLASSIFIER = "ForSequenceClassification"  # what transformers calls models that give a text a number for each label


def _head(fields, family):
    named = (fields.get("architectures") or [""])[0]
    if not named.endswith(CLASSIFIER):
        return "tokens"
    if family.classifier is None:
        raise ValueError(f"{fields.file}: architectures is {named}; transformers has no such class for this family")
    labels = len(fields["id2label"]) if fields.get("id2label") else fields.get("num_labels", 2)
    if labels != 1:
        raise ValueError(f"{fields.file}: {named} with {labels} labels; only one, a reward or a value, is computed")
    return "score"


def _common(fields, family) -> dict:
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
        "activation": activation(fields, "hidden_act"),
    }
    return out | rope(fields, partial=family.partial_rope)


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
    if config.head == "score":
        out |= {"architectures": [family.classifier], "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
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
        } | rope_fields(config, partial=family.partial_rope)
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


def opened(folder) -> tuple[Config, Tensors]:
    """The model of a folder and its tensors, whose names, shapes and types are all checked; no numbers are read."""
    config = read_config(folder)
    family = families.FAMILIES[config.family]
    tensors = Tensors(folder, family.ignored)
    tensors.prefixed(family.whole["embed"])
    shapes = parameters.shapes(config)
    for leaf, shape in shapes.items():
        if leaf != "layers":
            tensors.check(family.whole[leaf], _whole_on_disk(leaf, shape))
    for part in family.parts(config):
        tensors.check(part.name, _on_disk(part.tensor, part.shapes))
    if config.tied and family.whole["unembed"] in tensors:
        tensors.check(family.whole["unembed"], shapes["embed"])
    tensors.all_taken()
    return config, tensors


def _check_tied(folder, tensors, family):
    """A file may hold the unembedding though it is tied; then it must be the embedding."""
    name = family.whole["unembed"]
    if name in tensors and not tensors.same(name, family.whole["embed"]):
        raise ValueError(f"{folder}: config.json ties the embeddings, but {name} differs from the embedding")


def _whole_on_disk(leaf, shape):
    """The shape of a tensor that is no layer's: a head is a product with one output."""
    return (1, *shape) if leaf == "score" else shape


def _on_disk(tensor, shapes):
    """The shape of a tensor that holds leaves of these shapes side by side."""
    if not tensor.inputs and tensor.out_in:
        return (sum(int(np.prod(shape)) for shape in shapes),)
    rows = int(np.prod(shapes[0][: tensor.inputs]))
    columns = sum(int(np.prod(shape[tensor.inputs :])) for shape in shapes)
    return (columns, rows) if tensor.out_in else (rows, columns)


def _leaves(tensor, entry, shapes):
    """The leaves of a tensor, which are read later."""
    ends = np.cumsum([0, *(math.prod(shape[tensor.inputs :]) for shape in shapes)]).tolist()
    turned = tensor.inputs > 0 and tensor.out_in
    return [Leaf(entry, shape, tensor.inputs, first, turned) for shape, first in zip(shapes, ends)]


def _joined(tensor, leaves):
    """The tensor of some leaves: the inverse of ``_leaves``."""
    if not tensor.inputs and tensor.out_in:
        return np.concatenate([leaf.reshape(-1) for leaf in leaves])
    rows = int(np.prod(leaves[0].shape[: tensor.inputs]))
    whole = np.concatenate([leaf.reshape(rows, -1) for leaf in leaves], -1)
    return whole.T if tensor.out_in else whole


def _made(params, config):
    """The tensors as they go on disk, one at a time."""
    family = families.FAMILIES[config.family]
    for leaf, name in family.whole.items():
        if leaf in params:
            x = params[leaf]
            yield Made(name, _whole_on_disk(leaf, x.shape), np.dtype(x.dtype), partial(_fetched, x))
    for part in family.parts(config):
        stacks = [params["layers"][leaf] for leaf in part.tensor.leaves]
        dtype = np.result_type(*(np.dtype(stack.dtype) for stack in stacks))
        yield Made(part.name, _on_disk(part.tensor, part.shapes), dtype, partial(_of_layer, stacks, part))


def _fetched(x):
    """An array of the host; of a copy, because an array of a device keeps what was fetched of it."""
    return np.asarray(jnp.copy(x) if isinstance(x, jax.Array) else x)


def _of_layer(stacks, part):
    return _joined(part.tensor, [np.asarray(stack[part.at]) for stack in stacks])


def _fillings(shapes, dtype, place, how):
    types = {leaf: parameters.type_of(leaf[-1], dtype) for leaf in shapes}
    tree = unflatten_dict({leaf: jax.ShapeDtypeStruct(shape, types[leaf]) for leaf, shape in shapes.items()})
    if how is not None:
        tree = jax.eval_shape(partial(quantize_tree, how=how), tree)
    place = partial(jax.tree.map, lambda _: default_sharding()) if place is None else place
    forms, shardings = flatten_dict(tree), flatten_dict(place(tree))
    return {
        leaf: QuantizedFilling(leaf[-1], form, shardings[leaf], how)
        if isinstance(form, linear.Weight)
        else Filling(form.shape, form.dtype, shardings[leaf])
        for leaf, form in forms.items()
    }


def _check_said(path, config, found):
    """A family's fields say only what its own models differ in; for what it cannot say, readers take its default."""
    wanted, found = _shortest(config), _shortest(found)
    for name, value in wanted.items():
        got = found[name]
        if value != got and not (isinstance(value, float) and isinstance(got, float) and math.isclose(value, got)):
            raise ValueError(
                f"{path}: {name} is {value!r}, which a config.json of the family {config.family} cannot say; it would "
                f"be read as {got!r}"
            )


def _shortest(config):
    """The fields of a config, () where all layers have what they would have without, and no width of no network."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    hidden = fields.pop("hidden")
    same = {"windows": not any(config.windows), "rope_layers": all(config.rope_layers)}
    same |= {"expert_layers": all(config.expert_layers)}
    fields |= {name: () for name, is_same in same.items() if is_same}
    return fields | {"hidden": None if all(config.has_experts) else hidden}


def _check_tree(params, config):
    """A folder whose config.json does not speak of its weights looks like a good one until it is read."""
    given, expected = flatten_dict(params, sep="/"), flatten_dict(parameters.shapes(config), sep="/")
    for name, w in given.items():
        if isinstance(w, linear.Weight):
            raise ValueError(
                f"params[{name!r}] is {type(w).__name__}, a folder holds plain weights: save the adapters alone, or "
                "quantize.dequantize and lora.fold first"
            )
    for name in sorted(expected.keys() ^ given.keys()):
        who = "the config has none" if name in given else "the config asks for it"
        raise ValueError(f"params {'has' if name in given else 'lacks'} {name}, but {who}")
    for name, shape in expected.items():
        if given[name].shape != shape:
            raise ValueError(f"params[{name!r}] has shape {given[name].shape}, the config asks for {shape}")
        if np.dtype(given[name].dtype) not in NAMES:
            raise ValueError(f"params[{name!r}] is of type {given[name].dtype}; a folder holds float types")


def local(path, *, download=True) -> pathlib.Path:
    """The folder itself, or the one that a name on the hub is downloaded to (or was, without ``download``)."""
    folder = pathlib.Path(path)
    if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
        return folder
    from huggingface_hub import snapshot_download

    try:
        kept = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
        return pathlib.Path(snapshot_download(str(path), allow_patterns=kept, local_files_only=not download))
    except Exception as e:  # of the network, the hub and its cache: a dozen kinds
        why = f"{type(e).__name__}: {e}".split("\n")[0]
        where = "from the hub" if download else "from the cache of the hub; models.load downloads it"
        raise ValueError(f"{path}: no such folder, and not to be had {where} ({why})") from e
