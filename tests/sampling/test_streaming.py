"""Sampling in pieces: the tokens are those of ``sample``, and texts stop where they should, whatever the pieces."""

import functools

import jax
import numpy as np
import pytest

from pt_jax.data import tokenizers
from pt_jax.models import Config, bind, init
from pt_jax.sampling import Completions, Sampling, decode, sample, sample_until, stream, streaming, text

V, N = 29, 40
CONFIG = Config(vocab=V, layers=1, width=16, heads=2, kv_heads=1, head_width=8, hidden=16, eps=1e-3, qk_norm=False)
MODEL = bind(CONFIG)
PARAMS = jax.tree.map(lambda x: x * 12 if x.ndim > 2 or x.shape[0] == V else x, init(CONFIG, jax.random.key(0)))
PROMPTS = np.array([[1, 1, 5, 6, 7], [1, 1, 1, 1, 4], [9, 0, 0, 11, 2]], np.int32)
SEEN = np.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]], bool)
HOW = Sampling(0.9, repetition_penalty=1.1)
SETTINGS = {"apply": MODEL.apply, "init_cache": MODEL.init_cache, "length": N, "pad_token": 3, "group": 2, "how": HOW}
ENDS = (3, 17)


def ask(by, **more):
    return by(PARAMS, PROMPTS, SEEN, jax.random.key(3), **SETTINGS | {"end_tokens": ENDS} | more)


@pytest.fixture(scope="module")
def plain():
    out = jax.tree.map(np.asarray, ask(sample))
    assert len(set(out.alive.sum(1))) > 3 and out.ended.any()
    return out


def assert_same(got, expected):
    for name in ("tokens", "alive", "ended"):
        np.testing.assert_array_equal(getattr(got, name), getattr(expected, name), err_msg=name)
    np.testing.assert_allclose(got.logps, expected.logps, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk", [7, 16])
def test_what_is_streamed_is_what_is_sampled(plain, chunk, monkeypatch):
    """Through a cache that grows, with rows that end at many places and a pad token that ends one."""
    monkeypatch.setattr(decode, "rooms_of", lambda read, whole, chunk: [read + 2 * chunk, whole])
    out = ask(sample_until, chunk=chunk)
    assert_same(out, plain)
    assert not out.stopped.any() and set(out.reasons) <= {"end", "length"}


def test_limits_end_a_stream():
    limits = np.array([1, 3, 9, 2, 8, 9])
    parts = list(ask(stream, limits=limits, end_tokens=(-1, -2), chunk=8))
    assert [x.tokens.shape for x in parts] == [(6, 8)] * 2
    assert sum(x.alive.sum(1) for x in parts).tolist() == limits.tolist()
    assert parts[-1].reasons == ["length"] * 6


def test_the_last_piece_is_as_long_as_the_rest():
    parts = list(ask(stream, end_tokens=(-1, -2), chunk=16))
    assert [x.tokens.shape[1] for x in parts] == [16, 16, 8]


def test_a_stream_comes_to_the_host_once_a_chunk(monkeypatch):
    """And ends with its last row."""
    fetched = []
    real = jax.device_get
    monkeypatch.setattr(streaming.jax, "device_get", lambda x: fetched.append(1) or real(x))
    parts = list(ask(stream, chunk=8, limits=np.full(6, 17), end_tokens=(-1, -2)))
    assert len(parts) == 3 and len(fetched) == len(parts)


def test_tokens_are_there_before_all_are_sampled():
    taken = ask(stream, chunk=1, end_tokens=(-1, -2))
    first = next(taken)
    assert first.alive.all() and first.tokens.shape == (6, 1)


@pytest.mark.parametrize("chunk", [1, 8])
def test_rows_that_are_stopped_keep_what_they_said_until_then(plain, chunk):
    """Whatever is drawn between the stop and the next look is taken back; the other rows go on unchanged."""
    common = int(np.bincount(plain.tokens[plain.alive]).argmax())

    def until(tokens):  # after the second time
        at = [i for i, token in enumerate(tokens) if token == common]
        return at[1] + 1 if len(at) > 1 else None

    over = []

    def asked(tokens, before):
        assert not any(tokens[: len(said)] == said for said in over), "a row that is over is asked again"
        assert 0 < len(tokens) - before <= chunk
        count = until(tokens)
        over.extend([] if count is None else [tokens[:count]])
        return count

    out = ask(sample_until, chunk=chunk, until=asked)
    stopped = 0
    for row in range(6):
        said = plain.tokens[row, plain.alive[row]].tolist()
        count = until(said)
        stopped += count is not None
        assert out.stopped[row] == (count is not None)
        assert out.tokens[row, out.alive[row]].tolist() == said[:count]
        assert out.ended[row] == np.isin(said[:count], ENDS).any()
        length = len(said[:count])
        np.testing.assert_array_equal(out.alive[row], np.arange(N) < length)
        np.testing.assert_array_equal(out.tokens[row, length:], 3)
        np.testing.assert_array_equal(out.logps[row, length:], 0)
        np.testing.assert_allclose(out.logps[row, :length], plain.logps[row, :length], rtol=0, atol=1e-5)
    assert stopped > 1 and set(out.reasons) >= {"stop"}


def test_when_all_rows_are_stopped_no_more_steps_are_taken():
    parts = list(ask(stream, chunk=8, end_tokens=(-1, -2), until=lambda tokens, before: 1))
    assert len(parts) == 1 and parts[0].alive.sum() == 6


@pytest.mark.parametrize("count", ["x", True, 1.0])
def test_a_stop_that_is_no_number_of_tokens_is_a_sentence(count):
    parts = ask(stream, chunk=8, end_tokens=(-1, -2), until=lambda tokens, before: count)
    with pytest.raises(
        ValueError, match=f"until must return how many tokens are the completion, or None, got {count!r}"
    ):
        list(parts)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"chunk": 0}, r"chunk must be above 0, got 0"),
        ({"chunk": 17}, r"chunk must be in \[1, 17\), got 17"),
        ({"length": 0}, "length must be above 0"),
        ({"limits": np.ones(5, int)}, r"limits has shape \(5,\)"),
    ],
)
def test_bad_input_is_a_sentence_before_the_first_token(more, message):
    with pytest.raises(ValueError, match=message):
        ask(stream, **more)


