"""Our own engine as a provider, and the one door into engine/. Knows requests and the engine's own types.

torch is imported with this module, so routing imports it only when the native provider is asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from autobot_llm.engine.batching.profiles import get_batching_config
from autobot_llm.engine.description import DescribedExecutor
from autobot_llm.engine.engine import Engine
from autobot_llm.engine.grammar.matcher import Grammar
from autobot_llm.engine.kv_cache.prefix_cache import CACHED_PREFIXES, PrefixCacheConfig, PrefixCacheManager
from autobot_llm.engine.load import load_engine
from autobot_llm.engine.options import EngineOptions
from autobot_llm.engine.request import EngineRequest
from autobot_llm.engine.service import EngineService
from autobot_llm.engine.speculative.build import SpeculationOptions
from autobot_llm.errors import ConfigurationError, ModelNotFoundError, ProviderUnavailable, UnsupportedError
from autobot_llm.providers.base import ModelInfo, OnProgress, ProviderStatus, ScoredToken
from autobot_llm.providers.native.answer_shape import AnswerShape, answer_shape
from autobot_llm.providers.native.embedding import embed_inputs
from autobot_llm.providers.native.from_engine import Answer
from autobot_llm.providers.native.load_or_quantize import quantized_weights
from autobot_llm.providers.native.optimizations import running_optimizations
from autobot_llm.providers.native.scoring import score_text
from autobot_llm.providers.native.to_engine import encode_prompt, sampling_params
from autobot_llm.report import OptimizationOutcome
from autobot_llm.settings import Settings
from autobot_llm.types import EmbeddingRequest, EmbeddingResponse, Event, LLMRequest, Start

if TYPE_CHECKING:
    from autobot_llm.engine.grammar.compiler import GrammarCompiler

EMBEDDED_MODEL = "tiny"
EMBEDDED_DRAFT = "tiny-draft"
ASSETS = Path(__file__).parents[2] / "assets"


class NativeProvider:
    """Answers from model folders on this machine. Each model has an engine of its own, started when first asked for.

    The models are the default one and those that settings map to a type of request, and no others: a request cannot
    make the process load a folder of its choice.
    """

    name = "native"

    def __init__(self, settings: Settings, *, on_progress: OnProgress | None = None) -> None:
        self._settings = settings
        self._on_progress = on_progress
        self._default = settings.default_model.removeprefix(f"{self.name}/")
        self._folders = {self._default: model_folder(self._default)}
        # A type of request may be mapped to another provider's model, so what is no model here is no error here.
        for name in (name.removeprefix(f"{self.name}/") for name in settings.models.values()):
            with contextlib.suppress(ConfigurationError):
                self._folders[name] = model_folder(name)
        self._revisions: dict[str, str] = {}
        self._services: dict[str, EngineService] = {}
        self._prefix_caches: dict[str, PrefixCacheManager] = {}
        self._compilers: dict[str, GrammarCompiler] = {}
        batching = get_batching_config(settings.workload)
        self._heeds_priority = (settings.scheduling_policy or batching.scheduling_policy) == "priority"
        self._starting = asyncio.Lock()
        self._created = int(time.time())

    async def start(self) -> None:
        """Load the default model. Raises ModelLoadError or ConfigurationError."""
        await self._service(self._default)

    async def close(self) -> None:
        services, self._services, self._prefix_caches = list(self._services.values()), {}, {}
        compilers, self._compilers = list(self._compilers.values()), {}
        await asyncio.gather(*(asyncio.to_thread(compiler.close) for compiler in compilers))
        await asyncio.gather(*(service.close() for service in services))

    async def models(self) -> list[ModelInfo]:
        return [
            ModelInfo(
                id=name,
                provider=self.name,
                context_length=self._context_length(name),
                created=self._created,
                is_loaded=name in self._services,
            )
            for name in self._folders
        ]

    def status(self) -> ProviderStatus:
        service = self._services.get(self._default)
        if service is None:
            return ProviderStatus(name=self.name, state="stopped", message="the engine was not started")
        engine = service.engine
        if service.state != "ready" or engine is None:
            return ProviderStatus(name=self.name, state=service.state, message=str(service.failure or ""))
        scheduler = engine.scheduler
        pool = scheduler.block_pool
        num_cache_tokens, num_sequences = (
            pool.num_blocks * pool.block_size,
            pool.num_blocks / scheduler.blocks_per_sequence,
        )
        details: dict[str, float | int | str] = {
            "model": self._default,
            "step": engine.executor.name,
            "step_reason": engine.executor.reason,
            "max_model_len": scheduler.max_model_len,
            "max_num_seqs": scheduler.max_num_seqs,
            "kv_cache": f"{num_cache_tokens:,} tokens, {num_sequences:.1f} sequences of full length",
        }
        if engine.cache is not None and (smaller := "; ".join(engine.cache.lines())):
            details["kv_cache_optimization"] = smaller
        if isinstance(engine.executor, DescribedExecutor):
            details |= engine.executor.description.lines()
        details["speculation"] = engine.speculation_reason
        if engine.speculator is not None:
            details |= engine.speculator.lines()
        prefix_cache = self.get_prefix_cache_config()
        if tenants := {prefix.salt for prefix in prefix_cache.warmed}:
            details["warmed"] = (
                f"{prefix_cache.num_pinned_tokens:,} tokens: {len(prefix_cache.prefixes)} prefixes for "
                f"{len(tenants)} tenants"
            )
        return ProviderStatus(name=self.name, state="ready", details=details)

    def get_prefix_cache_config(self, model: str | None = None) -> PrefixCacheConfig:
        """What prefix caching does for a model (None: the default one), and what of it was warmed.

        Raises ProviderUnavailable where the model's engine was not started.
        """
        if (prefix_cache := self._prefix_caches.get(model or self._default)) is None:
            raise ProviderUnavailable(f"the engine of model {model or self._default!r} was not started")
        return prefix_cache.get_prefix_cache_config()

    def metrics(self) -> dict[str, float]:
        """Sums over the engines that run; see observability/metrics.py for the names."""
        engines = [service.engine for service in self._services.values() if service.engine is not None]
        schedulers = [engine.scheduler for engine in engines]
        pools = [scheduler.block_pool for scheduler in schedulers]
        speculators = [engine.speculator for engine in engines if engine.speculator is not None]
        num_draft_tokens = sum(speculator.num_proposed for speculator in speculators)
        num_accepted_tokens = sum(speculator.num_accepted for speculator in speculators)
        num_query_tokens = sum(pool.num_query_tokens for pool in pools)
        return {
            "num_running": sum(scheduler.num_running for scheduler in schedulers),
            "num_waiting": sum(scheduler.num_waiting for scheduler in schedulers),
            "num_preemptions": sum(scheduler.num_preemptions for scheduler in schedulers),
            "num_evicted_blocks": sum(scheduler.num_evicted_blocks for scheduler in schedulers),
            "num_blocks": sum(pool.num_blocks for pool in pools),
            "num_free_blocks": sum(pool.num_free for pool in pools),
            "kv_cache_memory_mb": sum(engine.kv_cache_bytes for engine in engines) / 1e6,
            "prefix_cache_hit_rate": sum(pool.num_hit_tokens for pool in pools) / max(1, num_query_tokens),
            "num_steps": sum(engine.num_steps for engine in engines),
            "num_generated_tokens": sum(engine.num_generated_tokens for engine in engines),
            "num_draft_tokens": num_draft_tokens,
            "num_accepted_tokens": num_accepted_tokens,
            "speculation_acceptance_rate": num_accepted_tokens / max(1, num_draft_tokens),
        }

    def revision(self, model: str | None) -> str:
        """Names, sizes and times of the model's files, as they were when this was first asked."""
        name = model or self._default
        if name not in self._revisions and name in self._folders:
            found = [(file.name, file.stat()) for file in sorted(self._folders[name].iterdir())]
            self._revisions[name] = repr([(file, stat.st_size, stat.st_mtime_ns) for file, stat in found])
        return self._revisions.get(name, "")

    def engine_version(self) -> str | None:
        return None  # the engine has no releases of its own

    def optimizations(self) -> list[OptimizationOutcome]:
        """What runs in the default model's engine; see `TellsOptimizations`."""
        service = self._services.get(self._default)
        return [] if service is None or service.engine is None else list(running_optimizations(service.engine))

    async def count_tokens(self, request: LLMRequest) -> int:
        """The prompt's length, chat template and tools included."""
        engine = (await self._service(request.model or self._default)).engine
        assert engine is not None, "a started service has an engine"
        return len(await encode_prompt(engine, request, answer_shape(request, engine.tokenizer).tools))

    async def score(self, text: str, *, before: str = "", model: str | None = None) -> tuple[ScoredToken, ...]:
        """See `TextScorer`."""
        return await score_text(await self._service(model or self._default), text, before)

    async def embed(self, request: EmbeddingRequest) -> EmbeddingResponse:
        """See `Embedder`. The vectors are mean-pooled hidden states of a model that writes: no embedding model's."""
        model = request.model or self._default
        return await embed_inputs(await self._service(model), request, model=model)

    async def text_counter(self, model: str | None = None) -> Callable[[str], int]:
        engine = (await self._service(model or self._default)).engine
        assert engine is not None, "a started service has an engine"
        tokenizer = engine.tokenizer
        return lambda text: len(tokenizer.encode(text, add_special_tokens=False))

    async def stream(self, request: LLMRequest) -> AsyncGenerator[Event, None]:
        """Answer with the engine. Everything that can be refused is refused before `Start`."""
        model = request.model or self._default
        service = await self._service(model)
        engine = service.engine
        assert engine is not None, "a started service has an engine"
        shape = answer_shape(request, engine.tokenizer)
        if request.priority and not self._heeds_priority:
            raise UnsupportedError(
                f"priority={request.priority}: the engine serves who came first; AUTOBOT_SCHEDULING_POLICY=priority "
                "makes it heed priorities",
                param="priority",
            )
        prompt_ids = await encode_prompt(engine, request, shape.tools)
        grammar = await self._grammar(model, engine, shape, request.tenant)
        engine_request = EngineRequest(
            prompt_ids=prompt_ids,
            params=sampling_params(engine, request, len(prompt_ids), grammar),
            stop=tuple(request.stop),
            salt=request.tenant,
            priority=request.priority,
            shown_ids=frozenset() if shape.tools is None else shape.tools.form.shown_ids(engine.tokenizer),
        )
        with service.submit(engine_request) as handle:
            yield Start(request_id=request.request_id or secrets.token_hex(12), model=model, provider=self.name)
            answer = Answer(engine, handle.stats, num_prompt_tokens=len(prompt_ids), tools=shape.tools)
            while handle.is_open:
                for event in answer.events(await handle.next_outputs()):
                    yield event
        yield answer.finish()

    async def _grammar(self, model: str, engine: Engine, shape: AnswerShape, tenant: str) -> Grammar | None:
        if shape.grammar is None:
            return None
        if (compiler := self._compilers.get(model)) is None:
            from autobot_llm.engine.grammar.compiler import GrammarCompiler  # its library is needed only here

            compiler = self._compilers[model] = GrammarCompiler.for_model(
                engine.tokenizer, engine.config.vocab_size, engine.config.eos_token_ids
            )
        return await compiler.compile(shape.grammar, shape.field, tenant)

    async def _service(self, model: str) -> EngineService:
        if model not in self._folders:
            raise ModelNotFoundError(
                f"model {model!r} is not served here; served are {', '.join(self._folders)}", param="model"
            )
        if (running := self._services.get(model)) is not None:
            return running
        async with self._starting:
            if model not in self._services:
                service = EngineService(
                    partial(self._build, model),
                    max_queued_requests=self._settings.max_queued_requests,
                )
                await service.start()
                self._services[model] = service
            return self._services[model]

    def _build(self, model: str) -> Engine:
        """Load a model and warm its prefixes: on the thread that will own the engine, before it has requests."""
        settings = self._settings
        folder, kind = quantized_weights(settings, self._folders[model], self._on_progress)
        options = replace(engine_options(settings, folder), quantization=kind)
        engine = load_engine(options, self._on_progress)
        try:
            prefix_cache = PrefixCacheManager(engine, settings.cached_prefixes or CACHED_PREFIXES)
            if settings.warm_prefixes:
                prefix_cache.warm(settings.tenants)
        except BaseException:
            engine.close()
            raise
        self._prefix_caches[model] = prefix_cache
        return engine

    def _context_length(self, model: str) -> int | None:
        service = self._services.get(model)
        return service.engine.scheduler.max_model_len if service and service.engine else None


