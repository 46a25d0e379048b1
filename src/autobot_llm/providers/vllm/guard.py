"""Run a program that does not outlive its parent: `python guard.py PARENT_PID PROGRAM ARGUMENT ...`.

A script of its own, which imports nothing of the package. Where the kernel offers it (Linux), the program is told to
stop when the parent dies in whatever way; elsewhere it is only run.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before this was set
            sys.exit(1)
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
