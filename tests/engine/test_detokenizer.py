"""Text as it is generated: the whole is what decoding all ids gives, and no piece is ever taken back."""

from __future__ import annotations

import re
import time
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import TINY
from tokenizers_of_every_kind import KINDS, write_tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from autobot_llm.engine.detokenizer import Detokenizer
from autobot_llm.engine.tokenizer import Tokenizer


@cache
def tokenizer(kind: str) -> Tokenizer:
    with TemporaryDirectory() as folder:
        return Tokenizer.from_folder(write_tokenizer(Path(folder), KINDS[kind]()))


def stream(
    source: Tokenizer, ids: list[int], stop: tuple[str, ...] = (), skip_special_tokens: bool = True
) -> list[str]:
    one = Detokenizer(source, stop, skip_special_tokens=skip_special_tokens)
    return [one.push(token_id) for token_id in ids] + [one.flush()]


def without_incomplete_character(source: Tokenizer, ids: list[int], skip_special_tokens: bool) -> str:
    """What the whole must be: `decode`, less a character that the end cuts through."""
    kept = [i for i in ids if source.piece(i) and not (skip_special_tokens and i in source.special_ids)]
    if source.decoder_kind == "byte_level":
        text = source.decode(kept, skip_special_tokens=False)
        data = b"".join(bytes_of(source, i) for i in kept)
        return text[:-1] if num_cut_bytes(data) else text
    num_bytes = 0
    while num_bytes < len(kept) and re.fullmatch(r"<0x..>", source.piece(kept[-1 - num_bytes]) or ""):
        num_bytes += 1
    run = bytes(int((source.piece(i) or "")[3:5], 16) for i in kept[len(kept) - num_bytes :])
    return source.decode(kept[: len(kept) - num_cut_bytes(run)], skip_special_tokens=False)


def bytes_of(source: Tokenizer, token_id: int) -> bytes:
    """The bytes of a byte-level token, by transformers' table."""
    alphabet = {character: byte for byte, character in bytes_to_unicode().items()}
    piece = source.piece(token_id) or ""
    return bytes(alphabet[c] for c in piece) if all(c in alphabet for c in piece) else piece.encode()


def num_cut_bytes(data: bytes) -> int:
    """Length of an unfinished character at the end: up to 3 bytes that the strict decoder calls unexpectedly ended."""
    for length in (3, 2, 1):
        try:
            data[-length:].decode()
        except UnicodeDecodeError as exc:
            if exc.reason == "unexpected end of data" and exc.start == 0 and len(data) >= length:
                return length
    return 0


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_pieces_of_any_ids_add_up_to_decoding_them_all(
    kind: str, skip_special_tokens: bool, data: st.DataObject
) -> None:
    source = tokenizer(kind)
    # ids beyond the vocabulary are legal: models pad theirs; the first 260 hold specials and single bytes
    some_id = st.one_of(st.integers(0, 259), st.integers(0, source.vocab_size + 5))
    ids = data.draw(st.lists(some_id, max_size=30))
    whole = "".join(stream(source, ids, skip_special_tokens=skip_special_tokens))
    assert whole == without_incomplete_character(source, ids, skip_special_tokens)


@pytest.mark.parametrize("kind", ["byte level", "SentencePiece with bytes"])
@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=40))
def test_any_text_comes_back(kind: str, text: str) -> None:
    source = tokenizer(kind)
    ids = source.encode(text)
    pieces = stream(source, ids)
    assert "".join(pieces) == source.decode(ids)
    if not any(token in text for token in ("<s>", "</s>", "<unk>", "<|", "▁", "<0x")):
        assert "".join(pieces) == text


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(min_codepoint=0x80, exclude_categories=("Cs",)), min_size=1, max_size=12))
def test_half_a_character_is_never_emitted(text: str) -> None:
    source = tokenizer("byte level")
    one, seen = Detokenizer(source), ""
    for token_id in source.encode(text):
        seen += one.push(token_id)
        assert text.startswith(seen)
    assert seen + one.flush() == text


