"""``pt-jax generate`` and ``pt-jax chat``."""

import dataclasses

import jax
import numpy as np
import pytest

from pt_jax import models
from pt_jax.commands import common, talk


def generate(folder, **options):
    return talk.generate(talk.Generate(**{"model": str(folder), "prompt": "The cat", "max_new_tokens": 8} | options))


def test_every_option_changes_what_is_said(folder, monkeypatch):
    said = generate(folder, temperature=1.5)
    assert said == generate(folder, temperature=1.5) and len(said) == 1
    changes = {
        "prompt": "Who are you?",
        "max_new_tokens": 2,
        "temperature": 0.1,
        "top_k": 1,
        "top_p": 0.01,
        "min_p": 1.0,
        "repetition_penalty": 0.05,
        "frequency_penalty": 9.0,
        "presence_penalty": -9.0,
        "stop": (said[0][3:5],),
    }
    for option, value in (changes | {"seed": 1}).items():
        assert generate(folder, **{"temperature": 1.5, option: value}) != said, option
    assert len(set(generate(folder, temperature=1.5, samples=4))) > 1
    # one layer hardly tells what stands before the last token, so the template is looked for in the tokens
    seen = []
    monkeypatch.setattr(talk.text, "complete", lambda *a, **k: seen.append(a[3][0].tolist()) or ["x"])
    generate(folder), generate(folder, chat=True)
    assert len(seen[1]) > len(seen[0]) + 5


@pytest.mark.parametrize("dtype", ["int8", "bfloat16", None])
def test_the_cache_is_of_the_type_that_is_asked_for(folder, monkeypatch, dtype):
    makers = []
    note = lambda by, *args, **more: makers.append(by.keywords["init_cache"]) or []
    for name in ("complete", "stream_texts"):
        monkeypatch.setattr(talk.text, name, note)
    generate(folder, cache_dtype=dtype)
    talk.chat(talk.Chat(model=str(folder), cache_dtype=dtype), ask=asking("Who?", ""))
    assert [make(1, 2)["k"].dtype for make in makers] == [dtype or "float32"] * 2


def test_an_answer_ends_before_the_stop_string(folder):
    options = talk.Chat(model=str(folder), temperature=1.5, max_new_tokens=16)
    whole, again = (talk.chat(options, ask=asking("Who?", ""))[-1]["content"] for _ in range(2))
    stop = next(c for c in whole[3:] if c.isascii() and c.isprintable())
    cut = talk.chat(dataclasses.replace(options, stop=(stop, "no such text")), ask=asking("Who?", ""))[-1]["content"]
    assert whole == again and cut == whole.split(stop)[0] != whole
    settings = {"prompt": "Who?", "temperature": 1.5, "max_new_tokens": 16, "samples": 2}
    whole = generate(folder, **settings)
    stop = tuple(next(c for c in x[3:] if c.isascii() and c.isprintable()) for x in whole)
    assert generate(folder, **settings, stop=stop) == [min((x.split(s)[0] for s in stop), key=len) for x in whole]


def test_a_gpu_says_the_same_layer_by_layer(folder, monkeypatch):
    options = {"temperature": 1.5, "samples": 2}
    talking = talk.Chat(model=str(folder), temperature=1.5, max_new_tokens=8)
    answers = lambda: (generate(folder, **options), talk.chat(talking, ask=asking("Who?", "")))
    expected, trees = answers(), []
    for name in ("complete", "stream_texts"):
        by = getattr(talk.text, name)
        monkeypatch.setattr(talk.text, name, lambda *a, by=by, **k: trees.append(a[1]) or by(*a, **k))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert answers() == expected
    assert [type(tree["layers"]) for tree in trees] == [tuple] * 2


def test_weights_are_taken_apart_stack_by_stack():
    """Into the same arrays as all at once, with experts in some layers; and nothing is held twice."""
    config = models.Config(
        vocab=11, layers=3, width=8, heads=2, kv_heads=1, head_width=4, hidden=8, experts=2, expert_hidden=4,
        expert_layers=(True, False, True),
    )  # fmt: skip
    params = models.init(config, jax.random.key(0))
    expected = models.by_layer(config, params)
    got = talk._by_layer(config, params)
    jax.tree.map(np.testing.assert_array_equal, got, expected)
    assert jax.tree.structure(got) == jax.tree.structure(expected) and not params["layers"]


