"""What prompt compression saves, and what it costs: tokens of system prompts, and questions answered from contexts.

    python benchmarks/prompt_compression.py [--items 40] [--ratios 0.7,0.5,0.3]

The question check is made for a very small model: a short story holds a fact about each of several children, the
question is about one of them, and the wrong answers are things that the story does not mention (the embedded model
cannot tell who of four had which thing: with the others' things as wrong answers it guesses, whole story or not). An
answer counts as right when the model finds it likelier than every wrong one. So the check tells whether the fact is
still there, in words that a model reads. Nothing is sampled, and the items come from a fixed seed. Ends with one JSON
line.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from autobot_llm.providers.base import TextScorer
from autobot_llm.providers.native import NativeProvider
from autobot_llm.settings import load_settings
from autobot_llm.universal.compression import PromptCompressor
from autobot_llm.universal.compression.result import CountTokens, estimated_tokens

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
PROMPTS = DATA / "system_prompts.jsonl"
MORE_PROSE = DATA / "prose_prompts.jsonl"  # prose alone, of kinds that the first ones do not have
TINY = ROOT / "src" / "autobot_llm" / "assets" / "tiny"
PROSE = ("rag", "support", "documentation", "tutor", "safety_negations")
NAMES = ("Tom", "Lily", "Ben", "Mia", "Sam", "Anna", "Max", "Sue")
VERBS = ("found", "lost", "wanted", "saw", "drew", "hid", "made", "ate")
COLOURS = ("red", "blue", "green", "yellow", "pink", "black", "white", "brown")
THINGS = ("ball", "hat", "boat", "kite", "cake", "doll", "box", "car", "cup", "book")
SCENERY = (
    "It was a sunny day and the birds were singing in the trees.",
    "The children were all very happy and they liked to play together.",
    "Then the wind began to blow and the leaves fell to the ground.",
    "After that they all sat down on the grass and had a nice rest.",
    "Their mom and dad were in the house and they smiled at the children.",
    "There was a big tree in the park and a small dog ran around it.",
    "They all laughed and said that it was the best day ever.",
    "The sun went down and it was time for everyone to go home.",
)
NUM_CHILDREN = 4


@dataclass(frozen=True)
class Item:
    """A story, a question with the beginning of its answer, and how that may go on; the first way is right."""

    story: str
    question: str
    beginning: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Score:
    """One strategy at one ratio: how many questions came out right, and what was left of the stories."""

    strategy: str
    target: float
    kept: float
    accuracy: float
    answer_log_probability: float
    milliseconds: float


Shorten = Callable[[Item, float], Awaitable[str]]


def make_items(num_items: int, seed: int = 7) -> list[Item]:
    chance = random.Random(seed)
    return [_item(chance) for _ in range(num_items)]


def _item(chance: random.Random) -> Item:
    names, verbs = chance.sample(NAMES, NUM_CHILDREN), chance.sample(VERBS, NUM_CHILDREN)
    colours, things = chance.sample(COLOURS, len(COLOURS)), chance.sample(THINGS, len(COLOURS))
    objects = [f"a {colour} {thing}" for colour, thing in zip(colours, things, strict=True)]
    facts = [f"{name} {verb} {thing}." for name, verb, thing in zip(names, verbs, objects, strict=False)]
    sentences = [*facts, *SCENERY]
    chance.shuffle(sentences)
    asked = chance.randrange(NUM_CHILDREN)
    others = objects[NUM_CHILDREN : 2 * NUM_CHILDREN - 1]
    return Item(
        story=" ".join(sentences),
        question=f"What is it that {names[asked]} {verbs[asked]}?",
        beginning=f"{names[asked]} {verbs[asked]}",
        answers=tuple(f" {thing}." for thing in (objects[asked], *others)),
    )


async def ask(scorer: TextScorer, item: Item, context: str) -> tuple[bool, float]:
    """Whether the right answer is the likeliest one, and its log probability for each token."""
    before = f"{context}\n\n{item.question} {item.beginning}".lstrip()
    told = []
    for answer in item.answers:
        tokens = await scorer.score(answer, before=before)
        told.append(sum(token.logprob or 0.0 for token in tokens) / len(tokens))
    return told[0] == max(told), told[0]


async def check(
    name: str, shorten: Shorten, ratio: float, items: list[Item], scorer: TextScorer, count: CountTokens
) -> Score:
    right, total, before, after, seconds = 0, 0.0, 0, 0, 0.0
    for item in items:
        start = time.perf_counter()
        context = await shorten(item, ratio)
        seconds += time.perf_counter() - start
        before += count(item.story)
        after += count(context)
        is_right, log_probability = await ask(scorer, item, context)
        right += is_right
        total += log_probability
    return Score(name, ratio, after / before, right / len(items), total / len(items), 1000 * seconds / len(items))


def strategies(scorer: TextScorer, count: CountTokens) -> dict[str, Shorten]:
    def compressor(ratio: float) -> PromptCompressor:
        return PromptCompressor(ratio=ratio, count_tokens=count)

    async def context(item: Item, ratio: float) -> str:
        return compressor(ratio).compress_context(item.question, item.story).compressed_text

    async def with_question(item: Item, ratio: float) -> str:
        result = await compressor(ratio).compress_by_perplexity(item.story, scorer, question=item.question)
        return result.compressed_text

    async def without_question(item: Item, ratio: float) -> str:
        return (await compressor(ratio).compress_by_perplexity(item.story, scorer)).compressed_text

    async def at_random(item: Item, ratio: float) -> str:
        chance = random.Random(item.story)
        words = item.story.split()
        kept = set(chance.sample(range(len(words)), int(ratio * len(words))))
        return " ".join(word for number, word in enumerate(words) if number in kept)

    found: dict[str, Shorten] = {
        "random words (baseline)": at_random,
        "context (BM25)": context,
        "perplexity, question known": with_question,
        "perplexity, question unknown": without_question,
    }
    if (lingua := _lingua(count)) is not None:
        found["LLMLingua, embedded model"] = lingua
    return found


def _lingua(count: CountTokens) -> Shorten | None:
    try:
        import llmlingua  # noqa: F401
    except ModuleNotFoundError:
        return None
    from autobot_llm.universal.compression.llmlingua import LinguaCompressor

    library = LinguaCompressor(TINY, count_tokens=count)

    async def compress(item: Item, ratio: float) -> str:
        return library.compress(item.story, ratio=ratio, question=item.question).compressed_text

    return compress


def tokenizers(embedded: CountTokens) -> dict[str, CountTokens]:
    """The embedded model's, the estimate, and Mistral's where the package mistral-common is installed."""
    found: dict[str, CountTokens] = {"embedded": embedded, "estimate": estimated_tokens}
    try:
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
    except ModuleNotFoundError:
        return found
    mistral = MistralTokenizer.v3(is_tekken=True).instruct_tokenizer.tokenizer
    return {**found, "mistral": lambda text: len(mistral.encode(text, bos=False, eos=False))}


def rules(counts: dict[str, CountTokens], ratio: float) -> dict[str, dict[str, float]]:
    """Tokens left by the rules, of 1, for each prompt and tokenizer, and for the prose ones together."""
    first, more = texts_of(PROMPTS), texts_of(MORE_PROSE)
    prompts = first | more
    short = {
        name: PromptCompressor(ratio=ratio).compress_system_prompt(text).compressed_text
        for name, text in prompts.items()
    }

    def left(names: Iterable[str]) -> dict[str, float]:
        chosen = list(names)
        return {
            kind: sum(count(short[name]) for name in chosen) / sum(count(prompts[name]) for name in chosen)
            for kind, count in counts.items()
        }

    together = {"all prose together": left(PROSE), f"{len(more)} more of prose together": left(more)}
    return {name: left([name]) for name in prompts} | together


def texts_of(file: Path) -> dict[str, str]:
    return {one["name"]: one["text"] for one in map(json.loads, file.read_text(encoding="utf-8").splitlines())}


def table(rows: list[list[str]]) -> str:
    head, *body = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, re.sub(r"[^|]+", "---", head), *body])


async def measure(num_items: int, ratios: list[float]) -> dict[str, object]:
    settings = load_settings(environ={"HOME": str(Path.home())}, env_file=None)
    native = NativeProvider(settings)
    await native.start()
    try:
        count = await native.text_counter()
        saved = rules(tokenizers(count), 0.7)
        kinds = list(saved["rag"])
        print("## System prompts by rules: share of tokens left\n")
        rows = [["prompt", *kinds], *([name, *(f"{of[kind]:.0%}" for kind in kinds)] for name, of in saved.items())]
        print(table(rows), "\n")
        items = make_items(num_items)

        async def whole(item: Item, ratio: float) -> str:
            return item.story

        async def nothing(item: Item, ratio: float) -> str:
            return ""

        scores = [
            await check("whole context", whole, 1.0, items, native, count),
            await check("no context", nothing, 0.0, items, native, count),
        ]
        for name, shorten in strategies(native, count).items():
            scores += [await check(name, shorten, ratio, items, native, count) for ratio in ratios]
        print(f"## {num_items} questions, {NUM_CHILDREN} answers each\n")
        head = ["strategy", "target", "tokens kept", "right", "log p of the answer's tokens", "ms a context"]
        print(table([head, *map(_row, scores)]), "\n")
    finally:
        await native.close()
    return {"items": num_items, "rules": saved, "questions": [score.__dict__ for score in scores]}


def _row(score: Score) -> list[str]:
    return [
        score.strategy, f"{score.target:.0%}", f"{score.kept:.0%}", f"{score.accuracy:.0%}",
        f"{score.answer_log_probability:.2f}", f"{score.milliseconds:.0f}",
    ]  # fmt: skip


def _rounded(value: object) -> object:
    match value:
        case float():
            return round(value, 3)
        case dict():
            return {name: _rounded(inner) for name, inner in value.items()}
        case list():
            return [_rounded(inner) for inner in value]
        case _:
            return value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=40)
    parser.add_argument("--ratios", default="0.7,0.5,0.3")
    chosen = parser.parse_args()
    ratios = [float(ratio) for ratio in chosen.ratios.split(",")]
    print(json.dumps(_rounded(asyncio.run(measure(chosen.items, ratios)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
