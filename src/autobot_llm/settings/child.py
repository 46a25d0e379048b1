"""The environment for a child process. Knows which variables are ours; knows nothing of the child."""

from __future__ import annotations

import os
from collections.abc import Mapping

from autobot_llm.settings.load import is_ours_alone


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with `extra`, and without our own settings, among which are API keys.

    Proxies stay: a child downloads what it needs through them.
    """
    return {name: value for name, value in os.environ.items() if not is_ours_alone(name)} | dict(extra)
