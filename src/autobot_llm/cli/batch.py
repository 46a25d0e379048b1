"""`autobot-llm batch`: jobs of many requests at half the price. Knows how to show them; the work is `BatchJobs`'."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click
import msgspec

from autobot_llm.cli.group import Group
from autobot_llm.cli.progress import Progress
from autobot_llm.errors import LLMError
from autobot_llm.settings import load_settings

if TYPE_CHECKING:
    from autobot_llm.cloud.batch_jobs import BatchJobs, Job
    from autobot_llm.cloud.batch_jobs import Progress as Step

_UNLIMITED = 10_000  # columns

ResultT = TypeVar("ResultT")

_as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
_wait = click.option("--wait", is_flag=True, help="Wait until the job has ended; Ctrl-C leaves it running.")


@click.group(
    cls=Group,
    short_help="Send many requests as one job, at half the price.",
    epilog="""\b
Examples:
  autobot-llm batch submit requests.jsonl --provider openai --model gpt-5.4-mini
  autobot-llm batch submit requests.jsonl --model anthropic/claude-haiku-5-5 --wait
  autobot-llm batch submit --resume job-3f9a        go on after a crash
  autobot-llm batch status job-3f9a --wait
  autobot-llm batch fetch job-3f9a --out answers.jsonl
  autobot-llm batch cancel job-3f9a
  autobot-llm batch list""",
)
def batch() -> None:
    """Send many requests as one job, which the provider answers within a day and at half the price.

    OpenAI, Anthropic and compatible clouds have such jobs. What is known of a job is on the disk, so that it survives
    any crash, and nothing is sent twice. A job may be named by the beginning of its id.
    """


@batch.command(
    short_help="Check a file of requests and send it.",
    epilog="""\b
