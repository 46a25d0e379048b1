"""The Triton kernels run on a CUDA device where there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

import pytest
import torch

ON_GPU = torch.cuda.is_available()

pytest.importorskip("triton", reason="triton is not made for this platform")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if ON_GPU else "cpu")


@pytest.fixture(params=[torch.float16, torch.bfloat16] if ON_GPU else [torch.float16])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """What weights and activations are stored in. The interpreter cannot multiply bfloat16 matrices."""
    kind: torch.dtype = request.param
    return kind
