"""What the tests of a GPU share."""

from __future__ import annotations

import pytest
from reference import Reference


@pytest.fixture(scope="session")
def reference() -> Reference:
    return Reference()
