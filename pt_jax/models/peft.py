"""PEFT folders in and out: adapter_config.json and adapter_model.safetensors.

PEFT passes over what it does not find: an adapter whose names are wrong loads as the model without one. Reading is
strict here, in both directions: every tensor is of a product of this model, every adapted product has all its tensors
in all layers, and an option that this version does not compute is refused by name.
"""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pt_jax import folders
from pt_jax.models import families, huggingface, linear, lora, parameters, peft_modules, tensors, vocabulary
from pt_jax.models.config import Config

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
LINEAR = {"a": "lora_A.weight", "b": "lora_B.weight", "m": "lora_magnitude_vector"}
EMBEDDING = {"b": "lora_embedding_A", "a": "lora_embedding_B"}  # what is looked up comes first
COPY = "base_layer.weight"  # of an embedding, which PEFT puts beside its adapter

# fields that change nothing of what an adapter computes, or that are read
KNOWN = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "target_modules", "exclude_modules",
    "layers_pattern", "fan_in_fan_out", "init_lora_weights", "ensure_weight_tying", "megatron_core",
    "qalora_group_size", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
    "lora_dropout",  # of training alone; there is none here
}  # fmt: skip
STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # other ways to begin change the base's weights as well


def is_adapter(path) -> bool:
    """Whether a folder holds an adapter, and no model of its own."""
    folder = pathlib.Path(path)
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base(path) -> str:
    """The model that an adapter is of: a folder, or a name on the hub.

    A relative path is looked for from the adapter's folder, and then from the one that the program runs in.

    Raises:
      ValueError: the adapter does not name one.
    """
    folder = huggingface.local(path)
    name = _fields(folder / CONFIG).get("base_model_name_or_path")
    if not name or not isinstance(name, str):
        raise ValueError(f"{folder / CONFIG}: lacks base_model_name_or_path, the model that the adapter is of")
    beside = folder / name
    return str(beside.resolve()) if beside.is_dir() else name


# ---- reading


def load(path, config: Config, params=None):
    """Reads a PEFT folder.

    Args:
      path: the folder, or its name on the hub.
      config: the model that the adapter is of.
      params: its weights. They are looked at only where the folder holds a copy of the embeddings, which PEFT writes
        with an adapter of theirs: it must be the same.

    Returns:
      adapters (float32) and their ``lora.Adapter``, for ``lora.attach`` and ``lora.fold``.

    Raises:
      ValueError: the adapter is of another model, lacks a tensor or has one that is of nothing, or asks for what is not
        computed; the message names the file and the tensor or the field.
    """
    folder = huggingface.local(path)
    fields, file = _fields(folder / CONFIG), folder / WEIGHTS
    _check_fields(folder / CONFIG, fields)
    if not file.is_file():
        raise ValueError(f"{folder}: has no {WEIGHTS}; other formats are not read, so save it again with a newer PEFT")
    entries = tensors.read_header(file)
    held = {name.removeprefix(PREFIX): entry for name, entry in entries.items() if name.startswith(PREFIX)}
    if len(held) < len(entries):
        raise ValueError(f"{file}: {min(set(entries) - {PREFIX + n for n in held})} does not begin with {PREFIX}")
    reader, adapters, ranks = _Reader(file, held, bool(fields.get("use_dora"))), {}, {}
    for module in peft_modules.modules(config):
        if any(name.startswith(tuple(f"{n}.lora_" for n in module.names)) for name in held):
            ranks[module] = _numbers(folder / CONFIG, fields, module)
            adapters |= reader.adapters(module, config, *ranks[module])
    if config.tied:
        reader.tied(config, adapters, fields)
    reader.copies(config, params)
    if reader.left:
        name = f"{PREFIX}{min(reader.left)}"
        raise ValueError(f"{file}: {name} is of no product of this {config.family}; is the adapter of another model?")
    if not adapters:
        raise ValueError(f"{file}: holds no adapter")
    for module in peft_modules.modules(config):
        if module not in ranks and all(_targets(fields, name) for name in module.names):
            raise ValueError(f"{file}: lacks {PREFIX}{module.names[0]}, which target_modules of {CONFIG} names")
    return unflatten_dict(adapters), _adapter(fields, ranks)


def _fields(file):
    if not file.is_file():
        raise ValueError(f"{file.parent}: has no {file.name}, so it is no PEFT folder")
    return tensors.read_json(file)


def _targets(fields, name) -> bool:
    """Whether PEFT puts an adapter on a module of this name."""
    among = lambda patterns: (
        re.fullmatch(patterns, name)
        if isinstance(patterns, str)
        else any(name == p or name.endswith(f".{p}") for p in patterns or ())
    )
    return bool(among(fields.get("target_modules"))) and not among(fields.get("exclude_modules"))


