"""Small tokenizers of the kinds that models come with: byte-level, SentencePiece with bytes, Metaspace, WordPiece."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers
from model_folders import TINY
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from autobot_llm.engine.tokenizer import Tokenizer

TEXT = ("the fox ran over the hill and the hen sat on the hay , then they all ran home . " * 20).split(".")
SPECIAL = ["<s>", "</s>", "<unk>"]


def sentencepiece_with_bytes() -> tokenizers.Tokenizer:
    """As Llama 2's: what the vocabulary lacks is written in bytes, and one leading space is dropped."""
    trained = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trained.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL + byte_pieces))
    # only the trainer makes special tokens of them: in a model they are pieces like any other
    description = json.loads(trained.to_str())
    description["added_tokens"] = [token for token in description["added_tokens"] if token["content"] in SPECIAL]
    return tokenizers.Tokenizer.from_str(json.dumps(description))


def metaspace() -> tokenizers.Tokenizer:
    trained = tokenizers.Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.decoder = decoders.Metaspace()
    trained.train_from_iterator(TEXT, trainers.UnigramTrainer(vocab_size=80, special_tokens=SPECIAL, unk_token="<unk>"))
    return trained


def wordpiece() -> tokenizers.Tokenizer:
    trained = tokenizers.Tokenizer(models.WordPiece(unk_token="<unk>"))
    trained.pre_tokenizer = pre_tokenizers.Whitespace()
    trained.decoder = decoders.WordPiece()
    trained.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL))
    return trained


def byte_level() -> tokenizers.Tokenizer:
    """As Llama 3's and Qwen's, with an added token that is not written in the byte alphabet."""
    trained = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    trained.add_tokens(["<think>", "日本 語"])
    return trained


KINDS = {
    "byte level": byte_level,
    "SentencePiece with bytes": sentencepiece_with_bytes,
    "Metaspace": metaspace,
    "WordPiece": wordpiece,
}


def write_tokenizer(folder: Path, backend: tokenizers.Tokenizer, **settings: Any) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    common = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps({**common, **settings}))
    return folder


def tiny_with_template(folder: Path, template: object) -> Tokenizer:
    """The embedded model's tokenizer with another chat template."""
    shutil.copy(TINY / "tokenizer.json", folder / "tokenizer.json")
    config = json.loads((TINY / "tokenizer_config.json").read_text())
    config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return Tokenizer.from_folder(folder)