def model_folder(name: str) -> Path:
    """The folder of a model: the embedded one by its name, any other by its path."""
    if name == EMBEDDED_MODEL:
        return ASSETS / EMBEDDED_MODEL
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ConfigurationError(
            f"model {name!r}: expected {EMBEDDED_MODEL} (the embedded model), or the path of a Hugging Face folder"
        )
    return folder


def engine_options(settings: Settings, folder: Path) -> EngineOptions:
    return EngineOptions(
        folder=folder,
        cache_dir=settings.cache_dir,
        device=settings.device,
        compiled_step=settings.compiled_step,
        prefix_caching=settings.prefix_caching,
        max_model_len=settings.max_model_len,
        workload=settings.workload,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=settings.max_num_batched_tokens,
        max_waiting_time_ms=settings.max_waiting_time_ms,
        scheduling_policy=settings.scheduling_policy,
        preemption=settings.preemption,
        swap_memory=settings.swap_memory,
        kv_cache_dtype=settings.kv_cache_dtype,
        kv_sliding_window=settings.kv_sliding_window,
        kv_heavy_hitters=settings.kv_heavy_hitters,
        kv_cache_memory=settings.kv_cache_memory,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        attention_backend=settings.attention_backend,
        cuda_graphs=settings.cuda_graphs,
        cpu_threads=settings.cpu_threads,
        speculation=speculation_options(settings),
    )


def speculation_options(settings: Settings) -> SpeculationOptions:
    """Raises ConfigurationError for a draft model, or heads, that are no folder."""
    draft_model, draft_folder = settings.speculation_draft_model, None
    if draft_model is not None:
        draft_folder = ASSETS / EMBEDDED_DRAFT if draft_model == EMBEDDED_DRAFT else Path(draft_model).expanduser()
        if not draft_folder.is_dir():
            raise ConfigurationError(
                f"AUTOBOT_SPECULATION_DRAFT_MODEL={draft_model!r}: expected {EMBEDDED_DRAFT} (the embedded "
                "model's), or the path of a Hugging Face folder"
            )
    heads = settings.speculation_heads
    if heads is not None and not heads.is_dir():
        raise ConfigurationError(
            f"AUTOBOT_SPECULATION_HEADS={str(heads)!r}: expected the folder of Medusa heads or of an EAGLE-3 draft"
        )
    return SpeculationOptions(
        method=settings.speculation_method if settings.speculation_enabled else "none",
        draft_model=draft_folder,
        heads=heads,
        num_tokens=settings.speculation_num_tokens,
        use_ngram=settings.speculation_use_ngram,
        min_acceptance_rate=settings.speculation_min_acceptance_rate,
    )
