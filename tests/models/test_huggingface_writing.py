"""Model folders: what is written is what was read, whole or not at all."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_folders import MESHED, SMALL, contents, same, tensors_of, write
from safetensors.numpy import load_file

from pt_jax.models import init, load, save, tensors


class Tokenizer:
    def get_vocab(self):
        return {"first": 0, "last": SMALL["vocab_size"] - 1}


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
