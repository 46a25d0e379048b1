"""A `vllm` for the tests of launching: a program that serves a little of vLLM's API, and can be told to misbehave.

The folder in FAKE_VLLM holds its orders, as files, and what it did:
  version       what `vllm --version` prints (0.33.0 without it)
  crash         each start prints a sentence and ends with status 3, until the file is gone
  gate          it listens only once the file is gone
  deaf          it ignores SIGTERM
  starts        one JSON line for each start: its process, arguments, the worker it started and its environment
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PLAN = Path(os.environ.get("FAKE_VLLM", "."))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        answers = {
            "/health": "",
            "/version": json.dumps({"version": version()}),
            "/v1/models": json.dumps({"object": "list", "data": [{"id": sys.argv[2], "object": "model"}]}),
            "/metrics": "vllm:num_requests_running 0.0\n",
        }
        body = answers.get(self.path, "").encode()
        self.send_response(200 if self.path in answers else 404)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        print(format % args, flush=True)


def version() -> str:
    path = PLAN / "version"
    return path.read_text() if path.exists() else "0.33.0"


def main() -> None:
    if sys.argv[1:] == ["--version"]:
        print(version())
        return
    if (PLAN / "deaf").exists():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    with (PLAN / "starts").open("a") as file:
        start = {"pid": os.getpid(), "worker": worker.pid, "argv": sys.argv[1:], "environ": dict(os.environ)}
        file.write(json.dumps(start) + "\n")
    print(f"INFO loading {sys.argv[2]}", flush=True)
    if (PLAN / "crash").exists():
        print("ValueError: no such model", flush=True)
        sys.exit(3)
    while (PLAN / "gate").exists():
        time.sleep(0.01)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
