"""Every setting there is: its field, type with limits, and default. Knows nothing of where values come from.

`Settings` is the value that is handed around; `SETTINGS` is the same as a list, joined with the words of `about`.
To add a setting, add a field here and its entry there.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
from msgspec import Meta

from autobot_llm.errors import ConfigurationError
from autobot_llm.settings.about import ABOUT
from autobot_llm.settings.meaning import About, ProviderName
from autobot_llm.settings.values import (
    BadValue,
    Budget,
    Count,
    Dollars,
    Duration,
    Fallback,
    Fraction,
    HttpUrl,
    Milliseconds,
    NonNegative,
    OwnLimit,
    Port,
    ProxyUrl,
    RedisUrl,
    Seconds,
    Share,
    Size,
    Switch,
    Text,
    Texts,
    WholeNumber,
    check,
    expected,
)

MASK = "********"


class CloudSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One named OpenAI-compatible cloud: its base address and its key."""

    endpoint: HttpUrl
    api_key: Text | None = None

    def __repr__(self) -> str:
        return f"CloudSettings(endpoint={self.endpoint!r}, api_key={MASK if self.api_key else None!r})"


def user_cache_dir(environ: Mapping[str, str]) -> Path:
    """Where this user's programs keep files that can be made again, by the custom of the operating system."""
    if base := environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME"):
        return Path(base) / "autobot_llm"
    try:
        home = Path(environ["HOME"]) if environ.get("HOME") else Path.home()
    except RuntimeError as exc:
        raise ConfigurationError("the home folder is unknown: set AUTOBOT_CACHE_DIR to a folder") from exc
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "autobot_llm"


