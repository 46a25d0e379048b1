"""Before anything imports triton: where there is no CUDA device, its kernels run in its interpreter.

And each test has the cache folder of a user of its own, so that no test gets an answer that another one had made. Only
the compiled CPU step, which takes long to make, is that of the user who runs the tests.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from autobot_llm.settings.registry import user_cache_dir

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

KERNELS = user_cache_dir(os.environ) / "kernels"


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("user-cache")
    KERNELS.mkdir(parents=True, exist_ok=True)
    Path(folder / "autobot_llm").mkdir()
    Path(folder / "autobot_llm" / "kernels").symlink_to(KERNELS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