def _check_fields(file, fields):
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {fields.get('peft_type')!r}; only 'LORA' is computed")
    if fields.get("init_lora_weights", True) not in STARTS:
        raise ValueError(
            f"{file}: init_lora_weights is {fields['init_lora_weights']!r}, which changes the base as well; save it "
            "in PEFT with path_initial_model_for_weight_conversion"
        )
    for name, value in fields.items():
        if name not in KNOWN and value and (name, value) != ("bias", "none"):
            raise ValueError(f"{file}: {name} is {value!r}, which is not computed; fold the adapter with PEFT")
    for name in ("r", "lora_alpha"):
        if not isinstance(fields.get(name), int | float) or fields[name] <= 0:
            raise ValueError(f"{file}: {name} is {fields.get(name)!r}, expected a number above 0")


def _numbers(file, fields, module):
    """Rank and alpha of a module, which must be the same in all layers."""
    out = set()
    for name in module.names:
        of = lambda field, default, name=name: next(
            (value for key, value in (fields.get(field) or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default
        )
        out.add((of("rank_pattern", fields["r"]), float(of("alpha_pattern", fields["lora_alpha"]))))
    if len(out) > 1:
        raise ValueError(f"{file}: rank_pattern or alpha_pattern gives {module.target} another one in some layers")
    return out.pop()


def _adapter(fields, ranks):
    """The record of an adapter with these ranks and alphas."""
    rank, alpha = fields["r"], float(fields["lora_alpha"])
    of = {leaf: numbers for module, numbers in ranks.items() for leaf in module.leaves}
    return lora.Adapter(
        rank, alpha, tuple(name for name in parameters.PRODUCTS if name in of),
        rslora=bool(fields.get("use_rslora")), dora=bool(fields.get("use_dora")),
        overrides=tuple((leaf, *numbers) for leaf, numbers in of.items() if numbers != (rank, alpha)),
    )  # fmt: skip


class _Reader:
    """The tensors of a file, and which of them are left."""

    def __init__(self, file, entries, dora):
        self.file, self.entries, self.left, self.dora = file, entries, set(entries), dora

    def take(self, name, shape):
        """A tensor as float32."""
        if name not in self.entries:
            raise ValueError(f"{self.file}: lacks {PREFIX}{name}, though it has others of this kind")
        entry = self.entries[name]
        if entry.shape != tuple(shape):
            raise ValueError(
                f"{self.file}: {PREFIX}{name} has shape {entry.shape}; the model and the ranks of {CONFIG} ask for "
                f"{tuple(shape)}"
            )
        self.left.discard(name)
        return tensors.numbers(entry).astype(np.float32)

    def adapters(self, module, config, rank, alpha):
        """Our arrays of a module, stacked over its layers."""
        sizes = peft_modules.sizes(module, config)
        inputs, outputs = sizes[0].inputs, sum(size.outputs for size in sizes)
        shapes = {"a": (rank, inputs), "b": (outputs, rank)} | ({"m": (outputs,)} if self.dora else {})
        names = LINEAR
        if module.leaves == ("embed",):
            names, shapes = EMBEDDING, {"b": (rank, outputs), "a": (inputs, rank)}
            if self.dora:
                raise ValueError(f"{self.file}: has DoRA of the embedding {PREFIX}{module.names[0]}; use LoRA there")
        out = {}
        for name in module.names:
            for part, shape in shapes.items():
                x = self.take(f"{name}.{names[part]}", shape)
                x = x if module.leaves == ("embed",) or part == "m" else x.T
                ends = np.cumsum([size.outputs for size in sizes])[:-1]
                for size, piece in zip(sizes, [x] * len(sizes) if part == "a" else np.split(x, ends, -1)):
                    out.setdefault((*module.path, size.leaf, part), []).append(piece.reshape(size.shapes[part]))
        stacked = lambda path, x: jnp.asarray(np.stack(x) if path[0] == "layers" else x[0])
        return {path: stacked(path, x) for path, x in out.items()}

    def tied(self, config, adapters, fields):
        """A tied embedding has one adapter, which PEFT writes twice."""
        whole = families.FAMILIES[config.family].whole
        names = [f"{whole['unembed'].removesuffix('.weight')}.{part}" for part in LINEAR.values()]
        mine = {part: adapters.get(("embed", part)) for part in "ab"}
        if mine["a"] is not None and not fields.get("ensure_weight_tying"):
            raise ValueError(
                f"{self.file.parent / CONFIG}: adapts the embedding, which the model ties, without "
                "ensure_weight_tying; here both are one matrix and have one adapter"
            )
        for name, part in zip(names, "ab"):
            if name not in self.entries or mine[part] is None:
                continue
            if not np.array_equal(self.take(name, mine[part].shape[::-1]), mine[part].T):
                raise ValueError(f"{self.file}: {PREFIX}{name} differs from the embedding's, which the model ties")

    def copies(self, config, params):
        """A copy of the base's embeddings must be a copy."""
        for leaf, name in families.FAMILIES[config.family].whole.items():
            name = f"{name.removesuffix('.weight')}.{COPY}"
            if name in self.entries and leaf in ("embed", "unembed"):
                of = "embed" if config.tied else leaf
                given = self.take(name, (config.vocab, config.width))
                if params is None:
                    raise ValueError(f"{self.file}: holds {PREFIX}{name}; give params, to compare it with the base's")
                if not np.array_equal(given, np.asarray(linear.dense(params[of], jnp.float32))):
                    raise ValueError(f"{self.file}: {PREFIX}{name} differs from the base's; fold the adapter with PEFT")


# ---- writing


def save(path, adapters, config: Config, how: lora.Adapter, *, base, tokenizer=None, overwrite=False):
    """Writes a folder that ``peft.PeftModel.from_pretrained`` and vLLM load, whole or not at all.

    Args:
      path: the folder to make.
      adapters: of ``lora.init``, trained.
      config: the model that they are of.
      how: what they are like.
      base: folder or hub name of that model, which the reader of the adapter will look for.
      tokenizer: a transformers tokenizer to put beside the weights, or None.
      overwrite: whether an existing folder may be replaced.

    Raises:
      ValueError: as ``check``; the adapters are not of this model; or the folder exists and is not empty.
    """
    check(config, how)
    lora.attach(_shapes(config), adapters, how)
    if tokenizer is not None:
        vocabulary.check(tokenizer, config, path)
    flat = {name: np.asarray(x, np.float32) for name, x in flatten_dict(jax.device_get(adapters)).items()}
    fields, arrays = _basic_fields(config, how, base), {}
    for module in peft_modules.modules(config):
        there = [leaf for leaf in module.leaves if (*module.path, leaf, "a") in flat]
        if there:
            rank, alpha, of_layers = peft_modules.joined(flat, module, there, config, how)
            fields["target_modules"].append(module.target)
            for field, default, value in (("rank_pattern", how.rank, rank), ("alpha_pattern", how.alpha, alpha)):
                fields[field] |= {} if value == default else {module.target: _whole(value)}
            for name, parts in zip(module.names, of_layers):
                names = EMBEDDING if module.leaves == ("embed",) else LINEAR
                arrays |= {f"{name}.{names[part]}": x for part, x in parts.items()}
    if fields["ensure_weight_tying"]:
        unembed = families.FAMILIES[config.family].whole["unembed"].removesuffix(".weight")
        arrays |= {f"{unembed}.{LINEAR[part]}": flat["embed", part].T for part in "ab"}
    made = [tensors.Made(PREFIX + n, x.shape, x.dtype, lambda x=x: np.ascontiguousarray(x)) for n, x in arrays.items()]
    with folders.appear_whole(path, overwrite=overwrite) as folder:
        tensors.write_file(folder / WEIGHTS, made)
        (folder / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def check(config: Config, how: lora.Adapter) -> None:
    """Fails with a sentence unless PEFT has a form for such adapters; called before long work starts."""
    if config.head != "tokens":
        raise ValueError("an adapter of a model that scores texts has no PEFT folder here; fold it, and save the model")
    names = [path[-1] for path in lora.targeted(_shapes(config), how)]
    for name in names:
        if why := _no_form(config, name):
            others = ", ".join(dict.fromkeys(n for n in names if not _no_form(config, n))) or "none of those given"
            raise ValueError(f"target {name!r}: {why}; target what it has a form for ({others}), or fold the adapters")
    if how.dora:
        for module in peft_modules.modules(config):
            missing = [leaf for leaf in module.leaves if leaf not in names]
            if missing and len(missing) < len(module.leaves):
                raise ValueError(
                    f"target {missing[0]!r} is missing: {config.family} keeps {', '.join(module.leaves)} in one "
                    "matrix, and PEFT's DoRA is of all of it; target them together, or fold the adapters"
                )


def _no_form(config, name) -> str | None:
    """Why PEFT could not read an adapter of this leaf."""
    if peft_modules.of_experts(name):
        return "PEFT has no settled form for adapters of experts and routers"
    if config.experts and name not in ("wq", "wk", "wv", "wo", "embed", "unembed"):
        return "in a model with experts, PEFT takes the adapter of a feed-forward network for one of the experts"
    if name == "embed" and config.tied and config.family == "gpt2":
        return "PEFT adapts only one side of GPT-2's tied embedding, and here it is one matrix"
    return None


def _basic_fields(config, how, base):
    out_in = all(tensor.out_in for tensor in families.FAMILIES[config.family].layer if tensor.inputs)
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "inference_mode": True,
        "r": how.rank, "lora_alpha": _whole(how.alpha), "target_modules": [], "rank_pattern": {}, "alpha_pattern": {},
        "use_rslora": how.rslora, "use_dora": how.dora, "fan_in_fan_out": not out_in, "bias": "none",
        "lora_dropout": 0.0, "init_lora_weights": True, "modules_to_save": None, "layers_to_transform": None,
        "ensure_weight_tying": config.tied and ("embed",) in lora.targeted(_shapes(config), how),
    }  # fmt: skip


def _shapes(config):
    return jax.eval_shape(lambda: parameters.init(config, jax.random.key(0)))


def _whole(x):
    return int(x) if x == int(x) else x
