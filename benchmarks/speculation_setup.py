"""What the benchmarks of speculation on a CPU share: the embedded model with every method that it has, and prompts."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from autobot_llm.engine.load import load_draft_model, load_engine
from autobot_llm.engine.options import EngineOptions
from autobot_llm.engine.request import EngineRequest, RequestStats
from autobot_llm.engine.sequence import SamplingParams, Sequence
from autobot_llm.engine.speculative.draft_model import DraftModel
from autobot_llm.engine.speculative.heads import make_eagle, make_medusa
from autobot_llm.engine.speculative.ngram import NgramProposer
from autobot_llm.engine.speculative.policy import Always
from autobot_llm.engine.speculative.speculator import Speculator

MODEL = Path(__file__).parents[1] / "src" / "autobot_llm" / "assets" / "tiny"
DRAFT = MODEL.with_name("tiny-draft")
PROMPTS = Path(__file__).parent / "data" / "dev_prompts.jsonl"
CATEGORIES = ("story", "chat", "copy", "code")
METHODS = ("off", "ngram", "draft", "medusa", "eagle3", "auto")
MAX_PROMPT_TOKENS = 600
SAMPLED = {"temperature": 0.8, "top_p": 0.95}
KV_CACHE_BYTES = 128 * 2**20

Half = Literal["held-out", "tuning", "all"]
"""Every second prompt of a category, from the second on, was not looked at when the controller was tuned."""


class Setup:
    """The engine, and what its speculators are made of."""

    def __init__(
        self,
        num_threads: int | None,
        num_tokens: int,
        *,
        max_num_batched_tokens: int | None = None,
        model: Path = MODEL,
        draft: Path = DRAFT,
        max_prompt_tokens: int = MAX_PROMPT_TOKENS,
    ) -> None:
        self.options = options = EngineOptions(
            folder=model,
            cache_dir=Path.home() / ".cache" / "autobot_llm",
            device="cpu",
            compiled_step="on",
            cpu_threads=num_threads,
            prefix_caching=False,
            kv_cache_memory=KV_CACHE_BYTES,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        self.engine = load_engine(options)
        self.draft: DraftModel = load_draft_model(model, draft, options)
        self._max_prompt_tokens = max_prompt_tokens
        self._num_tokens = num_tokens
        touch(self.engine.executor, self.draft.executor)
        # As `serve` does: a collection takes tens of milliseconds, and would hit whom it likes.
        gc.collect()
        gc.freeze()

    def speculator(self, method: str) -> Speculator | None:
        """A new one, which has learned nothing. All but auto draft always, whatever it costs."""
        config, most, always = self.engine.config, self._num_tokens, Always(self._num_tokens)
        match method:
            case "off":
                return None
            case "ngram":
                return Speculator(most, make_free=NgramProposer, policy=always)
            case "draft":
                return Speculator(most, costly=self.draft, policy=Always(min(3, most)))
            case "medusa":
                heads = make_medusa(MODEL.with_name("tiny-medusa"), MODEL, config)
                return Speculator(most, costly=heads, policy=always)
            case "eagle3":
                eagle = make_eagle(MODEL.with_name("tiny-eagle3"), MODEL, config, config.max_position_embeddings)
                return Speculator(most, costly=eagle, policy=always)
            case "auto":
                auto = Speculator(most, make_free=NgramProposer, costly=self.draft)
                auto.rehearse(Sequence(-1, [0, 0], self.params(1, is_sampled=False)))
                return auto
        raise ValueError(f"{method!r}: expected one of {', '.join(METHODS)}")

    def prompts(self, category: str, half: Half = "all") -> list[list[int]]:
        records = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
        found = [self._ids(record) for record in records if record["category"] == category]
        return found if half == "all" else found[half == "held-out" :: 2]

    def params(self, max_tokens: int, *, is_sampled: bool, seed: int = 0) -> SamplingParams:
        params = SamplingParams(
            max_tokens=max_tokens, temperature=0.0, seed=seed, stop_token_ids=self.engine.config.eos_token_ids
        )
        return replace(params, **SAMPLED) if is_sampled else params

    def answers(self, asked: list[tuple[list[int], SamplingParams]]) -> list[tuple[int, ...]]:
        """The tokens of some prompts' answers, all asked at once."""
        engine = self.engine
        for i, (ids, params) in enumerate(asked):
            engine.add(i, EngineRequest(ids, (params,)), RequestStats())
        sequences = [choice.sequence for choice in engine._choices.values()]
        while engine.has_work:
            engine.step()
        found = []
        for sequence, (_, params) in zip(sequences, asked, strict=True):
            output_ids = sequence.output_ids[: params.max_tokens]
            # A step with drafts may know tokens beyond the end, which nobody gets.
            stops = (i + 1 for i, token_id in enumerate(output_ids) if token_id in params.stop_token_ids)
            found.append(tuple(output_ids[: next(stops, len(output_ids))]))
        return found

    def close(self) -> None:
        self.engine.speculator = None
        self.draft.close()
        self.engine.close()

    def _ids(self, record: dict[str, Any]) -> list[int]:
        text = record.get("prompt") or "".join(
            f"<|{m['role']}|>\n{m['content'].strip()}<|end|>\n" for m in record["messages"]
        )
        text += "" if "prompt" in record else "<|assistant|>\n"
        ids: list[int] = self.engine.tokenizer.encode(text, add_special_tokens=False)
        return ids[-self._max_prompt_tokens :]


def touch(*executors: Any) -> None:
    """Have the caches' memory now: a page's first use takes as long as ten steps, whoever's turn it is."""
    for executor in executors:
        executor.cache.keys_LBKDP.zero_()
        executor.cache.values_LBKPD.zero_()
