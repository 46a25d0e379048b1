"""LLMLingua, both of its kinds, without a network and to the ratio that was asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from autobot_llm.errors import ModelLoadError
from autobot_llm.universal.compression.llmlingua import TOLERANCE, LinguaCompressor

TINY = Path(__file__).parents[3] / "src" / "autobot_llm" / "assets" / "tiny"
TEXT = (
    "Once upon a time there was a little fox who lived in a big forest with many friends. The fox liked to play in the "
    "rain. One day the fox did not find the way home, and the owl, who was very old and very wise, told her to follow "
    "the river until she saw the purple house. The fox was happy and said thank you to the owl. "
)


def num_words(text: str) -> int:
    return len(text.split())


@pytest.fixture(scope="module")
def first() -> LinguaCompressor:
    return LinguaCompressor(TINY, count_tokens=num_words)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of LLMLingua-2's kind with random weights; the library knows its kind by the folder's name."""
    folder = tmp_path_factory.mktemp("models") / "bert-base-multilingual-cased-random"
    folder.mkdir()
    words = sorted({word.strip(".,") for word in TEXT.split()})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate([*special, ".", ",", *words])}
    tokenizer = transformers.BertTokenizerFast(vocab=vocabulary, do_lower_case=False)
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertForTokenClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


OFFLINE = """
import sys
from pathlib import Path

def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise RuntimeError(f"the library asks the network: {event} {arguments}")

sys.addaudithook(refuse)
from autobot_llm.universal.compression.llmlingua import LinguaCompressor
print(LinguaCompressor(Path(sys.argv[1])).compress(sys.argv[2], ratio=0.5).compressed_tokens)
"""


def test_nothing_is_fetched() -> None:
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, str(TINY), TEXT], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < len(TEXT) // 4


@pytest.mark.parametrize("ratio", [0.8, 0.5])
def test_the_first_kind_prunes_by_the_embedded_models_perplexity(first: LinguaCompressor, ratio: float) -> None:
    result = first.compress(TEXT * 3, ratio=ratio)
    assert result.compression_ratio == pytest.approx(ratio, abs=TOLERANCE + 0.01)
    assert not result.is_estimate


def test_the_second_kind_prunes_by_a_trained_classifier(classifier: Path) -> None:
    lingua = LinguaCompressor(classifier, count_tokens=num_words)
    assert lingua.is_second
    result = lingua.compress(TEXT, ratio=0.6)
    assert 0.3 < result.compression_ratio < 0.8
    known = {word.strip(".,") for word in TEXT.split()}
    assert {word.strip(".,") for word in result.compressed_text.split()} - {""} <= known


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=str(tmp_path)):
        LinguaCompressor(tmp_path)
