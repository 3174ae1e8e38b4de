"""Scores of transformers' sequence classifiers with one label, of all families that have that class."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from model_cases import CASES
from safetensors.numpy import load_file, save_file

from pt_jax.models import families, heads, load, save

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

VOCAB, PAD = 37, 0
FIRST = {family: next(case for case in CASES if CASES[case][0] == family) for family, _ in CASES.values()}
SCORED = {family: case for family, case in FIRST.items() if families.FAMILIES[family].classifier}
# torch's grouped product wants multiples of 16 bytes
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
LENGTHS = (9, 4, 1, 7)

jit = functools.partial(small_models.jit, static_argnums=0)


def make(case, folder, labels=1, seed=0):
    """A classifier of torch far from its initial weights, saved to this folder."""
    family, fields = CASES[case]
    config = transformers.AutoConfig.for_model(
        family, vocab_size=VOCAB, dtype="float32", bos_token_id=1, eos_token_id=None, pad_token_id=PAD,
        num_labels=labels, **copy.deepcopy(fields),
    )  # fmt: skip
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(folder)
    draw = np.random.RandomState(seed).standard_normal
    around = lambda name, x: 1.0 if x.ndim == 1 and not name.endswith("bias") else 0.0
    held = sorted(load_file(f"{folder}/model.safetensors").items())
    held = {name: (around(name, x) + 0.3 * draw(x.shape)).astype(np.float32) for name, x in held}
    save_file(held, f"{folder}/model.safetensors", {"format": "pt"})
    return type(model).from_pretrained(folder, **EAGER).eval()


def batch(side, lengths=LENGTHS, seed=7):
    """Tokens that are never the pad token where they are seen, and always where they are not: torch looks at that."""
    rng = np.random.default_rng(seed)
    column = np.arange(max(lengths))
    seen = column < np.array(lengths)[:, None]
    seen = np.ascontiguousarray(seen[:, ::-1]) if side == "left" else seen
    return np.where(seen, rng.integers(PAD + 1, VOCAB, seen.shape), PAD).astype(np.int32), seen


def of_torch(model, tokens, seen):
    position = np.maximum(np.cumsum(seen, 1) - 1, 0)
    tokens, seen, position = (torch.from_numpy(np.ascontiguousarray(x)).long() for x in (tokens, seen, position))
    return model(tokens, attention_mask=seen, position_ids=position, use_cache=False).logits[:, 0]


def close(got, expected, share=2e-5):
    expected = np.asarray(expected)
    np.testing.assert_allclose(got, expected, rtol=0, atol=share * np.abs(expected).max())


rewards = jit(heads.rewards)
gradient = jit(jax.grad(lambda config, *a: jnp.square(heads.rewards(config, *a) - 1).sum(), 1))


@pytest.fixture(scope="module", params=SCORED.values())
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    return make(request.param, folder), *load(folder)


def test_the_reward_is_the_logit_of_the_label(both):
    model, params, config = both
    assert config.head == "score"
    for side in ("left", "right"):
        tokens, seen = batch(side)
        with torch.no_grad():
            expected = of_torch(model, tokens, seen).numpy()
        assert np.abs(expected).max() > 0.5 and len(np.unique(expected)) == len(LENGTHS)
        close(rewards(config, params, tokens, seen), expected)


def test_what_we_save_transformers_loads(both, tmp_path):
    _, params, config = both
    params = jax.tree.map(lambda x: x * 1.01, params)
    save(tmp_path / "ours", params, config)
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "ours", output_loading_info=True, **EAGER
    )
    assert not any(report.values()), report
    assert type(model).__name__ == families.FAMILIES[config.family].classifier
    assert (model.config.num_labels, model.config.pad_token_id) == (1, PAD)
    tokens, seen = batch("left")
    with torch.no_grad():
        close(rewards(config, params, tokens, seen), of_torch(model, tokens, seen).numpy())
    again, same = load(tmp_path / "ours")
    assert same == config and jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), again, params))


@pytest.mark.parametrize("case", [FIRST["qwen3"], FIRST["gpt2"]])
def test_gradients_of_all_parameters(case, tmp_path):
    model = make(case, tmp_path)
    params, config = load(tmp_path)
    tokens, seen = batch("left")
    # torch cuts off the gradient of the pad token's embedding, which nothing sees here
    torch.square(of_torch(model, tokens, seen) - 1).sum().backward()
    model.save_pretrained(tmp_path / "gradient", state_dict={n: p.grad for n, p in model.named_parameters()})
    expected, _ = load(tmp_path / "gradient")
    got = gradient(config, params, tokens, seen)
    for (path, g), mine in zip(jax.tree_util.tree_leaves_with_path(expected), jax.tree.leaves(got)):
        if config.learned_positions and path[-1].key == "wk_bias":  # softmax does not see it
            np.testing.assert_allclose(mine, g, rtol=0, atol=1e-5)
            continue
        assert np.abs(g).max() > 1e-4, path
        close(mine, g, 1e-4)


@pytest.mark.parametrize("family", ["ernie4_5", "ernie4_5_moe"])
def test_transformers_has_no_class_for_ernie(family):
    names = transformers.models.auto.modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    assert family not in names and families.FAMILIES[family].classifier is None
    assert all(names[name] == families.FAMILIES[name].classifier for name in SCORED)


def test_where_a_text_ends_in_the_pad_token_transformers_looks_one_token_earlier(tmp_path):
    """With pad == eos the end of every answer is skipped; ``seen`` has it."""
    model = make(FIRST["qwen3"], tmp_path)
    params, config = load(tmp_path)
    tokens, seen = batch("right", lengths=(6, 6))
    tokens[0, 5] = PAD
    with torch.no_grad():
        theirs = of_torch(model, tokens, seen).numpy()
    ours = np.asarray(rewards(config, params, tokens, seen))
    of_tokens = np.asarray(heads.scores(config, params, tokens, seen))
    close(theirs[1], ours[1])
    close(theirs[0], of_tokens[0, 4])
    close(ours[0], of_tokens[0, 5])
    assert abs(ours[0] - theirs[0]) > 0.1


@pytest.mark.parametrize("labels", [2, 3])
def test_more_labels_are_refused(tmp_path, labels):
    make(FIRST["qwen3"], tmp_path, labels)
    with pytest.raises(ValueError, match=rf"json: Qwen3ForSequenceClassification with {labels} labels; only one"):
        load(tmp_path)
