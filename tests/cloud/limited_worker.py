"""One worker of several, for the tests of what workers share: `limited_worker.py '{"settings": ..., ...}'`."""

from __future__ import annotations

import asyncio
import collections
import json
import sys
import time
from pathlib import Path
from typing import Any

from autobot_llm import LLMInterface, Settings
from autobot_llm.errors import LLMError


async def work(settings: dict[str, Any], num_requests: int, at_once: int, request: dict[str, Any]) -> dict[str, Any]:
    if "cache_dir" in settings:
        settings["cache_dir"] = Path(settings["cache_dir"])
    places = asyncio.Semaphore(at_once)
    ended: collections.Counter[str] = collections.Counter()
    began = time.monotonic()

    async def one(number: int) -> None:
        async with places:
            try:
                await llm.chat_completion([{"role": "user", "content": f"question {number}"}], **request)
                ended["answered"] += 1
            except LLMError as error:
                ended[error.code or type(error).__name__] += 1

    async with LLMInterface(Settings(**settings)) as llm:
        await asyncio.gather(*map(one, range(num_requests)))
        figures = llm.get_metrics()
    return {"ended": ended, "seconds": time.monotonic() - began, "figures": figures}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(work(**json.loads(sys.argv[1])))))
