"""Who sees whom, by brute force; and texts that share a row, or a beginning, as if each stood alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import jit

from pt_jax.models import apply, init, init_cache, visibility
from pt_jax.models.config import Config, RopeScaling

SIZES = {"vocab": 29, "layers": 3, "width": 20, "heads": 6, "kv_heads": 2, "head_width": 4, "hidden": 18, "eps": 1e-2}
KINDS = {
    "two windows, two ropes, caps": Config(
        **SIZES, windows=(3, 0, 5), local_rope_base=50.0, rope_base=5e5, norm="rms_plus_one", norms="both",
        activation="gelu_tanh", embed_scale=4.5, attention_softcap=2.0, logit_softcap=5.0,
    ),
    "learned positions": Config(
        **SIZES | {"kv_heads": 6}, learned_positions=True, max_length=24, norm="layer", gated=False, qk_norm=False,
        qkv_bias=True, out_bias=True, mlp_bias=True, scale_by_layer=True, activation="gelu",
    ),
    "one window, a layer without positions": Config(
        **SIZES, windows=(4, 4, 4), rope_layers=(True, False, True), tied=False, rope_interleaved=True,
    ),
    "experts": Config(
        **SIZES, experts=5, experts_per_token=2, expert_hidden=6, expert_layers=(False, True, True), shared_hidden=4,
        router_bias=True, expert_floor=1e-6,
    ),
}  # fmt: skip
B, T = 6, 24
LENGTHS = (9, 5, 1, 13, 7, 2)
ROWS = [(0, 3, 5), (1, 2, 4)]  # which texts share a row; the first is full, four rows are empty
RNG = np.random.default_rng(3)
TEXTS = [RNG.integers(0, SIZES["vocab"], n) for n in LENGTHS]


@functools.cache
def weights(config):
    """Far from the initial ones, norms, biases and routers too."""
    rng = np.random.default_rng(0)
    shift = lambda path, x: np.float32(path[-1].key.endswith("norm") and config.norm != "rms_plus_one")
    return jax.tree_util.tree_map_with_path(
        lambda path, x: (shift(path, x) + 0.4 * rng.normal(size=x.shape)).astype(np.float32),
        jax.eval_shape(lambda: init(config, jax.random.key(0))),
    )


@functools.partial(jit, static_argnums=0)
def scored(config, params, tokens, seen, targets):
    """The summed NLL of what is to follow each token (-1: nothing), its gradient, and the logits."""

    def nll(params):
        logits = apply(config, params, tokens, seen)[0]
        logps = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[..., None], 2)[..., 0]
        return -jnp.where(targets >= 0, logps, 0).sum(), logits

    (loss, logits), gradient = jax.value_and_grad(nll, has_aux=True)(params)
    return loss, gradient, logits


def rows(groups, fill=11):
    """Texts laid side by side: tokens, the numbers of the texts, what follows, and where each text stands."""
    tokens, seen, targets = np.full((B, T), fill, np.int32), np.zeros((B, T), np.int32), np.full((B, T), -1, np.int32)
    places = {}
    for row, group in enumerate(groups):
        at = 0
        for number, i in enumerate(group, 1):
            place = slice(at, at := at + len(TEXTS[i]))
            tokens[row, place], seen[row, place], places[i] = TEXTS[i], number, (row, place)
            targets[row, place] = [*TEXTS[i][1:], -1]
    return tokens, seen, targets, places


def close(got, expected, share=1e-5):
    np.testing.assert_allclose(got, expected, rtol=0, atol=share * np.abs(expected).max())


@functools.cache
def alone(config):
    tokens, seen, targets, places = rows([[i] for i in range(len(TEXTS))])
    return *scored(config, weights(config), tokens, seen > 0, targets), places


# ---- packed


@pytest.mark.parametrize("kind", KINDS)
def test_a_packed_text_has_the_logits_and_the_gradient_of_the_text_alone(kind):
    config = KINDS[kind]
    loss, gradient, logits, places = alone(config)
    tokens, seen, targets, packed_places = rows(ROWS)
    packed_loss, packed_gradient, packed_logits = scored(config, weights(config), tokens, seen, targets)
    np.testing.assert_allclose(packed_loss, loss, rtol=1e-5)
    for i in range(len(TEXTS)):
        close(packed_logits[packed_places[i]], logits[places[i]])
    for (path, got), expected in zip(jax.tree_util.tree_leaves_with_path(packed_gradient), jax.tree.leaves(gradient)):
        if config.learned_positions and path[-1].key == "wk_bias":
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)  # 0 but for rounding: softmax does not see it
            continue
        if path[-1].key != "router_bias":  # it only chooses
            assert np.abs(expected).max() > 1e-3, path
        close(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_changes_nothing_in_its_neighbours(kind):
    """Bit for bit; and what stands in padding changes nothing either."""
    config = KINDS[kind]
    tokens, seen, targets, places = rows(ROWS)
    before = np.asarray(scored(config, weights(config), tokens, seen, targets)[2])
    row, place = places[3]  # the middle one of three
    changed = np.where(seen == 0, 28, tokens)
    changed[row, place] = (changed[row, place] + 5) % config.vocab
    after = np.asarray(scored(config, weights(config), changed, seen, targets)[2])
    for i in (0, 5, 1, 2, 4):
        np.testing.assert_array_equal(after[places[i]], before[places[i]])
    assert (after[places[3]] != before[places[3]]).any(-1).all()


# ---- a shared beginning

PROMPTS, ANSWERS = (5, 8), ((6, 1, 9), (4, 7))
PROMPT = [RNG.integers(0, 29, n) for n in PROMPTS]
ANSWER = [[RNG.integers(0, 29, n) for n in lengths] for lengths in ANSWERS]


def shared(pad_left=2):
    """[prompt | answer 1 | answer 2 ...], one document a row, and one row with both: padding in front and behind."""
    tokens, seen = np.full((B, T + 19), 11, np.int32), np.zeros((B, T + 19, 2), np.int32)
    places = {}
    for row, documents in enumerate([(0,), (1,), (1, 0)]):
        at = pad_left
        for document in documents:
            for branch, text in enumerate([PROMPT[document], *ANSWER[document]]):
                place = slice(at, at := at + len(text))
                tokens[row, place], seen[row, place] = text, (document + 1, branch)
                places[row, document, branch] = place
    return tokens, seen, places


@pytest.mark.parametrize("kind", KINDS)
def test_answers_behind_one_prompt_have_the_logits_of_rows_of_their_own(kind):
    config = KINDS[kind]
    apart, seen, where = np.zeros((B, T), np.int32), np.zeros((B, T), bool), {}
    for row, (document, branch) in enumerate((d, b) for d in (0, 1) for b in range(len(ANSWERS[d]))):
        text = [*PROMPT[document], *ANSWER[document][branch]]
        apart[row, : len(text)], seen[row, : len(text)], where[document, branch + 1] = text, True, row
    nothing = np.full((B, T), -1, np.int32)
    expected = np.asarray(scored(config, weights(config), apart, seen, nothing)[2])
    tokens, branches, places = shared()
    got = np.asarray(scored(config, weights(config), tokens, branches, np.full(tokens.shape, -1))[2])
    for (row, document, branch), place in places.items():
        start = PROMPTS[document] if branch else 0
        of_text = expected[where[document, max(branch, 1)], start : start + place.stop - place.start]
        np.testing.assert_allclose(got[row, place], of_text, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_numbers_of_texts_are_branches_that_are_all_beginnings():
    config = KINDS["two windows, two ropes, caps"]
    tokens, seen, _, _ = rows(ROWS)
    of = lambda seen: apply(config, weights(config), tokens, seen)[0]
    np.testing.assert_array_equal(of(seen), of(np.stack([seen, np.zeros_like(seen)], -1)))


def test_an_attention_mask_of_0_and_1_is_one_text_a_row():
    """What transformers calls ``attention_mask`` is whole numbers, and means the same here."""
    config = KINDS["one window, a layer without positions"]
    tokens, seen, _, _ = rows([[i] for i in range(len(TEXTS))])
    of = lambda seen: np.asarray(apply(config, weights(config), tokens, seen)[0])
    np.testing.assert_array_equal(of(seen)[seen > 0], of(seen > 0)[seen > 0])


def test_longrope_chooses_by_the_length_of_the_row():
    """As it does for a text alone: a packed text equals the same text in an array of the same length, and no other."""
    scaling = RopeScaling("longrope", 1.0, original=10, short=(1.0, 1.1), long=(2.0, 3.0))
    config = Config(**SIZES, rope_scaling=scaling)
    tokens, seen, _, places = rows(ROWS)
    packed = apply(config, weights(config), tokens, seen)[0]
    row, place = places[0]
    alone = lambda length: apply(
        config, weights(config), np.pad(TEXTS[0], (0, length - 9))[None], np.arange(length)[None] < 9
    )[0][0, :9]
    close(packed[row, place], alone(T))
    assert np.abs(packed[row, place] - alone(10)).max() > 0.01


# ---- sight by brute force


def brute(text, branch, q, k):
    """Whether column q of a row sees column k."""
    return k <= q and text[q] == text[k] != 0 and branch[k] in (0, branch[q])


@pytest.mark.parametrize("form", ["one text", "texts", "branches"])
def test_sight_is_what_a_loop_says(form):
    rng, n = np.random.default_rng(5), 9
    if form == "one text":
        text = rng.integers(0, 2, (40, n))  # on the left, on the right, everywhere, nowhere
        text[:10] = np.arange(n) >= np.arange(10)[:, None]
        text[10:20] = np.arange(n) < np.arange(10)[:, None]
    else:
        text = rng.integers(0, 3, (40, n))
        text[:20] = np.sort(text[:20])
    branch = rng.integers(0, 3, text.shape) if form == "branches" else np.zeros_like(text)
    seen = {"one text": text > 0, "texts": text, "branches": np.stack([text, branch], -1)}[form]
    seen = jnp.asarray(seen, bool if form == "one text" else jnp.int32)
    view = jax.tree.map(np.asarray, visibility.sight(seen))
    for row in range(len(text)):
        for q in range(n):
            sees = [k for k in range(n) if brute(text[row], branch[row], q, k)]
            if text[row, q]:
                assert np.flatnonzero(view.visible[row, 0, q]).tolist() == sees
                assert view.position[row, q] == len(sees) - 1
            elif form != "one text":
                assert not view.visible[row, 0, q].any()
            for k in sees if text[row, q] else []:  # how many of the tokens that q sees are behind k
                behind = len(sees) - 1 - sum(brute(text[row], branch[row], k, j) for j in range(n)) + 1
                assert view.behind[row, 0, q, k] == behind
    assert view.position.min() >= 0


def test_to_front_puts_what_is_seen_in_front_in_order_and_back():
    seen = jnp.asarray(np.random.default_rng(2).integers(0, 2, (20, 9)) > 0)
    tokens = jnp.arange(180).reshape(20, 9)
    order, back = visibility.to_front(seen)
    front = visibility.arranged(tokens, order)
    for row in range(20):
        assert front[row, : seen[row].sum()].tolist() == tokens[row][seen[row]].tolist()
    np.testing.assert_array_equal(visibility.arranged(front, back), tokens)
    deep = jnp.stack([tokens, -tokens])[..., None]
    np.testing.assert_array_equal(visibility.arranged(deep, order, 1)[1, ..., 0], -front)


# ---- mistakes


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        (
            np.ones((2, 4), np.float32),
            r"^seen is of type float32; give bool \(not padding\), or int32 numbers of texts$",
        ),
        (np.ones((2, 4), np.int8), "^seen is of type int8"),
        (
            np.ones((2, 4, 2), bool),
            r"^seen has shape \(2, 4, 2\) and type bool; with three axes it is \[B, T, 2\] int32",
        ),
        (np.ones((2, 4, 3), np.int32), r"^seen has shape \(2, 4, 3\)"),
        (
            np.ones((2, 5, 2), np.int32),
            r"^seen has shape \(2, 5, 2\), expected \[B, T, two\] with T=4 \(from tokens\)$",
        ),
    ],
)
def test_a_seen_that_says_nothing_is_refused(seen, message):
    config = KINDS["experts"]
    with pytest.raises(ValueError, match=message):
        apply(config, weights(config), np.zeros((2, 4), np.int32), seen)


def test_packed_rows_have_no_cache():
    config = KINDS["experts"]
    with pytest.raises(ValueError, match="seen numbers the texts of packed rows, which have no cache"):
        apply(config, weights(config), np.zeros((2, 4), np.int32), np.ones((2, 4), np.int32), init_cache(config, 2, 8))
