"""What the tests of a GPU share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from reference import Reference


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The host's part is small. Where others compute beside it, threads wait for each other longer than they compute:
    quantizing the embedded model took 28 s with two threads on a busy machine, 3 with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference()