def asking(*said):
    said = iter(said)
    return lambda _: next(said)


def test_a_penalty_is_heard_in_a_conversation(folder):
    options = talk.Chat(model=str(folder), temperature=1.5, max_new_tokens=16)
    plain, other = (
        talk.chat(dataclasses.replace(options, presence_penalty=x), ask=asking("Who?", "")) for x in (None, -9.0)
    )
    assert plain[-1] != other[-1]


def test_an_answer_is_shown_while_it_is_made(folder, monkeypatch):
    """Every piece is on the screen before the next steps are taken."""
    shown, parts = [], []
    real = talk.text.stream_texts

    def watched(*a, **k):
        for part in real(*a, **k):
            parts.append(part[0])
            yield part
            assert shown[-1] == part[0]

    monkeypatch.setattr(talk.text, "stream_texts", watched)
    monkeypatch.setattr("builtins.print", lambda *a, **k: shown.append(a[0] if a else "\n"))
    options = talk.Chat(model=str(folder), temperature=1.5, max_new_tokens=16)
    messages = talk.chat(options, ask=asking("Who?", ""))
    assert sum(map(bool, parts)) > 1 and "".join(parts) == messages[-1]["content"]


@pytest.mark.parametrize("by_chat", [True, False])
def test_a_turn_ends_with_the_token_that_ends_it_in_the_template(folder, monkeypatch, by_chat):
    """Which need not be the end token of the tokenizer or of the model's config."""
    ends = []

    opened = common.open_model(str(folder))
    opened.tokenizer.eos_token = "<pad>"
    opened = dataclasses.replace(opened, config=dataclasses.replace(opened.config, end_tokens=(0,)))
    end = opened.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end not in opened.end_tokens
    monkeypatch.setattr(talk.common, "open_model", lambda *_, **__: opened)
    monkeypatch.setattr(talk.text, "complete", lambda sampler, *a, **k: ends.append(sampler.keywords["end_tokens"]))
    monkeypatch.setattr(
        talk.text, "stream_texts", lambda s, *a, **k: ends.append(s.keywords["end_tokens"]) or iter([["x"]])
    )
    if by_chat:
        talk.chat(talk.Chat(model=str(folder)), ask=asking("Who?", ""))
    else:
        generate(folder, chat=True)
        generate(folder)
        assert ends.pop() == opened.end_tokens
    assert ends == [tuple(sorted({*opened.end_tokens, end}))]


def test_greedy_answers_need_no_seed(folder):
    assert generate(folder, temperature=0.0) == generate(folder, temperature=0.0, seed=5)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be above 0"),
        ({"samples": 0}, "--samples must be above 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0"),
        ({"presence_penalty": float("nan")}, "presence_penalty must be finite"),
        ({"stop": ("x", "")}, "--stop is empty"),
        ({"prompt": "word " * 200}, r"--prompt: has \d+ tokens and 8 are to be sampled, the limit is 96"),
        ({"model": "nowhere"}, "nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_sentence(folder, options, message):
    with pytest.raises(ValueError, match=message):
        generate(folder, **options)


def test_a_conversation_keeps_its_turns_and_ends_on_an_empty_line(folder, capsys):
    said = iter(["Who are you?", "word " * 200, "Add 1 and 2.", ""])
    options = talk.Chat(model=str(folder), system="Be kind.", max_new_tokens=4)
    messages = talk.chat(options, ask=lambda _: next(said))
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in messages[:4:3]] == ["Be kind.", "Add 1 and 2."]
    out = capsys.readouterr()
    assert f"model: {messages[-1]['content']}" in out.out and "the limit is 96" in out.err


def test_the_end_of_input_ends_a_conversation(folder):
    def closed(_):
        raise EOFError

    assert talk.chat(talk.Chat(model=str(folder)), ask=closed) == []