def test_a_character_cut_by_the_end_is_dropped() -> None:
    source = Tokenizer.from_folder(TINY)
    ids = source.encode("so 🦊")
    assert "".join(stream(source, ids[:-1])) == "so "
    spm = tokenizer("SentencePiece with bytes")
    assert "".join(stream(spm, spm.encode("fox 🦊")[:-1])) == "fox "


def cut_at_first_stop(text: str, stop: tuple[str, ...]) -> tuple[str, bool]:
    """The reference: read character by character, end as soon as what was read ends with a stop string."""
    for end in range(1, len(text) + 1):
        starts = [end - len(one) for one in stop if text[:end].endswith(one)]
        if starts:
            return text[: min(starts)], True
    return text, False


@settings(max_examples=300, deadline=None)
@given(
    words=st.lists(st.sampled_from(["the", " fox", " ran over", " hill", "é", " "]), min_size=1, max_size=8),
    has_bytes=st.booleans(),
    data=st.data(),
)
def test_text_ends_before_the_first_stop_string_however_it_falls_into_tokens(
    words: list[str], has_bytes: bool, data: st.DataObject
) -> None:
    source = tokenizer("SentencePiece with bytes" if has_bytes else "byte level")
    ids = [token_id for word in words for token_id in source.encode(word)]
    whole = source.decode(ids)
    # pieces of the text itself, so that they begin, end, overlap and nest within tokens; and one that hardly occurs
    cuts = st.tuples(st.integers(0, len(whole)), st.integers(1, 6))
    found = [whole[a : a + n] for a, n in data.draw(st.lists(cuts, max_size=3))]
    stop = tuple(one for one in [*found, data.draw(st.text("the ", min_size=1, max_size=5))] if one)
    one, pieces = Detokenizer(source, stop), []
    for token_id in ids:
        pieces.append(one.push(token_id))
        if one.stop_string is not None:
            assert one.push(token_id) == ""
            break
    pieces.append(one.flush())
    assert ("".join(pieces), one.stop_string is not None) == cut_at_first_stop(whole, stop)
    if one.stop_string is not None:
        assert one.stop_string in stop
        assert whole.startswith("".join(pieces) + one.stop_string)


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_decided() -> None:
    source = Tokenizer.from_folder(TINY)
    one = Detokenizer(source, ("###",))
    (sharp,), (letter,) = source.encode("#"), source.encode("a")
    assert [one.push(i) for i in (letter, sharp, sharp, letter, sharp, sharp)] == ["a", "", "", "##a", "", ""]
    assert one.flush() == "##"
    assert one.stop_string is None


def test_a_stop_string_within_the_minimum_is_passed_on() -> None:
    source = Tokenizer.from_folder(TINY)
    one = Detokenizer(source, ("ab",))
    a, b = (source.encode(c)[0] for c in "ab")
    assert one.push(a, match_stop=False) + one.push(b, match_stop=False) == "ab"
    assert one.push(a) + one.push(b) == ""
    assert one.stop_string is not None


@pytest.mark.parametrize("kind", ["byte level", "SentencePiece with bytes"])
def test_a_long_answer_costs_no_more_per_token_than_a_short_one(kind: str) -> None:
    source = tokenizer(kind)
    ids = source.encode("the fox ran over the hill ")

    def seconds_per_token(num_tokens: int) -> float:
        one = Detokenizer(source, ("never",))
        start = time.perf_counter()
        for i in range(num_tokens):
            one.push(ids[i % len(ids)])
        return (time.perf_counter() - start) / num_tokens

    short = min(seconds_per_token(500) for _ in range(5))
    long = min(seconds_per_token(20_000) for _ in range(3))
    assert long < 10 * short  # work that grows with the answer would make it 40 times