# ---- texts


@pytest.fixture(scope="module")
def tokenizer():
    """Of bytes, with few merges: most characters that are not ASCII are several tokens, some words are one."""
    return tokenizers.train_bpe(["the cat sat", "the end of the cat", "stop stop"] * 9, vocab=275)


def saying(tokenizer, sentences):
    """A streamer that says these, in chunks of any size, one a row; and the tokens of the rows."""
    rows = [tokenizer(s, add_special_tokens=False)["input_ids"] for s in sentences]
    length = max(map(len, rows))
    tokens, alive = np.full((len(rows), length), 0, np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], alive[i, : len(row)] = row, True

    def streamer(params, prompts, seen, key, *, chunk, group=1, until=None):
        texts, stopped = [[] for _ in rows], np.zeros(len(rows), bool)
        for first in range(0, length, chunk):
            new = {"tokens": tokens[:, first : first + chunk], "alive": alive[:, first : first + chunk].copy()}
            new["logps"] = np.zeros(new["tokens"].shape, np.float32)
            if until is not None:
                stopped = streaming._stop(until, texts, new, stopped)
            yield Completions(**new, ended=np.zeros(len(rows), bool), stopped=stopped)

    return streamer, rows


SENTENCES = ["the cat sat", "ein Kätzchen saß 🐈‍⬛ da", "the end of the cat", "日本語 stop 日本", ""]


def streamed(streamer, tokenizer, stop=()):
    prompts = [np.array([1])] * len(SENTENCES)
    return list(text.stream_texts(streamer, {}, tokenizer, prompts, None, pad_token=0, stop=stop))


@pytest.mark.parametrize("chunk", [1, 2, 3, 50])
def test_texts_come_whole_in_pieces_that_are_texts(tokenizer, chunk):
    """No character is shown before its last byte, though tokens end within characters."""
    streamer, rows = saying(tokenizer, SENTENCES)
    parts = streamed(functools.partial(streamer, chunk=chunk), tokenizer)
    assert ["".join(row) for row in zip(*parts)] == SENTENCES
    assert not any("\ufffd" in piece for part in parts for piece in part)
    assert max(map(len, rows)) > len(SENTENCES[1])  # of several tokens a character
    assert len(parts) == 1 + -(-max(map(len, rows)) // chunk)


def test_bytes_that_never_become_a_character_are_shown_in_the_end(tokenizer):
    rows = [tokenizer("ä", add_special_tokens=False)["input_ids"][:1]]

    def broken(*a, until, **k):
        tokens = np.array(rows, np.int32)
        yield Completions(tokens, np.zeros((1, 1)), np.ones((1, 1), bool), np.zeros(1, bool), stopped=np.zeros(1, bool))

    parts = list(text.stream_texts(broken, {}, tokenizer, [np.array([1])], None, pad_token=0))
    assert parts == [[""], ["\ufffd"]]


@pytest.mark.parametrize("chunk", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        (("cat",), ["the ", SENTENCES[1], "the end of the ", SENTENCES[3], ""]),
        (("e c", "sat"), ["th", SENTENCES[1], "the end of th", SENTENCES[3], ""]),  # within tokens, over several
        (("🐈‍⬛",), [SENTENCES[0], "ein Kätzchen saß ", SENTENCES[2], SENTENCES[3], ""]),
        (("ß 🐈", "語"), [SENTENCES[0], "ein Kätzchen sa", SENTENCES[2], "日本", ""]),
        (("the end of it", "stop now", "🐈x"), SENTENCES),  # begun and not ended
        (("of the", "f", "d of"), [SENTENCES[0], SENTENCES[1], "the en", SENTENCES[3], ""]),
    ],
    ids=lambda x: "+".join(x) if len(x) < 4 else "",
)
def test_a_text_ends_before_its_stop_string(tokenizer, chunk, stop, expected):
    """And nothing of the stop string was shown before it was whole."""
    streamer, _ = saying(tokenizer, SENTENCES)
    parts = streamed(functools.partial(streamer, chunk=chunk), tokenizer, stop)
    assert ["".join(row) for row in zip(*parts)] == expected


