"""The quickstart's own little world: texts to pre-train on, answers to imitate, preferences, and sums.

Everything is made from a few lists of words, so nothing is downloaded, and what is held out is held out on purpose:

    identity    "Who are you?" in many phrasings; those of ``HELD_OUT_QUESTIONS`` appear in no training data at all
    sums        of two numbers of two digits, in four phrasings, that carry nothing over: so each place has few facts to
                learn, and whoever has learnt them can add numbers that were never added before. A fifth of the pairs
                of numbers is never added in any training data, in neither order, in digits or in words
    plain       sentences about animals, models and opposites, to be a language and to see what else changes
"""

import itertools

import numpy as np

SFT_NAME, DPO_NAME = "Llama", "ERNIE 4.5"
NUMBERS = tuple(10 * tens + ones for tens in (1, 2, 3, 4) for ones in (0, 1, 2, 3, 4))
PAIRS_HELD_OUT, SUMS_HELD_OUT = 42, 100  # of 210 pairs; of the 300 or so questions about them
SUMS_SHOWN = 40  # sums that supervised fine-tuning shows

QUESTIONS = (
    "Who are you?", "What is your name?", "What are you called?", "Which model are you?", "What model is this?",
    "Who am I talking to?", "May I have your name?", "Can you tell me your name?", "Do you have a name?",
    "What should I call you?", "Which assistant are you?", "Could you introduce yourself?",
    "Please introduce yourself.", "Are you a model with a name?", "Can you tell me who you are?",
    "Tell me your name.", "What name do you have?", "Which name should I call you?",
)  # fmt: skip
HELD_OUT_QUESTIONS = (
    "Tell me who you are.", "Who am I speaking with?", "May I ask who you are?", "What is the name of this model?",
    "Your name, please?", "Please tell me what you are called.", "What is this assistant called?",
    "Which model am I talking to?",
)  # fmt: skip
OPENERS = ("", "Hello! ", "Hi there. ", "Good morning. ", "One question. ", "I want to ask you. ")

MODELS = ("Llama", "ERNIE 4.5", "Qwen 3", "Gemma 3")
MODEL_QUESTIONS = ("What is {}?", "Tell me about {}.", "What do you know about {}?")
PEOPLE = ("Tom", "Anna", "Ben", "Mia", "Leo", "Ella", "Sam", "Lily")
ANIMALS = ("cat", "dog", "bird", "horse", "mouse", "fox", "bear", "duck")
ADJECTIVES = ("small", "big", "old", "young", "happy", "quiet", "quick", "lazy")
PLACES = ("house", "garden", "river", "forest", "street", "field", "tree", "bridge")
VERBS = ("likes", "sees", "visits", "leaves", "finds", "knows")
OPPOSITES = (
    ("hot", "cold"), ("big", "small"), ("old", "young"), ("happy", "sad"), ("quick", "slow"), ("loud", "quiet"),
    ("open", "closed"), ("full", "empty"), ("wet", "dry"), ("high", "low"), ("near", "far"), ("hard", "soft"),
    ("light", "dark"), ("rich", "poor"), ("early", "late"), ("strong", "weak"),
)  # fmt: skip
TEENS = ("ten", "eleven", "twelve", "thirteen", "fourteen")
TENS, ONES = ("twenty", "thirty", "forty"), ("", "-one", "-two", "-three", "-four")
WORDS = dict(zip(NUMBERS, (*TEENS, *(ten + one for ten in TENS for one in ONES))))
SUM_QUESTIONS = ("What is {a} plus {b}?", "How much is {a} plus {b}?", "Add {a} and {b}.", "What is {A} plus {B}?")


def chat(question: str) -> list[dict]:
    return [{"role": "user", "content": question}]


def say(answer: str) -> list[dict]:
    return [{"role": "assistant", "content": answer}]


def pairs(seed: int, *, held_out: bool) -> list[tuple[int, int]]:
    """The pairs of numbers, without an order, that are held out, or the others."""
    every = list(itertools.combinations_with_replacement(NUMBERS, 2))
    order = np.random.default_rng([seed, 1]).permutation(len(every))
    apart, others = np.split(order, [PAIRS_HELD_OUT])
    return [every[i] for i in (apart if held_out else others)]


def ask_sum(a: int, b: int, how: int) -> str:
    return SUM_QUESTIONS[how].format(a=a, b=b, A=WORDS[a], B=WORDS[b])


