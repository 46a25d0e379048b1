"""Settings that make a model fit, for each engine. Knows engines' names for things; computes no sizes of its own."""

from __future__ import annotations

from dataclasses import dataclass

from autobot_llm.settings import load_settings
from autobot_llm.tuning.gguf import BITS_PER_WEIGHT
from autobot_llm.tuning.knobs import facts_of, translate_settings
from autobot_llm.tuning.plan.cards import Card
from autobot_llm.tuning.plan.fit import UTILIZATION, Plan, Row

WANTED_CONTEXT = 8192  # what a conversation with documents needs; shorter where the model's own is


@dataclass(frozen=True, slots=True)
class Recommendation:
    """What to tell an engine, and why. `text` is empty where nothing fits."""

    engine: str
    text: str
    reason: str


def recommend(plan: Plan, card: Card | None = None) -> tuple[Recommendation, ...]:
    """For our engine, vLLM and Ollama: the most faithful way in which the wanted context fits once."""
    return (_native(plan, card), _vllm(plan, card), _ollama(plan))


def _first_that_fits(rows: list[Row], plan: Plan) -> Row | None:
    """The first row, the most faithful one first, with room for the wanted context; else that with the most room."""
    wanted = min(WANTED_CONTEXT, plan.max_context)
    best = max(rows, key=lambda row: row.max_context, default=None)
    chosen = next((row for row in rows if row.max_context >= wanted), best)
    return chosen if chosen is not None and chosen.fits else None


def _native(plan: Plan, card: Card | None) -> Recommendation:
    row = _first_that_fits(list(plan.rows), plan)
    if row is None:
        return Recommendation("native", "", "does not fit at 4 bits either: a larger card")
    eight = "fp8" if card is None or card.has_fp8 else "int8"
    kind = {"8-bit": eight, "4-bit": "int4"}.get(row.weights)
    setting = "" if kind is None else f"AUTOBOT_QUANTIZATION_TYPE={kind} "
    options = "" if row.max_context >= plan.max_context else f" --max-model-len {_rounded(row.max_context)}"
    options += " --kv-cache-dtype int8" if row.kv_cache == "8-bit" else ""
    options += f" --kv-sliding-window {plan.window}" if plan.is_window_lossy else ""
    return Recommendation(
        "native",
        f"{setting}autobot-llm serve --model {plan.model}{options}",
        f"{row.weights} weights, KV cache {row.kv_cache}: {_room(row)}",
    )


def _vllm(plan: Plan, card: Card | None) -> Recommendation:
    row = _first_that_fits(list(plan.rows), plan)
    if row is None:
        return Recommendation(
            "vllm", "", "does not fit at 4 bits either: a larger card, or several (tensor parallelism)"
        )
    wishes: dict[str, object] = {"gpu_memory_utilization": UTILIZATION, "speculation_enabled": False}
    if row.max_context < plan.max_context:
        wishes["max_model_len"] = _rounded(row.max_context)
    model, notes = plan.model, []
    if row.weights == "8-bit":
        if card is None or card.has_fp8:
            wishes["quantization_type"] = "fp8"
            why = ", as INT8 does not run there" if card is not None and card.is_blackwell else ""
            notes.append(f"fp8 at load, without calibration{why}")
        else:
            model = f"{plan.model}-w8a8"
            notes.append(f"{card.name} has no fp8: `autobot-llm quantize {plan.model} --type w8a8` makes {model}")
    elif row.weights == "4-bit":
        model = f"{plan.model}-gptq"
        notes.append(f"`autobot-llm quantize {plan.model} --type gptq --calibration TEXT` makes {model}")
    if row.kv_cache == "8-bit":
        wishes["kv_cache_dtype"] = "fp8"
    settings = load_settings(environ={}, env_file=None, overrides=wishes)
    told = translate_settings("vllm", facts_of("vllm").read[-1], settings)
    reason = "; ".join([f"{row.weights} weights, KV cache {row.kv_cache}: {_room(row)}", *notes])
    return Recommendation("vllm", told.command_line("vllm", "serve", model), reason)


def _ollama(plan: Plan) -> Recommendation:
    """Tags by their bits per weight; the cache of 16 bits and the buffers are those of the plan."""
    whole = plan.rows[0]
    wanted = min(WANTED_CONTEXT, plan.max_context)
    for tag, bits in (("fp16", 16.0), *BITS_PER_WEIGHT.items()):
        needed = plan.num_parameters * bits / 8 + wanted * whole.kv_bytes_per_token + whole.reserve_bytes
        if needed <= plan.memory_bytes * UTILIZATION:
            reason = f"a tag that ends in {tag}: {needed / 2**30:.1f} GiB with a context of {wanted:,}"
            return Recommendation("ollama", f"MODEL-{tag} with num_ctx={wanted}", reason)
    return Recommendation("ollama", "", f"no tag fits with a context of {wanted:,}: parts of it would run on the CPU")


def _rounded(num_tokens: int) -> int:
    """A round number below."""
    return num_tokens // 256 * 256 or num_tokens


def _room(row: Row) -> str:
    return f"one sequence of {row.max_context:,} tokens, {row.cache_bytes / 2**30:.1f} GiB of cache"
