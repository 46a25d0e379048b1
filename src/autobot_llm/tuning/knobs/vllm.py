"""What each release of vLLM calls its knobs. Facts only, read from the released packages."""

from __future__ import annotations

from typing import Any

from autobot_llm.tuning.knobs.facts import Argument, EngineFacts, Group, Instead, Knob, Knobs, Way, same, table
from autobot_llm.tuning.knobs.versions import ALWAYS, Span

READ = (
    "0.8.5", "0.9.0.1", "0.10.0", "0.10.1.1", "0.10.2", "0.11.0", "0.12.0", "0.14.1", "0.15.1", "0.16.0", "0.18.1",
    "0.22.1", "0.26.0", "0.30.0", "0.31.0", "0.32.0", "0.33.0",
)  # fmt: skip


def _since(version: str) -> tuple[Span, ...]:
    return (Span(since=version),)


def _until(version: str) -> tuple[Span, ...]:
    return (Span(gone_by=version),)


def _between(since: str, gone_by: str) -> tuple[Span, ...]:
    return (Span(since=since, gone_by=gone_by),)


KV_CACHE_DTYPES = {
    "auto": ALWAYS,
    "fp8": ALWAYS,
    "fp8_e4m3": ALWAYS,
    "fp8_e5m2": ALWAYS,
    "bfloat16": _since("0.11.0"),
    "float16": _since("0.18.1"),
    "fp8_per_token_head": _since("0.22.1"),
    "int8_per_token_head": _since("0.22.1"),
    "int4_per_token_head": _since("0.26.0"),
    "nvfp4": _since("0.22.1"),
    "turboquant_k8v4": _since("0.22.1"),
    "turboquant_4bit_nc": _since("0.22.1"),
    "turboquant_k3v4_nc": _since("0.22.1"),
    "turboquant_3bit_nc": _since("0.22.1"),
}
# A plain draft model was refused by the releases from 0.10.0 to 0.14.1, although its name was in their list.
SPECULATIVE_METHODS = {
    "ngram": ALWAYS,
    "draft_model": (Span(gone_by="0.10.0"), Span(since="0.15.1")),
    "eagle": ALWAYS,
    "eagle3": _since("0.10.0"),
    "medusa": _until("0.33.0"),
    "mlp_speculator": _until("0.33.0"),
    "mtp": _since("0.11.0"),
    "suffix": _since("0.12.0"),
    "ngram_gpu": _since("0.18.1"),
    "extract_hidden_states": _since("0.18.1"),
    "custom_class": _since("0.22.1"),
    "dflash": _since("0.22.1"),
    "dspark": _since("0.26.0"),
}
REJECTION_METHODS = {
    "strict": _between("0.18.1", "0.22.1"),
    "probabilistic": _between("0.18.1", "0.22.1"),
    "standard": _since("0.22.1"),
    "synthetic": _since("0.22.1"),  # for tests of speed: its answers mean nothing
    "block": _since("0.26.0"),
    "fly": _since("0.33.0"),  # lossy
}
QUANTIZATIONS = {
    "fp8": ALWAYS,
    "compressed-tensors": ALWAYS,
    "torchao": ALWAYS,
    "quark": ALWAYS,
    "awq": ALWAYS,
    "awq_marlin": ALWAYS,
    "gptq": ALWAYS,
    "gptq_marlin": ALWAYS,
    "modelopt": ALWAYS,
    "experts_int8": ALWAYS,
    "mxfp4": _since("0.10.1.1"),
    "fp8_per_tensor": _since("0.22.1"),
    "fp8_per_block": _since("0.22.1"),
    "fp8_per_channel": _since("0.26.0"),
    "int8_per_channel_weight_only": _since("0.22.1"),
    "bitsandbytes": _until("0.30.0"),
    "gguf": _until("0.26.0"),
}
ATTENTION_BACKENDS = {
    "FLASH_ATTN": ALWAYS,
    "FLASHINFER": ALWAYS,
    "TRITON_ATTN": _since("0.11.0"),
    "TRITON_ATTN_VLLM_V1": _until("0.11.0"),
    "FLEX_ATTENTION": _since("0.10.0"),
    "XFORMERS": _until("0.12.0"),
}
POLICIES = {"fcfs": ALWAYS, "priority": ALWAYS}
PERFORMANCE_MODES = {"balanced": ALWAYS, "interactivity": ALWAYS, "throughput": ALWAYS}
CUDAGRAPH_MODES = dict.fromkeys(("NONE", "PIECEWISE", "FULL", "FULL_DECODE_ONLY", "FULL_AND_PIECEWISE"), ALWAYS)

