"""RULER's needle tasks: what a model finds in a long text. Generated here, so they need no data.

A sample is a text of random sentences with needles in between, and a question about these. The same
task, number of sentences and seed give the same sample. Two scores: `recall` is RULER's, the share
of the expected answers that are in the model's; `exact` is 1 if there is also no other in it.
"""

from __future__ import annotations

import asyncio
import random
import re
from typing import Any, NamedTuple

from gllm_benchmarks.openai_api import Post

TASKS = ("single", "multikey", "multivalue", "tracking")
NUM_NEEDLES = 4
NUM_CHAINS = 2
CHAIN_LEN = 5

ADJECTIVES = "old quiet green heavy narrow bright cold early gentle hollow plain rusty".split()
NOUNS = (
    "river garden letter window market bridge teacher lantern harbour orchard clock road".split()
)
VERBS = "follows watches reaches remembers crosses leaves carries paints mends forgets".split()
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
INTRODUCTION = "Remember the secret codes and the variables that are told in the text below."


class Sample(NamedTuple):
    """`answers`: code words of five capital letters."""

    prompt: str
    answers: set[str]


def make_sample(task: str, num_sentences: int, seed: int) -> Sample:
    draws = random.Random(f"{task} {num_sentences} {seed}")
    numbers = draws.sample(range(26**5), NUM_CHAINS * CHAIN_LEN)
    codes = ["".join(LETTERS[number // 26**i % 26] for i in range(5)) for number in numbers]
    make = _chains if task == "tracking" else _needles
    needles, question, answers = make(task, codes, draws)
    sentences = [
        f"The {draws.choice(ADJECTIVES)} {draws.choice(NOUNS)} {draws.choice(VERBS)} "
        f"the {draws.choice(ADJECTIVES)} {draws.choice(NOUNS)}."
        for _ in range(num_sentences)
    ]
    places = sorted(draws.choices(range(num_sentences + 1), k=len(needles)))
    for place, needle in zip(reversed(places), reversed(needles), strict=True):
        sentences.insert(place, needle)
    prompt = "\n\n".join([INTRODUCTION, " ".join(sentences), question])
    return Sample(prompt, set(answers))


def _needles(task: str, codes: list[str], draws: random.Random) -> tuple[list[str], str, list[str]]:
    """One code; several with a key each; or several with one key."""
    keys = draws.sample([f"{a}-{n}" for a in ADJECTIVES for n in NOUNS], NUM_NEEDLES)
    wanted = keys[0]
    if task == "multivalue":
        keys = [wanted] * NUM_NEEDLES
    pairs = list(zip(keys, codes, strict=False))[: 1 if task == "single" else None]
    answers = [code for key, code in pairs if key == wanted]
    draws.shuffle(pairs)
    needles = [f"A secret code of {key} is {code}." for key, code in pairs]
    question = f"What are all the secret codes of {wanted} in the text? Answer with them alone."
    return needles, question, answers


def _chains(_: str, codes: list[str], draws: random.Random) -> tuple[list[str], str, list[str]]:
    """Chains of variables, each set to the one before it; which ones have a chain's value?"""
    values = draws.sample(range(10**4, 10**5), NUM_CHAINS)
    sources = [*map(str, values), *(f"the variable {code}" for code in codes)]
    pairs = zip(codes, sources, strict=False)
    needles = [f"The variable {code} is set to {source}." for code, source in pairs]
    question = (
        f"Which {CHAIN_LEN} variables in the text have the value {values[0]}, directly or through "
        "other variables? Answer with their names alone."
    )
    return needles, question, codes[::NUM_CHAINS]


def score(sample: Sample, answer: str) -> dict[str, float]:
    found = set(re.findall(r"\b[A-Z]{5}\b", answer))
    hits = found & sample.answers
    return {"exact": float(found == sample.answers), "recall": len(hits) / len(sample.answers)}


async def run(
    length: int, num_samples: int, max_tokens: int, concurrency: int, post: Post
) -> dict[str, Any]:
    """The mean scores of every task, with samples of `length` tokens, answer included.

    Raises GenerateError, and ValueError for a length in which there is no room.
    """
    slots = asyncio.Semaphore(concurrency)

    async def ask(sample: Sample, limit: int) -> tuple[str, int]:
        """The answer and the tokens of the prompt."""
        messages = [{"role": "user", "content": sample.prompt}]
        body = {"messages": messages, "max_tokens": limit, "temperature": 0}
        async with slots:
            answer = await post("/chat/completions", body)
        text = answer["choices"][0]["message"]["content"] or ""
        return text, answer["usage"]["prompt_tokens"]

    figures = {}
    probe = length // 60  # sentences, from whose tokens those of one are told; they fit in any case
    for task in TASKS:
        _, base = await ask(make_sample(task, 0, 0), 1)
        _, longer = await ask(make_sample(task, probe, 0), 1)
        # Sentences differ in their tokens: a part is left for that.
        num_sentences = int((0.98 * length - max_tokens - base) / (longer - base) * probe)
        if num_sentences < 1:
            raise SystemExit(f"--length: {length} tokens leave no room for a text")
        samples = [make_sample(task, num_sentences, seed) for seed in range(num_samples)]
        answers = await asyncio.gather(*(ask(sample, max_tokens) for sample in samples))
        scores = [score(s, text) for s, (text, _) in zip(samples, answers, strict=True)]
        figures[task] = {key: sum(s[key] for s in scores) / len(scores) for key in scores[0]}
        figures[task]["prompt_tokens"] = sum(tokens for _, tokens in answers) / len(answers)
    return figures
