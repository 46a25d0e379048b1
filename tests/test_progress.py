"""What a terminal shows while something loads, on a real pseudo-terminal."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

# One piece of code for each moment: {work} happens within the context.
PROGRAM = """
import sys, time
from autobot_llm.cli.progress import PATIENCE, Progress
with Progress("Loading [a] model") as progress:
    {work}
print("rich" in sys.modules)
"""
GROWING = "[(progress.advance('weights', i * 10**9, 100 * 10**9), time.sleep(0.03)) for i in range(60)]"


def on_a_terminal(work: str) -> tuple[str, str]:
    """What the program writes to its terminal, and to its standard output."""
    pty = pytest.importorskip("pty", reason="pseudo-terminals are a thing of POSIX systems")
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(work=work)], stderr=theirs, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "1"},
    ) as process:  # fmt: skip
        os.close(theirs)
        shown = b"".join(read_until_closed(ours))
        os.close(ours)
        assert process.stdout is not None
        return shown.decode(), process.stdout.read()


def read_until_closed(terminal: int) -> Iterator[bytes]:
    while True:
        try:
            part = os.read(terminal, 4096)
        except OSError:  # Linux says so at the end
            return
        if not part:
            return
        yield part


def test_a_bar_shows_bytes_and_their_rate() -> None:
    shown, _ = on_a_terminal(GROWING)
    assert "Loading [a] model ..." in shown
    figures = re.findall(r"(\d+\.0) of 100\.0 GB +(\d+\.\d) GB/s", shown)
    assert len(figures) > 3
    assert all(float(done) > 2 for done, _ in figures)  # nothing before PATIENCE
    assert all(0 < float(rate) < 34 for _, rate in figures)  # a billion bytes every 30 ms at most
    assert not re.search(r"GB/s", shown[shown.rindex("\x1b[2K") :])  # it goes away


def test_what_comes_after_the_last_byte_has_no_measure() -> None:
    shown, _ = on_a_terminal(f"{GROWING}; progress.advance('weights', 10**11, 10**11); time.sleep(0.5)")
    frames = [frame for frame in shown.split("\x1b[2K") if "Loading [a] model" in frame]
    assert "GB" in frames[-12]  # ten frames a second
    assert "GB" not in frames[-1]


def test_other_phases_are_counted_in_pieces() -> None:
    shown, _ = on_a_terminal(
        "time.sleep(PATIENCE + 0.3); progress.advance('kernels', 0, 0); time.sleep(0.4);"
        " progress.advance('graphs', 3, 24); time.sleep(0.4)"
    )
    assert shown.index("kernels") < shown.index("3 of 24 graphs")
    assert "GB" not in shown


def test_quick_work_is_not_worth_a_word_nor_a_library() -> None:
    shown, printed = on_a_terminal("progress.advance('weights', 1, 1)")
    assert shown == ""
    assert printed == "False\n"


def test_without_a_terminal_it_is_one_line() -> None:
    work = "progress.advance('weights', 1, 2); time.sleep(PATIENCE + 0.3); progress.advance('weights', 2, 2)"
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(work=work)], capture_output=True, text=True, check=True)
    assert done.stderr == "Loading [a] model ...\n"


def test_the_message_can_be_another_one_while_it_is_shown() -> None:
    shown, _ = on_a_terminal('time.sleep(PATIENCE + 0.3); progress.say("Loading: [b] 50%"); time.sleep(0.4)')
    assert "Loading [a] model ..." in shown
    assert "Loading: [b] 50% ..." in shown
    assert shown.index("Loading [a] model ...") < shown.index("Loading: [b] 50% ...")
