"""`autobot-llm train`: make what speculation needs for one's own model. Knows options, progress and Ctrl-C; knows
nothing of how anything is learned.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from autobot_llm.cli.group import Group
from autobot_llm.cli.progress import Progress
from autobot_llm.errors import ConfigurationError

if TYPE_CHECKING:
    from autobot_llm.training.accuracy import Accuracies
    from autobot_llm.training.loop import Status
    from autobot_llm.training.run import DataOptions, Listeners, OnMethod

INTERRUPTED = 130
MODULES = ("torch", "safetensors", "tokenizers", "jinja2")

CommandT = TypeVar("CommandT", bound=Callable[..., Any])
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_NEW = click.Path(path_type=Path)


class _Numbers(click.ParamType):  # type: ignore[type-arg]
    """Numbers with commas between them."""

    name = "numbers"

    def __init__(self, kind: type[int] | type[float], count: int | None = None) -> None:
        self._kind, self._count = kind, count

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(self._kind(part) for part in str(value).split(","))
        except ValueError:
            numbers = ()
        if not numbers or (self._count is not None and len(numbers) != self._count):
            wanted = "numbers" if self._count is None else f"{self._count} numbers"
            self.fail(f"{value!r}: expected {wanted} with commas between them", param, ctx)
        return numbers


@click.group(
    cls=Group,
    short_help="Make Medusa heads, an EAGLE-3 draft or a draft model for a model.",
    epilog="""\b