@pytest.mark.parametrize("stop", [("cat",), ("t",), ("ätz",), ("🐈‍⬛", "語")])
def test_tokens_end_with_the_one_that_completes_the_stop_string(tokenizer, stop):
    until = text.stop_at(tokenizer, stop)
    for sentence in SENTENCES:
        tokens = tokenizer(sentence, add_special_tokens=False)["input_ids"]
        count = until(tokens)
        has = lambda n, tokens=tokens: any(s in tokenizer.decode(tokens[:n]) for s in stop)
        assert count == next((n for n in range(len(tokens) + 1) if has(n)), None)


class Counting:
    """A tokenizer that counts the tokens that it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.count = tokenizer, 0

    def batch_decode(self, rows, **how):
        self.count += sum(map(len, rows))
        return self.tokenizer.batch_decode(rows, **how)


LONG = ("der Käse, die Soße 🐈‍⬛; the cat sat " * 4 + "日本語のテキスト、" * 4) * 16


@pytest.mark.parametrize("chunk", [1, 8])
@pytest.mark.parametrize(
    "stop", [("<stop>",), ("語の<", "t <stop>"), ("本語のテキスト、<",), ("never",)], ids=["1", "2", "many tokens", "0"]
)
def test_a_text_is_not_decoded_again_and_again_to_find_its_end(tokenizer, chunk, stop):
    """A look at new tokens finds what a look at the whole finds, and decodes some of the last tokens."""
    tokens = tokenizer(LONG + "<t <stop> and on", add_special_tokens=False)["input_ids"]
    counting = Counting(tokenizer)
    until, whole = text.stop_at(counting, stop), text.stop_at(tokenizer, stop)(tokens)
    got = None
    for before in range(0, len(tokens), chunk):
        counting.count = 0
        got = until(tokens[: before + chunk], before)
        if got is not None:
            break
        assert counting.count < 2000 < len(tokens) / 2, "the whole text is decoded"
    assert got == whole and (whole is None) == (stop == ("never",))


class Bytes:
    """A tokenizer of bytes that decodes them together, as byte fallback does: one that is missing spoils all."""

    def batch_decode(self, rows, skip_special_tokens):
        try:
            return [bytes(row).decode() for row in rows]
        except UnicodeDecodeError:
            return ["\ufffd" * len(row) for row in rows]


@pytest.mark.parametrize("chunk", [1, 5, 16])
def test_a_text_that_is_cut_within_a_character_is_decoded_from_further_back(chunk):
    for more in range(4):
        tokens = list(("a" * more + "日本語" * 30 + "。日" + "本語" * 9).encode())
        until, got = text.stop_at(Bytes(), ("語。日",)), None
        for before in range(0, len(tokens), chunk):
            got = got or until(tokens[: before + chunk], before)
        assert bytes(tokens[:got]).decode().endswith("語。日")


def test_special_tokens_are_no_text(tokenizer):
    until = text.stop_at(tokenizer, ("<|im_end|>", "tx"))
    special = [*tokenizer("t", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert until(special) is None
    assert until([*special, *tokenizer("x", add_special_tokens=False)["input_ids"]]) == 3


@pytest.mark.parametrize("stop", ["cat", ("cat", ""), (b"cat",)])
def test_stop_strings_that_cannot_be_are_refused(tokenizer, stop):
    with pytest.raises(ValueError, match="stop must be a tuple of strings that are not empty, got"):
        text.stop_at(tokenizer, stop)


def test_complete_and_stream_texts_say_the_same():
    """With a model: the same prompts, the same key, in pieces and whole; some rows stop at a string."""

    class Letters:
        def batch_decode(self, rows, skip_special_tokens):
            return ["".join(chr(97 + t) for t in row) for row in rows]

    prompts = [row[seen] for row, seen in zip(PROMPTS, SEEN)]
    settings = SETTINGS | {"end_tokens": ENDS, "chunk": 8}
    del settings["group"]
    plain = text.complete(
        functools.partial(sample_until, **settings), PARAMS, Letters(), prompts, jax.random.key(0), pad_token=3
    )
    stop = (plain[0][4:6], plain[2][1:3])
    sampler = functools.partial(sample_until, **settings, until=text.stop_at(Letters(), stop))
    whole = text.complete(sampler, PARAMS, Letters(), prompts, jax.random.key(0), pad_token=3, stop=stop)
    assert whole == [text.before(x, stop) for x in plain] and whole[0] != plain[0]
    streamer = functools.partial(stream, **settings)
    parts = text.stream_texts(streamer, PARAMS, Letters(), prompts, jax.random.key(0), pad_token=3, stop=stop)
    assert ["".join(row) for row in zip(*parts)] == whole