ARGUMENTS = {
    # Weights and devices
    "dtype": Argument(),
    "seed": Argument(),
    "tensor_parallel_size": Argument(),
    "served_model_name": Argument(shape="list"),
    "trust_remote_code": Argument(shape="switch", negatable=False),
    "quantization": Argument(values=QUANTIZATIONS),
    "max_model_len": Argument(),
    "cpu_offload_gb": Argument(),
    # Memory
    "gpu_memory_utilization": Argument(),
    "block_size": Argument(),
    "kv_cache_dtype": Argument(values=KV_CACHE_DTYPES),
    "kv_cache_dtype_skip_layers": Argument(shape="list", spans=_since("0.22.1")),
    "swap_space": Argument(spans=_until("0.18.1")),
    "kv_offloading_size": Argument(spans=_since("0.12.0")),
    "kv_offloading_backend": Argument(spans=_since("0.12.0"), values={"native": ALWAYS, "lmcache": ALWAYS}),
    "preemption_mode": Argument(spans=_until("0.11.0"), values={"recompute": ALWAYS, "swap": ALWAYS}),
    "disable_sliding_window": Argument(shape="switch", negatable=False),
    "enable_prefix_caching": Argument(shape="switch"),
    # Scheduling
    "max_num_seqs": Argument(),
    "max_num_batched_tokens": Argument(),
    "scheduling_policy": Argument(values=POLICIES),
    "enable_chunked_prefill": Argument(shape="switch"),
    "num_scheduler_steps": Argument(spans=_until("0.10.1.1")),
    "disable_async_output_proc": Argument(shape="switch", spans=_until("0.11.0"), negatable=False),
    "async_scheduling": Argument(shape="switch", spans=_since("0.10.0")),
    "long_prefill_token_threshold": Argument(),
    "prefill_schedule_interval": Argument(spans=_since("0.26.0")),
    "max_num_queued_reqs": Argument(spans=_since("0.30.0")),
    "max_num_queued_tokens": Argument(spans=_since("0.30.0")),
    "performance_mode": Argument(spans=_since("0.18.1"), values=PERFORMANCE_MODES),
    # Kernels and graphs
    "attention_backend": Argument(spans=_since("0.14.1"), values=ATTENTION_BACKENDS),
    "VLLM_ATTENTION_BACKEND": Argument(place="environment", spans=_until("0.15.1"), values=ATTENTION_BACKENDS),
    "enforce_eager": Argument(shape="switch", negatable=False),
    "optimization_level": Argument(spans=_since("0.12.0")),
    "max_seq_len_to_capture": Argument(spans=_until("0.11.0")),
    "max_cudagraph_capture_size": Argument(spans=_since("0.12.0")),
    "cudagraph_capture_sizes": Argument(shape="list", spans=_since("0.12.0")),
    "cuda_graph_sizes": Argument(shape="list", spans=_between("0.9.0.1", "0.14.1")),
    "compilation_config.cudagraph_capture_sizes": Argument(shape="json"),
    "compilation_config.cudagraph_mode": Argument(shape="json", spans=_since("0.10.1.1"), values=CUDAGRAPH_MODES),
    # Speculation
    "speculative_config.method": Argument(shape="json", values=SPECULATIVE_METHODS),
    "speculative_config.model": Argument(shape="json"),
    "speculative_config.num_speculative_tokens": Argument(shape="json"),
    "speculative_config.draft_tensor_parallel_size": Argument(shape="json"),
    "speculative_config.prompt_lookup_max": Argument(shape="json"),
    "speculative_config.prompt_lookup_min": Argument(shape="json"),
    "speculative_config.disable_by_batch_size": Argument(shape="json", spans=_until("0.18.1")),
    "speculative_config.num_speculative_tokens_per_batch_size": Argument(shape="json", spans=_since("0.26.0")),
    "speculative_config.speculative_token_tree": Argument(shape="json", spans=_between("0.9.0.1", "0.22.1")),
    "speculative_config.parallel_drafting": Argument(shape="json", spans=_since("0.16.0")),
    "speculative_config.use_heterogeneous_vocab": Argument(shape="json", spans=_since("0.26.0")),
    "speculative_config.rejection_sample_method": Argument(
        shape="json", spans=_since("0.18.1"), values=REJECTION_METHODS
    ),
    "speculative_config.draft_sample_method": Argument(
        shape="json", spans=_since("0.22.1"), values={"greedy": ALWAYS, "probabilistic": ALWAYS}
    ),
    "speculative_config.quantization": Argument(shape="json"),
    "speculative_config.max_model_len": Argument(shape="json"),
    "speculative_config.attention_backend": Argument(shape="json", spans=_since("0.22.1")),
    "speculative_config.kv_cache_dtype": Argument(shape="json", spans=_since("0.26.0")),
}