Examples:
  autobot-llm train medusa --model ~/models/Qwen3-0.6B --data texts.txt --out heads
  autobot-llm train medusa --stage 2 --init heads --model ~/models/Qwen3-0.6B --data texts.txt --out Qwen3-medusa-2
  autobot-llm train eagle3 --model ~/models/Qwen3-0.6B --data chats.jsonl --out eagle --time-limit 3600
  autobot-llm train data --model ~/models/Qwen3-0.6B --data chats.jsonl --out answers.safetensors
  autobot-llm train draft --model ~/models/Qwen3-0.6B --data answers.safetensors --out draft
  autobot-llm train tree heads""",
)
def train() -> None:
    """Make what speculation needs for a model, from what the model itself says to prompts."""


def _answer_options(command: CommandT) -> CommandT:
    """Options of how answers are made."""
    for option in (
        click.option("--num-prompts", type=click.IntRange(1), help="Prompts; 256, or 16384 on a GPU."),
        click.option("--sequence-length", type=click.IntRange(1), help="Most tokens of a prompt and its answer."),
        click.option(
            "--temperatures",
            type=_Numbers(float),
            default="0,0.7",
            show_default=True,
            help="Temperatures of the answers, in turn; 0 is greedy.",
        ),
        click.option(
            "--answer-tokens", type=click.IntRange(1), default=256, show_default=True, help="Most of an answer."
        ),
        click.option("--answer-batch-size", type=click.IntRange(1), help="Prompts that are answered together."),
    ):
        command = option(command)
    return command


def _common(command: CommandT) -> CommandT:
    for option in (
        click.option("-m", "--model", type=_FOLDER, required=True, help="The model's folder."),
        click.option(
            "--data",
            type=_FILE,
            required=True,
            multiple=True,
            help="Text (plain, .xz, .gz), prompts (.jsonl), or answers that `train data` wrote. May be repeated.",
        ),
        click.option("--out", type=_NEW, required=True, help="Where the result goes."),
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
            help="Where to compute.",
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Of answers, weights and order."),
        click.option("--time-limit", type=float, help="Seconds, after which it ends well."),
        click.option("--json", "as_json", is_flag=True, help="Print the summary as one line of JSON."),
    ):
        command = option(command)
    return command


def _learning(command: CommandT) -> CommandT:
    for option in (
        click.option("--eval-data", type=_FILE, help="Prompts or answers to measure with, instead of held-out ones."),
        click.option("--steps", type=click.IntRange(1), default=2000, show_default=True, help="Steps of learning."),
        click.option(
            "--batch-size", type=click.IntRange(1), default=8192, show_default=True, help="Tokens of one step."
        ),
        click.option("--learning-rate", type=float, default=1e-3, show_default=True, help="At its highest."),
        click.option(
            "--evaluate-every", type=click.IntRange(1), default=200, show_default=True, help="Steps between measurings."
        ),
        click.option("--resume", is_flag=True, help="Go on with the interrupted training in --out."),
    ):
        command = option(command)
    return _common(_answer_options(command))


@train.command(short_help="Let the model answer prompts: what all trainings learn from.")
@_answer_options
@_common
def data(model: Path, out: Path, device: Any, as_json: bool, **options: Any) -> None:
    """Let the model answer prompts, and keep the answers for one or several trainings."""
    _need_engine()
    from autobot_llm.training.run import load_target, make_answers

    if out.suffix != ".safetensors":
        raise click.UsageError(f"--out {out}: expected a name that ends with .safetensors")
    how = _data_options(options, options["time_limit"])
    with Progress("Answering prompts") as progress, _stopping() as listeners_of:
        answers = make_answers(load_target(model, device), model, options["data"], how, listeners_of(progress))
    answers.save(out, data=[str(path) for path in options["data"]], options=str(how))
    summary = {"out": str(out), "num_answers": answers.num_sequences, "num_answer_tokens": answers.num_answer_tokens}
    if as_json:
        click.echo(msgspec.json.encode(summary))
    else:
        click.echo(f"{answers.num_sequences} answers, {answers.num_answer_tokens} tokens, in {out}")


@train.command(short_help="Medusa heads, on a frozen model.")
@click.option("--num-heads", type=click.IntRange(1), help="Tokens guessed ahead; 5.")
@click.option("--num-layers", type=click.IntRange(1), help="Residual blocks a head; 1, or 2 with a shared projection.")
@click.option(
    "--share-lm-head/--own-lm-head",
    "shares_lm_head",
    default=None,
    help="Use the model's projection, or give each head its own; shared where the model ties its embeddings.",
)
@click.option(
    "--stage",
    type=click.Choice(["1", "2"]),
    default="1",
    show_default=True,
    help="1: heads on the model as it is. 2: both together, from stage 1's heads. Lossy: it makes another model.",
)
@click.option("--init", type=_FOLDER, help="Stage 2: the heads of stage 1.")
@click.option("--model-rate", type=float, help="Stage 2: the model's share of the learning rate; 0.1.")
@_learning
def medusa(
    num_heads: int | None,
    num_layers: int | None,
    shares_lm_head: bool | None,
    stage: str,
    init: Path | None,
    model_rate: float | None,
    **options: Any,
) -> None:
    """Train Medusa heads: on a frozen model (Medusa-1), or together with it (Medusa-2).

    Stage 2 writes a model folder of its own with the heads in it, medusa/. It is another model, kept close to the first
    one by learning from its distributions; metrics.json says how often the two agree.
    """
    if (stage == "2") != (init is not None):
        raise click.UsageError("--stage 2 and --init HEADS go together: stage 2 goes on from the heads of stage 1")
    if stage == "2" and any(option is not None for option in (num_heads, num_layers, shares_lm_head)):
        raise click.UsageError("--num-heads, --num-layers and the projection are those of --init in stage 2")
    if stage == "1" and model_rate is not None:
        raise click.UsageError("--model-rate: stage 1 leaves the model as it is")
    _need_engine()
    from autobot_llm.training.joint import MODEL_RATE, JointOptions
    from autobot_llm.training.medusa import NUM_HEADS, MedusaOptions

    if init is not None:
        _run(
            JointOptions(init, MODEL_RATE if model_rate is None else model_rate),
            "Training a model and its Medusa heads",
            options,
        )
        return
    _run(MedusaOptions(num_heads or NUM_HEADS, num_layers, shares_lm_head), "Training Medusa heads", options)


@train.command(short_help="An EAGLE-3 draft, on a frozen model.")
@click.option(
    "--num-draft-steps", type=click.IntRange(1), default=5, show_default=True, help="Steps of the unrolled draft."
)
@click.option("--draft-vocab-size", type=click.IntRange(1), help="Tokens that the draft knows; half, at most 32000.")
@click.option("--feature-layers", type=_Numbers(int, 3), help="The layers whose input is read; 2, half, all less 3.")
@click.option(
    "--share-lm-head/--own-lm-head",
    "shares_lm_head",
    default=None,
    help="Use the model's projection, or one of its own; shared where the model ties its embeddings.",
)
@click.option("--init", type=_FOLDER, help="Go on from this draft instead; it keeps its layer and feature layers.")
@_learning
def eagle3(
    num_draft_steps: int,
    draft_vocab_size: int | None,
    feature_layers: tuple[int, int, int] | None,
    shares_lm_head: bool | None,
    init: Path | None,
    **options: Any,
) -> None:
    """Train an EAGLE-3 draft on a frozen model, by training-time test."""
    _need_engine()
    from autobot_llm.training.eagle import EagleOptions

    method = EagleOptions(num_draft_steps, draft_vocab_size, feature_layers, shares_lm_head, init)
    _run(method, "Training an EAGLE-3 draft", options)


@train.command(short_help="A draft model: a small Llama with the model's vocabulary.")
@click.option("--num-layers", type=click.IntRange(1), default=2, show_default=True, help="Layers of the draft.")
@click.option("--hidden-size", type=click.IntRange(1), help="Of the draft; half of the model's.")
@click.option("--init", type=_FOLDER, help="Go on from this draft instead; its tokenizer is the model's.")
@_learning
def draft(num_layers: int, hidden_size: int | None, init: Path | None, **options: Any) -> None:
    """Train a draft model by distillation from the model."""
    _need_engine()
    from autobot_llm.training.draft import DraftOptions

    _run(DraftOptions(num_layers, hidden_size, init), "Training a draft model", options)


@train.command(short_help="What trees of several sizes would yield with trained heads.")
@click.argument("folder", type=_FOLDER)
@click.option("--nodes", type=_Numbers(int), default="8,16,32,64", show_default=True, help="Nodes, the root included.")
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON, with the trees.")
def tree(folder: Path, nodes: tuple[int, ...], as_json: bool) -> None:
    """Tokens of a step with the best tree of so many nodes, from the accuracies measured for the heads in FOLDER.

    They are estimates: accuracies at different places are taken for independent.
    """
    _need_engine()
    from autobot_llm.training.trees import read_metrics, tree_yields

    yields = tree_yields(read_metrics(folder), nodes)
    if as_json:
        click.echo(msgspec.json.encode(yields))
        return
    categories = list(yields[0].expected)
    click.echo(f"{'nodes':>5}  {'depth':>5}  " + "  ".join(f"{category:>11}" for category in categories))
    for one in yields:
        figures = "  ".join(f"{one.expected[category]:11.2f}" for category in categories)
        click.echo(f"{one.num_nodes:5}  {one.max_depth:5}  {figures}")


def _run(method: OnMethod, title: str, options: dict[str, Any]) -> None:
    from autobot_llm.training.loop import LoopOptions
    from autobot_llm.training.run import run

    loop = LoopOptions(
        steps=options["steps"],
        batch_size=options["batch_size"],
        learning_rate=options["learning_rate"],
        time_limit=options["time_limit"],
        seed=options["seed"],
        evaluate_every=options["evaluate_every"],
    )
    with Progress(title) as progress, _stopping() as listeners_of:
        document = run(
            options["model"],
            options["out"],
            options["data"],
            method,
            loop,
            data_options=_data_options(options, None),
            eval_data=options["eval_data"],
            device=options["device"],
            resume=options["resume"],
            listeners=listeners_of(progress),
        )
    _report(document, options["out"], options["as_json"])


def _data_options(options: dict[str, Any], time_limit: float | None) -> DataOptions:
    from autobot_llm.training.run import DataOptions

    return DataOptions(
        num_prompts=options["num_prompts"],
        num_positions=options["sequence_length"],
        max_tokens=options["answer_tokens"],
        temperatures=options["temperatures"],
        batch_size=options["answer_batch_size"],
        seed=options["seed"],
        time_limit=time_limit,
    )


@contextmanager
def _stopping() -> Iterator[Callable[[Progress], Listeners]]:
    """Listeners that show progress, and stop at the first Ctrl-C once the step is done; the second one interrupts."""
    from autobot_llm.training.run import Listeners

    stops: list[int] = []

    def stop(number: int, frame: object) -> None:
        stops.append(number)
        signal.signal(signal.SIGINT, before)

    def listeners(progress: Progress) -> Listeners:
        shown: list[Accuracies] = []

        def on_status(status: Status) -> None:
            progress.advance("% of the training", round(100 * min(status.share, 0.99)), 100)
            progress.say(_in_words(status))
            if status.accuracies is not None and status.accuracies not in shown[-1:] and not sys.stderr.isatty():
                shown.append(status.accuracies)
                click.echo(_in_words(status), err=True)

        return Listeners(progress.advance, on_status, lambda: bool(stops))

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield listeners
    finally:
        signal.signal(signal.SIGINT, before)


def _in_words(status: Status) -> str:
    words = f"step {status.step} ({100 * status.share:.0f} %): loss {status.loss:.3f}"
    if status.accuracies is not None:
        words += f", top-1 {_percent(status.accuracies.top(1))}, top-5 {_percent(status.accuracies.top(5))}"
    return words


def _percent(shares: list[float]) -> str:
    return " ".join(f"{100 * share:.0f}" for share in shares) + " %"


def _report(document: dict[str, Any], out: Path, as_json: bool) -> None:
    if as_json:
        click.echo(msgspec.json.encode(document))
    if not document["complete"]:
        click.echo(f"stopped at step {document['steps']}; --resume goes on from {out}", err=True)
        sys.exit(INTERRUPTED)
    if as_json:
        return
    click.echo(f"{document['num_parameters']:,} parameters in {out}, after {document['steps']} steps")
    if "lossy" in document:
        click.echo(f"lossy: {document['lossy']}; {100 * document['agreement']:.1f} % of its choices are the same")
    click.echo(f"{'held-out accuracy':20} top-1 by place in the draft | top-5")
    for category, shares in document["accuracies"].items():
        click.echo(f"{category:20} {_percent(shares['top1'])} | {_percent(shares['top5'])}")


def _need_engine() -> None:
    import importlib.util

    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(f"training needs {', '.join(missing)}: pip install 'autobot_llm[engine]'")
