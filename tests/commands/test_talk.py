"""``pt-jax generate`` and ``pt-jax chat``."""

import pytest

from pt_jax.commands import talk


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
    }
    for option, value in (changes | {"seed": 1}).items():
        assert generate(folder, **{"temperature": 1.5, option: value}) != said, option
    assert len(set(generate(folder, temperature=1.5, samples=4))) > 1
    # one layer hardly tells what stands before the last token, so the template is looked for in the tokens
    seen = []
    monkeypatch.setattr(talk.text, "complete", lambda *a, **k: seen.append(a[3][0].tolist()) or ["x"])
    generate(folder), generate(folder, chat=True)
    assert len(seen[1]) > len(seen[0]) + 5


def test_greedy_answers_need_no_seed(folder):
    assert generate(folder, temperature=0.0) == generate(folder, temperature=0.0, seed=5)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be above 0"),
        ({"samples": 0}, "--samples must be above 0"),
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
