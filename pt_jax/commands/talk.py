"""``pt-jax generate`` and ``pt-jax chat``: ask a model folder."""

import dataclasses
import sys
from functools import partial
from typing import Literal

import jax
import numpy as np
from tyro.conf import Positional

from pt_jax import checks, models
from pt_jax.commands import common
from pt_jax.data import encode, rows, tokenizers
from pt_jax.sampling import Sampling, sample, sample_until, stream, text

PENALTIES = ("repetition", "frequency", "presence")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Talking:
    """Options of both.

    Args:
      max_new_tokens: longest answer.
      temperature: of sampling; 0 takes the likeliest token each time.
      top_k: sample from the k likeliest tokens only.
      top_p: sample from the likeliest tokens that together have this probability.
      min_p: sample from the tokens of at least this share of the likeliest one's probability.
      repetition_penalty: above 1, makes tokens of the prompt and the answer so far less likely.
      frequency_penalty: taken off the logit of a token for each time that it is in the answer so far.
      presence_penalty: taken off the logits of all tokens that are in the answer so far.
      stop: texts that end an answer; it is cut off before them.
      cache_dtype: type of the keys and values that are remembered; int8 takes least memory, and rounds most.
      seed: of the samples.
    """

    max_new_tokens: int = 64
    temperature: float = 0.7
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stop: tuple[str, ...] = ()
    cache_dtype: Literal["float32", "bfloat16", "float16", "int8"] | None = None
    seed: int = 0

    def sampling(self) -> Sampling:
        common.check_numbers(self, above_0=("max_new_tokens",), seed=(0, common.SEEDS))
        if not all(self.stop):
            raise ValueError("--stop is empty; give the text that ends an answer")
        names = ("temperature", "top_k", "top_p", "min_p", *(f"{x}_penalty" for x in PENALTIES))
        return Sampling(**{name: getattr(self, name) for name in names}).check()


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
    model = _opened(options)
    prompt = [{"role": "user", "content": options.prompt}] if options.chat else options.prompt
    tokens = encode.prompt(model.tokenizer, {"prompt": prompt, "source": "--prompt"})
    model.check_length(tokens, "--prompt", room=options.max_new_tokens)
    if not len(tokens):
        raise ValueError("--prompt is empty, and the tokenizer puts no token in front; give some text")
    sampler = partial(sample, **_settings(model, options, how, chat=options.chat))
    if options.stop:
        sampler = partial(sample_until, **sampler.keywords, until=text.stop_at(model.tokenizer, options.stop))
    return text.complete(
        sampler, model.params, model.tokenizer, [tokens], jax.random.key(options.seed),
        pad_token=model.pad_token, group=options.samples, stop=options.stop,
    )  # fmt: skip


def _opened(options) -> common.Model:
    """The model that is asked; on a GPU layer by layer, which samples faster, as in the training commands."""
    model = common.open_model(options.model, how=models.Execution(cache_dtype=options.cache_dtype))
    if jax.default_backend() != "gpu":
        return model
    return dataclasses.replace(model, params=_by_layer(model.config, model.params))


def _by_layer(config, params) -> dict:
    """``models.by_layer`` of weights that nobody else needs: stack by stack, so that only one is there twice."""
    stacks = params["layers"]
    parts = [models.by_layer(config, {"layers": {name: stacks.pop(name)}})["layers"] for name in list(stacks)]
    layers = tuple({name: w for part in of_layer for name, w in part.items()} for of_layer in zip(*parts))
    return params | {"layers": layers}


def _settings(model, options, how, chat: bool) -> dict:
    """Those of the sampler; a turn of a conversation ends with what ends it in the template, too."""
    settings = model.sampler(options.max_new_tokens, how).keywords
    ends = {*settings["end_tokens"], *(tokenizers.turn_ends(model.tokenizer) if chat else ())}
    return settings | {"end_tokens": tuple(sorted(ends))}


def chat(options: Chat, ask=input) -> list[dict]:
    """Reads the user's turns with ``ask``, prints the answers as they come, and returns the conversation."""
    how = options.sampling()
    rows.check_characters(options.system or "", "--system")
    model = _opened(options)
    streamer = partial(stream, **_settings(model, options, how, chat=True))
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
        parts = text.stream_texts(
            streamer, model.params, model.tokenizer, [np.asarray(tokens)], jax.random.fold_in(key, len(turn)),
            pad_token=model.pad_token, stop=options.stop,
        )  # fmt: skip
        answer = _shown(part[0] for part in parts)
        messages = [*turn, {"role": "assistant", "content": answer}]


def _shown(parts) -> str:
    """An answer, printed piece by piece."""
    print("model: ", end="", flush=True)
    answer = ""
    for part in parts:
        print(part, end="", flush=True)
        answer += part
    print()
    return answer
