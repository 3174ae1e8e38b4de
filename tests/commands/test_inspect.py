"""``pt-jax inspect``: true numbers, from headers alone, and a sentence for a folder that could not be loaded."""

import dataclasses
import json
import shutil

import huggingface_hub.constants
import jax
import numpy as np
import pytest

from pt_jax import cli, models
from pt_jax.commands import inspect
from pt_jax.models import huggingface, lora, parameters, quantize, tensors
from pt_jax.tracking.tables import text

EXPERTS = models.Config(
    vocab=32, layers=3, width=64, heads=4, kv_heads=2, head_width=16, hidden=96, family="qwen3_moe", experts=4,
    experts_per_token=2, expert_hidden=24, expert_layers=(True, False, True), tied=False, max_length=77,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "experts"
    models.save(path, models.init(EXPERTS, jax.random.key(0)), EXPERTS)
    return path


@pytest.fixture
def broken(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "broken")


def hollow(folder, config, dtype=np.float16):
    """A folder whose weights are a header and nothing behind it: a file with a hole."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(huggingface.to_json(config, "float16")))
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x, dtype), parameters.shapes(config), is_leaf=lambda x: isinstance(x, tuple)
    )
    header, at = {}, 0
    for name, shape, *_ in huggingface._made(shapes, config):
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at := at + 2 * int(np.prod(shape))]}
    written = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as f:
        f.write(len(written).to_bytes(8, "little") + written)
        f.truncate(8 + len(written) + at)


def size(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_the_numbers_are_those_of_the_loaded_model(folder):
    found, (params, config) = inspect.examine(folder), models.load(folder)
    assert {n: found[n] for n in dataclasses.asdict(config)} == dataclasses.asdict(config)
    assert found["parameters"] == sum(x.size for x in jax.tree.leaves(params))
    assert found["disk"] == {"float32": size(params)} and found["files"] == 1
    memory = {"float32": size(params), "bfloat16": size(models.load(folder, dtype="bfloat16")[0])}
    for how in (quantize.int8, quantize.nf4, quantize.nf4_double):
        memory[how.__name__] = size(models.load(folder, dtype="bfloat16", quantize=how)[0])
    assert found["memory"] == memory
    # keys and values of 3 layers, 2 heads, 16 wide; a position; two experts of two layers
    numbers = {"float32": 4 * 192, "bfloat16": 2 * 192, "int8": 192 + 4 * 12}
    assert found["cache"] == {dtype: 1000 * (size + 4 + 16) for dtype, size in numbers.items()}


def test_of_the_experts_a_token_goes_through_some(folder):
    found, of_one = inspect.examine(folder), 3 * 64 * 24
    assert found["parameters"] - found["active"] == 2 * (4 - 2) * of_one  # two layers, two of four left out
    assert found["embeddings"] == 2 * 32 * 64


def test_what_an_adapter_would_train(folder):
    how = lora.Adapter(rank=3, targets=("wq", "wo", "expert_down"), dora=True)
    found = inspect.examine(folder, how)
    adapters = lora.init(jax.random.key(0), models.load(folder)[0], how)
    of_leaf = {f"layers.{name}": sum(x.size for x in tree.values()) for name, tree in adapters["layers"].items()}
    assert found["trained"] == of_leaf
    assert of_leaf["layers.wq"] == 3 * (64 * 3 + 3 * 64 + 64)  # A, B and DoRA's m, of three layers
    shown = text(inspect.tables("x", found)[-1])
    assert f"{sum(of_leaf.values()):,}" in shown and f"{100 * of_leaf['layers.wq'] / found['parameters']:.3g}%" in shown


def test_no_number_of_a_tensor_is_read(tmp_path, monkeypatch):
    """A model of 70 billion parameters, of which there is a header on this disk and a hole of 140 GB."""
    config = models.Config(
        vocab=128_256, layers=80, width=8192, heads=64, kv_heads=8, head_width=128, hidden=28_672, tied=False,
        qk_norm=False, max_length=131_072,
    )  # fmt: skip
    hollow(tmp_path / "llama", config)
    monkeypatch.setattr(tensors, "_numbers", None)
    found = inspect.run(inspect.Inspect(model=str(tmp_path / "llama"), lora_rank=16))
    assert found["parameters"] == 70_553_706_496  # Llama 3.1 70B
    assert found["disk"] == {"float16": 2 * found["parameters"]}
    assert found["cache"]["bfloat16"] == 1000 * (2 * 2 * 80 * 8 * 128 + 4)
    assert sum(found["trained"].values()) == 207_093_760  # what PEFT says of rank 16 on all linear layers


def test_what_is_printed(folder, capsys):
    assert cli.main(["inspect", str(folder), "--lora-rank", "2", "--lora-targets", "w[qv]"]) == 0
    shown = capsys.readouterr().out
    for word in ("Qwen3MoeForCausalLM", "longest context", "77", "loaded as nf4", "KiB", "layers.wq", "layers.wv"):
        assert word in shown
    assert "layers.wk" not in shown


def sentence(capsys, *words):
    """Of a command that must fail: its one line on standard error."""
    assert cli.main(["inspect", *map(str, words)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pt-jax: ") and error.count("\n") == 1
    return error


def test_a_broken_folder_gets_a_sentence(broken, capsys):
    file = broken / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    assert f"{file}: cannot be read (" in sentence(capsys, broken)
    file.write_bytes(whole.replace(b"layers.1.mlp.up_proj", b"layers.1.mlp.up_prof"))
    assert "lack the tensor model.layers.1.mlp.up_proj.weight" in sentence(capsys, broken)
    shutil.rmtree(broken)
    assert "no such folder" in sentence(capsys, broken)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"hidden": 97}, "model.layers.1.mlp.gate_proj.weight has shape (96, 64), config.json asks for (97, 64)"),
        ({"layers": 2, "expert_layers": (True, False)}, "unexpected tensor model.layers.2."),
        ({"layers": 4, "expert_layers": (True, False, True, False)}, "lack the tensor model.layers.3."),
        ({"experts": 5}, "model.layers.0.mlp.gate.weight has shape (4, 64), config.json asks for (5, 64)"),
    ],
    ids=str,
)
def test_a_config_of_other_tensors_is_refused_by_their_headers(broken, capsys, change, said):
    fields = huggingface.to_json(dataclasses.replace(EXPERTS, **change), "float32")
    (broken / "config.json").write_text(json.dumps(fields))
    assert said in sentence(capsys, broken)


def test_options_that_do_not_fit(folder, capsys):
    assert "--lora-targets and --dora need --lora-rank" in sentence(capsys, folder, "--lora-targets", "wq")
    assert "rank" in sentence(capsys, folder, "--lora-rank", "0")
    assert "'q_proj' matches none of the products" in sentence(
        capsys, folder, "--lora-rank", "2", "--lora-targets", "q_proj"
    )


def test_a_model_of_the_hub_is_looked_up_where_it_was_downloaded_to(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert "owner/name: no such folder, and not to be had from the cache of the hub" in sentence(capsys, "owner/name")
    commit = "0" * 40
    shutil.copytree(folder, tmp_path / "models--owner--name" / "snapshots" / commit)
    (tmp_path / "models--owner--name" / "refs").mkdir()
    (tmp_path / "models--owner--name" / "refs" / "main").write_text(commit)
    assert inspect.examine("owner/name") == inspect.examine(folder)


def test_a_mesh_that_is_not_there_is_planned(folder, capsys, monkeypatch):
    """Every device has an eighth of the experts, a quarter of other matrices, their moments alike, and all norms."""
    monkeypatch.setenv("COLUMNS", "120")
    assert cli.main(["inspect", str(folder), "--fsdp", "4", "--expert", "2"]) == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.split("\n") if line.strip()}
    number = lambda name, i: int(lines[name][i].replace(",", ""))
    params = models.load(folder)[0]
    assert number("layers.expert_up", -2) == params["layers"]["expert_up"].nbytes
    assert number("layers.expert_up", -1) == params["layers"]["expert_up"].nbytes // 8
    assert number("layers.wq", -1) == params["layers"]["wq"].nbytes // 4
    assert number("norm", -1) == params["norm"].nbytes
    assert number("opt_state", -2) == 2 * size(params) + 4
    assert 2 * size(params) / 8 < number("opt_state", -1) < 2 * size(params) / 3


def test_a_mesh_that_does_not_divide_is_told(folder, capsys):
    assert cli.main(["inspect", str(folder), "--expert", "8"]) == 2
    said = "mesh axis expert=8 does not divide axis 1 of params.layers.expert_down, which is 4"
    assert said in capsys.readouterr().err
