"""What our own engine calls its knobs: fields of `Settings`. Facts only; knows nothing of how the engine works."""

from __future__ import annotations

from typing import Any

from autobot_llm.settings import SETTINGS
from autobot_llm.settings.meaning import EVERY
from autobot_llm.settings.meaning import NATIVE as ON_NATIVE
from autobot_llm.tuning.knobs.facts import Argument, EngineFacts, Instead, Knob, Knobs, Way, table
from autobot_llm.tuning.knobs.versions import ALWAYS

GIB = 2**30

_OURS = tuple(setting.field for setting in SETTINGS if ON_NATIVE <= setting.about.on < EVERY)
ARGUMENTS = {field: Argument(place="setting") for field in _OURS} | {
    "kv_cache_dtype": Argument(place="setting", values=dict.fromkeys(("auto", "int8", "fp8", "float16"), ALWAYS)),
    "preemption": Argument(place="setting", values=dict.fromkeys(("auto", "recompute", "swap"), ALWAYS)),
    "scheduling_policy": Argument(place="setting", values=dict.fromkeys(("fcfs", "priority"), ALWAYS)),
    "speculation_method": Argument(
        place="setting", values=dict.fromkeys(("auto", "ngram", "draft", "medusa", "eagle3", "none"), ALWAYS)
    ),
    "attention_backend": Argument(
        place="setting", values=dict.fromkeys(("auto", "triton", "flashinfer", "flash_attention", "sdpa"), ALWAYS)
    ),
    "quantization_type": Argument(
        place="setting", values=dict.fromkeys(("none", "int8", "int4", "gptq", "awq", "fp8"), ALWAYS)
    ),
}


def _bytes_of_gib(value: Any, knobs: Knobs) -> Any:
    return int(float(value) * GIB) if isinstance(value, int | float) and value > 0 else None


def _model_name(value: Any, knobs: Knobs) -> Any:
    return None if str(value).startswith("[") else value


_METHODS = {"ngram": "ngram", "draft_model": "draft", "draft": "draft", "medusa": "medusa", "eagle3": "eagle3"}

KNOBS = table(
    *(Knob(field, (Way(field),)) for field in _OURS),
    Knob("num_scheduler_steps", instead=(Instead("nothing: each step is planned while the one before it runs"),)),
    Knob("enable_async_output_proc", instead=(Instead("nothing: output always overlaps with computing"),)),
    Knob("enable_chunked_prefill", instead=(Instead("nothing: prompts are always computed in chunks"),)),
    Knob("enable_prefix_caching", (Way("prefix_caching"),)),
    Knob("swap_space", (Way("swap_memory", convert=_bytes_of_gib),)),
    Knob("preemption_mode", (Way("preemption"),)),
    Knob(
        "speculative_model",
        (Way("speculation_method", {"[ngram]": "ngram"}), Way("speculation_draft_model", convert=_model_name)),
    ),
    Knob("speculative_method", (Way("speculation_method", _METHODS),)),
    Knob("num_speculative_tokens", (Way("speculation_num_tokens"),)),
    Knob("min_acceptance_rate", (Way("speculation_min_acceptance_rate"),)),
    Knob("speculative_draft_tensor_parallel_size", instead=(Instead("nothing: a draft runs on one GPU"),)),
    Knob("speculative_disable_by_batch_size", instead=(Instead("drafting stops where it costs more than it saves"),)),
    Knob("sliding_window", (Way("kv_sliding_window"),)),
    Knob("block_size", instead=(Instead("nothing: blocks hold 16 tokens"),)),
    Knob("enforce_eager", (Way("cuda_graphs", {True: "off", False: "auto"}),)),
    Knob("cuda_graph_batch_sizes", instead=(Instead("cuda_graphs; the sizes are the engine's"),)),
    Knob("max_seq_len_to_capture", instead=(Instead("cuda_graphs; a graph serves every length"),)),
    Knob("cuda_graph_memory_pool", instead=(Instead("nothing: the graphs always share one pool"),)),
    Knob("quantization", (Way("quantization_type", {"fp8": "fp8", "gptq": "gptq", "awq": "awq"}),)),
    Knob(
        "performance_mode",
        (Way("workload", {"interactivity": "interactive", "throughput": "batch", "balanced": "mixed"}),),
    ),
)

NATIVE = EngineFacts(engine="native", package="autobot_llm", read=("0.1.0",), arguments=ARGUMENTS, knobs=KNOBS)
