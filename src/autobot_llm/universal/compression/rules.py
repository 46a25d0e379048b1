"""Shorten the prose of an instruction by rules: fillers, wordy phrases, articles, white space.

A pure function of the text: the same prompt always becomes the same bytes, so that a prefix cache that has seen it
keeps hitting. Knows English phrases (phrases.py); what is not prose it never sees (structure.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Literal

from autobot_llm.universal.compression.phrases import (
    BARE_VERBS,
    CLOSINGS,
    FILLERS,
    GREETINGS,
    NEGATIONS,
    OPENINGS,
    REDUNDANT,
    WORDY,
    words,
)
from autobot_llm.universal.compression.structure import MARK, mask

Depth = Literal["wordiness", "telegraphic"]
"""How far the rules go: full sentences with nothing superfluous, or also without articles and the like."""

MAX_PASSES = 12  # one removal uncovers the next; every pass shortens, and texts settle after two or three


def shorten(text: str, depth: Depth = "wordiness") -> str:
    """`text` with shorter prose and everything else byte for byte as it was. Never longer than `text`."""
    masked = mask(text)
    prose = _tidied(masked.text)
    for _ in range(MAX_PASSES):
        shorter = _tidied(_without_wordiness(prose))
        if depth == "telegraphic":
            shorter = _tidied(_telegraphic(shorter))
        if shorter == prose:
            break
        prose = shorter
    if depth == "telegraphic" and prose != _tidied(masked.text):  # a prompt with nothing to remove stays as it is
        prose = _LAST_STOP.sub("", prose)
    return masked.unmasked(prose)


def _without_wordiness(prose: str) -> str:
    prose = _CLOSING.sub("", _GREETING.sub("", prose))
    prose = _ANNOUNCED.sub(_without_second_announcement, prose)
    prose = _FILLER.sub(_dropped, prose)
    prose = _OPENING.sub(lambda found: found["lead"] + _in_case_of(found["said"], OPENINGS[_key(found["said"])]), prose)
    prose = _THEN_FILLER.sub(r"\g<lead>", prose)
    prose = _SO_FILLER.sub(r"\1", prose)
    prose = _THEN_OPENING.sub(lambda found: f"{found['lead']} {OPENINGS[_key(found['said'])]}", prose)
    prose = _PLEASE.sub(_dropped, prose)
    prose = _ANYWHERE.sub(lambda found: _in_case_of(found.group(), _SHORTER[_key(found.group())]), prose)
    prose = _THEN.sub(r"\1", prose)
    return _TWICE.sub(_once, prose)


def _telegraphic(prose: str) -> str:
    prose = _ROLE.sub(_dropped, prose)
    prose = _DUTY.sub(_dropped, prose)
    prose = _ONLY.sub(r"\g<lead>Only", prose)
    prose = _THAT.sub(r"\1 ", prose)
    prose = _WHICH_IS.sub(r"\1 ", prose)
    prose = _GENITIVE.sub(r"\g<owner>'s \g<owned>", prose)
    prose = _THEN_YOU.sub(r"\g<lead>", prose)
    prose = _IF_THERE_IS.sub(r"\1 ", prose)
    prose = _AND_THEN.sub(", then", prose)
    prose = _SUCH_AS.sub("like", prose)
    prose = _SERIES.sub(_without_last_comma, prose)
    return _ARTICLE.sub(_without_article, prose)


def _tidied(prose: str) -> str:
    """Single spaces, none at the ends of lines, at most one empty line."""
    prose = re.sub(r" +(?=\n|\Z)", "", re.sub(r" {2,}", " ", prose))
    return re.sub(r"\n[ \n]*\n", "\n\n", prose).strip(" \n")


# --- patterns ---------------------------------------------------------------------------------------------------------


def _any_of(phrases: Iterable[str]) -> str:
    """Any of the phrases, the longest first, also where a line breaks within one."""
    longest_first = sorted(phrases, key=len, reverse=True)
    return "|".join(re.escape(phrase).replace(r"\ ", r"[ \n]") for phrase in longest_first)


def _rule(expression: str) -> re.Pattern[str]:
    return re.compile(expression, re.IGNORECASE)


# Where a sentence may begin: a line's start, a list's marker, after a sentence or a clause.
_MARKER = r"(?:(?:[-*+•]|\d+[.)]|\#{1,6})[ ])?"
_LEAD = rf"(?P<lead>(?:\A|\n|[.!?:;]\)?[ \n]){_MARKER})"
_BEFORE = r"(?<![^\s(])"
_AFTER = rf"(?=[\s.,;:!?)]|{MARK}|\Z)"
# How the sentence goes on. `next` and `tail` are its next word, where that is a plain one and `stop` ends it.
_REST = r"(?P<gap>[ \n])(?P<next>\S)(?P<tail>[a-z]*)(?P<stop>(?s:.)?)"
_SHORTER: Mapping[str, str] = {**WORDY, **REDUNDANT}

_OPENING = _rule(rf"{_LEAD}(?P<said>{_any_of(OPENINGS)}){_AFTER}")
_FILLER = _rule(rf"{_LEAD}(?P<dropped>{_any_of(FILLERS)}){_REST}")
_GREETING = _rule(rf"\A(?:{_any_of(GREETINGS)})[ \n]+(?=\S)")
_CLOSING = _rule(rf"(?<=[.!?])[ \n]+(?:{_any_of(CLOSINGS)})\Z")
# "It is important that you do A, and that you do B"; no "that" of another clause may stand between.
_THAT_YOU = {f"{said.removesuffix(' you')} you" for said in FILLERS if said.endswith((" that", " that you"))}
_ANNOUNCED = _rule(
    rf"(?P<before>(?:\A|\n|[.!?:;]\)?[ \n]){_MARKER}(?:{_any_of(_THAT_YOU)})"
    r"[ ](?:(?! that )[^.!?\n]){1,300}?),? and that you(?: should)?(?= (?!have\b|already\b|be able\b))"
)
_ANYWHERE = _rule(rf"{_BEFORE}(?:{_any_of(_SHORTER)}){_AFTER}")
_PLEASE = _rule(
    rf"(?P<lead>(?:\A|\n|[.!?:;,]\)?[ \n]|\(){_MARKER}(?:(?:and|but|or|so|then|also)[ \n])?|"
    r"\b(?:and|but|or|so|then|also)[ \n])"
    rf"(?P<dropped>please|kindly)(?=[ \n](?!and\b|or\b|before\b|when\b|as\b)){_REST}"
)
# Only what follows the condition itself: a later "then" says in which order.
_THEN = re.compile(r"((?:\A|\n|[.!?:;][ \n])(?:If|When)\b[^.!?,\n]{1,300},)[ ]then(?=[ ])")
_TWICE = re.compile(r"(?:\A|(?<=\n)|(?<=[.!?] ))([^.!?\n]{10,300}[.!?])(?: \1)+(?!\S)")
_ROLE = _rule(rf"(?P<lead>\A|\n\n)(?P<dropped>you are (?:an?|the)){_REST}")
_DUTY = _rule(
    rf"{_LEAD}(?P<dropped>you (?:should|must)(?=[ ](?!have\b|already\b|be able\b))|"
    rf"(?:please )?make sure to|(?:please )?ensure(?=[ ](?:{_any_of(BARE_VERBS)})\b)){_REST}"
)
# "When he asks, you should answer": what comes first says when, and the rest is an instruction.
_INTRODUCED = (
    r"(?P<lead>(?:\A|\n|[.!?:;][ \n])(?:If|When|Whenever|Once|Where|Before|After|Until|Unless|At|For|In)\b"
    r"[^.!?:;\n]{1,200}?,)(?: then)?"
)
_THEN_YOU = re.compile(rf"{_INTRODUCED} you should(?= (?!have\b|already\b|be\b|not\b)[a-z])")
_THEN_FILLER = re.compile(rf"{_INTRODUCED} (?:{_any_of(said for said in FILLERS if said.endswith(' to'))})(?= [a-z])")
_SO_FILLER = re.compile(rf"(, so) (?:{_any_of(said for said in FILLERS if said.endswith(' to'))})(?= [a-z])")
_THEN_OPENING = re.compile(
    rf"{_INTRODUCED} (?P<said>{_any_of(said for said in OPENINGS if said.startswith('it '))})(?= [a-z])"
)
# A paragraph ends where its line does. What ends in an abbreviation keeps its stop.
_LAST_STOP = re.compile(r"(?<=[a-z)])(?<!\betc)(?<!\.[a-z])\.(?=\n\n|\Z)")
_ONLY = re.compile(r"(?P<lead>(?:\A|\n|[.!?:;][ \n]))You (?:can|may|must|should) only\b")
# "the plan that you made", "it means that the light stays off"; "so that", "is that" and the like need theirs.
_THAT = re.compile(
    r"(?<![\w’'])((?!(?:so|such|now|given|provided|except|is|was|are|in|of|to|than|and|or|but|not|if|like)\b)[a-z]+)"
    r" that (?=(?:you|the|they|it|we|every|each|all)\b)"
)
_WHICH_IS = re.compile(r"(?<![\w’'])([a-z]{3,}) (?:that|which|who) (?:is|are) (?=[a-z]{3,}(?:ed|ing)\b)")
_GENITIVE = re.compile(
    r"(?<![\w’'])(?<!\band )(?<!\bor )the (?P<owned>(?!(?:basis|case|event|course|form|rest|part)\b)[a-z]+) of the "
    r"(?P<owner>[a-z]+[a-rt-z])(?=[.,;:!?)\n]|\Z| (?:and|or|is|are)\b)"
)
# "If no tables fit" for "If there are no tables that fit".
_IF_THERE_IS = re.compile(r"\b([Ii]f|[Ww]hen|[Uu]nless) there (?:is|are) (?=(?:no|any|some|several|enough)\b)")
_AND_THEN = re.compile(r"(?<=[a-z]), and then(?= [a-z])")
_SUCH_AS = re.compile(r"(?<=[a-z] )such as(?= )")
_SERIES = re.compile(r"(?P<said>(?:\A|(?<=[.!?:;\n]))[^.!?:;\n]{1,300}?,[^.!?:;,\n]{1,100}), (?P<word>and|or) ")
_ARTICLE = re.compile(
    r"(?P<lead>(?:\A|(?P<start>(?:[.!?:][ \n]|\n)(?:(?:[-*+•]|\d+[.)])[ ])?)|(?P<before>[\w’',;)]{1,40})[ \n]|\())"
    r"(?P<article>[Tt]he|[Aa]n?)(?P<gap>[ \n])(?P<next>[a-z][a-z’'-]*|[A-Z]{2,}(?![a-z]))"
)
# Where an article does mean something: "a few" are more than "few", "twice a day", "to the list" is no verb.
_KEEPS_BEFORE = NEGATIONS - {"without"} | words("such half many what once twice times all both quite as")
_KEEPS_AFTER = words(
    "few little lot bit couple more less same other others one second "
    "is are was were or and in of to as for on with at day week month year hour minute night morning time"
)
_NO_VERB = words("next first last user users following previous current customer important")
_WORD_ENDS = frozenset(" \n.,;:!?)") | {""}


# --- replacements -----------------------------------------------------------------------------------------------------


def _key(phrase: str) -> str:
    return phrase.lower().replace("\n", " ")


def _in_case_of(said: str, instead: str) -> str:
    return instead[0].upper() + instead[1:] if said[0].isupper() else instead


def _dropped(found: re.Match[str]) -> str:
    """What went before and what comes after; a capital letter moves on to the word that begins the sentence now."""
    word = found["next"] + found["tail"]
    if found["dropped"][0].isupper() and word.isalpha() and word.islower() and found["stop"] in _WORD_ENDS:
        word = word[0].upper() + word[1:]
    return found["lead"] + word + found["stop"]


def _without_second_announcement(found: re.Match[str]) -> str:
    return found["before"] + " and"


def _without_article(found: re.Match[str]) -> str:
    begins = found["before"] is None and not found["lead"].endswith("(")
    before = (found["before"] or "").lower()
    is_article = found["article"].islower() or begins
    if before == "to" and found["next"] not in _NO_VERB:
        return found.group()
    if not is_article or before in _KEEPS_BEFORE or before.endswith("n't") or before[-1:].isdigit():
        return found.group()
    if found["next"] in _KEEPS_AFTER:
        return found.group()
    word = found["next"]
    return found["lead"] + (word[0].upper() + word[1:] if found["article"][0].isupper() else word)


def _without_last_comma(found: re.Match[str]) -> str:
    """ "a, b and c" for "a, b, and c", but not where the comma may say how far a negation reaches."""
    return found.group() if _is_negated(found["said"]) else f"{found['said']} {found['word']} "


def _is_negated(text: str) -> bool:
    said = re.findall(r"[\w’']+", text.lower())
    return any(word in NEGATIONS or word.endswith(("n't", "n’t")) for word in said)


def _once(found: re.Match[str]) -> str:
    """A sentence said twice in a row, but for prohibitions, whose repetition is emphasis, and what holds data."""
    is_needed = MARK in found[1] or _is_negated(found[1]) or re.search(r"\d", found[1])
    return found.group() if is_needed else found[1]
