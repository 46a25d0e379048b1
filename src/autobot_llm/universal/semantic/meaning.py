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

MAX_CHARACTERS = 1000  # of a text; longer ones are not questions that come again in other words

_TOKEN = re.compile(
    r"(?P<fixed>```.*?```|`[^`]+`"  # code
    r"|\"[^\"]+\"|“[^”]+”|«[^»]+»|‘[^’]+’(?!\w)|(?<!\w)'[^'\n]+'(?!\w)"  # quotations
    r"|(?<!\S)-+\w\S*"  # options of a command
    r"|\n\s*"  # a line's end and the next one's indentation
    r"|\S{0,256}(?:[\d@/\\_=<>{}\[\]|~^$%&#*+€£]|\w[.:]\w)\S*)"  # numbers, addresses, paths, identifiers, formulas
    r"|(?P<word>[^\W\d_]+(?:['’-][^\W\d_]+)*)"
    r"|(?P<mark>\S)",
    re.DOTALL,
)
_AFTER_FIXED = re.compile(r"(?:(?<!\d)!|[.,;:?…)])+$")
_QUOTES = "`\"“«‘'"
_SENTENCE_ENDS = frozenset(".!?…")
_ENDS = frozenset(".!,。")
_ENDS_OF_QUESTIONS = _ENDS | {"?"}
_PLACEHOLDER = "\ue000"  # of Unicode's private use area, in front of a fixed token's place


Meaning = tuple[str, ...]  # canonical words, in order


def meaning_of(text: str) -> Meaning | None:
    """What must be equal where two texts are one question; None for a text that is too long to be judged, or empty."""
    if len(text) > MAX_CHARACTERS or _PLACEHOLDER in text:
        return None
    tokens, fixed = _tokens(text.strip())
    if not tokens:
        return None
    if _is_english(tokens) and ":" not in tokens and not any("\n" in one for one in fixed):
        tokens = _canonical(tokens)
    tokens = _without_end(tokens)
    return tuple(f"{_PLACEHOLDER}{fixed[int(token[1:])]}" if token[0] == _PLACEHOLDER else token for token in tokens)


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


class _Words(msgspec.Struct, frozen=True):
    """words.toml, in the form in which it is used."""

    synonyms: Mapping[str, str]
    english: frozenset[str]
    questions: frozenset[str]
    about_words: frozenset[str]
    courtesies: tuple[tuple[re.Pattern[str], str], ...]
    rewrites: tuple[tuple[re.Pattern[str], str], ...]


@cache
def _words() -> _Words:
    told: dict[str, Any] = tomllib.loads((files(__package__) / "words.toml").read_text("utf-8"))
    synonyms = {word: group[0] for group in told["synonyms"] for word in group}
    return _Words(
        synonyms=synonyms,
        english=frozenset(told["english"]),
        questions=frozenset((*told["question_words"], *told["auxiliaries"])),
        about_words=frozenset(told["about_words"]),
        courtesies=_courtesies(told),
        rewrites=_rewrites(told),
    )


def _is_english(tokens: list[str]) -> bool:
    return all(token.isascii() or token[0] == _PLACEHOLDER or not token[0].isalpha() for token in tokens) and any(
        token in _words().english for token in tokens
    )


# --- canonical form ---------------------------------------------------------------------------------------------------


def _canonical(tokens: list[str]) -> list[str]:
    known = _words()
    text = " ".join(tokens)
    is_about_words = not known.about_words.isdisjoint(tokens)  # then a word is not what it stands for
    for pattern, into in known.rewrites if is_about_words else known.courtesies + known.rewrites:
        text = pattern.sub(into, text)
    rewritten = text.split() or tokens  # nothing but a greeting is what was meant
    return rewritten if is_about_words else [known.synonyms.get(word, word) for word in rewritten]


def _without_end(tokens: list[str]) -> list[str]:
    """A question is one without its mark, too; any other sentence is one only with it."""
    is_question = tokens[0] in _words().questions
    num_kept = len(tokens)
    while num_kept > 1 and tokens[num_kept - 1] in (_ENDS_OF_QUESTIONS if is_question else _ENDS):
        num_kept -= 1
    return tokens[:num_kept]