def tenant_of(api_key: str) -> str:
    """The name under which the owner of a key has caches; it does not tell the key."""
    return hashlib.sha256(api_key.encode()).hexdigest()[:16]


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """All settings of one process. None means "not set"; docs/settings.md says what each one does.

    `sources` maps the variables that were set to where they were set, and `warnings` holds what the user should be
    told. Raises ConfigurationError, one line for each bad value, when built from values that are not accepted.
    """

    # Providers and models
    provider: ProviderName = "native"
    default_model: Text = "tiny"
    models: Mapping[str, Text] = msgspec.field(default_factory=dict)
    timeout: Seconds | None = 600.0
    ollama_endpoint: HttpUrl = "http://127.0.0.1:11434"
    ollama_keep_alive: Duration | None = "30m"
    vllm_endpoints: tuple[HttpUrl, ...] = ()
    vllm_api_key: Text | None = None
    openai_endpoint: HttpUrl = "https://api.openai.com/v1"
    anthropic_endpoint: HttpUrl = "https://api.anthropic.com"
    clouds: Mapping[str, CloudSettings] = msgspec.field(default_factory=dict)
    openai_api_key: Text | None = None
    anthropic_api_key: Text | None = None

    # Server
    host: Text = "127.0.0.1"
    port: Port = 8100
    api_keys: tuple[Text, ...] = ()
    max_body_bytes: Size = 16 * 2**20
    shutdown_grace: NonNegative = 30.0
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    # Our own engine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    compiled_step: Switch = "auto"
    cpu_threads: Annotated[int, Meta(ge=1, le=1024)] | None = None
    max_model_len: Count | None = None
    max_queued_requests: Count = 1024
    workload: Literal["interactive", "batch", "mixed"] = "mixed"
    max_num_seqs: Count | None = None
    max_num_batched_tokens: Count | None = None
    max_waiting_time_ms: Milliseconds | None = None
    scheduling_policy: Literal["fcfs", "priority"] | None = None
    preemption: Literal["auto", "recompute", "swap"] = "auto"
    swap_memory: Size = 4 * 2**30
    kv_cache_memory: Size | None = None
    gpu_memory_utilization: Share = 0.9
    prefix_caching: bool = True
    cached_prefixes: Texts = ()
    warm_prefixes: bool = True
    attention_backend: Literal["auto", "triton", "flashinfer", "flash_attention", "sdpa"] = "auto"
    cuda_graphs: Switch = "auto"
    cache_dir: Path = msgspec.field(default_factory=lambda: user_cache_dir(os.environ))
    kv_cache_dtype: Literal["auto", "int8", "fp8", "float16"] = "auto"
    kv_sliding_window: WholeNumber = 0
    kv_heavy_hitters: Budget = 0

    # Speculation
    speculation_enabled: bool = True
    speculation_method: Literal["auto", "ngram", "draft", "medusa", "eagle3", "none"] = "auto"
    speculation_draft_model: Text | None = None
    speculation_heads: Path | None = None
    speculation_num_tokens: Annotated[int, Meta(ge=1, le=64)] = 5
    speculation_use_ngram: bool = True
    speculation_min_acceptance_rate: Fraction | None = None

    # Quantization
    quantization_type: Literal["none", "int8", "int4", "gptq", "awq", "fp8"] = "none"
    quantization_calibration: Path | None = None
    llm_compressor: Literal["off", "installed", "install"] = "off"
    use_quantized_models: bool = False

    # vLLM
    vllm_multi_step: Count = 8
    vllm_prefix_caching: bool = True
    vllm_async_output: bool = True

    # Everything over HTTP
    cloud_connection_pool_size: Count = 100
    cloud_connection_max_age: Seconds | None = 300.0
    cloud_http_version: Literal["auto", "1.1", "2"] = "auto"
    cloud_warm_up: bool = False
    https_proxy: ProxyUrl | None = None
    http_proxy: ProxyUrl | None = None
    no_proxy: tuple[Text, ...] = ()
    cloud_batch_window_ms: NonNegative = 50.0
    cloud_max_batch_size: Count = 10
    cloud_retry_max_attempts: WholeNumber = 3
    cloud_max_queued_requests: WholeNumber = 1000
    cloud_rate_limits: tuple[OwnLimit, ...] = ()
    cloud_batch_completions: bool = False
    cloud_hedging: Literal["off", "deterministic", "all"] = "off"
    fallbacks: tuple[Fallback, ...] = ()
    cloud_prices: Path | None = None
    batch_dir: Path | None = None
    cloud_budget_per_day: Dollars | None = None
    cloud_budget_per_month: Dollars | None = None

    # Every provider
    prompt_compression_enabled: bool = False
    prompt_compression_ratio: Share = 0.7
    cache_enabled: bool = True
    cache_l1_size: WholeNumber = 100
    cache_l2_ttl: Seconds = 300.0
    redis_url: RedisUrl | None = None
    embedding_cache_size: WholeNumber = 10_000
    embedding_cache_ttl: Seconds = 3600.0
    semantic_cache_threshold: Share | None = None

    # About the settings
    sources: Mapping[str, str] = msgspec.field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        for setting in SETTINGS:
            value = getattr(self, setting.field)
            try:
                check(setting.kind, value)
            except BadValue:
                problems.append(complaint(setting, setting.variable, value))
        if problems:
            raise ConfigurationError("\n".join(problems))

    @property
    def tenants(self) -> tuple[str, ...]:
        """Whose requests the server tells apart: one for each of its keys, the nameless one where it asks for none."""
        return tuple(map(tenant_of, self.api_keys)) or ("",)

    def __repr__(self) -> str:
        shown = []
        for setting in SETTINGS:
            value = getattr(self, setting.field)
            shown.append(f"{setting.field}={MASK if setting.about.secret and value else repr(value)}")
        return f"Settings({', '.join(shown)})"


class Setting(msgspec.Struct, frozen=True):
    """One entry of the registry: the field of `Settings`, its variable, type with limits, default and meaning.

    `default` is None for the three fields whose default is made anew (`models`, `clouds`, `cache_dir`).
    """

    field: str
    variable: str
    kind: Any
    default: object
    about: About


def complaint(setting: Setting, variable: str, value: object, origin: str = "") -> str:
    """The sentence for a bad value: `AUTOBOT_KV_CACHE_DTYPE='int9': expected auto, int8, fp8 or float16`."""
    shown = MASK if setting.about.secret else repr(value)
    return f"{variable}={shown}{origin}: expected {expected(setting.kind)}"


def _registry() -> tuple[Setting, ...]:
    hints = get_type_hints(Settings, include_extras=True)
    fields = {field.name: field for field in msgspec.structs.fields(Settings)}
    entries = []
    for name, about in ABOUT.items():
        default = fields[name].default
        entries.append(
            Setting(
                field=name,
                variable=about.variable or f"AUTOBOT_{name.upper()}",
                kind=hints[name],
                default=None if default is msgspec.NODEFAULT else default,
                about=about,
            )
        )
    return tuple(entries)


SETTINGS = _registry()
