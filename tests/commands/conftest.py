"""A model folder and data files such as a user has, made small."""

import json

import jax
import pytest

from pt_jax import models
from pt_jax.commands import quickstart_data as world
from pt_jax.data import rows, tokenizers


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A random one-layer model with a tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = tokenizers.train_bpe((row["text"] for row in world.corpus(50, 0)), vocab=300, max_length=96)
    config = models.Config(
        vocab=304, layers=1, width=16, heads=2, kv_heads=1, head_width=8, hidden=24, max_length=96,
        bos_token=tokenizer.bos_token_id, end_tokens=(tokenizer.eos_token_id,), pad_token=tokenizer.pad_token_id,
    )  # fmt: skip
    params = models.init(config, jax.random.key(1))
    params = jax.tree.map(lambda x: x * 4 if x.ndim > 2 else x, params)  # far enough from uniform to tell runs apart
    models.save(path, params, config, tokenizer)
    return path


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Kind of rows -> file."""
    path = tmp_path_factory.mktemp("data")
    kinds = {
        "text": world.corpus(12, 0),
        "completion": world.supervised(0)[::9],
        "preference": world.preferences()[:11],
        "question": world.sums(0, held_out=False)[:10],
        "held_out": world.sums(0, held_out=True)[:5],
    }
    for kind, content in kinds.items():
        rows.write_jsonl(path / f"{kind}.jsonl", content)
    return {kind: str(path / f"{kind}.jsonl") for kind in kinds}


@pytest.fixture(scope="module")
def train(request, options, tmp_path_factory):
    """(command, changes) -> the folder of a run, each run once; of a module with COMMANDS and a fixture ``options``."""
    commands, done = request.module.COMMANDS, {}

    def run(command, **changes):
        name = json.dumps([command, changes], sort_keys=True)
        if name not in done:
            done[name] = tmp_path_factory.mktemp("runs") / "out"
            commands[command][0].run(options(command, done[name], **changes))
        return done[name]

    return run


@pytest.fixture(scope="module")
def programs_are_kept(tmp_path_factory):
    """For tests that start commands again and again: the same few programs are compiled by every run."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.getbasetemp() / "programs"),
        "jax_persistent_cache_min_compile_time_secs": 0.0, "jax_persistent_cache_min_entry_size_bytes": -1,
    }  # fmt: skip
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
