"""The `options` of an Ollama request, both ways. Knows their names, types and neutral values; knows no provider."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from autobot_llm.errors import InvalidRequestError, UnsupportedError
from autobot_llm.types import LLMRequest

# What a sampling option is called in `LLMRequest`.
REQUEST_FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "seed": "seed",
    "stop": "stop",
    "num_predict": "max_tokens",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
_INTEGERS = frozenset({"top_k", "seed", "num_predict", "num_ctx"})
RANDOM_SEED = -1  # Ollama's own default: another answer each time
UNTIL_IT_STOPS = (-1, -2)  # num_predict: no limit, and until the context is full; here both end with the context
SEED_MODULUS = 2**31
LARGEST_INTEGER = 2**64

# Options of Ollama alone, with the values that do nothing.
OLLAMA_ONLY: Mapping[str, tuple[object, ...]] = {
    "repeat_last_n": (),
    "num_keep": (),
    "typical_p": (1,),
    "tfs_z": (1,),
    "mirostat": (0,),
    "mirostat_tau": (),
    "mirostat_eta": (),
    "penalize_newline": (),
    "draft_num_predict": (),
}

# Options that take effect when a model is loaded, with the values that are Ollama's defaults and so change nothing.
LOAD_TIME: Mapping[str, tuple[object, ...]] = {
    "numa": (False,),
    "num_batch": (512,),
    "num_gpu": (-1,),
    "main_gpu": (0,),
    "low_vram": (False,),
    "f16_kv": (True, False),  # ignored by Ollama itself
    "logits_all": (False,),
    "vocab_only": (False,),
    "use_mmap": (),
    "use_mlock": (False,),
    "embedding_only": (False,),
    "num_thread": (0,),
}


@dataclass(frozen=True, slots=True)
class Options:
    """Options that were read: `fields` of `LLMRequest`, `extra` for another Ollama, and the context asked for."""

    fields: dict[str, Any]
    extra: dict[str, Any]
    num_ctx: int | None


def read_options(options: Mapping[str, Any]) -> Options:
    """Sort the options of a request. One that nobody knows is for an Ollama, which may be newer.

    Errors: InvalidRequestError for a value of a wrong type, UnsupportedError for a load-time option that would change
    something, each with `options.<name>` as `param`.
    """
    fields: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    num_ctx: int | None = None
    for name, value in options.items():
        if value is None:
            continue
        if name in REQUEST_FIELDS:
            read = _READERS.get(name, _number)
            if (checked := read(name, value)) is not None:
                fields[REQUEST_FIELDS[name]] = checked
        elif name == "num_ctx":
            num_ctx = _positive(name, value)
        elif name in LOAD_TIME:
            refuse_load_time(name, value)
        elif value not in OLLAMA_ONLY.get(name, ()):
            extra[name] = value
    return Options(fields, extra, num_ctx)


def refuse_load_time(name: str, value: object) -> None:
    """Refuse an option that would load the model anew, for everybody, unless it has the value that changes nothing."""
    if value not in LOAD_TIME[name]:
        raise UnsupportedError(
            f"options.{name}={value!r}: takes effect when a model is loaded, and a request does not load one anew; "
            "set it where the model is served",
            param=f"options.{name}",
        )


def _bad(name: str, value: object, expected: str) -> InvalidRequestError:
    return InvalidRequestError(f"options.{name}={value!r}: expected {expected}", param=f"options.{name}")


def _number(name: str, value: object) -> float | int:
    acceptable = isinstance(value, float) and math.isfinite(value)
    if isinstance(value, int) and not isinstance(value, bool):
        acceptable = abs(value) < LARGEST_INTEGER
    if not acceptable:
        raise _bad(name, value, "a number")
    return value  # type: ignore[return-value]  # looked at above


def _integer(name: str, value: object) -> int:
    number = _number(name, value)
    if number != int(number):
        raise _bad(name, value, "an integer")
    return int(number)


def _positive(name: str, value: object) -> int:
    number = _integer(name, value)
    if number < 1:
        raise _bad(name, value, "an integer of at least 1")
    return number


def _seed(name: str, value: object) -> int | None:
    seed = _integer(name, value)
    return None if seed == RANDOM_SEED else seed


def _num_predict(name: str, value: object) -> int | None:
    number = _integer(name, value)
    if number in UNTIL_IT_STOPS:
        return None
    if number < 1:
        raise _bad(name, value, "an integer of at least 1, -1 (no limit) or -2 (until the context is full)")
    return number


def _stop(name: str, value: object) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise _bad(name, value, "a text or a list of texts")
    return texts


_READERS: Mapping[str, Callable[[str, object], Any]] = {
    "top_k": _integer,
    "seed": _seed,
    "num_predict": _num_predict,
    "stop": _stop,
}


def write_options(request: LLMRequest) -> dict[str, Any]:
    """The sampling options of `request`; what it leaves open stays the model's own.

    A seed is folded into Ollama's 31 bits, where -1 would mean "none": the same seed still gives the same answer.
    """
    options = {
        name: value for name, field in REQUEST_FIELDS.items() if (value := getattr(request, field)) not in (None, [])
    }
    for name in ("presence_penalty", "frequency_penalty"):
        if not options[name]:
            del options[name]
    if "seed" in options:
        options["seed"] %= SEED_MODULUS
    if "top_k" in options:
        options["top_k"] = max(0, options["top_k"])
    return options
