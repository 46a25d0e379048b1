"""`/v1/optimizations`: what could run, what runs, and why."""

from __future__ import annotations

from server_harness import running_server

from autobot_llm.routing import OPTIMIZATIONS


async def test_the_server_tells_what_runs_and_why() -> None:
    async with running_server(api_keys=("a-secret",)) as server:
        refused = await server.get("/v1/optimizations")
        reply = await server.get("/v1/optimizations", authorization="Bearer a-secret")
    assert refused.status == 401
    (row,) = reply.json["data"]
    assert (row["provider"], row["state"]) == ("native", "ready")
    assert [one["name"] for one in row["optimizations"]] == list(OPTIMIZATIONS)
    assert all(one["reason"] for one in row["optimizations"])
    assert not any(one["runs"] and not one["could_apply"] for one in row["optimizations"])
