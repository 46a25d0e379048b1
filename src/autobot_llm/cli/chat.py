"""`autobot-llm chat`: one question, or a conversation. Knows options and pipes; knows nothing of engines."""

from __future__ import annotations

import asyncio
import sys

import click
import msgspec

from autobot_llm.cli.answer import print_answer, print_json
from autobot_llm.cli.options import given
from autobot_llm.cli.progress import Progress
from autobot_llm.cli.session import Session
from autobot_llm.interface import LLMInterface
from autobot_llm.settings import load_settings
from autobot_llm.types import ChatMessage, LLMRequest


@click.command(
    short_help="Ask once, or hold a conversation.",
    epilog="""\b
Examples:
  autobot-llm chat "Tell me a story about a fox"
  autobot-llm chat --temperature 0 --max-tokens 40 --stats "What is a fox?"
  echo "What is a fox?" | autobot-llm chat --json
  autobot-llm chat --system "Answer in one sentence."    an interactive session; /help says what it knows""",
)
@click.argument("prompt", required=False)
@click.option("-m", "--model", help="A model's name or folder, instead of AUTOBOT_DEFAULT_LLM_MODEL.")
@click.option("--provider", help="Who answers, instead of AUTOBOT_LLM_PROVIDER.")
@click.option("-s", "--system", help="The system message.")
@click.option("-t", "--temperature", type=float, help="0 is greedy; the model's own default otherwise.")
@click.option("-n", "--max-tokens", type=int, help="The longest answer, in tokens.")
@click.option("--seed", type=int, help="The same seed gives the same answer.")
@click.option("--json", "as_json", is_flag=True, help="Print the complete answer as one line of JSON.")
@click.option("--stats", is_flag=True, help="Print tokens, time to first token and speed on stderr.")
def chat(
    prompt: str | None,
    model: str | None,
    provider: str | None,
    system: str | None,
    temperature: float | None,
    max_tokens: int | None,
    seed: int | None,
    as_json: bool,
    stats: bool,
) -> None:
    """Ask PROMPT and stream the answer; without one, read it from a pipe or hold a conversation.

    In a conversation Ctrl-C stops the answer, Ctrl-D ends the program.
    """
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
    if prompt is not None and not prompt.strip():
        raise click.UsageError("the prompt is empty")
    if prompt is None and as_json:
        raise click.UsageError("--json needs a prompt: it prints one answer")

    settings = load_settings(overrides=given(provider=provider, default_model=model))
    options = LLMRequest(temperature=temperature, max_tokens=max_tokens, seed=seed)
    progress = Progress(f"Loading {settings.default_model}")
    with asyncio.Runner() as runner:
        llm = LLMInterface(settings, on_progress=progress.advance)
        try:
            with progress:
                runner.run(llm.initialize())
            if prompt is None:
                Session(llm, options, runner, system=system, stats=stats).run()
                return
            conversation = [ChatMessage("system", system)] if system else []
            conversation.append(ChatMessage("user", prompt))
            request = msgspec.structs.replace(options, messages=conversation)
            runner.run(print_json(llm, request) if as_json else print_answer(llm, request, stats=stats))
        finally:
            runner.run(llm.aclose())
