"""Microsoft's LLMLingua with files of this machine only. Knows the library `llmlingua`; needs the extra of that name.

LLMLingua (Jiang et al. 2023) prunes tokens by a causal model's perplexity, LLMLingua-2 (Pan et al. 2024) by a
classifier that was trained for it. The kind of the model in the folder decides which one runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from autobot_llm.errors import ConfigurationError, ModelLoadError
from autobot_llm.universal.compression.result import CompressionResult, CountTokens, measured

MAX_FORCED_TOKENS = 100
MAX_ATTEMPTS = 6
TOLERANCE = 0.05
STEP_TOKENS = 50  # a smaller step spreads what is dropped over a short text


class LinguaCompressor:
    """Shortens contexts with the model in `folder`, a Hugging Face folder; loads it, on the CPU unless told otherwise.

    `count_tokens` is the tokenizer of the model that will read the result; without it counts are estimates. Raises
    ConfigurationError where the extra is not installed, and ModelLoadError where the folder holds no such model.
    """

    def __init__(self, folder: Path, *, device: str = "cpu", count_tokens: CountTokens | None = None) -> None:
        self.is_second = _is_classifier(folder)
        self._count_tokens = count_tokens
        try:
            self._library = _offline(folder, device, self.is_second)
        except ModuleNotFoundError as exc:
            raise ConfigurationError(
                f'LLMLingua needs {exc.name}, which is not installed: pip install "autobot_llm[llmlingua]"'
            ) from exc
        except (OSError, ValueError, KeyError) as exc:
            raise ModelLoadError(f"{folder}: {exc}") from exc

    def compress(self, text: str, *, ratio: float, question: str = "") -> CompressionResult:
        """`text` at about `ratio` of its tokens, within 5 % where the library can. LLMLingua-2 heeds no question.

        It drops tokens, not words: unlike our own pruning it may cut a number or a name in two.
        """
        low, high = 0.0, 1.0
        best = measured(text, text, self._count_tokens)
        for _ in range(MAX_ATTEMPTS):  # the library's rate is a wish: what comes out is up to twice as long
            rate = (low + high) / 2
            attempt = measured(text, self._compressed(text, rate, question), self._count_tokens)
            if abs(attempt.compression_ratio - ratio) < abs(best.compression_ratio - ratio):
                best = attempt
            if abs(attempt.compression_ratio - ratio) <= TOLERANCE:
                break
            low, high = (low, rate) if attempt.compression_ratio > ratio else (rate, high)
        return best

    def _compressed(self, text: str, rate: float, question: str) -> str:
        if self.is_second:
            told = self._library.compress_prompt_llmlingua2([text], rate=rate, force_reserve_digit=True)
        else:
            told = self._library.compress_prompt(
                [text],
                question=question,
                rate=rate,
                iterative_size=STEP_TOKENS,
                use_sentence_level_filter=False,
                use_context_level_filter=False,
                concate_question=False,
            )
        return str(told["compressed_prompt"]).strip()


def _is_classifier(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise ModelLoadError(f"{folder}: {exc}") from exc
    return any("ForTokenClassification" in name for name in config.get("architectures") or ())


def _offline(folder: Path, device: str, is_second: bool) -> Any:
    from llmlingua import PromptCompressor
    from transformers import DynamicCache

    class CacheOfPairs:
        """The model with keys and values in pairs, which the library cuts; transformers 5 has an object for them."""

        def __init__(self, model: Any) -> None:
            self._model = model

        def __getattr__(self, name: str) -> Any:
            return getattr(self._model, name)

        def __call__(self, *inputs: Any, past_key_values: Any = None, **options: Any) -> Any:
            cache: Any = DynamicCache()
            for number, (keys, values) in enumerate(past_key_values or ()):
                cache.update(keys, values, number)
            answer = self._model(*inputs, past_key_values=cache, **options)
            answer.past_key_values = [(layer.keys, layer.values) for layer in cache.layers]
            return answer

    class Offline(PromptCompressor):  # type: ignore[misc, unused-ignore]
        """The library's own class, made without the file that its constructor fetches (the tokenizer of GPT-3.5)."""

        model: Any

        def __init__(self) -> None:
            self.model_name = str(folder)
            self.use_llmlingua2 = is_second
            self.retrieval_model = None
            self.retrieval_model_name = None
            self.open_api_config: dict[str, Any] = {}
            self.cache_bos_num = 10
            self.prefix_bos_num = 100
            self.load_model(str(folder), device, {"trust_remote_code": False, "local_files_only": True})
            self.oai_tokenizer = self.tokenizer  # what it counts with
            if not is_second:
                self.model = CacheOfPairs(self.model)
            else:
                self.init_llmlingua2(max_force_token=MAX_FORCED_TOKENS)

    return Offline()
