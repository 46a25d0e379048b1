"""Prompts to train heads and drafts with, of the kinds that a model meets in use: instructions over passages short and
long, stories to go on with, code.

    python benchmarks/training_prompts.py --chat train_chat.txt.xz --prose train_prose.txt.xz \\
        --held-out dev_prompts.jsonl --out prompts.jsonl

The chats in a training text are short, and a draft that has seen no long prompt guesses badly behind one. So the
instructions that the chats' own users give over a passage ("Summarize the text.", "Repeat this text exactly.") are put
before and behind passages of the prose, of 60 to 1,400 tokens. No passage shares a whole line of 40 characters with a
held-out prompt. Code is continued as it stands.
"""

from __future__ import annotations

import argparse
import collections
import json
import lzma
import random
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

END = "<|endoftext|>"
CHARACTERS_A_TOKEN = 3.9
LEAST_USED = 10  # times that an instruction is given over a passage, to be one of the kind and not a question about it
LINE = 40
LONG_INSTRUCTIONS = (
    "What happens here?", "Who are the people in this text?", "What is the story about?", "Tell this story again.",
    "How does the story begin?", "What did you read?", "Retell the story in your own words.",
)  # fmt: skip
QUESTION_HEADS = ("Read the story and answer the question.", "Read this text.", "Here is a story.", "")


def documents(path: Path) -> list[str]:
    with (lzma.open if path.suffix == ".xz" else open)(path, "rb") as file:
        return [part.strip("\n") for part in file.read().decode("utf-8").split(END) if part.strip()]


def instructions_of(chats: Sequence[str]) -> list[str]:
    """What users say before or behind a passage, as often as they say it."""
    counts: collections.Counter[str] = collections.Counter()
    for chat in chats:
        for text in re.findall(r"<\|user\|>\n(.*?)<\|end\|>", chat, re.DOTALL):
            parts = text.strip().split("\n\n")
            if len(parts) > 1 and len(text) > 400:
                counts.update(part for part in {parts[0], parts[-1]} if len(part) < 120)
    often = {text: number for text, number in counts.items() if number >= LEAST_USED}
    return [text for text, number in sorted(often.items()) for _ in range(number) if text not in QUESTION_HEADS]


def is_code(document: str) -> bool:
    return len(re.findall(r"^ *(def|class|return|import|self\.)", document, re.MULTILINE)) > 10


class Passages:
    """Paragraphs in a row out of documents, none of which holds a line of a held-out prompt."""

    def __init__(self, texts: Sequence[str], held_out: str, chooser: random.Random) -> None:
        lines = {line.strip() for line in held_out.split("\n") if len(line.strip()) >= LINE}
        self._documents = []
        for text in texts:
            # the paragraphs between those that are held out are documents of their own
            part: list[str] = []
            for paragraph in text.split("\n\n"):
                if any(line.strip() in lines for line in paragraph.split("\n")):
                    self._documents.append(part)
                    part = []
                else:
                    part.append(paragraph)
            self._documents.append(part)
        self._documents = [part for part in self._documents if part]
        self._weights = [sum(map(len, part)) for part in self._documents]
        self._chooser = chooser

    def take(self, num_tokens: int) -> str:
        """About so many tokens, from the beginning of a paragraph."""
        wanted = int(num_tokens * CHARACTERS_A_TOKEN)
        while True:
            [paragraphs] = self._chooser.choices(self._documents, self._weights)
            start = self._chooser.randrange(len(paragraphs))
            text = "\n\n".join(paragraphs[start:])[: wanted + 200]
            if len(text) < 0.7 * wanted:
                continue
            cut = max(text.rfind(mark, 0, wanted) for mark in (". ", "\n", '" ')) + 1
            return text[: cut if cut > wanted // 2 and self._chooser.random() < 0.5 else wanted].strip()


def prompts(chats: Sequence[str], proses: Sequence[str], held_out: str, numbers: Any) -> Iterator[dict[str, Any]]:
    chooser = random.Random(numbers.seed)
    instructions = instructions_of(chats)
    prose = Passages([text for text in proses if not is_code(text)], held_out, chooser)
    code = Passages([text for text in proses if is_code(text)], held_out, chooser)
    for _ in range(numbers.num_long):
        instruction = chooser.choice(instructions) if chooser.random() < 0.3 else chooser.choice(LONG_INSTRUCTIONS)
        head = chooser.choice(QUESTION_HEADS)
        parts = [head, prose.take(chooser.randint(700, 1300)), instruction]
        yield _asked("long", "\n\n".join(part for part in parts if part))
    for _ in range(numbers.num_passages):
        parts = [chooser.choice(instructions), prose.take(int(60 * 12 ** chooser.random()))]
        chooser.shuffle(parts)
        yield _asked("passage", "\n\n".join(parts))
    for _ in range(numbers.num_stories):
        yield _asked("story", f"Continue the story.\n\n{prose.take(int(16 * 8 ** chooser.random()))}")
    for _ in range(numbers.num_code):
        text = code.take(chooser.randint(120, 480))
        yield {"category": "code", "prompt": text + ("\n" if chooser.random() < 0.5 else "")}


def _asked(category: str, text: str) -> dict[str, Any]:
    return {"category": category, "messages": [{"role": "user", "content": text}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chat", type=Path, required=True)
    parser.add_argument("--prose", type=Path, required=True)
    parser.add_argument("--held-out", type=Path, required=True, help="prompts (.jsonl) that nothing may be taken of")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    for name, number in (("long", 6144), ("passages", 12288), ("stories", 4096), ("code", 4096)):
        parser.add_argument(f"--num-{name}", type=int, default=number)
    numbers = parser.parse_args()
    held_out = "\n".join(
        str(value.get("prompt", "")) + "".join(turn["content"] + "\n" for turn in value.get("messages", ()))
        for value in map(json.loads, numbers.held_out.read_text(encoding="utf-8").splitlines())
    )
    made = list(prompts(documents(numbers.chat), documents(numbers.prose), held_out, numbers))
    numbers.out.write_text("".join(json.dumps(prompt) + "\n" for prompt in made), encoding="utf-8")
    print(f"{len(made)} prompts in {numbers.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
