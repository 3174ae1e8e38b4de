"""Texts that come in pieces are the texts that the whole decodes to, by tokenizers of every make, in linear time."""

import functools

import jax
import numpy as np
import pytest

from pt_jax.data import tokenizers
from pt_jax.sampling import Completions, text

WORDS = [
    "the",
    "cat",
    "don't",
    "Käse",
    "Straße,",
    "日本語のテキスト。",
    "🐈‍⬛",
    "🇩🇪 x",
    "  two",
    "ẞ",
    "\n",
    "a . b",
    "rock ' n roll",
    "\ufffd",
]


def of_bytes():
    """Byte-level BPE with few merges, as GPT-2, Llama 3 and Qwen: characters lie across tokens."""
    return tokenizers.train_bpe(["the cat sat", "the end of the cat, don't"] * 9, vocab=275)


def fast(core, **more):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>", **more)


def of_pieces(**more):
    """As sentencepiece's: words begin with a space that the first word is without, and rare characters are bytes, of
    which one that is missing spoils all beside it."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    pieces = ["▁", "▁the", "▁cat", "▁c", "at", "the", "▁don", "'", "t", "K", "se", ",", ".", "▁two", *"abcdehiknorswx"]
    vocab = [("<unk>", -9.0), ("</s>", -9.0), *((b, -9.0) for b in bytes_), *((p, -2.0 - len(p) / 9) for p in pieces)]
    core = Tokenizer(models.Unigram(vocab, 0, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast(core, **more)


def of_words():
    """As BERT's: pieces that go on with a word say so, and are told from others at the beginning of a text only so."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = [
        "the",
        "cat",
        "##t",
        "##at",
        "c",
        "do",
        "##n",
        "n",
        "'",
        "t",
        ".",
        "two",
        "##o",
        "a",
        "b",
        "Käse",
        "rock",
        "roll",
    ]
    core = Tokenizer(models.WordPiece({w: i for i, w in enumerate(["<unk>", "</s>", *words])}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece("##", cleanup=False)
    return fast(core, clean_up_tokenization_spaces=True)


MAKES = {
    "bytes": of_bytes, "pieces": of_pieces, "words, cleaned": of_words,
    "pieces, cleaned": functools.partial(of_pieces, clean_up_tokenization_spaces=True),
}  # fmt: skip


@functools.cache
def made(make):
    return MAKES[make]()


class Counting:
    """A tokenizer that counts the tokens that it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.count = tokenizer, 0
        self.clean_up_tokenization_spaces = tokenizer.clean_up_tokenization_spaces

    def batch_decode(self, rows, **how):
        self.count += sum(map(len, rows))
        return self.tokenizer.batch_decode(rows, **how)


def pieces_of(tokenizer, rows, cuts, stop=()):
    """What ``stream_texts`` yields of rows of tokens that come in pieces of these sizes, over and over."""
    length = max(map(len, rows))
    alive = np.arange(length) < np.array([[len(row)] for row in rows])
    tokens = np.array([[*row, *[0] * (length - len(row))] for row in rows], np.int32)

    def streamer(params, prompts, seen, key, *, group, until):
        first, turn = 0, 0
        while first < length:
            at = slice(first, first + cuts[turn % len(cuts)])
            over = ~alive[:, at.stop :].any(1) & (np.arange(len(rows)) % 2 == 0)  # the others come to their limits
            yield Completions(
                tokens[:, at], np.zeros_like(tokens[:, at], float), alive[:, at], over, stopped=over & False
            )
            first, turn = at.stop, turn + 1

    prompts = [np.array([1])] * len(rows)
    return list(zip(*text.stream_texts(streamer, {}, tokenizer, prompts, None, pad_token=0, stop=stop)))


def decoded(tokenizer, rows):
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def sentences(seed, count=4, words=80):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, words).tolist()) for _ in range(count)]


@pytest.mark.parametrize("cuts", [(1,), (3,), (8,), (1, 5, 2, 13)], ids=str)
@pytest.mark.parametrize("make", MAKES)
def test_the_pieces_are_the_text_of_the_whole(make, cuts):
    """No half of a character is given, and no space that the whole has not, wherever a piece ends."""
    tokenizer = made(make)
    rows = [[*row, tokenizer.eos_token_id] for row in tokenizer(sentences(0), add_special_tokens=False)["input_ids"]]
    parts = pieces_of(tokenizer, rows, cuts)
    assert ["".join(row) for row in parts] == decoded(tokenizer, rows)
    assert all(sum(map(bool, row)) > len(row) / 4 for row in parts)  # and they are not all kept until the end


@pytest.mark.parametrize("cuts", [(1,), (7,)], ids=str)
def test_bytes_that_are_no_characters_are_read_as_in_the_whole(cuts):
    tokenizer = made("bytes")
    rows = np.random.default_rng(1).integers(0, len(tokenizer), (20, 200)).tolist()
    said = ["".join(row) for row in pieces_of(tokenizer, rows, cuts)]
    assert said == decoded(tokenizer, rows)
    assert min(x.count("\ufffd") for x in said) > 9


@pytest.mark.parametrize("make", MAKES)
def test_the_time_is_linear_in_the_length(make):
    """A row of four times the tokens decodes four times as many; all were decoded again with every piece before."""
    tokenizer = made(make)
    counts = []
    for words in (150, 600):
        rows = tokenizer(sentences(2, 1, words), add_special_tokens=False)["input_ids"]
        counting = Counting(tokenizer)
        assert ["".join(row) for row in pieces_of(counting, rows, (8,))] == decoded(tokenizer, rows)
        counts.append(counting.count / len(rows[0]))
    assert counts[1] < 1.2 * counts[0] and counts[1] < 16, counts


@pytest.mark.parametrize("make", MAKES)
def test_a_stop_string_far_into_a_text_is_not_shown(make):
    tokenizer = made(make)
    whole = decoded(
        tokenizer, tokenizer([sentences(3, 1)[0] + " the cat two two"], add_special_tokens=False)["input_ids"]
    )[0]
    rows = tokenizer([whole], add_special_tokens=False)["input_ids"]
    stop = whole[-9:]
    at = decoded(tokenizer, rows)[0].find(stop)
    assert at > 200
    for cuts in ((1,), (8,)):
        assert ["".join(row) for row in pieces_of(tokenizer, rows, cuts, (stop,))] == [decoded(tokenizer, rows)[0][:at]]


@pytest.mark.parametrize("make", MAKES)
def test_what_is_kept_for_a_long_stop_string_is_given_when_it_does_not_come(make):
    """More than is decoded again otherwise, and found whole when it does come."""
    tokenizer = made(make)
    text_of = lambda x: decoded(tokenizer, tokenizer([x], add_special_tokens=False)["input_ids"])[0]
    begun = "the cat two n " * 12
    rows = tokenizer([f"{begun} a {begun} b {begun}"], add_special_tokens=False)["input_ids"]
    whole = decoded(tokenizer, rows)[0]
    for stop in (text_of(begun).rstrip() + " never", whole[-90:]):
        expected = text.before(whole, (stop,))
        for cuts in ((1,), (8,)):
            assert ["".join(row) for row in pieces_of(tokenizer, rows, cuts, (stop,))] == [expected]


@pytest.mark.parametrize("letters", ["", "a", "at"])
def test_a_long_run_of_bytes_is_shown_while_it_comes(letters):
    """Though every piece ends within a character, and the bytes before it are not read without its last."""
    tokenizer = made("pieces")
    rows = tokenizer([letters + "日本語" * 30], add_special_tokens=False)["input_ids"]
    [row] = pieces_of(tokenizer, rows, (3,))
    assert "".join(row) == decoded(tokenizer, rows)[0] and sum(map(bool, row)) > 80


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_where_spaces_are_taken_out_a_stop_is_found_where_it_is_there_first(chunk):
    """And is not shown, though it may be there only until more has come: "don '" becomes "don't", "do n ' t" too."""
    tokenizer, rng = made("words, cleaned"), np.random.default_rng(5)
    ids = tokenizer("do n ' t . two cat n", add_special_tokens=False)["input_ids"]
    found = 0
    for stop in (" '", " don't", "n '", "o n", "'t", " .", "two t.", "cat n't"):
        for row in rng.choice(ids, (12, 24)).tolist():
            texts = [decoded(tokenizer, [row[:n]])[0] for n in range(len(row) + 1)]
            expected = next((n for n, said in enumerate(texts) if stop in said), None)
            until = text.stop_at(tokenizer, (stop,))
            got = next((n for b in range(0, len(row), chunk) if (n := until(row[: b + chunk], b)) is not None), None)
            assert got == expected, (stop, texts[-1])
            said = row[:expected]
            [shown] = pieces_of(tokenizer, [said], (chunk,), (stop,))
            assert "".join(shown) == text.before(decoded(tokenizer, [said])[0], (stop,)), (stop, texts[-1])
            found += expected is not None
    assert 10 < found < 90


def test_characters_of_a_run_that_is_cut_stay_as_they_were_shown():
    tokenizer = made("pieces")
    row = tokenizer("the cat 日本語", add_special_tokens=False)["input_ids"][:-1]
    assert decoded(tokenizer, [row]) == ["the cat " + 8 * "\ufffd"]
    assert "".join(pieces_of(tokenizer, [row], (1,))[0]) == "the cat 日本" + 6 * "\ufffd"


def test_a_row_that_is_over_is_not_decoded_again():
    tokenizer = made("bytes")
    short, long = tokenizer(["the cat", sentences(7, 1)[0]], add_special_tokens=False)["input_ids"]
    counts = []
    for first in ([], short):  # it is over when it is whole, before the other
        counting = Counting(tokenizer)
        pieces_of(counting, [first, long], (1,))
        counts.append(counting.count)
    assert counts[1] - counts[0] < 2 * len(short) ** 2 < len(long)


def test_behind_many_tokens_without_a_text_a_word_has_its_space():
    tokenizer = made("pieces")
    words = tokenizer("the cat", add_special_tokens=False)["input_ids"]
    rows = [[*words, *[tokenizer.eos_token_id] * 70, *words]]
    assert ["".join(row) for row in pieces_of(tokenizer, rows, (1,))] == ["the cat the cat"] == decoded(tokenizer, rows)


def test_mistakes_are_sentences():
    tokenizer = made("bytes")
    ask = lambda prompts, **more: next(
        text.stream_texts(pytest.fail, {}, tokenizer, prompts, jax.random.key(0), pad_token=0, **more)
    )
    for prompts, more, message in [
        ([], {}, "prompts is empty; give one at least"),
        ([np.array([1.5])], {}, "prompt 0 is of type float64; give an array of token ids"),
        ([np.array([1])], {"stop": None}, "stop must be a tuple of strings that are not empty, got None"),
        ([np.array([1])], {"stop": "cat"}, "stop must be a tuple of strings"),
    ]:
        with pytest.raises(ValueError, match=message):
            ask(prompts, **more)
    for group in (1.5, "2"):
        with pytest.raises(ValueError, match=f"group must be a whole number above 0, got {group!r}"):
            ask([np.array([1])], group=group)
    for more, message in [
        ({"rows": 0}, "rows must be above 0"),
        ({"group": 1.5}, "group must be a whole number above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            text.complete(pytest.fail, {}, tokenizer, [np.array([1])], None, pad_token=0, **more)
