"""What a run reads, and whether that is still what it was begun with."""

import pathlib

import xxhash

from pt_jax.commands import runs
from pt_jax.models import huggingface, peft, tensors
from pt_jax.training import manifests

READ = ("model", "data", "eval_data")  # options that name files; these are compared by what is in them
PIECE = 1 << 16  # bytes of a tensor that are looked at in one place
SAYS = (".json", ".jinja", ".txt", ".model")  # what files of a model folder end in, beside its weights


def noted(options) -> dict[str, str]:
    """A checksum of everything that a run reads, by the name of its option."""
    return {name: content(path) for name, path in options.reads().items()}


def check(meta: dict, options, names=None) -> None:
    """Fails with a sentence when what a run reads is not what it was begun with.

    Args:
      meta: noted when it was begun, with "inputs".
      options: of the run now.
      names: of the options to look at; all when None.
    """
    reads, begun = options.reads(), meta.get("inputs")
    for name in () if begun is None else dict.fromkeys((*begun, *reads)):
        if names is not None and name not in names:
            continue
        flag, path = "--" + name.replace("_", "-"), reads.get(name)
        if name not in begun:
            raise ValueError(f"{flag} {path}: the run was begun without {flag}; a run goes on with the same")
        if path is None:
            raise ValueError(f"no {flag}: the run was begun with {flag}; a run goes on with the same")
        if content(path) != begun[name]:
            raise ValueError(f"{flag} {path} is not what the run was begun with; a run goes on with the same")


def content(path) -> str:
    """A checksum of a file, or of a model folder: config, tokenizer, weights; of an adapter's folder, of its base too.

    Of every tensor no more is read than ``PIECE`` bytes at its beginning, in its middle and at its end, so that it
    takes a moment for a model of any size: another model shows, a byte that has flipped need not.
    """
    if pathlib.Path(path).is_file():
        return manifests.digest(path)
    folder, state = huggingface.local(path, download=False), xxhash.xxh3_128()
    for file in sorted(p for p in folder.glob("*") if p.is_file() and p.name not in runs.LOGS):
        if file.suffix in SAYS:
            state.update(f"{file.name} {manifests.digest(file)} ".encode())
        elif file.suffix == ".safetensors":
            state.update(f"{file.name} {file.stat().st_size} ".encode())
            _add_weights(state, file)
    if peft.is_adapter(folder):
        state.update(content(peft.base(folder)).encode())
    return state.hexdigest()


def _add_weights(state, file) -> None:
    entries = sorted(tensors.read_header(file).items())
    with open(file, "rb") as f:
        for name, entry in entries:
            state.update(f"{name} {entry.dtype} {entry.shape} ".encode())
            last = max(entry.end - PIECE, entry.begin)
            for at in sorted({entry.begin, (entry.begin + last) // 2, last}):
                f.seek(at)
                state.update(f.read(min(PIECE, entry.end - at)))
