"""What vLLM did for a request, and what runs in its servers, in the words of the report. Knows figures and words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from autobot_llm.providers.vllm.replica import Replica
from autobot_llm.providers.vllm.scrape import EngineFacts
from autobot_llm.report import OptimizationOutcome
from autobot_llm.types import Finish, Usage

_QUANTIZED = ("fp8", "int8", "int4", "nvfp4", "turboquant")


def with_report(finish: Finish, replica: Replica, home: Replica, num_failed: int, num_replicas: int) -> Finish:
    """The end of an answer with lines of our own: what the cache gave, who answered and why, who drafted.

    `home` is the replica to which prompts that begin so belong; `num_failed` were tried before this one.
    """
    lines = [line for line in finish.optimizations if line.name != "prompt_caching"]
    lines.append(_prefix_caching(finish.usage, replica.facts))
    if num_replicas > 1:
        lines.append(_affinity(replica, home, num_failed, num_replicas))
    if replica.facts.drafts:
        lines.append(_speculation(replica.figures()))
    return replace(finish, optimizations=tuple(lines))


def _prefix_caching(usage: Usage, facts: EngineFacts) -> OptimizationOutcome:
    cached = usage.cached_tokens
    if cached:
        reason = f"{cached} of {usage.prompt_tokens} prompt tokens were in the cache"
    elif facts.prefix_caching is False:
        reason = "vLLM was started without it"
    else:
        reason = "none was found, or vLLM was started without --enable-prompt-tokens-details and does not tell"
    return OptimizationOutcome(name="prefix_caching", applied=cached > 0, reason=reason, tokens_saved=cached or None)


def _affinity(replica: Replica, home: Replica, num_failed: int, num_replicas: int) -> OptimizationOutcome:
    reason = f"{replica.address}, one of {num_replicas}: "
    if replica is home:
        reason += "the one for prompts of this tenant that begin like this"
    elif num_failed:
        reason += f"{num_failed} failed before it"
    else:
        reason += f"{home.address}, to which prompts that begin like this belong, had too much to do"
    return OptimizationOutcome(name="prefix_affinity", applied=replica is home, reason=reason)


def _speculation(figures: Mapping[str, float]) -> OptimizationOutcome:
    drafted, accepted = figures.get("num_draft_tokens", 0.0), figures.get("num_accepted_tokens", 0.0)
    share = f"{accepted / drafted:.0%} of {drafted:,.0f} drafted tokens accepted" if drafted else "nothing drafted yet"
    return OptimizationOutcome(
        name="speculative_decoding", applied=drafted > 0, reason=f"{share}, over all requests of the server so far"
    )


def server_outcomes(servers: Sequence[EngineFacts], figures: Mapping[str, float]) -> list[OptimizationOutcome]:
    """What runs in the servers that are up, as far as their metrics tell."""
    outcomes = [
        OptimizationOutcome(
            name="continuous_batching",
            applied=True,
            reason=f"vLLM always batches so; {figures.get('num_running', 0):.0f} sequences run now",
        )
    ]
    caching = {facts.prefix_caching for facts in servers} - {None}
    if caching:
        rate = figures.get("prefix_cache_hit_rate")
        seen = f"{rate:.0%} of prompt tokens were found" if rate is not None else "nothing was asked of it yet"
        outcomes.append(
            OptimizationOutcome(
                name="prefix_caching", applied=True in caching, reason=seen if True in caching else "started without it"
            )
        )
    if any(facts.drafts for facts in servers):
        outcomes.append(_speculation(figures))
    else:
        outcomes.append(
            OptimizationOutcome(name="speculative_decoding", applied=False, reason="started without speculative_config")
        )
    kinds = sorted({facts.kv_cache_dtype for facts in servers if facts.kv_cache_dtype})
    if kinds:
        outcomes.append(
            OptimizationOutcome(
                name="kv_cache_optimization",
                applied=any(kind.startswith(_QUANTIZED) for kind in kinds),
                reason=f"keys and values are kept as {', '.join(kinds)}",
            )
        )
    return outcomes