Rewrites = tuple[tuple[re.Pattern[str], str], ...]


def _courtesies(told: Mapping[str, Any]) -> Rewrites:
    """Greetings, thanks and "please" in a text that is not about words itself; in words parted by single spaces."""
    follows = f"(?={'|'.join((*told['question_words'], *told['auxiliaries'], 'i', 'please'))}\\b)"
    return _compiled(
        (rf"^(?:hi|hello|hey)(?: there)? (?:(?:[,.!] )+|{follows})", ""),
        (
            r"( [,.!?])(?: [,.!?]){0,3} (?:thanks|thank you)(?: a lot| so much| very much| in advance)?(?: [.!])*$",
            r"\1",
        ),
        (r"(?<! to)(?: ,)? please(?=(?: [.!?])*$)", ""),
    )


def _rewrites(told: Mapping[str, Any]) -> Rewrites:
    """What is replaced by what, in this order, in words parted by single spaces. Each keeps the meaning."""
    questions = told["question_words"]
    question = f"(?=(?:{'|'.join(questions)})\\b)"
    # "tell me when it is ready" asks for something else than "when is it ready"
    no_time = f"(?=(?:{'|'.join(word for word in questions if word not in ('when', 'whether'))})\\b)"
    task, plain_task = (f"(?=(?:{'|'.join(told[name])})\\b)" for name in ("tasks", "plain_tasks"))
    be = "is|are|was|were"
    auxiliary = "|".join(told["auxiliaries"])
    state = "|".join(told["states"])
    owner = "the|a|an|my|your|his|her|our|their|this|that"
    end = r"(?=(?: [.!?])*$)"
    tell = r"(?:tell me|explain to me|explain|help me understand)"
    return _compiled(
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
        # what only announces a question, or a task
        (r"^please (?:, )?", ""),
        (rf"^(?:(?:can|could|would) you (?:please )?)?{tell} {no_time}", ""),
        (rf"^(?:do|would) you (?:happen to )?(?:know|remember) {question}", ""),
        (rf"^i (?:want|need|would like|am trying) to (?:know|find out|understand) {question}", ""),
        (rf"^i (?:am|was) (?:just )?(?:wondering|curious) {question}", ""),
        (rf"^(?:any idea|may i ask|can i ask|could i ask) {question}", ""),
        (r"^(?:(?:can|could|would) you (?:please )?)?(?:tell me|give me) the (?=\S+ (?:of|in|for)\b)", "what is the "),
        (rf"^(?:could you(?: please)?|can you please) {task}(.*?){end}(?: [.?!])*$", r"\1"),
        (rf"^can you {plain_task}(.*?){end}(?: [.?!])*$", r"\1"),
        (rf"^i (?:want|need|would like) you to {task}", ""),
        # one way to ask how
        (rf"^how (?:(?:do|can|could) (?:i|one)|i (?:can|could)|does one) (?!(?:{state})\b)", "how to "),
        (r"^(?:what is the way to|what are the steps to|what steps do i take to) ", "how to "),
        (r"^which (?=is\b|are\b)", "what "),
        # the order of a question, and not that of a clause
        (rf"^(what|who|where|when|why) (?!(?:{auxiliary})\b)(.+?) ({be}){end}", r"\1 \3 \2"),
        (rf"^(why|when|where) (?!(?:{auxiliary})\b)(.+?) ({be}) (?=\w)", r"\1 \3 \2 "),
        (rf"^what (?!does\b)((?:\S+ )?\S+) means{end}", r"what does \1 mean"),
        (rf"^how (?!does\b)((?:\S+ ){{1,3}})works{end}", r"how does \1work"),
        (
            rf"^what is (?:the )?meaning of ((?:the (?:word|term|phrase) )?(?:{_PLACEHOLDER}\d+|[A-Z]{{2,}})){end}",
            r"what does \1 mean",
        ),
        (rf"^([^']*?)((?:(?:{owner}) )?\S+)'s (\S+){end}", r"\1the \3 of \2"),
    )


def _compiled(*rewrites: tuple[str, str]) -> Rewrites:
    return tuple((re.compile(pattern), into) for pattern, into in rewrites)
