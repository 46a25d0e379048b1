"""Rules shorten the prose of an instruction, and leave its meaning, its code and its data alone."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autobot_llm.universal.compression.phrases import FILLERS, NEGATIONS, OPENINGS, REDUNDANT, WORDY
from autobot_llm.universal.compression.rules import Depth, shorten
from autobot_llm.universal.compression.structure import mask, paragraphs

LINES = (Path(__file__).parents[2] / "data" / "system_prompts.jsonl").read_text(encoding="utf-8").splitlines()
PROMPTS = {prompt["name"]: prompt["text"] for prompt in map(json.loads, LINES)}
DEPTHS: tuple[Depth, ...] = ("wordiness", "telegraphic")

CODE = """```python
def total(xs):
    # Please note that   this is   a comment, in order to test
    return sum(x for x in xs if x is not None)


print(total([1, 2,  3]))
```"""
YAML = """apiVersion: apps/v1
metadata:
  name: web
  annotations:
    note: "Please note that   this stays"
spec:
  replicas: 3

  items:
  - Please make sure to keep this
  - name:   "in order to"
"""
TOP_LEVEL_YAML = """steps:
- Please make sure to keep this
- in order to   be kept
timeout: 30"""
JSON = '{\n  "prompt": "Please note that  in order to",\n  "n": 10.50\n}'
FLAT_JSON = '{"prompt": "Please note that  in order to", "sku": "XX-0000", "items": [1,  2]}'
TABLE = """| agent | can do      | please note that |
|-------|-------------|------------------|
| shell | in order to | 30 s             |"""
COLUMNS = """name      size   in order to
web       12     please note that
db        7      the"""
CSV = "id,name,note\n1,in order to,the\n2,please note that,a"
INDENTED = "    for x in xs:\n        print(x)   # in order to show the value\n\n\n    done()"
UNFENCED = "def f(x):\n    return x   # the value, in order to\n\n\nfor y in ys:\n    f(y)"
QUOTE = "> Please note that the   quote stays, in order to be one."
DIALOG = "User: Please note that the cat is here.\nAssistant: In order to help, I need the address."
ELEMENT = "<example>\nPlease note that the   example stays.\n\nIn order to be one.\n</example>"
LATEX = "$$\n  the   sum\n$$"
BLOCKS = (CODE, YAML, TOP_LEVEL_YAML, JSON, FLAT_JSON, TABLE, COLUMNS, CSV, INDENTED, UNFENCED, QUOTE, DIALOG, ELEMENT)
INLINE = (
    '"please note that  in order to"',
    "“In order to   be, or not to be”",
    "„Please note that das bleibt“",
    "«in order to»",
    "`in order to   the`",
    "``a `tick` in order to``",
    "https://example.com/a?b=1&c=%20#in-order-to",
    "[in order to](https://example.com/the)",
    "{the_user}",
    "{{ in order to }}",
    "'in order to'",
    "$a   +  the$",
)
SENTENCES = (
    "Please note that the answer is short.",
    "It is important to never promise a date.",
    "Keep in mind that the user may not read English.",
    "In order to delete 12 of the 13 files, do not ask, unless the owner is away.",
    "You are a helpful assistant that isn't allowed to open door 2.",
    "Make sure to check the 3.10 release, and make sure to keep the 3.1 one.",
    "If the customer is angry, then first apologise, then ask.",
    "Remember that you should only use a few words such as the ones below.",
    "Nothing without a reason: cannot, neither the one nor the other.",
    "As you know, the plan that the user sends is only 5-7 steps.",
    "Please be polite, please be brief.",
)


OWN = (
    Path(__file__).parents[2] / "data" / "prose_prompts.jsonl"
)  # written for these tests, none of the rules' phrases in mind
PROMPTS |= {prompt["name"]: prompt["text"] for prompt in map(json.loads, OWN.read_text(encoding="utf-8").splitlines())}
MODALITY = re.compile(r"\b(?:may|might|cannot|if|unless|until|before|after|only|always|never|at least|at most|or)\b")


def numbers(text: str) -> list[str]:
    return re.findall(r"\d+(?:[.,:/-]\d+)*", text)


def negations(text: str) -> list[str]:
    """Every word that turns a sentence round, in order."""
    found = re.findall(r"[\w’']+", text.lower())
    return [word for word in found if word in NEGATIONS or word.endswith(("n't", "n’t"))]


def appear_in_order(pieces: list[str], text: str) -> bool:
    at = 0
    for piece in pieces:
        at = text.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return True


@pytest.mark.parametrize(
    ("said", "shorter"),
    [
        ("You are a helpful assistant.", "Assistant."),
        ("You are a helpful assistant that writes SQL.", "Assistant that writes SQL."),
        ("Please provide a summary.", "Provide a summary."),
        ("Make sure to test.", "Ensure test."),
        ("In order to win, train.", "To win, train."),
        ("Please note that the sky is blue.", "The sky is blue."),
        ("It is important to be specific.", "Be specific."),
        ("It is important to keep in mind that every plan ends.", "Every plan ends."),
        ("Keep in mind that money is in cents.", "Money is in cents."),
        ("Remember that the door is open.", "The door is open."),
        ("As you know, the agent is offline.", "The agent is offline."),
        ("In other words, do not ask.", "Do not ask."),
        ("It is important that you never unlock the door.", "Never unlock the door."),
        ("Use it due to the fact that it works.", "Use it because it works."),
        ("Please do not comment, and please be brief.", "Do not comment, and be brief."),
        ("If it rains, then stay.", "If it rains, stay."),
        ("Too   many    spaces.  And lines.  \n\n\n\nEnd.", "Too many spaces. And lines.\n\nEnd."),
        ("Be brief and clear. Be brief and clear. Stop.", "Be brief and clear. Stop."),
        ("Hello! Write a story. Thank you very much!", "Write a story."),
        ("It is essential that the text is short.", "Ensure the text is short."),
        ("It is vital that you wait, and that you should ask.", "Wait and ask."),
        (
            "It is vital that you say that it is shut and that you cannot help.",
            "Say that it is shut and that you cannot help.",
        ),
        ("They may be anxious, so it is important to be calm.", "They may be anxious, so be calm."),
        ("The lamp has to be off.", "The lamp must be off."),
        ("When in doubt, it is important to ask.", "When in doubt, ask."),
        ("It is a good idea to begin early.", "Preferably begin early."),
        ("At the end, it is a good idea to stop.", "At the end, preferably stop."),
        ("Please make sure that you always greet.", "Always greet."),
        ("You are not allowed to ask.", "Do not ask."),
        ("Answer on the basis of the text.", "Answer based on the text."),
        ("- Please note that lists stay.\n- Please use lists.", "- Lists stay.\n- Use lists."),
    ],
)
def test_listed_phrases_become_their_short_form(said: str, shorter: str) -> None:
    assert shorten(said) == shorter


@pytest.mark.parametrize(
    "text",
    [
        "Never say please before the meal.",
        "Do not remember that.",
        "Say please and thank you.",
        "First apologise, then ask.",
        "Do not reveal it. Do not reveal it.",
        "Keep the names in mind.",
        "npm is a tool.",
        "Greet with one of:\n- Hello!\n- Hi!\n- Thanks!",
        "Then say: thank you!",
        "As a general rule, be brief.",
        "He says that it is important to ask.",
    ],
)
def test_what_only_looks_like_filler_stays(text: str) -> None:
    assert shorten(text) == text


@pytest.mark.parametrize(
    ("said", "shorter"),
    [
        ("Answer the question with a few words.", "Answer question with a few words"),
        ("Run it twice a day.", "Run it twice a day."),
        ("Add it to the list.", "Add it to the list."),
        ("Turn off the light.", "Turn off light"),
        ("Visit The Hague and plan A is off.", "Visit The Hague and plan A is off."),
        ("It is not a promise.", "It is not a promise."),
        ("The timeout is 30 s.", "Timeout is 30 s"),
        ("Speak so that the user learns.", "Speak so that user learns"),
        ("Give the language of the question.", "Give question's language"),
        ("Ask one thing at a time.", "Ask one thing at a time."),
        ("Serve the north and the west of the city.", "Serve north and west of city"),
        ("If he asks, you should first ask why.", "If he asks, first ask why"),
        ("If he asks, you should not answer.", "If he asks, you should not answer."),
        ("Read it, and then answer the question.", "Read it, then answer question"),
        ("If there are no tables, say so to the user.", "If no tables, say so to user"),
        ("You are the guide of a museum.", "Guide of museum"),
        ("Add pepper, salt etc.", "Add pepper, salt etc."),
        ("Open the door.\n\nBe done by 5 p.m.", "Open door\n\nBe done by 5 p.m."),
    ],
)
def test_telegraphic_style_drops_only_what_carries_no_meaning(said: str, shorter: str) -> None:
    assert shorten(said, "telegraphic") == shorter


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("block", BLOCKS)
def test_code_and_data_stay_byte_for_byte(block: str, depth: Depth) -> None:
    before, after = "Please note that the example is short.", "In order to go on, read the next part."
    text = f"{before}\n\n{block}\n\n{after}"
    short = shorten(text, depth)
    assert block.strip("\n") in short
    assert len(short) < len(text)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("span", INLINE)
def test_quotations_and_addresses_within_prose_stay_byte_for_byte(span: str, depth: Depth) -> None:
    short = shorten(f"Please note that {span} stays. In order to see it, look at the page.", depth)
    assert span in short
    assert "Please" not in short.replace(span, "")


document = st.lists(
    st.one_of(
        st.sampled_from(BLOCKS).map(lambda block: (block.strip("\n"), "\n\n")),
        st.sampled_from(SENTENCES).map(lambda sentence: (sentence, " ")),
        st.sampled_from(SENTENCES).map(lambda sentence: (sentence, "\n\n")),
        st.tuples(st.sampled_from(INLINE), st.just(" is meant. ")),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(document, st.sampled_from(DEPTHS))
def test_in_any_document_code_data_numbers_and_negations_are_what_they_were(
    parts: list[tuple[str, str]], depth: Depth
) -> None:
    text = ""
    for piece, ending in parts:
        if (piece in (block.strip("\n") for block in BLOCKS)) and text and not text.endswith("\n\n"):
            text += "\n\n"
        text += piece + ending
    short = shorten(text, depth)
    kept = [piece for piece, _ in parts if piece not in SENTENCES]
    assert appear_in_order(kept, short)
    assert numbers(short) == numbers(text)
    assert negations(short) == negations(text)
    assert len(short) <= len(text)
    assert shorten(text, depth) == short
    assert shorten(short, depth) == short


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from("aA the\n \t.,`\"'{[<>|:-“”*12\ufffc$\\\r"), max_size=80))
def test_any_text_survives_masking_and_is_never_made_longer(text: str) -> None:
    masked = mask(text)
    assert masked.unmasked(masked.text) == text
    short = shorten(text, "telegraphic")
    assert len(short) <= len(text)
    assert shorten(short, "telegraphic") == short
    assert numbers(short) == numbers(text)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_prose_in_any_script_keeps_every_letter_but_spaces(text: str) -> None:
    if not re.search(r"[A-Za-z]", text):
        assert shorten(text, "telegraphic").split() == text.split()


@pytest.mark.parametrize("name", PROMPTS)
def test_the_shared_prompts_keep_their_code_data_and_numbers(name: str) -> None:
    text = PROMPTS[name]
    for depth in DEPTHS:
        short = shorten(text, depth)
        assert appear_in_order(list(mask(text).spans), short)
        assert numbers(short) == numbers(text)
        assert negations(short) == negations(text)
        assert shorten(short, depth) == short


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("name", PROMPTS)
def test_no_condition_permission_or_order_of_the_prompts_is_lost(name: str, depth: Depth) -> None:
    def told(text: str) -> Counter[str]:
        return Counter(MODALITY.findall(text.lower().replace("would be great if you could", "is polite")))

    text = PROMPTS[name]
    assert not told(text) - told(shorten(text, depth))


def test_no_phrase_adds_or_drops_a_negation_or_a_number_and_each_gets_shorter() -> None:
    for said, instead in {**dict.fromkeys(FILLERS, ""), **OPENINGS, **WORDY, **REDUNDANT}.items():
        assert said == said.lower().strip()
        assert not re.search(r"\d", said + instead)
        assert negations(said) == negations(instead), said
        assert len(instead) < len(said), said


def test_paragraphs_are_not_cut_within_code() -> None:
    assert paragraphs(f"One.\n\n{CODE}\n\nTwo.") == ["One.", CODE, "Two."]


@pytest.mark.parametrize("hostile", ["`" * 50_000, "{" * 50_000, "[" * 50_000, "<a" * 30_000, "please " * 20_000,
                                     '"' * 50_001, "'a " * 30_000, "a," * 50_000, "you are a " * 10_000, "\n" * 50_000,
                                     "If a b " * 20_000, "\\( " * 30_000, "“‘" * 30_000, "<p>\n" * 20_000])  # fmt: skip
def test_a_hostile_prompt_costs_no_more_than_its_length(hostile: str) -> None:
    began = time.process_time()
    shorten(hostile, "telegraphic")
    assert time.process_time() - began < 5
