"""Loading weights onto a CUDA device: the values of the files, in the dtype that is asked for. `make test-gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from autobot_llm.engine.models.checkpoint import SINGLE_FILE, open_checkpoint
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.models.transfer import NUM_BUFFERS, CudaTransport, Staged, Transfer, carry, plan_spans
from autobot_llm.engine.models.weights import SPAN_BYTES, DecoderWeights, LayerWeights, load_weights

pytestmark = pytest.mark.gpu

TINY = Path(__file__).parents[2] / "src" / "autobot_llm" / "assets" / "tiny"


@pytest.fixture
def device() -> torch.device:
    assert torch.cuda.is_available(), "make test-gpu needs a CUDA device"
    return torch.device("cuda", torch.cuda.current_device())


def tensors_of(weights: DecoderWeights) -> list[torch.Tensor]:
    found = [getattr(layer, name) for layer in weights.layers for name in LayerWeights.__slots__]
    return [weights.embed_VE, weights.norm_E, weights.lm_head_VE, *(one for one in found if one is not None)]


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16])
def test_a_model_on_the_gpu_is_the_one_on_the_cpu(device: torch.device, dtype: torch.dtype | None) -> None:
    config = load_config(TINY)
    on_gpu, on_cpu = (load_weights(TINY, config, dtype=dtype, device=one) for one in (device, "cpu"))
    for ours, theirs in zip(tensors_of(on_gpu), tensors_of(on_cpu), strict=True):
        assert ours.device == device
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("span_bytes", [2**12, 2**16, SPAN_BYTES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_buffer_is_filled_while_it_is_copied(
    device: torch.device, dtype: torch.dtype, span_bytes: int, tmp_path: Path
) -> None:
    sizes = [3, 2_000_001, 1_000_000, 5] * 3
    stored = {f"t{i}": torch.randn(n).to((torch.float32, torch.bfloat16)[i % 2]) for i, n in enumerate(sizes)}
    safetensors.torch.save_file(stored, tmp_path / SINGLE_FILE)
    shapes = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    checkpoint = open_checkpoint(tmp_path, shapes, model_type="test")
    targets = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in shapes.items()}
    spans = plan_spans([Transfer(checkpoint.tensors[name], targets[name]) for name in shapes], span_bytes)
    assert len(spans) > 5 * NUM_BUFFERS or span_bytes == SPAN_BYTES
    carry(spans, [Staged(CudaTransport(device), span_bytes) for _ in range(5)])
    for name, tensor in stored.items():
        assert torch.equal(targets[name].cpu(), tensor.to(dtype)), name
