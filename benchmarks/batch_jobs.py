"""What a batch job costs here, in processor time and memory: checking, sending and fetching many requests.

Beside it, in the same run, what OpenAI's own client takes to send the same file as it is and to fetch the results as
they come, with nothing checked, ordered or counted. Each is a process of its own, in front of a server that answers
each request with the same 400 characters. One JSON line at the end.

    python benchmarks/batch_jobs.py [--requests 50000] [--characters 1500]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODEL = "gpt-4o-mini"
MEBIBYTE = 2**20
JSON_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"


class Server:
    """As much of OpenAI's files and batches as the two clients ask for; a batch is complete when it is looked at."""

    def __init__(self) -> None:
        self.requests: list[bytes] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode("latin-1"):
                lines = head.split("\r\n")
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                method, path, _ = lines[0].split(" ")
                answer = self.answer(method, path.partition("?")[0], body)
                writer.write(JSON_HEAD % len(answer) + answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def answer(self, method: str, path: str, body: bytes) -> bytes:
        if path.endswith("/content"):
            return self.results()
        if path.startswith("/v1/files"):
            self.requests = [line for line in body.split(b"\n") if line.startswith(b'{"custom_id"')]
            file = {"id": "f", "object": "file", "bytes": len(body), "created_at": 1, "filename": "x"}
            return json.dumps(file | {"purpose": "batch", "status": "processed"}).encode()
        counts = {"total": len(self.requests), "completed": len(self.requests), "failed": 0}
        batch = {"id": "b", "object": "batch", "endpoint": "/v1/chat/completions", "input_file_id": "f",
                 "completion_window": "24h", "status": "completed", "output_file_id": "o", "created_at": 1,
                 "request_counts": counts}  # fmt: skip
        return json.dumps(batch).encode()

    def results(self) -> bytes:
        message = {"role": "assistant", "content": "x" * 400, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        usage = {"prompt_tokens": 400, "completion_tokens": 100, "total_tokens": 500}
        answer = {"id": "c", "object": "chat.completion", "created": 1, "model": MODEL, "choices": [choice]}
        body = json.dumps({"status_code": 200, "request_id": "r", "body": answer | {"usage": usage}})
        ids = (json.loads(line[: line.index(b",")] + b"}")["custom_id"] for line in reversed(self.requests))
        return "".join(f'{{"id":"i","custom_id":"{one}","response":{body},"error":null}}\n' for one in ids).encode()


def write_requests(path: Path, num_requests: int, num_characters: int) -> None:
    with path.open("w") as file:
        for number in range(num_requests):
            messages = [{"role": "user", "content": f"{number} " + "word " * (num_characters // 5)}]
            body = {"model": MODEL, "messages": messages, "max_tokens": 100}
            line = {"custom_id": f"q{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def by_us(url: str, folder: Path) -> None:
    from autobot_llm import BatchJobs, Settings

    async def work() -> None:
        settings = Settings(openai_endpoint=url, openai_api_key="k", cache_dir=folder / "cache")
        async with BatchJobs(settings) as jobs:
            measured("start")
            job = await jobs.submit(folder / "in.jsonl", provider="openai")
            measured("sent")
            await jobs.fetch((await jobs.wait(job.id)).id, folder / "ours.jsonl")
            measured("fetched")

    asyncio.run(work())


def by_openais_client(url: str, folder: Path) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="k")
    measured("start")
    file = client.files.create(file=folder / "in.jsonl", purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    measured("sent")
    client.batches.retrieve(batch.id)
    client.files.content("o").write_to_file(folder / "theirs.jsonl")
    measured("fetched")


def measured(what: str) -> None:
    """Print this process's processor seconds and its peak memory in bytes so far."""
    # Not `getrusage`: its figure begins with that of the process which started this one.
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    print(json.dumps({"what": what, "cpu": time.process_time(), "peak": peak}), flush=True)


def run(client: str, url: str, folder: Path) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, __file__, "--client", client, url, str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    start, sent, fetched = map(json.loads, done.stdout.splitlines())
    return {
        "send_cpu_s": sent["cpu"] - start["cpu"],
        "fetch_cpu_s": fetched["cpu"] - sent["cpu"],
        "start_mib": start["peak"] / MEBIBYTE,
        "peak_mib": fetched["peak"] / MEBIBYTE,
    }


async def main(num_requests: int, num_characters: int) -> None:
    server = await asyncio.start_server(Server().serve, "127.0.0.1", 0, limit=2**20)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_requests(folder / "in.jsonl", num_requests, num_characters)
        size = (folder / "in.jsonl").stat().st_size / MEBIBYTE
        ours = await asyncio.to_thread(run, "ours", url, folder)
        theirs = await asyncio.to_thread(run, "openai", url, folder)
        ids = [json.loads(line)["custom_id"] for line in (folder / "ours.jsonl").open()]
    if ids != [f"q{number}" for number in range(num_requests)]:
        raise SystemExit("the results are not those of the requests, in their order")
    print(f"{num_requests:,} requests, {size:.0f} MiB")
    print(f"{'':28}{'autobot_llm':>14}{'openai client':>16}")
    for figure, words in (
        ("send_cpu_s", "check and send, CPU s"),
        ("fetch_cpu_s", "fetch in order, CPU s"),
        ("start_mib", "memory at the start, MiB"),
        ("peak_mib", "peak memory, MiB"),
    ):
        print(f"{words:28}{ours[figure]:>14.2f}{theirs[figure]:>16.2f}")
    print(
        json.dumps({"benchmark": "batch_jobs", "requests": num_requests, "mib": size, "ours": ours, "openai": theirs})
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--characters", type=int, default=1500)
    parser.add_argument("--client", nargs=3, metavar=("WHO", "URL", "FOLDER"))
    options = parser.parse_args()
    if options.client is not None:
        who, where, folder_name = options.client
        (by_us if who == "ours" else by_openais_client)(where, Path(folder_name))
    else:
        asyncio.run(main(options.requests, options.characters))
