"""One start, timed from the inside: load a model folder through the public interface and answer once.

    python start_probe.py SECONDS_SINCE_EPOCH FOLDER DEVICE CACHE_DIR

The first argument is when the parent started this process. Prints one JSON line.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

PROMPT = "Once upon a time there was a"


async def main(began: float, folder: str, device: str, cache_dir: str) -> None:
    from autobot_llm import LLMInterface
    from autobot_llm.engine import load as _engine  # what the provider would import next; timed apart from its work
    from autobot_llm.settings import load_settings
    from autobot_llm.types import Finish, TextDelta

    assert _engine
    imported = time.time()
    complete: list[float] = []  # when the last weight was there

    def on_progress(phase: str, done: int, in_all: int) -> None:
        if phase == "weights" and done >= in_all:
            complete.append(time.time())

    overrides = {"default_model": folder, "device": device, "cache_dir": Path(cache_dir)}
    settings = load_settings(environ={}, env_file=None, overrides=overrides)
    async with LLMInterface(settings, on_progress=on_progress) as llm:
        ready = time.time()
        first = None
        async for event in llm.stream(prompt=PROMPT, max_tokens=16, temperature=0, ignore_eos=True):
            if isinstance(event, (TextDelta, Finish)):
                first = first or time.time()
        finished = time.time()
    assert first is not None, "a complete answer has a Finish"
    loaded = complete[0] if complete else ready
    figures = {
        "imports": imported - began,
        "weights": loaded - imported,
        "preparation": ready - loaded,
        "first_token": first - ready,
        "total": first - began,
        "whole_answer": finished - began,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    asyncio.run(main(float(sys.argv[1]), *sys.argv[2:5]))
