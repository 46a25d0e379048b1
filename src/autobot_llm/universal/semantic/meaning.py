"""Say whether two texts could be the same question in other words. Knows some English; knows no vectors and no caches.

A text becomes the sequence of its words in a canonical form: what is without weight is gone (greetings, "please",
"could you tell me"), and what is always the same is written in one way ("what's", "how do I", British spellings). All
else must be equal, word by word and in order: numbers, names, units, negations, prepositions, articles. Similarity
alone cannot be trusted with any of them: "delete user 12" and "delete user 13" have nearly the same vector.

Code, quotations, addresses and everything with a digit or a symbol in it are taken as they stand. A text that does not
look English is compared word for word: nothing in it is known to be without weight.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

import msgspec

MAX_CHARACTERS = 2000  # of a text; longer ones are not questions that come again in other words

_TOKEN = re.compile(
    r"(?P<fixed>```.*?```|`[^`]+`"  # code
    r"|\"[^\"]+\"|“[^”]+”|«[^»]+»|‘[^’]+’(?!\w)|(?<!\w)'[^'\n]+'(?!\w)"  # quotations
    r"|\n\s*"  # a line's end and the next one's indentation
    r"|\S*(?:[\d@/\\_=<>{}\[\]|~^$%&#*+€£]|\w[.:]\w)\S*)"  # numbers, addresses, paths, identifiers, formulas
    r"|(?P<word>[^\W\d_]+(?:['’-][^\W\d_]+)*)"
    r"|(?P<mark>\S)",
    re.DOTALL,
)
_AFTER_FIXED = re.compile(r"(?:(?<!\d)!|[.,;:?…)])+$")
_QUOTES = "`\"“«‘'"
_SENTENCE_ENDS = frozenset(".!?…")
_PLACEHOLDER = "\ue000"  # of Unicode's private use area, in front of a fixed token's place


class Meaning(msgspec.Struct, frozen=True):
    """What must be equal. `words`: everything, in order. `fixed`: what must be even where other words may differ."""

    words: tuple[str, ...]
    fixed: tuple[str, ...]


def meaning_of(text: str) -> Meaning | None:
    """None for a text that is too long to be judged, or has no words."""
    if len(text) > MAX_CHARACTERS or _PLACEHOLDER in text:
        return None
    tokens, fixed = _tokens(text.strip())
    if not tokens:
        return None
    is_english = _is_english(tokens)
    if is_english:
        tokens = _canonical(tokens)
    words = tuple(_word(token, fixed) for token in tokens)
    return Meaning(words, _fixed(words) if is_english else words)


def _tokens(text: str) -> tuple[list[str], list[str]]:
    """Words, marks and placeholders; and what the placeholders stand for."""
    tokens: list[str] = []
    fixed: list[str] = []
    begins = True
    for match in _TOKEN.finditer(text):
        token = match[0]
        if match["fixed"] is not None:
            ending = None if token[0] in _QUOTES else _AFTER_FIXED.search(token)
            kept = token[: ending.start()] if ending else token
            tokens.append(f"{_PLACEHOLDER}{len(fixed)}")
            fixed.append(kept)
            tokens += token[len(kept) :]
            begins = bool(_SENTENCE_ENDS & set(token[len(kept) :]))
        elif match["word"] is not None:
            tokens.append(_cased(token.replace("’", "'"), begins))
            begins = False
        else:
            tokens.append(token)
            begins = token in _SENTENCE_ENDS
    return tokens, fixed


def _cased(word: str, begins: bool) -> str:
    """A name keeps its capitals. At the beginning of a sentence the first one says nothing."""
    if word == "I" or word.startswith("I'"):
        return word.lower()
    is_capitalized_only = word[1:] == word[1:].lower()
    return word.lower() if begins and is_capitalized_only else word


def _word(token: str, fixed: list[str]) -> str:
    if token.startswith(_PLACEHOLDER):
        return f"{_PLACEHOLDER}{fixed[int(token[1:])]}"
    return _words().synonyms.get(token, token)


class _Words(msgspec.Struct, frozen=True):
    """words.toml, in the form in which it is used."""

    synonyms: Mapping[str, str]
    english: frozenset[str]
    questions: frozenset[str]
    fixed: frozenset[str]
    binding: frozenset[str]
    rewrites: tuple[tuple[re.Pattern[str], str], ...]


@cache
def _words() -> _Words:
    told: dict[str, Any] = tomllib.loads((files(__package__) / "words.toml").read_text("utf-8"))
    lists = ("negations", "numbers", "dates", "units", "quantifiers", "comparatives", "persons", "relations")
    fixed = {word for name in lists for word in told[name]}
    fixed |= {word for pair in told["antonyms"] for word in pair}
    fixed |= {*told["question_words"], *told["auxiliaries"]}
    synonyms = {word: group[0] for group in told["synonyms"] for word in group}
    return _Words(
        synonyms=synonyms,
        english=frozenset(told["english"]),
        questions=frozenset((*told["question_words"], *told["auxiliaries"])),
        fixed=frozenset(fixed | {synonyms.get(word, word) for word in fixed}),
        binding=frozenset(told["binding"]),
        rewrites=_rewrites(told),
    )


def _is_english(tokens: list[str]) -> bool:
    return all(token.isascii() or token[0] == _PLACEHOLDER or not token[0].isalpha() for token in tokens) and any(
        token in _words().english for token in tokens
    )


# --- canonical form ---------------------------------------------------------------------------------------------------


def _canonical(tokens: list[str]) -> list[str]:
    text = " ".join(tokens)
    for pattern, into in _words().rewrites:
        text = pattern.sub(into, text)
    tokens = text.split()
    while tokens and tokens[-1] in _SENTENCE_ENDS:
        # A question is one without its mark, too; any other sentence is one only with it.
        if tokens[-1] == "?" and tokens[0] not in _words().questions:
            break
        tokens.pop()
    return tokens


def _rewrites(told: Mapping[str, Any]) -> tuple[tuple[re.Pattern[str], str], ...]:
    """What is replaced by what, in this order, in words parted by single spaces. Each keeps the meaning."""
    question = f"(?={'|'.join(told['question_words'])}\\b)"
    task = f"(?=(?:{'|'.join(told['tasks'])})\\b)"
    be = "is|are|was|were"
    auxiliary = "|".join(told["auxiliaries"])
    you = r"(?:can|could|would|will) you (?:please )?"
    owner = "the|a|an|my|your|his|her|our|their|this|that"
    tell = r"(?:tell me|explain to me|show me|let me know|explain|help me understand|remind me)"
    patterns: list[tuple[str, str]] = [
        # contractions
        (rf"\b({'|'.join(told['is_after'])})'s\b", r"\1 is"),
        (r"\b(?:can't|cannot)\b", "can not"),
        (r"\bwon't\b", "will not"),
        (r"\b(\w+)n't\b", r"\1 not"),
        (r"\bi'm\b", "i am"),
        (r"\b(\w+)'re\b", r"\1 are"),
        (r"\b(\w+)'ve\b", r"\1 have"),
        (r"\b(\w+)'ll\b", r"\1 will"),
        (r"\bi'd like\b", "i would like"),
        # greetings and thanks
        (r"^(?:hi|hello|hey)(?: there)?(?: [,.!])* ", ""),
        (r"(?:^| )(?:[,.!?] )?(?:thanks|thank you)(?: a lot| so much| very much| in advance)?(?: [.!])*$", ""),
        (r"^please (?:, )?", ""),
        (r"(?: ,)? please(?=(?: [.!?])*$)", ""),
        # what only announces a question, or a task
        (rf"^{you}{tell} {question}", ""),
        (rf"^(?:do|would|could|can) you (?:happen to )?(?:know|remember) {question}", ""),
        (rf"^i (?:want|need|would like|wish|am trying) to (?:know|find out|understand|learn) {question}", ""),
        (rf"^i (?:am|was) (?:just )?(?:wondering|curious) {question}", ""),
        (rf"^(?:any idea|may i ask|can i ask|could i ask|could i know|may i know) {question}", ""),
        (rf"^{tell} {question}", ""),
        (rf"^(?:{you})?(?:tell me|give me) the (?=\S+ (?:of|in|for)\b)", "what is the "),
        (rf"^{you}{task}(.*?)(?: [.?])*$", r"\1"),
        (rf"^i (?:want|need|would like) you to {task}", ""),
        # one way to ask how
        (r"^how (?:do|can|could) (?:i|you|we|one) ", "how to "),
        (r"^how does one ", "how to "),
        (r"^(?:what is the way to|what are the steps to|what steps do i take to|in what way can i) ", "how to "),
        (r"^which (?=is\b|are\b)", "what "),
        # the order of a question, and not that of a clause
        (rf"^(what|who|where|when|why) (?!(?:{auxiliary})\b)(.+?) ({be})(?=(?: [.!?])*$)", r"\1 \3 \2"),
        (r"^what (?!does\b)((?:\S+ )?\S+) means(?=(?: [.!?])*$)", r"what does \1 mean"),
        (r"^how (?!does\b)((?:\S+ ){1,3})works(?=(?: [.!?])*$)", r"how does \1work"),
        (r"^what is meaning of (.+?)(?=(?: [.!?])*$)", r"what does \1 mean"),
        (r"^what is the meaning of (.+?)(?=(?: [.!?])*$)", r"what does \1 mean"),
        (rf"^([^']*?)((?:(?:{owner}) )?\S+)'s (\S+)((?: [.!?])*)$", r"\1the \3 of \2\4"),
    ]
    return tuple((re.compile(pattern), into) for pattern, into in patterns)


# --- what must be equal even where other words may differ -------------------------------------------------------------

_DERIVED = re.compile(r"(?:un|non|dis|in|im|ir|il|mis|anti|over|under|de|re|ex)[a-z]{3,}|[a-z]{2,}(?:er|est|less|n't)")


def _fixed(words: tuple[str, ...]) -> tuple[str, ...]:
    """All that is no plain word in small letters, and of those the ones that can turn a meaning around."""
    known = _words()
    kept = []
    for place, word in enumerate(words):
        if (
            not (word.isascii() and word.isalpha() and word.islower())
            or word in known.fixed
            or _DERIVED.fullmatch(word)
        ):
            follower = words[place + 1] if word in known.binding and place + 1 < len(words) else ""
            kept.append(f"{word} {follower}" if follower else word)
    return tuple(kept)
