"""`autobot-llm serve`: start the server and say how to use it. Knows what to print; knows nothing of HTTP."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence

import click

from autobot_llm.cli.launch import launched
from autobot_llm.cli.options import given
from autobot_llm.cli.progress import Progress
from autobot_llm.interface import LLMInterface
from autobot_llm.providers.base import ProviderStatus
from autobot_llm.settings import Settings, ineffective_settings, load_settings

QUESTION = "Tell me a story about a fox."
MOST_YOUNG_OBJECTS = 20_000  # a request makes a few hundred, and nearly all of them go without the collector's help


@click.command(
    short_help="Start the OpenAI-compatible server.",
    epilog="""\b
Examples:
  autobot-llm serve
  autobot-llm serve --model ~/models/Qwen3-0.6B --port 9000
  autobot-llm serve --model ~/models/Mistral-7B --workload interactive --max-model-len 8192
  autobot-llm serve --model ~/models/Mistral-7B --gpu-memory-utilization 0.5 --attention-backend triton
  autobot-llm serve --kv-cache-dtype int8 --kv-sliding-window 4096
  autobot-llm serve --kv-heavy-hitters 0.5
  autobot-llm serve --speculation ngram
  autobot-llm serve --cached-prefixes '["You are a librarian. Answer in one sentence."]'
  autobot-llm serve --provider vllm --launch --model ~/models/Mistral-7B
  autobot-llm serve --provider vllm --launch --model big/model -- --tensor-parallel-size 4
  AUTOBOT_API_KEYS=a-long-secret autobot-llm serve --host 0.0.0.0""",
)
@click.option("-m", "--model", "default_model", help="A model's name or folder, instead of AUTOBOT_DEFAULT_LLM_MODEL.")
@click.option("--provider", help="Who answers, instead of AUTOBOT_LLM_PROVIDER.")
@click.option("--host", help="The address to listen on, instead of AUTOBOT_HOST (127.0.0.1: this machine only).")
@click.option("--port", help="The port to listen on, instead of AUTOBOT_PORT (8100).")
@click.option(
    "--api-key",
    "api_keys",
    help="Demand this key. Others on this machine may see it here; AUTOBOT_API_KEYS hides it.",
)
@click.option("--log-level", help="debug, info, warning or error, instead of AUTOBOT_LOG_LEVEL.")
@click.option("--device", help="auto, cpu or cuda, instead of AUTOBOT_DEVICE.")
@click.option("--workload", help="interactive, batch or mixed, instead of AUTOBOT_WORKLOAD.")
@click.option("--scheduling-policy", help="fcfs or priority, instead of AUTOBOT_SCHEDULING_POLICY.")
@click.option("--max-model-len", help="Most tokens of prompt and answer, instead of AUTOBOT_MAX_MODEL_LEN.")
@click.option("--max-num-seqs", help="Most sequences computed together, instead of AUTOBOT_MAX_NUM_SEQS.")
@click.option(
    "--gpu-memory-utilization",
    help="Share of the GPU's memory to use, instead of AUTOBOT_GPU_MEMORY_UTILIZATION (0.9).",
)
@click.option(
    "--attention-backend",
    help="auto, triton, flashinfer, flash_attention or sdpa, instead of AUTOBOT_ATTENTION_BACKEND.",
)
@click.option(
    "--speculation",
    "speculation_method",
    help="auto, ngram, draft, medusa, eagle3 or none, instead of AUTOBOT_SPECULATION_METHOD.",
)
@click.option("--kv-cache-dtype", help="auto, int8 or fp8 (lossy), instead of AUTOBOT_KV_CACHE_DTYPE.")
@click.option(
    "--kv-sliding-window",
    help="Tokens that attention looks back at most (lossy), instead of AUTOBOT_KV_SLIDING_WINDOW.",
)
@click.option(
    "--kv-heavy-hitters",
    help="Tokens of a sequence, or a share of its context, that stay in the cache (lossy), instead of "
    "AUTOBOT_KV_HEAVY_HITTERS.",
)
@click.option("--cuda-graphs", help="auto, on or off, instead of AUTOBOT_CUDA_GRAPHS.")
@click.option(
    "--cached-prefixes",
    help="System prompts to compute now and to keep: a JSON list, or @FILE; instead of AUTOBOT_CACHED_PREFIXES.",
)
@click.option(
    "--launch",
    is_flag=True,
    help="Start a vLLM for the model too, told what the settings say; it is minded while this runs. Needs "
    "--provider vllm and the command `vllm`.",
)
@click.argument("vllm_arguments", nargs=-1)
def serve(launch: bool, vllm_arguments: tuple[str, ...], **options: str | None) -> None:
    """Start the OpenAI-compatible server; Ctrl-C lets running answers finish, a second one does not.

    Every setting can be given as an AUTOBOT_* variable or in .env; `autobot-llm config` lists them. What follows a
    lone -- is for the vLLM that --launch starts.
    """
    if vllm_arguments and not launch:
        raise click.UsageError(
            f"unexpected {' '.join(vllm_arguments)}: only --launch takes arguments for vLLM, after --"
        )
    settings = load_settings(overrides=given(**options))
    log_format = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(stream=_Stderr(), level=settings.log_level.upper(), format=log_format)
    with asyncio.Runner(loop_factory=_event_loop()) as runner:
        runner.run(_launch_and_serve(settings, vllm_arguments) if launch else _serve(settings))


class _Stderr:
    """Whatever stderr is now: a moving spinner stands in for it, and lets lines pass above itself."""

    def write(self, text: str) -> object:
        return sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()


def _event_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """uvloop's maker of event loops; None, asyncio's own choice, on Windows, for which there is no uvloop."""
    if sys.platform == "win32":
        return None
    import uvloop

    return uvloop.new_event_loop


async def _launch_and_serve(settings: Settings, vllm_arguments: Sequence[str]) -> None:
    async with launched(settings, vllm_arguments) as settings_with_address:
        await _serve(settings_with_address)


async def _serve(settings: Settings) -> None:
    from autobot_llm.server.lifecycle import serve as run_server

    with Progress(f"Loading {settings.default_model}") as progress:
        llm = LLMInterface(settings, on_progress=progress.advance)

        def announce(address: str) -> None:
            progress.stop()
            _spare_the_collector()
            click.echo("\n".join(start_lines(settings, llm.get_all_provider_status(), address)))

        await run_server(settings, llm=llm, on_ready=announce)
    click.echo("stopped")


def _spare_the_collector() -> None:
    """Have Python look for cycles more rarely, and never among what has been loaded.

    That is 10 % of the CPU time of a request, and saves the engine's steps pauses of up to 200 ms (docs/log.md).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(MOST_YOUNG_OBJECTS, 20, 20)


def start_lines(settings: Settings, statuses: Mapping[str, ProviderStatus], address: str) -> Iterable[str]:
    """What a user needs to know at the start: who answers and how, what is without effect, and what to type next."""
    for status in statuses.values():
        yield f"provider    {status.name}: {status.state} {status.message}".rstrip()
        for name, value in status.details.items():
            yield f"  {name.replace('_', ' '):14}{value}"
    if idle := ineffective_settings(settings):
        yield "no effect   " + ", ".join(f"{row.variable} ({row.effect})" for row in idle)
    for warning in settings.warnings:
        yield f"warning     {warning}"
    yield f"API         {address}/v1"
    yield f"try         {curl_line(settings, address)}"
    yield "stop        Ctrl-C"


def curl_line(settings: Settings, address: str) -> str:
    """A command that asks the server at `address`, to be pasted into a shell. It never shows a key."""
    # An address for listening everywhere is none to connect to.
    reachable = address.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    body = json.dumps({"messages": [{"role": "user", "content": QUESTION}]})
    key = ' -H "Authorization: Bearer $AUTOBOT_API_KEY"' if settings.api_keys else ""
    return f"curl {reachable}/v1/chat/completions -H 'Content-Type: application/json'{key} -d '{body}'"
