"""``pt-jax generate`` and ``pt-jax chat``: ask a model folder."""

import dataclasses
import sys

import jax
import numpy as np
from tyro.conf import Positional

from pt_jax import checks
from pt_jax.commands import common
from pt_jax.data import encode, rows
from pt_jax.sampling import Sampling, text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Talking:
    """Options of both.

    Args:
      max_new_tokens: longest answer.
      temperature: of sampling; 0 takes the likeliest token each time.
      top_k: sample from the k likeliest tokens only.
      top_p: sample from the likeliest tokens that together have this probability.
      min_p: sample from the tokens of at least this share of the likeliest one's probability.
      seed: of the samples.
    """

    max_new_tokens: int = 64
    temperature: float = 0.7
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0

    def sampling(self) -> Sampling:
        common.check_numbers(self, above_0=("max_new_tokens",), seed=(0, common.SEEDS))
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p).check()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(Talking):
    """Completes a prompt.

    Args:
      model: model folder, or PEFT folder of an adapter.
      prompt: the text to go on from.
      chat: put the prompt through the chat template, as a user's message.
      samples: completions to sample.
    """

    model: Positional[str]
    prompt: str
    chat: bool = False
    samples: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat(Talking):
    """Talks with a model in the terminal; an empty line or Ctrl-D ends it.

    Args:
      model: model folder, or PEFT folder of an adapter.
      system: a system message to begin with.
    """

    model: Positional[str]
    system: str | None = None


def generate(options: Generate) -> list[str]:
    """The completions; the command prints them, one a paragraph."""
    how = options.sampling()
    checks.positive("--samples", options.samples)
    rows.check_characters(options.prompt, "--prompt")
    model = common.open_model(options.model)
    prompt = [{"role": "user", "content": options.prompt}] if options.chat else options.prompt
    tokens = encode.prompt(model.tokenizer, {"prompt": prompt, "source": "--prompt"})
    model.check_length(tokens, "--prompt", room=options.max_new_tokens)
    if not len(tokens):
        raise ValueError("--prompt is empty, and the tokenizer puts no token in front; give some text")
    return text.complete(
        model.sampler(options.max_new_tokens, how), model.params, model.tokenizer, [tokens],
        jax.random.key(options.seed), pad_token=model.pad_token, group=options.samples,
    )  # fmt: skip


def chat(options: Chat, ask=input) -> list[dict]:
    """Reads the user's turns with ``ask``, prints the answers, and returns the conversation."""
    how = options.sampling()
    rows.check_characters(options.system or "", "--system")
    model = common.open_model(options.model)
    sampler = model.sampler(options.max_new_tokens, how)
    key = jax.random.key(options.seed)
    messages = [{"role": "system", "content": options.system}] if options.system else []
    # refused now, not after the first question
    encode.prompt(model.tokenizer, {"prompt": [*messages, {"role": "user", "content": "x"}], "source": options.model})
    while True:
        try:
            said = ask("you: ")
        except EOFError:
            said = ""
        if not said.strip():
            return messages
        turn = [*messages, {"role": "user", "content": said}]
        try:
            rows.check_characters(said, "what you said")
            tokens = encode.prompt(model.tokenizer, {"prompt": turn, "source": "the conversation"})
            model.check_length(tokens, "the conversation", room=options.max_new_tokens)
        except ValueError as e:  # what was said stays out of it
            print(e, file=sys.stderr)
            continue
        answer = text.complete(
            sampler, model.params, model.tokenizer, [np.asarray(tokens)],
            jax.random.fold_in(key, len(turn)), pad_token=model.pad_token,
        )[0]  # fmt: skip
        print(f"model: {answer}")
        messages = [*turn, {"role": "assistant", "content": answer}]
