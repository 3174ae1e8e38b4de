"""What transformers does to logits, and the texts that it generates, with a tiny model whose weights are large."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pt_jax import models
from pt_jax.sampling import Sampling, beam_search, sample, scored_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)  # on a busy machine, two threads that wait for each other take a hundred times as long

VOCAB, NEW = 23, 20
PROMPTS = np.random.default_rng(0).integers(3, VOCAB, (4, 6)).astype(np.int32)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The torch model, and ours from its folder."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, bos_token_id=1, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.5 + (p.ndim < 2))
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, *models.load(folder)


def generated(model, prompts=PROMPTS, **more):
    tokens = torch.from_numpy(prompts).long()
    more = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | more
    with torch.no_grad():
        return model.generate(tokens, attention_mask=torch.ones_like(tokens), **more)[:, prompts.shape[1] :].numpy()


@pytest.mark.parametrize("penalty", [0.4, 1.0, 1.3, 5.0])
def test_the_repetition_penalty(penalty):
    """Of rows without padding: transformers counts the pad token among what was there before."""
    rng = np.random.default_rng(3)
    logits, tokens = rng.normal(0, 3, (2, 7, 9)).astype(np.float32), rng.integers(0, 9, (2, 7))
    mask = np.arange(7) >= np.array([[3], [5]])
    how = Sampling(repetition_penalty=penalty)
    got = scored_logits(jnp.asarray(logits), tokens, np.ones_like(mask), mask, how)
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    for t in range(7):
        expected = processor(torch.from_numpy(tokens[:, : t + 1]), torch.from_numpy(logits[:, t]))
        np.testing.assert_allclose(got[:, t], expected, rtol=1e-6)


def test_the_order_of_all_that_transformers_has():
    """Its processors and warpers in its order, as ``generate`` calls them."""
    rng = np.random.default_rng(3)
    logits, tokens = rng.normal(0, 3, (3, 12)).astype(np.float32), rng.integers(0, 12, (3, 5))
    config = transformers.GenerationConfig(
        do_sample=True, temperature=0.8, top_k=7, top_p=0.9, min_p=0.02, repetition_penalty=1.4, min_new_tokens=3,
        eos_token_id=4,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=12, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))  # fmt: skip
    model._prepare_special_tokens(config, True)
    processors = model._get_logits_processor(config, input_ids_seq_length=3)
    expected = processors(torch.from_numpy(tokens), torch.from_numpy(logits)).softmax(-1).numpy()
    how = Sampling(0.8, 7, 0.9, 0.02, min_length=3, end_tokens=(4,), repetition_penalty=1.4)
    repeated = np.repeat(logits[:, None], 5, 1)
    mask = np.arange(5) >= np.full((3, 1), 3)
    got = scored_logits(jnp.asarray(repeated), tokens, np.ones_like(mask), mask, how)[:, -1]
    np.testing.assert_allclose(jax.nn.softmax(got), expected, atol=1e-6)
    assert (expected > 0).sum() < 30


def test_greedy_texts_with_a_repetition_penalty(both):
    model, params, config = both
    bound = models.bind(config)
    expected = generated(model, repetition_penalty=1.6)
    assert (expected != generated(model)).any(1).all()
    got = sample(
        params, PROMPTS, np.ones_like(PROMPTS, bool), jax.random.key(0), apply=bound.apply,
        init_cache=bound.init_cache, length=NEW, end_tokens=(-1,), pad_token=0,
        how=Sampling(0.0, repetition_penalty=1.6),
    ).tokens  # fmt: skip
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("ends", [[9, 21], [0, 5]], ids=str)
@pytest.mark.parametrize(
    "more",
    [
        {"num_beams": 3}, {"num_beams": 3, "length_penalty": -0.7}, {"num_beams": 3, "length_penalty": 2.5},
        {"num_beams": 6}, {"num_beams": 3, "min_new_tokens": 4, "repetition_penalty": 1.4},
    ],
    ids=str,
)  # fmt: skip
def test_beam_search(both, more, ends):
    """All beams, their order and their scores; rows end at different lengths."""
    model, params, config = both
    bound, K, penalty = models.bind(config), more["num_beams"], more.get("length_penalty", 1.0)
    tokens = torch.from_numpy(PROMPTS).long()
    with torch.no_grad():
        out = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=NEW, do_sample=False, pad_token_id=1,
            eos_token_id=ends, num_return_sequences=K, return_dict_in_generate=True, output_scores=True, **more,
        )  # fmt: skip
    expected = out.sequences[:, PROMPTS.shape[1] :].numpy()
    how = Sampling(repetition_penalty=more.get("repetition_penalty"))
    if "min_new_tokens" in more:
        how = how.replace(min_length=more["min_new_tokens"], end_tokens=jnp.array(ends))
    got, scores = beam_search(
        params, PROMPTS, np.ones_like(PROMPTS, bool), apply=bound.apply, init_cache=bound.init_cache, length=NEW,
        end_tokens=ends, pad_token=1, beams=K, how=how, length_penalty=penalty,
    )  # fmt: skip
    got = jax.tree.map(np.asarray, got)
    np.testing.assert_array_equal(got.tokens[:, : expected.shape[1]], expected)
    lengths = got.alive.sum(1)
    assert lengths.max() == expected.shape[1] and len(set(lengths.tolist())) > 1 and got.ended.any()
    np.testing.assert_allclose(np.ravel(scores), out.sequences_scores, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.logps.sum(1) / lengths**penalty, np.ravel(scores), rtol=1e-4)
