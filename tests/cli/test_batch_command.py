"""`autobot-llm batch` as its users meet it: what it prints, waits for, writes and answers with."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from batch_faults import Hold
from openai_batches import OpenAIBatchServer, openai_batches

COMMAND = [sys.executable, "-c", "import sys; from autobot_llm.cli.main import main; sys.exit(main())", "batch"]
PATIENCE = 30.0


class Terminal:
    """Runs the command in a folder of its own, against a server."""

    def __init__(self, folder: Path, server: OpenAIBatchServer) -> None:
        self.folder = folder
        self.server = server
        self.file = folder / "in.jsonl"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("AUTOBOT_")}
        self.environment = inherited | server.environment() | {"AUTOBOT_CACHE_DIR": str(folder / "cache")}

    def write(self, *texts: str) -> None:
        chats = (
            {"custom_id": text, "messages": [{"role": "user", "content": text}], "max_tokens": 9} for text in texts
        )
        self.file.write_text("".join(json.dumps(one) + "\n" for one in chats))

    async def start(self, *arguments: str, kilobytes: int | None = None) -> asyncio.subprocess.Process:
        """Start the command; no file of its may become larger than `kilobytes`."""
        pipe = asyncio.subprocess.PIPE
        limited = () if kilobytes is None else ("bash", "-c", f'ulimit -f {kilobytes}; exec "$@"', "limited")
        return await asyncio.create_subprocess_exec(
            *limited, *COMMAND, *arguments, cwd=self.folder, env=self.environment, stdin=asyncio.subprocess.DEVNULL,
            stdout=pipe, stderr=pipe,
        )  # fmt: skip

    async def run(self, *arguments: str, kilobytes: int | None = None) -> tuple[int | None, str, str]:
        process = await self.start(*arguments, kilobytes=kilobytes)
        out, err = await asyncio.wait_for(process.communicate(), PATIENCE)
        return process.returncode, out.decode(), err.decode()

    async def submitted(self) -> str:
        code, out, err = await self.run("submit", "in.jsonl", "--model", "openai/gpt-4o-mini", "--json")
        assert code == 0, err
        return str(json.loads(out)["id"])


@pytest.fixture
async def terminal(tmp_path: Path) -> AsyncIterator[Terminal]:
    async with openai_batches(fails=frozenset({"bad"})) as server:
        yield Terminal(tmp_path, server)


async def test_a_job_from_its_file_to_its_answers(terminal: Terminal) -> None:
    terminal.write("a", "b")
    code, out, err = await terminal.run("submit", "in.jsonl", "--model", "openai/gpt-4o-mini")
    assert code == 0, err
    job = out.split(":")[0]
    assert f"{job}: running, 0 of 2 requests done, 0 failed (openai, 1 batch)" in out
    assert "at most 0.0000 dollars" in out
    assert f"next: autobot-llm batch status {job} --wait" in out
    terminal.server.run_all()
    code, out, _ = await terminal.run("status", job[:9])
    assert code == 0 and f"{job}: ended, 2 of 2 requests done" in out
    assert f"next: autobot-llm batch fetch {job} --out answers.jsonl" in out
    code, out, err = await terminal.run("fetch", job, "--out", "answers.jsonl")
    assert code == 0, err
    assert "dollars spent" in out and "fetched" in out
    answers = [json.loads(line) for line in (terminal.folder / "answers.jsonl").read_text().splitlines()]
    assert [answer["custom_id"] for answer in answers] == ["a", "b"]
    code, out, _ = await terminal.run("list", "--json")
    (listed,) = json.loads(out)
    assert (listed["id"], listed["state"], listed["num_done"]) == (job, "fetched", 2)
    code, out, _ = await terminal.run("list")
    assert code == 0 and job in out and "in.jsonl" in out


async def test_answers_are_printed_without_a_file_and_failures_show_in_the_exit_code(
    terminal: Terminal,
) -> None:
    terminal.write("a", "bad")
    job = await terminal.submitted()
    terminal.server.run_all()
    code, out, err = await terminal.run("fetch", job)
    assert code == 1
    good, bad = map(json.loads, out.splitlines())
    assert good["error"] is None and good["response"]["body"]["choices"][0]["message"]["content"] == "about a"
    assert bad["error"] == {"code": "no_way", "message": "cannot do bad"}
    assert "1 of 2 requests have no answer" in err


async def test_a_wrong_line_is_one_clear_error(terminal: Terminal) -> None:
    terminal.file.write_text('{"messages": [{"role": "user", "content": "x"}]}\n{"messages": 5}\n')
    code, _, err = await terminal.run("submit", "in.jsonl", "--model", "openai/gpt-4o-mini")
    assert code == 1
    assert "error: line 2: messages: expected array, got int" in err
    assert terminal.server.server.asked == []


async def test_ctrl_c_leaves_the_job_running_and_says_how_to_come_back(terminal: Terminal) -> None:
    terminal.write("a")
    process = await terminal.start("submit", "in.jsonl", "--model", "openai/gpt-4o-mini", "--wait")
    async with asyncio.timeout(PATIENCE):
        while not any(asked.path.startswith("/v1/batches/") for asked in terminal.server.server.asked):
            await asyncio.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode == 130
    assert "goes on without you: autobot-llm batch status job-" in err.decode()
    assert "Traceback" not in err.decode()
    terminal.server.run_all()
    job = err.decode().split(" goes on")[0].split()[-1]
    code, out, _ = await terminal.run("fetch", job, "--wait")
    assert code == 0 and json.loads(out)["custom_id"] == "a"
    assert len(terminal.server.batches) == 1


async def test_ctrl_c_while_it_is_sent_says_how_to_go_on(terminal: Terminal) -> None:
    terminal.write("a")
    terminal.server.hold = hold = Hold(0, "before")
    process = await terminal.start("submit", "in.jsonl", "--model", "openai/gpt-4o-mini")
    await asyncio.wait_for(hold.is_reached.wait(), PATIENCE)
    process.send_signal(signal.SIGINT)
    _, err = await asyncio.wait_for(process.communicate(), PATIENCE)
    assert process.returncode == 130 and "Traceback" not in err.decode()
    assert "is kept; to go on: autobot-llm batch submit --resume job-" in err.decode()


async def test_a_cancelled_job_says_so(terminal: Terminal) -> None:
    terminal.write("a")
    job = await terminal.submitted()
    code, out, err = await terminal.run("cancel", job)
    assert code == 0, err
    assert "cancelling" in out
    (batch,) = terminal.server.batches.values()
    terminal.server.run(batch["id"], status="cancelled", num_answered=0) if batch["status"] == "cancelling" else None
    code, out, _ = await terminal.run("fetch", job)
    assert code == 1 and json.loads(out)["error"]["code"] == "batch_cancelled"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["submit"], "expected a FILE, or --resume JOB"),
        (["submit", "in.jsonl", "--provider", "nobody"], "provider='nobody': expected one that has batch jobs"),
        (["status", "job-0"], "no batch job is called 'job-0'; known are none"),
        (["fetch", "job-0", "--json"], "--json needs --out"),
    ],
)
async def test_a_wrong_argument_is_named(terminal: Terminal, arguments: list[str], words: str) -> None:
    terminal.write("a")
    code, _, err = await terminal.run(*arguments)
    assert code in (1, 2)
    assert words in err


@pytest.mark.parametrize("kilobytes", [1, 40, 100])
async def test_a_disk_without_room_is_one_clear_error_and_nothing_is_lost(terminal: Terminal, kilobytes: int) -> None:
    """The limit on a file's size stands for a full disk: it hits the requests, the store, or the answers."""
    terminal.write(*(f"{i} {'x' * 500}" for i in range(100)))
    submit = ("submit", "in.jsonl", "--model", "openai/gpt-4o-mini", "--json")
    small = await terminal.run(*submit, kilobytes=kilobytes)
    assert small[0] in (0, 2) and "Traceback" not in small[2]
    code, out, err = await terminal.run(*submit)
    assert code == 0, err
    assert len(terminal.server.batches) == 1
    terminal.server.run_all()
    job = json.loads(out)["id"]
    code, _, err = await terminal.run("fetch", job, "--out", "answers.jsonl", kilobytes=kilobytes)
    assert code == 2 and "cannot be" in err and "Traceback" not in err
    assert not (terminal.folder / "answers.jsonl").exists()
    code, _, err = await terminal.run("fetch", job, "--out", "answers.jsonl")
    assert code == 0, err
    assert len((terminal.folder / "answers.jsonl").read_text().splitlines()) == 100


async def test_a_submission_that_fails_says_how_to_go_on(terminal: Terminal) -> None:
    terminal.write("a")
    terminal.environment["OPENAI_API_KEY"] = "sk-wrong"
    code, _, err = await terminal.run("submit", "in.jsonl", "--model", "openai/gpt-4o-mini")
    assert code == 1 and "was not accepted" in err
    hint = next(
        line for line in err.splitlines() if "is kept; to go on: autobot-llm batch submit --resume job-" in line
    )
    terminal.environment |= terminal.server.environment()
    code, out, err = await terminal.run("submit", "--resume", hint.split()[0])
    assert code == 0 and "running" in out, err


async def test_no_jobs_is_no_error(terminal: Terminal) -> None:
    assert await terminal.run("list") == (0, "there are no batch jobs\n", "")
