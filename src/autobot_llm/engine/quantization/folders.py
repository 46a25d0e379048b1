"""What everybody who makes a model folder needs: that one process does, and the files that are not weights.

Knows names and locks, which end with their processes; imports no torch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COPIED_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


@contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[int]:
    """Hold the lock of file `path`, which is made if it is not there, and give its number.

    A child that inherits the number holds the lock, too, and goes on holding it if this process is killed. Raises
    BlockingIOError where another process holds it and `wait` is false. Systems without such locks are not locked.
    """
    with path.open("w") as file:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield file.fileno()