Each line of FILE is one JSON object, of one of these forms:
  {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "...", "messages": [...]}}
  {"custom_id": "a", "messages": [{"role": "user", "content": "..."}], "max_tokens": 100}
  {"messages": [...]}                               its custom_id is then line-N""",
)
@click.argument("file", required=False, type=click.Path(path_type=Path, dir_okay=False, exists=True))
@click.option("--provider", help="openai, anthropic or a cloud's name; the model's prefix says it, too.")
@click.option("--model", help="The model of requests that name none.")
@click.option("--resume", metavar="JOB", help="Send what of JOB was not sent yet, instead of a file.")
@click.option("--again", is_flag=True, help="Send requests that are a job already, and pay them again.")
@_wait
@_as_json
def submit(
    file: Path | None,
    provider: str | None,
    model: str | None,
    resume: str | None,
    again: bool,
    wait: bool,
    as_json: bool,
) -> None:
    """Check every line of FILE, then send it as one job. Nothing is sent where a line is wrong.

    The same FILE is not sent again while its job is under way: that job is shown, and gone on with where a crash has
    interrupted it. The exit code is 1 where the provider refused requests.
    """
    if (file is None) == (resume is None):
        raise click.UsageError("expected a FILE, or --resume JOB")

    async def work(jobs: BatchJobs, progress: Progress) -> Job:
        on_progress = _shown_on(progress)
        try:
            if file is not None:
                job = await jobs.submit(file, provider=provider, model=model, again=again, on_progress=on_progress)
            else:
                job = await jobs.resume(resume or "", on_progress=on_progress)
        except (LLMError, asyncio.CancelledError):
            progress.stop()
            _tell_what_is_kept(jobs.jobs(), file, resume)
            raise
        return await _waited(jobs, job.id, progress) if wait else job

    done = _with_jobs(work, "Sending the requests")
    _print_job(done, as_json=as_json)
    if any(part.state == "refused" for part in done.parts):
        raise click.exceptions.Exit(1)


@batch.command(short_help="Ask how far a job is.")
@click.argument("job")
@_wait
@_as_json
def status(job: str, wait: bool, as_json: bool) -> None:
    """Ask the provider how far JOB is. Of a job that was interrupted while it was sent, what has arrived is found."""

    async def work(jobs: BatchJobs, progress: Progress) -> Job:
        return await _waited(jobs, job, progress) if wait else await jobs.status(job)

    _print_job(_with_jobs(work, "Asking the provider"), as_json=as_json)


@batch.command(short_help="Get a job's answers, in the order of its requests.")
@click.argument("job")
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), help="The file to write; else they are printed."
)
@_wait
@click.option("--json", "as_json", is_flag=True, help="Print the job as a JSON document; needs --out.")
def fetch(job: str, out: Path | None, wait: bool, as_json: bool) -> None:
    """Get one line for each request of JOB, in the order of the input, of the form of OpenAI's output files.

    `error` is set in the line of each request that has no answer. The exit code is 1 where there are such lines. It may
    be repeated; what was downloaded is kept.
    """
    if as_json and out is None:
        raise click.UsageError("--json needs --out: the answers are printed otherwise")

    async def work(jobs: BatchJobs, progress: Progress) -> Job:
        if wait:
            await _waited(jobs, job, progress)
            progress.say("Fetching the answers")
        if out is not None:
            return await jobs.fetch(job, out)
        async with aclosing(jobs.results(job)) as results:
            async for result in results:
                progress.stop()
                sys.stdout.buffer.write(result.line() + b"\n")
        return jobs.find(job)

    done = _with_jobs(work, "Fetching the answers")
    if out is not None:
        _print_job(done, as_json=as_json)
    if done.num_failed:
        click.echo(f"{done.num_failed:,} of {done.num_items:,} requests have no answer: see their errors", err=True)
        raise click.exceptions.Exit(1)


@batch.command(short_help="Stop a job.")
@click.argument("job")
@_as_json
def cancel(job: str, as_json: bool) -> None:
    """Have the provider stop JOB, and send no more of it. What is answered by then is paid, and can be fetched."""
    _print_job(_with_jobs(lambda jobs, _: jobs.cancel(job), "Asking the provider"), as_json=as_json)


@batch.command("list", short_help="List the jobs.")
@_as_json
def list_jobs(as_json: bool) -> None:
    """List every job as it was last seen, the latest first; the providers are not asked."""

    async def work(jobs: BatchJobs, progress: Progress) -> Sequence[Job]:
        return jobs.jobs()

    jobs = _with_jobs(work, "Reading")
    if as_json:
        _print_json([job.summary() for job in jobs])
    elif not jobs:
        click.echo("there are no batch jobs")
    else:
        _print_table(jobs)


def _with_jobs(work: Callable[[BatchJobs, Progress], Awaitable[ResultT]], message: str) -> ResultT:
    from autobot_llm.cloud.batch_jobs import BatchJobs

    async def worked(progress: Progress) -> ResultT:
        async with BatchJobs(load_settings()) as jobs:
            return await work(jobs, progress)

    with Progress(message) as progress:
        return asyncio.run(worked(progress))


async def _waited(jobs: BatchJobs, job: str, progress: Progress) -> Job:
    name = jobs.find(job).id
    progress.say(f"Waiting for {name}")
    try:
        return await jobs.wait(name, on_progress=_shown_on(progress))
    except asyncio.CancelledError:
        progress.stop()
        click.echo(f"\n{name} goes on without you: autobot-llm batch status {name} --wait", err=True)
        raise


def _tell_what_is_kept(jobs: Sequence[Job], file: Path | None, resume: str | None) -> None:
    """After an error within a submission: the job that it leaves, if it came that far."""
    for job in jobs[:1] if resume is None else ():
        if job.state == "unfinished" and job.source == str(file):
            click.echo(f"{job.id} is kept; to go on: autobot-llm batch submit --resume {job.id}", err=True)


def _shown_on(progress: Progress) -> Callable[[Step], None]:
    return lambda step: progress.advance(step.phase, step.num_done, step.num_total)


def _print_job(job: Job, *, as_json: bool) -> None:
    if as_json:
        _print_json(job.summary())
        return
    click.echo("\n".join(told(job)))


def told(job: Job) -> list[str]:
    """The job in words: how far it is, what it cost, and what to do next."""
    lines = [
        f"{job.id}: {job.state}, {job.num_done:,} of {job.num_items:,} requests done, {job.num_failed:,} failed "
        f"({job.provider}, {len(job.parts)} {'batch' if len(job.parts) == 1 else 'batches'})"
    ]
    lines += [f"  batch {part.number + 1}: {_part_told(part.state, part.batch_id, part.status, part.failure)}"
              for part in job.parts]  # fmt: skip
    if job.state == "fetched":
        lines.append(f"  {job.spent:.4f} dollars spent, {job.saved:.4f} saved")
        if len(job.costs) > 1:
            lines += [f"    {model}: {spent:.4f}, {saved:.4f}" for model, (spent, saved) in job.costs.items()]
    elif job.reserved:
        lines.append(f"  at most {job.reserved:.4f} dollars, as far as lengths and max_tokens tell")
    if job.unpriced:
        lines.append(f"  the price is not known of {', '.join(job.unpriced)}: AUTOBOT_CLOUD_PRICES can tell it")
    if (num_unpriced := sum(part.num_unpriced for part in job.parts)) > 0:
        lines.append(f"  {num_unpriced:,} answers of models without a price are not in that sum")
    if (next_step := _next_step(job)) is not None:
        lines.append(f"next: autobot-llm batch {next_step}")
    return lines


def _part_told(state: str, batch_id: str | None, status: str, failure: str) -> str:
    words = {
        "unsent": "not sent",
        "unconfirmed": "sent, but it is not known whether it has arrived",
        "running": f"{batch_id} {status or 'created'}",
        "ended": f"{batch_id} {status}",
        "refused": "refused",
        "withdrawn": "cancelled before it was sent",
    }[state]
    return f"{words}: {failure}" if failure else words


def _next_step(job: Job) -> str | None:
    if job.state == "unfinished":
        return f"status {job.id}" if job.is_cancelled else f"submit --resume {job.id}"
    if job.state == "running":
        return f"status {job.id} --wait"
    return f"fetch {job.id} --out answers.jsonl" if job.state == "ended" else None


def _print_table(jobs: Sequence[Job]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # In a pipe a row stays one line, for grep.
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _UNLIMITED
    table = Table("job", "created", "provider", "state", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("requests", "done", "failed", "spent $", "saved $"):
        table.add_column(heading, justify="right")
    table.add_column("file")
    for job in jobs:
        created = datetime.fromtimestamp(job.created).strftime("%Y-%m-%d %H:%M")
        state = f"{job.state}, cancelled" if job.is_cancelled else job.state
        table.add_row(
            job.id, created, Text(job.provider), state, f"{job.num_items:,}", f"{job.num_done:,}",
            f"{job.num_failed:,}", f"{job.spent:.4f}", f"{job.saved:.4f}", Text(job.source),
        )  # fmt: skip
    Console(width=width).print(table)


def _print_json(document: object) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(document), indent=2))