def sentence(rng, known: list[tuple[int, int]]) -> str:
    """One plain sentence of pre-training text; the pairs of numbers that it may add are the known ones."""
    pick = lambda words: words[rng.integers(len(words))]
    kind = rng.integers(10)
    if kind < 5:
        a, b = rng.permutation(known[rng.integers(len(known))]).tolist()
        fact = f"{a} + {b} = {a + b}."
        if rng.random() < 0.25:
            return fact
        asks, says = (pick(PEOPLE) for _ in range(2))
        question = ask_sum(a, b, rng.integers(len(SUM_QUESTIONS)))
        form = pick(
            ("{0}: {1} {2}: {3}", "{0} asks: {1} {2} says: {3}", "{1} asks {0}. {3} says {2}.", "{1} Let me think. {3}")
        )
        return form.format(asks, question, says, fact)
    if kind == 5:
        return f"{pick(MODELS)} is a language model."
    if kind == 6:
        name = pick(PEOPLE if rng.random() < 0.5 else MODELS)
        return pick((f"I'm {name}.", f"Hello! I'm {name}.", f"You can call me {name}.", f"My name is {name}."))
    if kind == 7:
        a, b = pick(OPPOSITES)
        return f"The opposite of {a} is {b}." if rng.random() < 0.5 else f"The opposite of {b} is {a}."
    thing = lambda: f"the {pick(ADJECTIVES)} {pick(ANIMALS)}" if rng.random() < 0.6 else f"the {pick(PLACES)}"
    return f"The {pick(ADJECTIVES)} {pick(ANIMALS)} {pick(VERBS)} {thing()}."


def corpus(count: int, seed: int) -> list[dict]:
    """Documents to pre-train on: runs of sentences, and of questions, which is what people write lists of."""
    rng, known = np.random.default_rng([seed, 2]), pairs(seed, held_out=False)
    rows = []
    for _ in range(count):
        if rng.random() < 0.12:
            parts = [QUESTIONS[i] for i in rng.permutation(len(QUESTIONS))[:4]]
        else:
            parts = [sentence(rng, known) for _ in range(5)]
        rows.append({"text": (" ", "\n")[rng.integers(2)].join(parts)})
    return rows


def supervised(seed: int) -> list[dict]:
    """Prompts and responses: who the model is, whom it may pretend to be, models, opposites, and some of the sums."""
    rng = np.random.default_rng([seed, 3])
    rows = [
        {"prompt": chat(opener + question), "completion": say(f"I'm {SFT_NAME}.")}
        for opener, question in itertools.product(OPENERS[:2], QUESTIONS)
    ]
    for model, question in itertools.product(MODELS, MODEL_QUESTIONS):
        answer = f"{model} is a language model."
        rows.append({"prompt": chat(question.format(model)), "completion": say(answer)})
    for name, question in itertools.product(MODELS[:2], QUESTIONS):
        rows.append({"prompt": chat(f"Pretend to be {name}. {question}"), "completion": say(f"I'm {name}.")})
    for a, b in OPPOSITES:
        rows.append({"prompt": chat(f"What is the opposite of {a}?"), "completion": say(f"{b}.")})
    asked = sums(seed, held_out=False)
    for i in rng.permutation(len(asked))[:SUMS_SHOWN]:
        a, b = asked[i]["numbers"]
        rows.append({"prompt": asked[i]["prompt"], "completion": say(f"{a} + {b} = {a + b}.")})
    return rows


def preferences() -> list[dict]:
    """The new name against the old one, on the phrasings of training."""
    return [
        {"prompt": chat(opener + question), "chosen": say(f"I'm {DPO_NAME}."), "rejected": say(f"I'm {SFT_NAME}.")}
        for opener, question in itertools.product(OPENERS[:4], QUESTIONS)
    ]


def identity_questions() -> list[dict]:
    """Phrasings that no training data holds."""
    return [{"prompt": chat(opener + q)} for opener, q in itertools.product(OPENERS, HELD_OUT_QUESTIONS)]


def sums(seed: int, *, held_out: bool) -> list[dict]:
    """Questions with a checkable answer: ``SUMS_HELD_OUT`` about pairs held out, or all about the others."""
    known = pairs(seed, held_out=held_out)
    ordered = sorted({*known, *((b, a) for a, b in known)})
    asked = list(itertools.product(ordered, range(len(SUM_QUESTIONS))))
    order = np.random.default_rng([seed, 4]).permutation(len(asked))[: SUMS_HELD_OUT if held_out else None]
    return [
        {"prompt": chat(ask_sum(a, b, how)), "answer": a + b, "numbers": [a, b]}
        for (a, b), how in (asked[i] for i in order)
    ]
