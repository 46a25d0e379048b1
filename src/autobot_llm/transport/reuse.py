"""The report's line about the connection that an answer came over. Knows words only."""

from __future__ import annotations

from autobot_llm.report import OptimizationOutcome

_REUSED = OptimizationOutcome(name="connection_pooling", applied=True, reason="sent over a connection that was open")
_NEW = OptimizationOutcome(name="connection_pooling", applied=False, reason="no connection was idle: one was made")


def connection_pooling(*, is_reused: bool) -> OptimizationOutcome:
    """Whether keeping connections spared this request the making of one (`HttpStream.is_reused`)."""
    return _REUSED if is_reused else _NEW
