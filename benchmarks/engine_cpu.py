"""The engine on a CPU beside transformers: the same model, prompts, dtype and machine, in one run.

Each side runs in a process of its own that sleeps while the other is measured, and the sides take turns, so that a
busy moment of the machine hits both. Prints a table, and one JSON line at the end.

    python benchmarks/engine_cpu.py                 # the figures of docs/results/engine_cpu.md
    python benchmarks/engine_cpu.py --rounds 1 --new-tokens 32
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODEL = Path(__file__).parents[1] / "src" / "autobot_llm" / "assets" / "tiny"
PROMPTS = Path(__file__).parent / "data" / "dev_prompts.jsonl"
PROMPT_TOKENS = 105
PREFIX_TOKENS = 1_500
NUM_CONCURRENT = 16


def prompts(count: int) -> list[list[int]]:
    """`count` different prompts of PROMPT_TOKENS tokens, from real text."""
    return [ids[:PROMPT_TOKENS] for ids in _long_prompts(PROMPT_TOKENS)][:count]


def _long_prompts(num_tokens: int) -> list[list[int]]:
    records = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    texts = [r["prompt"] if "prompt" in r else "\n".join(m["content"] for m in r["messages"]) for r in records]
    encode = tokenizer().encode
    encoded = (encode(text).ids for text in texts)
    return [ids for ids in encoded if len(ids) >= num_tokens]


def tokenizer() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(MODEL / "tokenizer.json"))


# --- the two sides, each in its own process: a JSON request a line in, a JSON answer a line out -----------------------


class TransformersSide:
    def __init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        self.model.generation_config.eos_token_id = None  # every answer has the length that is asked for
        self.tokenizer = tokenizer()

    def generate(self, batch: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """All prompts in one static batch (they have one length). Seconds, and the texts."""
        ids = self.torch.tensor(batch)
        start = time.perf_counter()
        with self.torch.inference_mode():
            out = self.model.generate(
                ids,
                attention_mask=self.torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        seconds = time.perf_counter() - start
        answers = out[:, ids.shape[1] :]
        assert answers.shape[1] == new_tokens
        return {"seconds": seconds, "texts": self.tokenizer.decode_batch(answers.tolist())}


class EngineSide:
    def __init__(self, compiled: bool) -> None:
        from autobot_llm.providers.native import NativeProvider
        from autobot_llm.settings import load_settings

        overrides = {"device": "cpu", "compiled_step": "on" if compiled else "off"}
        settings = load_settings(environ={}, env_file=None, overrides=overrides)
        self.loop = asyncio.new_event_loop()
        self.provider = NativeProvider(settings)
        start = time.perf_counter()
        self.loop.run_until_complete(self.provider.start())
        self.start_seconds = time.perf_counter() - start

    def describe(self) -> dict[str, Any]:
        return {**self.provider.status().details, "start_seconds": self.start_seconds}

    def generate(self, batch: list[list[int]], new_tokens: int) -> dict[str, Any]:
        """All prompts at once, through the provider and its thread. No prompt meets its own earlier cache."""
        salt = os.urandom(8).hex()
        return self.loop.run_until_complete(self._generate(batch, new_tokens, [salt] * len(batch)))

    def prefix(self, shared: list[int], suffixes: list[list[int]]) -> dict[str, Any]:
        """Seconds to the first token with a cold cache and with the shared prefix in it, one pair per suffix."""
        cold, warm = [], []
        for suffix in suffixes:
            salt = os.urandom(8).hex()
            first = self.loop.run_until_complete(self._generate([shared + suffix], 1, [salt]))
            cold.append(first["seconds"])
            again = self.loop.run_until_complete(self._generate([shared + suffix[::-1]], 1, [salt]))
            warm.append(again["seconds"])
        return {"cold": cold, "warm": warm}

    async def _generate(self, batch: list[list[int]], new_tokens: int, tenants: list[str]) -> dict[str, Any]:
        from autobot_llm.types import Finish, LLMRequest, TextDelta

        async def one(ids: list[int], tenant: str) -> str:
            request = LLMRequest(prompt=ids, max_tokens=new_tokens, ignore_eos=True, temperature=0, tenant=tenant)
            text = ""
            async for event in self.provider.stream(request):
                if isinstance(event, TextDelta):
                    text += event.text
                elif isinstance(event, Finish):
                    assert event.usage.completion_tokens == new_tokens
            return text

        start = time.perf_counter()
        texts = await asyncio.gather(*(one(*pair) for pair in zip(batch, tenants, strict=True)))
        return {"seconds": time.perf_counter() - start, "texts": texts}


def bandwidth(megabytes: int) -> float:
    """Bytes read per second (GB/s) by all cores over one buffer of this size, the best of many passes."""
    import torch

    buffer = torch.ones(megabytes * 2**20 // 4)
    buffer.sum()
    best = min(_timed(buffer.sum) for _ in range(max(10, 4_000 // megabytes)))
    return buffer.nbytes / best / 1e9


def _timed(function: Any) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def worker(side: str) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not look like a reply
    served: Any = TransformersSide() if side == "transformers" else EngineSide(compiled=side == "compiled")
    calls = {"bandwidth": bandwidth}
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        function = calls.get(name) or getattr(served, name)
        print(json.dumps(function(*arguments)), file=replies, flush=True)


class Side:
    """A worker process, and the calls it answers."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, __file__, "--worker", name]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def call(self, name: str, *arguments: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, arguments]) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"a worker died (exit status {self.process.wait()}); its error is above")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# --- the comparison ---------------------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    names = arguments.sides.split(",")
    sides = {}
    for name in names:
        try:
            sides[name] = Side(name)
        except SystemExit:
            if name != "compiled":
                raise
            print("no compiled step here: comparing torch eager only", file=sys.stderr)
    batch = prompts(NUM_CONCURRENT)
    new_tokens = arguments.new_tokens
    for side in sides.values():
        side.call("generate", batch[:1], 4)  # warm up
    rates: dict[str, dict[str, list[float]]] = {
        name: {"decode": [], "whole": [], "first": [], "at_once": []} for name in sides
    }
    reference: list[str] | None = None
    differing: dict[str, int] = {}
    for round_number in range(arguments.rounds):
        for name, side in sides.items():
            first, whole, texts = 0.0, 0.0, []
            for prompt in batch[: arguments.prompts]:
                first += side.call("generate", [prompt], 1)["seconds"]
                one = side.call("generate", [prompt], new_tokens)
                whole += one["seconds"]
                texts += one["texts"]
            num = arguments.prompts
            rates[name]["first"].append(first / num)
            rates[name]["decode"].append(num * (new_tokens - 1) / (whole - first))
            rates[name]["whole"].append(num * new_tokens / whole)
            if name == "transformers":
                reference = texts
                at_once = {"seconds": sum(side.call("generate", [p], new_tokens)["seconds"] for p in batch)}
                static = side.call("generate", batch, new_tokens)
                rates[name].setdefault("static", []).append(NUM_CONCURRENT * new_tokens / static["seconds"])
            else:
                at_once = side.call("generate", batch, new_tokens)
            rates[name]["at_once"].append(NUM_CONCURRENT * new_tokens / at_once["seconds"])
            if round_number == 0 and name != "transformers":
                assert reference is not None
                differing[name] = sum(a != b for a, b in zip(reference, texts, strict=True))
    shared = _long_prompts(700)[0]
    shared = (shared * 4)[:PREFIX_TOKENS]
    best = "compiled" if "compiled" in sides else "eager"
    prefix = sides[best].call("prefix", shared, [p[:40] for p in batch[:6]])
    result = {
        "benchmark": "engine_cpu",
        "machine": {"cores": os.cpu_count(), "processor": _processor()},
        "engine": {name: side.call("describe") for name, side in sides.items() if name != "transformers"},
        "bandwidth_gb_s": {f"{mb}MiB": sides["transformers"].call("bandwidth", mb) for mb in (30, 512)},
        "outputs_differing_from_transformers": differing,
        "rates": {n: {k: statistics.median(v) for k, v in r.items() if v} for n, r in rates.items()},
        "prefix_first_token_s": {k: statistics.median(v) for k, v in prefix.items()},
    }
    for side in sides.values():
        side.close()
    return result


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def report(result: dict[str, Any]) -> None:
    rates = result["rates"]
    base = rates["transformers"]
    print(f"{'':14}{'decode tok/s':>14}{'ratio':>8}{'first token ms':>16}{'16 at once tok/s':>18}{'ratio':>8}")
    for name, rate in rates.items():
        print(
            f"{name:14}{rate['decode']:14.0f}{rate['decode'] / base['decode']:8.2f}{rate['first'] * 1e3:16.1f}"
            f"{rate['at_once']:18.0f}{rate['at_once'] / base['at_once']:8.2f}"
        )
    print(f"(transformers: 16 one after the other; as one static batch {base['static']:.0f} tok/s)")
    prefix = result["prefix_first_token_s"]
    saved = 1 - prefix["warm"] / prefix["cold"]
    print(
        f"{PREFIX_TOKENS}-token shared prefix: first token {prefix['cold'] * 1e3:.1f} ms cold, "
        f"{prefix['warm'] * 1e3:.1f} ms warm: {saved:.1%} less"
    )
    weights = (MODEL / "model.safetensors").stat().st_size
    for size, gb_s in result["bandwidth_gb_s"].items():
        print(f"limit of batch 1 at the {gb_s:.1f} GB/s read over {size}: {gb_s * 1e9 / weights:.0f} tok/s")
    print(f"greedy outputs that differ from transformers: {result['outputs_differing_from_transformers']}")
    print(json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns each side takes (default 3)")
    parser.add_argument("--prompts", type=int, default=6, help="prompts per turn at batch 1 (default 6)")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens per answer (default 128)")
    parser.add_argument(
        "--sides", default="transformers,compiled,eager", help="which to compare; transformers comes first"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker)
    else:
        report(measure(arguments))


if __name__ == "__main__":
    main()
