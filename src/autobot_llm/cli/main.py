"""The `autobot-llm` command: its subcommands, and what an error looks like. Knows exit codes; knows nothing of models.

Exit codes: 0 done, 1 the work failed, 2 a setting or an argument is wrong, 130 stopped by Ctrl-C. The server and
the drawing library are imported by the commands that need them, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import click

from autobot_llm import __version__
from autobot_llm.cli.batch import batch
from autobot_llm.cli.cache import cache
from autobot_llm.cli.chat import chat
from autobot_llm.cli.compress import compress
from autobot_llm.cli.config import config
from autobot_llm.cli.cost import cost
from autobot_llm.cli.knobs import knobs
from autobot_llm.cli.models import models
from autobot_llm.cli.plan import plan
from autobot_llm.cli.pull import pull
from autobot_llm.cli.quantize import quantize
from autobot_llm.cli.routes import routes
from autobot_llm.cli.serve import serve
from autobot_llm.cli.train import train
from autobot_llm.errors import ConfigurationError, LLMError

FAILED = 1
WRONG_USE = 2
INTERRUPTED = 130


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="""\b
Examples:
  autobot-llm serve                            start the OpenAI-compatible server
  autobot-llm chat "Tell me a story"           ask once, and stream the answer
  autobot-llm chat                             an interactive session
  autobot-llm config                           every setting, its value and its source
  autobot-llm knobs --engine vllm              what each setting becomes in an engine
  autobot-llm cache stats                      how many answers are kept, and where
  autobot-llm routes                           which optimization runs at which provider
  autobot-llm compress prompt.txt              a prompt in fewer tokens, before and after
  autobot-llm cost                             what was spent, by day and model
  autobot-llm train medusa --help              heads that make a model's answers faster
  autobot-llm batch submit requests.jsonl      many requests as one job, at half the price
  autobot-llm plan DIR --gpu-memory 8GiB       what of a model fits, before it is downloaded
  autobot-llm quantize DIR --type fp8          a model in fewer bits, and what that costs

Settings come from options, then AUTOBOT_* variables, then .env in the working directory.""",
)
@click.version_option(__version__, message="autobot-llm %(version)s")
def cli() -> None:
    """Run language models behind one fast, honest interface: local engine, OpenAI-compatible server, terminal chat."""


COMMANDS = (serve, chat, config, models, pull, knobs, routes, cache, compress, cost, batch, plan, quantize, train)
for command in COMMANDS:
    cli.add_command(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code. `arguments` default to the process's own."""
    try:
        result = cli.main(args=arguments, prog_name="autobot-llm", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):  # click makes Abort of Ctrl-C
        return INTERRUPTED
    except LLMError as error:
        for line in error.message.splitlines():
            click.echo(f"error: {line}", err=True)
        return WRONG_USE if isinstance(error, ConfigurationError) else FAILED
    return result if isinstance(result, int) else 0