_PLACEHOLDERS = {"[ngram]": "ngram"}
_BACKENDS = {"flashinfer": "FLASHINFER", "flash_attention": "FLASH_ATTN", "triton": "TRITON_ATTN"}
_OLD_BACKENDS = {**_BACKENDS, "triton": "TRITON_ATTN_VLLM_V1"}
_ANY_BACKEND = {name: name for name in ATTENTION_BACKENDS}
_DRAFTING = Instead("speculative_config")


def _drafting_schedule(last_batch: Any, knobs: Knobs) -> Any:
    """Draft as asked up to that batch size, and nothing above; vLLM carries the last entry on to larger batches."""
    num_tokens = knobs.get("num_speculative_tokens")
    if not isinstance(last_batch, int) or last_batch < 1 or num_tokens is None:
        return None
    return [[1, last_batch, num_tokens], [last_batch + 1, last_batch + 1, 0]]


def _model_name(value: Any, knobs: Knobs) -> Any:
    return None if str(value).startswith("[") else value


KNOBS = table(
    *map(same, ARGUMENTS),
    Knob(
        "num_scheduler_steps",
        (
            Way(
                "num_scheduler_steps",
                note="steps planned together belong to vLLM's older engine, and a value above 1 goes back to that",
            ),
        ),
        (Instead("async_scheduling, on by default", _since("0.14.1")), Instead("async_scheduling", _since("0.10.0"))),
    ),
    Knob(
        "enable_async_output_proc",
        (
            Way("disable_async_output_proc", {False: True}),
            Way("async_scheduling", {False: False}),
        ),
        (
            Instead("async_scheduling, on by default", _since("0.14.1")),
            Instead("async_scheduling, off by default", _since("0.11.0")),
            Instead("output is asynchronous unless disable_async_output_proc is set"),
        ),
    ),
    same("disable_async_output_proc", Instead("async_scheduling", _since("0.11.0"))),
    # Speculation
    Knob(
        "speculative_model",
        (
            Way("speculative_config.method", _PLACEHOLDERS),
            Way("speculative_config.model", convert=_model_name),
        ),
        (_DRAFTING,),
    ),
    Knob(
        "speculative_method",
        (
            Way(
                "speculative_config.method",
                {**{name: name for name in SPECULATIVE_METHODS}, "eagle": "eagle3"},
            ),
            Way("speculative_config.method", {"eagle": "eagle"}),
        ),
        (Instead("our own engine drafts with Medusa heads; vLLM has eagle3, draft_model, ngram", _since("0.33.0")),),
    ),
    Knob("num_speculative_tokens", (Way("speculative_config.num_speculative_tokens"),)),
    Knob(
        "speculative_draft_tensor_parallel_size",
        (Way("speculative_config.draft_tensor_parallel_size", note="1, or the target model's"),),
    ),
    Knob("ngram_prompt_lookup_max", (Way("speculative_config.prompt_lookup_max"),)),
    Knob("ngram_prompt_lookup_min", (Way("speculative_config.prompt_lookup_min"),)),
    Knob(
        "speculative_disable_by_batch_size",
        (
            Way("speculative_config.disable_by_batch_size"),
            Way("speculative_config.num_speculative_tokens_per_batch_size", convert=_drafting_schedule),
        ),
        (Instead("num_speculative_tokens_per_batch_size, with num_speculative_tokens", _since("0.26.0")),),
    ),
    Knob("speculative_token_tree", (Way("speculative_config.speculative_token_tree"),)),
    Knob(
        "min_acceptance_rate",
        instead=(
            Instead("no switch for low acceptance; drafting can be limited by batch size", _since("0.26.0")),
            Instead("no switch for low acceptance"),
        ),
    ),
    # Memory
    same(
        "swap_space",
        Instead("kv_offloading_size and kv_offloading_backend; cpu_offload_gb for weights", _since("0.18.1")),
    ),
    same("preemption_mode", Instead("nothing: interrupted sequences are computed again", _since("0.11.0"))),
    Knob(
        "kv_cache_dtype",
        (
            Way("kv_cache_dtype"),
            Way(
                "kv_cache_dtype",
                {"int8": "int8_per_token_head"},
                note="runs on TRITON_ATTN only, so FlashAttention 3 is given up",
            ),
        ),
        (Instead("fp8 takes as little memory"),),
    ),
    Knob("sliding_window", instead=(Instead("the window is the model's; disable_sliding_window turns it off"),)),
    Knob("kv_heavy_hitters", instead=(Instead("our own engine"),)),
    # Scheduling
    Knob(
        "max_waiting_time_ms",
        instead=(
            Instead(
                "max_num_queued_reqs, max_num_queued_tokens, prefill_schedule_interval, long_prefill_token_threshold",
                _since("0.30.0"),
            ),
            Instead("prefill_schedule_interval, long_prefill_token_threshold", _since("0.26.0")),
            Instead("long_prefill_token_threshold"),
        ),
    ),
    # Kernels and graphs
    Knob(
        "attention_backend",
        (
            Way("attention_backend", _BACKENDS),
            Way("attention_backend", _ANY_BACKEND),
            Way("VLLM_ATTENTION_BACKEND", _BACKENDS),
            Way("VLLM_ATTENTION_BACKEND", _OLD_BACKENDS),
            Way("VLLM_ATTENTION_BACKEND", _ANY_BACKEND),
        ),
        (Instead("FLASH_ATTN, FLASHINFER, TRITON_ATTN, FLEX_ATTENTION", _since("0.12.0")),),
    ),
    same(
        "max_seq_len_to_capture",
        Instead("max_cudagraph_capture_size, which counts tokens of a step", _since("0.12.0")),
    ),
    Knob(
        "cuda_graph_batch_sizes",
        (
            Way("cudagraph_capture_sizes"),
            Way("cuda_graph_sizes"),
            Way("compilation_config.cudagraph_capture_sizes"),
        ),
    ),
    Knob("cuda_graph_memory_pool", instead=(Instead("nothing: its graphs always share one pool"),)),
    # Weights: whatever is in a checkpoint vLLM sees for itself, and naming "gptq" or "awq" would choose slower kernels.
    Knob(
        "quantization_type",
        (Way("quantization", {"fp8": "fp8"}),),
        (Instead("a checkpoint that is quantized so: vLLM recognizes it"),),
    ),
)  # fmt: skip

VLLM = EngineFacts(
    engine="vllm",
    package="vllm",
    read=READ,
    arguments=ARGUMENTS,
    knobs=KNOBS,
    groups=(
        Group(
            "speculative_config",
            one_of=("method", "model"),
            all_of=("num_speculative_tokens",),
            otherwise="left out: vLLM drafts only when told how (a method or a model) and how many tokens",
        ),
    ),
)
