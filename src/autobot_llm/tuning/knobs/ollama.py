"""What Ollama calls its knobs: a request's options, and its server's environment. Facts only."""

from __future__ import annotations

from typing import Any

from autobot_llm.tuning.knobs.facts import Argument, EngineFacts, Instead, Knob, Way, table
from autobot_llm.tuning.knobs.versions import ALWAYS

READ = ("0.30",)

_OPTIONS = (
    "num_ctx", "num_batch", "num_gpu", "main_gpu", "use_mmap", "num_thread", "num_keep", "draft_num_predict",
    "temperature", "top_k", "top_p", "min_p", "seed", "stop", "num_predict", "repeat_penalty",
)  # fmt: skip
_VARIABLES = (
    "OLLAMA_NUM_PARALLEL", "OLLAMA_CONTEXT_LENGTH", "OLLAMA_KEEP_ALIVE", "OLLAMA_LOAD_TIMEOUT",
    "OLLAMA_MAX_LOADED_MODELS", "OLLAMA_MAX_QUEUE",
)  # fmt: skip

ARGUMENTS = {
    **{name: Argument(place="option") for name in _OPTIONS},
    **{name: Argument(place="environment") for name in _VARIABLES},
    "OLLAMA_FLASH_ATTENTION": Argument(place="environment", values={"1": ALWAYS, "0": ALWAYS}),
    "OLLAMA_KV_CACHE_TYPE": Argument(place="environment", values=dict.fromkeys(("f16", "q8_0", "q4_0"), ALWAYS)),
}

_DRAFTS = Instead("nothing: Ollama drafts only with a model that comes attached to the answering one")
_ITS_OWN = Instead("nothing: Ollama's own graphs cannot be set")
_FLASH_ATTENTION: dict[str, Any] = {"OLLAMA_FLASH_ATTENTION": "1"}
_RELOADS = "changing it loads the model again: keep it the same in all requests"
_ALL_MODELS = "for all models of the server"


def _nothing(name: str, *instead: Instead) -> Knob:
    return Knob(name, instead=instead)


KNOBS = table(
    *(Knob(name, (Way(name),)) for name in ARGUMENTS),
    Knob("max_model_len", (Way("num_ctx", note=_RELOADS),)),
    Knob("max_num_seqs", (Way("OLLAMA_NUM_PARALLEL", note="each one takes memory for a whole context"),)),
    Knob("max_num_batched_tokens", (Way("num_batch", note=_RELOADS),)),
    Knob("num_speculative_tokens", (Way("draft_num_predict", note="acts where a draft is attached to the model"),)),
    Knob(
        "kv_cache_dtype",
        (
            Way("OLLAMA_KV_CACHE_TYPE", {"int8": "q8_0", "q8_0": "q8_0", "q4_0": "q4_0"}, note=_ALL_MODELS,
                also=_FLASH_ATTENTION),
            Way("OLLAMA_KV_CACHE_TYPE", {"float16": "f16", "f16": "f16"}, note=_ALL_MODELS),
        ),
        (Instead("q8_0 (int8 here) takes as little memory"),),
    ),
    Knob(
        "attention_backend",
        (Way("OLLAMA_FLASH_ATTENTION", {"flash_attention": "1", "FLASH_ATTN": "1"}),),
        (Instead("OLLAMA_FLASH_ATTENTION (flash_attention here)"),),
    ),
    _nothing("speculative_model", _DRAFTS),
    _nothing("speculative_method", _DRAFTS),
    _nothing("speculative_draft_tensor_parallel_size", _DRAFTS),
    _nothing("speculative_disable_by_batch_size", _DRAFTS),
    _nothing("ngram_prompt_lookup_max", _DRAFTS),
    _nothing("ngram_prompt_lookup_min", _DRAFTS),
    _nothing("min_acceptance_rate", _DRAFTS),
    _nothing("quantization_type", Instead("a tag of the model, such as q8_0 or q4_K_M")),
    _nothing("enforce_eager", _ITS_OWN),
    _nothing("cuda_graph_batch_sizes", _ITS_OWN),
    _nothing("max_seq_len_to_capture", _ITS_OWN),
    _nothing("cuda_graph_memory_pool", _ITS_OWN),
    _nothing("sliding_window"),
    _nothing("kv_heavy_hitters", Instead("our own engine")),
    _nothing("gpu_memory_utilization", Instead("num_gpu, the layers put on the GPU")),
    _nothing("block_size"),
    _nothing("swap_space"),
    _nothing("preemption_mode"),
    _nothing("scheduling_policy"),
    _nothing("max_waiting_time_ms", Instead("OLLAMA_MAX_QUEUE bounds how many wait, not how long")),
    _nothing("num_scheduler_steps"),
    _nothing("enable_async_output_proc"),
    _nothing("enable_chunked_prefill", Instead("num_batch, the tokens of a prompt computed at a time")),
    _nothing("enable_prefix_caching"),
    _nothing("performance_mode"),
)  # fmt: skip

OLLAMA = EngineFacts(engine="ollama", read=READ, arguments=ARGUMENTS, knobs=KNOBS)
