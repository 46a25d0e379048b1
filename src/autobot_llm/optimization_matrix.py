"""Say, for every provider and every optimization, whether it could apply there, whether it runs now, and why.

Knows the router's table and what providers tell of themselves; knows nothing of how an optimization works.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from autobot_llm.providers.base import Link, Provider, TellsOptimizations
from autobot_llm.routing import (
    ARGUMENTS_OF,
    OPTIMIZATIONS,
    WRAPPERS,
    OptimizationRouter,
    ProviderType,
    kind_of,
)
from autobot_llm.tuning.knobs import facts_of, releases_that_accept


class OptimizationState(msgspec.Struct, frozen=True, kw_only=True):
    """One cell: an optimization at one provider. What runs could apply; `reason` says why it does or does not."""

    name: str
    could_apply: bool
    runs: bool
    reason: str


class ProviderRow(msgspec.Struct, frozen=True, kw_only=True):
    """One provider and its optimizations. `engine_version` is None where it is not known or there is no engine."""

    provider: str
    kind: ProviderType
    state: str
    engine_version: str | None
    optimizations: tuple[OptimizationState, ...]


_NOT_OVER_HTTP = "it runs in this process, not over HTTP"
_NOT_OUR_WEIGHTS = "weights and kernels are the provider's own"
_CLOUDS = (ProviderType.CLOUD_OPENAI, ProviderType.CLOUD_ANTHROPIC, ProviderType.CLOUD_OTHER)
# Why an optimization cannot apply to a kind of provider; None stands for every other one that cannot.
_WHY_NOT: Mapping[ProviderType, Mapping[str | None, str]] = {
    ProviderType.LOCAL_NATIVE: {None: _NOT_OVER_HTTP},
    ProviderType.LOCAL_OLLAMA: {
        "speculative_decoding": "Ollama drafts only with a model that comes attached to the answering one",
        "cuda_graphs": "Ollama's graphs are its own and cannot be set",
        "medusa_heads": "Ollama has no Medusa",
    },
    **{cloud: {None: _NOT_OUR_WEIGHTS} for cloud in _CLOUDS},
}
# What every client of a provider over HTTP does.
_OF_EVERY_CLIENT = {"connection_pooling": "connections are kept and shared by all requests"}


def optimization_matrix(
    known: Sequence[str], in_use: Mapping[str, Provider], links: Mapping[str, Link]
) -> list[ProviderRow]:
    """A row for each known provider; those in use tell what runs in them, and `links` run in front of them."""
    return [_row(name, in_use.get(name), links) for name in known]


def _row(name: str, provider: Provider | None, links: Mapping[str, Link]) -> ProviderRow:
    kind = kind_of(name)
    told = {name: link.state() for name, link in links.items()}
    version: str | None = None
    teller: object = provider
    if isinstance(teller, TellsOptimizations):
        version = teller.engine_version()
        told |= {outcome.name: (outcome.applied, outcome.reason) for outcome in teller.optimizations()}

    def cell(optimization: str) -> OptimizationState:
        could_apply = OptimizationRouter.should_apply(optimization, kind, version)
        if not could_apply:
            runs, reason = False, _why_not(kind, optimization, version)
        elif provider is None:
            runs, reason = False, "the provider is not started"
        else:
            runs, reason = told.get(optimization) or _untold(optimization)
        return OptimizationState(name=optimization, could_apply=could_apply, runs=runs, reason=reason)

    return ProviderRow(
        provider=name,
        kind=kind,
        state=provider.status().state if provider is not None else "stopped",
        engine_version=version,
        optimizations=tuple(map(cell, OPTIMIZATIONS)),
    )


def _untold(optimization: str) -> tuple[bool, str]:
    if optimization in _OF_EVERY_CLIENT:
        return True, _OF_EVERY_CLIENT[optimization]
    if any(wrapper.optimization == optimization for wrapper in WRAPPERS):
        return False, "the settings switch it off"
    return False, "the provider does not tell"


def _why_not(kind: ProviderType, optimization: str, version: str | None) -> str:
    needed = ARGUMENTS_OF.get(kind, {}).get(optimization)
    if needed is not None:
        releases = releases_that_accept(kind, *needed)
        return f"{kind} from {releases[0]} to {releases[-1]} has it, {version or facts_of(kind).read[-1]} does not"
    reasons = _WHY_NOT[kind]
    return reasons[optimization] if optimization in reasons else reasons[None]
