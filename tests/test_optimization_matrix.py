"""The matrix of optimizations: true to each kind of provider, to its version, and to what it tells of itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from autobot_llm.interface import LLMInterface
from autobot_llm.optimization_matrix import ProviderRow, optimization_matrix
from autobot_llm.providers.base import Link, Provider, Streamer
from autobot_llm.providers.scripted import ScriptedProvider
from autobot_llm.report import OptimizationOutcome
from autobot_llm.routing import OPTIMIZATIONS, OptimizationRouter, ProviderType
from autobot_llm.settings import Settings
from autobot_llm.tuning.knobs.vllm import READ


class TellingProvider(ScriptedProvider):
    """A provider that says which engine is behind it and what runs there."""

    def __init__(self, name: str, version: str | None, **runs: bool) -> None:
        super().__init__(name=name)
        self._version = version
        self._runs = runs

    def engine_version(self) -> str | None:
        return self._version

    def optimizations(self) -> list[OptimizationOutcome]:
        return [OptimizationOutcome(name=name, applied=runs, reason="I say so") for name, runs in self._runs.items()]


def row_of(provider: Provider, **links: Link) -> ProviderRow:
    (row,) = optimization_matrix([provider.name], {provider.name: provider}, links)
    return row


def cells(row: ProviderRow) -> dict[str, tuple[bool, bool, str]]:
    return {one.name: (one.could_apply, one.runs, one.reason) for one in row.optimizations}


@pytest.mark.parametrize("version", READ)
def test_medusa_could_apply_to_vllm_up_to_0_32(version: str) -> None:
    could = OptimizationRouter.should_apply("medusa_heads", ProviderType.LOCAL_VLLM, version)
    assert could == (version != "0.33.0")
    assert OptimizationRouter.get_optimizations(ProviderType.LOCAL_VLLM, version)["medusa_heads"] == could
    could_apply, runs, reason = cells(row_of(TellingProvider("vllm", version)))["medusa_heads"]
    assert (could_apply, runs) == (could, False)
    if not could:
        assert reason == "vllm from 0.8.5 to 0.32.0 has it, 0.33.0 does not"


def test_a_version_that_cannot_be_read_counts_as_todays() -> None:
    for version in (None, "dev", "0.6.1"):
        assert not OptimizationRouter.should_apply("medusa_heads", ProviderType.LOCAL_VLLM, version)
        assert OptimizationRouter.should_apply("speculative_decoding", ProviderType.LOCAL_VLLM, version)
    assert not OptimizationRouter.should_apply("teleportation", ProviderType.LOCAL_VLLM, "0.20")


def test_what_runs_is_what_the_provider_tells() -> None:
    row = row_of(TellingProvider("vllm", "0.33.0", prefix_caching=True, speculative_decoding=False))
    found = cells(row)
    assert row.engine_version == "0.33.0"
    assert found["prefix_caching"] == (True, True, "I say so")
    assert found["speculative_decoding"] == (True, False, "I say so")
    assert found["quantization"] == (True, False, "the provider does not tell")
    assert found["connection_pooling"][:2] == (True, True)
    assert found["response_caching"] == (True, False, "the settings switch it off")


def test_nothing_runs_that_could_not_apply_whatever_the_provider_says() -> None:
    telling = dict.fromkeys(OPTIMIZATIONS, True)
    for kind in ProviderType:
        for name, (could_apply, runs, _) in cells(row_of(TellingProvider(kind, None, **telling))).items():
            assert could_apply == OptimizationRouter.should_apply(name, kind)
            assert runs == could_apply


class PlainLink(Link):
    def wrap(self, chain: Streamer, provider: Provider) -> Streamer:
        return chain


def test_a_link_of_the_chain_runs_where_it_could_apply() -> None:
    assert cells(row_of(ScriptedProvider(name="openai"), response_caching=PlainLink()))["response_caching"][1] is True
    assert cells(row_of(ScriptedProvider(name="native"), connection_pooling=PlainLink()))["connection_pooling"] == (
        False, False, "it runs in this process, not over HTTP",
    )  # fmt: skip


def test_every_cell_has_a_reason_and_a_provider_that_is_not_started_runs_nothing() -> None:
    for row in optimization_matrix([*ProviderType, "my_cloud"], {}, {}):
        assert row.state == "stopped"
        for name, (could_apply, runs, reason) in cells(row).items():
            assert not runs
            assert reason == "the provider is not started" if could_apply else reason, name
    assert row.kind is ProviderType.CLOUD_OTHER


async def test_the_interface_tells_of_the_native_engine_what_its_executor_says(tmp_path: Path) -> None:
    async with LLMInterface(Settings(device="cpu", cache_dir=tmp_path, compiled_step="off", cpu_threads=1)) as llm:
        native = cells(next(row for row in llm.get_optimizations() if row.provider == "native"))
    assert native["prefix_caching"][:2] == (True, True)
    assert native["continuous_batching"][:2] == (True, True)
    assert native["cuda_graphs"][:2] == (True, False)
    assert "CPU" in native["cuda_graphs"][2]


def test_the_command_prints_the_matrix_and_the_reasons(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; from autobot_llm.cli.main import main; sys.exit(main())", "routes"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert {name for name in OPTIMIZATIONS if f"\n {name} " in done.stdout} == set(OPTIMIZATIONS)
    assert "native: ready" in done.stdout
    done = subprocess.run([*command, "--json"], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    rows = {row["provider"]: row for row in json.loads(done.stdout)}
    assert set(rows) >= set(ProviderType)
    assert {one["name"]: one["could_apply"] for one in rows["ollama"]["optimizations"]}["medusa_heads"] is False
