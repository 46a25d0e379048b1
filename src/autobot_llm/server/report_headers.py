"""A request's report in HTTP headers. Knows the report's lines; knows nothing of who sends them.

An answer that was given to another question before is marked by two headers of its own, in a stream too:

    x-autobot-cache: semantic;similarity=0.9812
    x-autobot-cache-question: How%20do%20I%20reset%20my%20password%3F

The question is percent-encoded UTF-8, of at most 200 characters.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import quote

from autobot_llm.report import OptimizationOutcome, reused_from
from autobot_llm.server.asgi import Header

_HEADER_UNSAFE = re.compile(r"[^A-Za-z0-9_.:-]+")


def report_headers(optimizations: tuple[OptimizationOutcome, ...]) -> list[Header]:
    """The headers of a whole answer."""
    applied = _optimizations_header(optimizations)
    headers = [(b"x-autobot-optimizations", applied)] if applied else []
    reused = reused_from(optimizations)
    return headers if reused is None else [*headers, *reused_headers(reused)]


def reused_headers(line: OptimizationOutcome) -> Sequence[Header]:
    """The headers that mark an answer to another question."""
    question = quote((line.matched_question or "").encode("utf-8", "replace"), safe="")
    return (
        (b"x-autobot-cache", f"semantic;similarity={line.similarity or 0.0:.4f}".encode("ascii")),
        (b"x-autobot-cache-question", question.encode("ascii")),
    )


def _optimizations_header(optimizations: tuple[OptimizationOutcome, ...]) -> bytes:
    """The applied optimizations in one line, as in `prefix_cache;tokens_saved=512, response_cache`."""
    return ", ".join(_applied(outcome) for outcome in optimizations if outcome.applied).encode("ascii")


def _applied(outcome: OptimizationOutcome) -> str:
    savings = {
        "tokens_saved": outcome.tokens_saved,
        "ms_saved": None if outcome.milliseconds_saved is None else round(outcome.milliseconds_saved, 1),
        "bytes_saved": outcome.bytes_saved,
        "dollars_spent": _dollars(outcome.dollars_spent),
        "dollars_saved": _dollars(outcome.dollars_saved),
    }
    parts = [_HEADER_UNSAFE.sub("_", outcome.name)]
    parts += [f"{name}={value}" for name, value in savings.items() if value is not None]
    return ";".join(parts)


def _dollars(amount: float | None) -> str | None:
    """To a billionth, without an exponent: a cheap model's token costs less than a millionth."""
    return None if amount is None else f"{amount:.9f}".rstrip("0").rstrip(".")
