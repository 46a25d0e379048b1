"""Kernels in CUDA C++ that their compiler refuses: it is heard once, and the others do the work."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from autobot_llm.engine.kernels.gpu import launch, linear, streamed
from autobot_llm.engine.kernels.gpu.nvrtc import CompilationError, CudaKernel, compile_source, find_nvrtc
from autobot_llm.engine.kernels.gpu.stream_tiles import StreamTile
from tests.kernels.test_quantized import random_weight

TILE = StreamTile(4, 1024, 5, 1)


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CudaKernel:
    """A kernel whose source is nonsense, in the place of the real one. Without NVRTC any source is refused."""
    source = tmp_path / "nonsense.cu"
    source.write_text("nonsense")
    kernel = CudaKernel(str(source), "streamed_rows")
    monkeypatch.setattr(streamed, "_kernel", kernel)
    return kernel


@pytest.fixture
def looks_like_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: as far as what comes before a launch asks."""
    if not torch.cuda.is_available():
        properties = SimpleNamespace(multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@pytest.fixture
def wants_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables ask for the kernel wherever it is not known to be refused, whatever the shape."""

    def why_not(*_: object) -> str | None:
        return streamed._kernel.refusal

    monkeypatch.setattr(linear, "why_not_streamed", why_not)
    monkeypatch.setattr(linear, "choose_stream_tile", lambda *_: TILE)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.usefixtures("looks_like_hopper", "wants_streams")
def test_where_the_compiler_refuses_a_kernel_another_one_multiplies(
    refused: CudaKernel, device: torch.device, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
    weight = random_weight("int8", 64, 128, dtype, device)
    residual = torch.ones(3, 64, dtype=dtype, device=device)
    found = [linear.linear_add(x, weight, None, residual.clone()) for _ in range(2)]
    expected = linear.linear_add_reference(x, weight.dequantized(torch.float64), None, residual)
    for one in found:
        assert float((one.double() - expected).norm() / expected.norm()) < 4e-3
    assert refused.refusal
    (warning,) = warnings_of(caplog)
    assert "nonsense.cu does not compile" in warning and refused.refusal in warning


@pytest.mark.usefixtures("looks_like_hopper")
def test_a_refusal_is_known_once_kernels_were_compiled_ahead(
    refused: CudaKernel, device: torch.device, caplog: pytest.LogCaptureFixture
) -> None:
    """Many at once, of which none is launched: no error stops the start, and there is one warning."""
    caplog.set_level(logging.WARNING)
    x = torch.zeros(16, 256, dtype=torch.bfloat16, device=device)
    weight = torch.zeros(32, 256, dtype=torch.bfloat16, device=device)
    with ThreadPoolExecutor(4) as threads:
        token = launch._ahead.set(launch.Ahead(threads))
        try:
            for rows in range(1, 17):
                out = torch.full((rows, 32), 3.0, dtype=torch.bfloat16, device=device)
                streamed.multiply_streamed(TILE, x[:rows], weight, out)
                assert (out == 3.0).all()
        finally:
            launch._ahead.reset(token)
    assert refused.refusal and len(warnings_of(caplog)) == 1
    if device.type == "cuda":
        assert streamed.why_not_streamed(x[:2], weight, torch.bfloat16) == "no compiler for it"
    with pytest.raises(CompilationError):
        streamed.multiply_streamed(TILE, x[:2], weight, x.new_empty(2, 32))
    assert len(warnings_of(caplog)) == 1


@pytest.mark.skipif(find_nvrtc() is None, reason="NVRTC comes with torch for CUDA")
def test_what_the_compiler_says_is_heard() -> None:
    with pytest.raises(CompilationError, match="nonsense"):
        compile_source("nonsense", "sm_90", {})
