"""Learn step by step, within a number of steps and a limit of time, and survive an interruption. Knows the optimizer,
files and clocks; knows nothing of what is learned.
"""

from __future__ import annotations

import json
import math
import pickle
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from autobot_llm.engine.models.whole_file import write_whole
from autobot_llm.errors import ConfigurationError
from autobot_llm.training.accuracy import Accuracies
from autobot_llm.training.answers import Answers, Batch

CHECKPOINT_FILE = "checkpoint.pt"
METRICS_FILE = "metrics.json"
WARM_UP = 0.02  # of the whole training
LAST_RATE = 0.05  # of the learning rate
MAX_GRADIENT_NORM = 1.0
STEPS_BETWEEN_REPORTS = 10  # reading a loss waits for the device
NUM_LOOKED_AT = 64  # held-out sequences that accuracy is told of on the way; at the end it is all of them


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that learn at `rate` times the learning rate, which rises through the first `warm_up` of the
    training."""

    parameters: Sequence[torch.nn.Parameter]
    rate: float = 1.0
    warm_up: float = WARM_UP


class Task(Protocol):
    """What is learned."""

    name: str

    def groups(self) -> Sequence[Group]: ...

    def learn(self, batch: Batch) -> torch.Tensor:
        """Add the batch's gradients to those of the parameters; return its loss, detached."""
        ...

    def evaluate(self, answers: Answers, batch_size: int) -> Accuracies: ...

    def state(self) -> dict[str, torch.Tensor]: ...

    def load_state(self, state: dict[str, torch.Tensor]) -> None: ...

    def export(self, folder: Path, accuracies: Accuracies) -> None:
        """Write what was learned, for the engine to load."""
        ...


@dataclass(frozen=True, slots=True)
class LoopOptions:
    """`batch_size` is in positions of a step. `time_limit` is in seconds, None is without end; it counts the time
    before an interruption too."""

    steps: int = 2000
    batch_size: int = 8192
    learning_rate: float = 1e-3
    time_limit: float | None = None
    seed: int = 0
    evaluate_every: int = 200
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "learning_rate", "evaluate_every", "checkpoint_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigurationError(f"{name}={getattr(self, name)}: expected more than 0")
        if self.time_limit is not None and self.time_limit <= 0:
            raise ConfigurationError(f"time_limit={self.time_limit}: expected more than 0 seconds")


@dataclass(frozen=True, slots=True)
class Status:
    """How far a training is: `share` of 1, by steps or by time, whichever is nearer to its end."""

    step: int
    share: float
    loss: float
    accuracies: Accuracies | None


@dataclass(frozen=True, slots=True)
class Outcome:
    step: int
    seconds: float
    loss: float
    accuracies: Accuracies | None
    """None where it was stopped before its end."""

    @property
    def is_complete(self) -> bool:
        return self.accuracies is not None


def train(
    task: Task,
    learned: Answers,
    held_out: Answers,
    options: LoopOptions,
    folder: Path,
    *,
    resume: bool = False,
    on_status: Callable[[Status], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train to the end and export to `folder`, or until `should_stop`, which leaves a checkpoint to go on from. A
    checkpoint of the way is left there too.

    Raises ConfigurationError where `folder` holds a result or a checkpoint already and `resume` is not asked for, or
    where there is nothing to go on from; OSError for a full disk.
    """
    loop = _Loop(task, learned, options, folder)
    loop.begin(resume)
    look = held_out.rows(range(min(NUM_LOOKED_AT, held_out.num_sequences)))
    accuracies: Accuracies | None = None
    loss = math.nan
    last_saved = time.monotonic()
    while loop.share < 1.0:
        if should_stop():
            loop.save()
            return Outcome(loop.step, loop.seconds, loss, None)
        loss_tensor = loop.advance()
        if loop.step % options.evaluate_every == 0:
            accuracies = task.evaluate(look, options.batch_size)
        if loop.step % STEPS_BETWEEN_REPORTS == 0 or loop.step == 1:
            loss = float(loss_tensor)
            if not math.isfinite(loss):
                raise ConfigurationError(
                    f"the loss became {loss} at step {loop.step}: try --learning-rate {options.learning_rate / 3:.2g}"
                )
            if on_status is not None:
                on_status(Status(loop.step, loop.share, loss, accuracies))
        if time.monotonic() - last_saved > options.checkpoint_seconds:
            loop.save()
            last_saved = time.monotonic()
    loss = float(loss_tensor) if loop.step else loss
    accuracies = task.evaluate(held_out, options.batch_size)
    task.export(folder, accuracies)
    return Outcome(loop.step, loop.seconds, loss, accuracies)


class _Loop:
    def __init__(self, task: Task, learned: Answers, options: LoopOptions, folder: Path) -> None:
        self._task, self._learned, self._options, self._folder = task, learned, options, folder
        self._groups = task.groups()
        self._parameters = [parameter for group in self._groups for parameter in group.parameters]
        self._optimizer = torch.optim.AdamW(
            [{"params": list(group.parameters)} for group in self._groups],
            lr=options.learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=self._parameters[0].is_cuda,
        )  # fmt: skip
        self._epoch, self._place = 0, 0
        self._batches = iter(())  # type: Any
        self._seconds_before = 0.0
        self._begun = time.monotonic()
        self.step = 0

    @property
    def seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._begun

    @property
    def share(self) -> float:
        by_time = self.seconds / self._options.time_limit if self._options.time_limit else 0.0
        return min(1.0, max(self.step / self._options.steps, by_time))

    def begin(self, resume: bool) -> None:
        check_folder(self._folder, resume)
        if resume:
            self._load(self._folder / CHECKPOINT_FILE)
        self._folder.mkdir(parents=True, exist_ok=True)
        self._batches = self._epoch_from(self._place)

    def advance(self) -> torch.Tensor:
        share = self.share
        for group, optimized in zip(self._groups, self._optimizer.param_groups, strict=True):
            optimized["lr"] = self._options.learning_rate * group.rate * _rate(share, group.warm_up)
        loss = self._task.learn(self._next_batch())
        torch.nn.utils.clip_grad_norm_(self._parameters, MAX_GRADIENT_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss

    def _next_batch(self) -> Batch:
        batch: Batch | None = next(self._batches, None)
        if batch is None:
            self._epoch, self._place = self._epoch + 1, 0
            self._batches = self._epoch_from(0)
            batch = next(self._batches)
        self._place += 1
        return batch

    def _epoch_from(self, place: int) -> Any:
        batches = self._learned.batches(
            self._options.batch_size, random.Random(f"{self._options.seed} {self._epoch}"), first=place
        )
        return iter(batches)

    def save(self) -> None:
        state = {
            "task": self._task.name,
            "options": json.dumps(asdict(self._options)),
            "step": self.step,
            "seconds": self.seconds,
            "epoch": self._epoch,
            "place": self._place,
            "state": self._task.state(),
            "optimizer": self._optimizer.state_dict(),
        }
        write_whole(self._folder / CHECKPOINT_FILE, lambda partial: torch.save(state, partial))

    def _load(self, path: Path) -> None:
        try:
            saved = torch.load(path, map_location=self._parameters[0].device, weights_only=True)
            if saved["task"] != self._task.name:
                raise ConfigurationError(f"{path}: a training of {saved['task']}, not of {self._task.name}")
            self._task.load_state(saved["state"])
            self._optimizer.load_state_dict(saved["optimizer"])
            self.step, self._epoch, self._place = saved["step"], saved["epoch"], saved["place"]
            self._seconds_before = saved["seconds"]
        except (pickle.UnpicklingError, RuntimeError, KeyError, EOFError, ValueError) as exc:
            raise ConfigurationError(f"{path}: not a checkpoint of this training: {exc}") from exc


def check_folder(folder: Path, resume: bool) -> None:
    """Raise ConfigurationError unless a training can begin, or go on, in `folder`."""
    unfinished, finished = (folder / CHECKPOINT_FILE).exists(), (folder / METRICS_FILE).exists()
    if resume and not unfinished:
        raise ConfigurationError(f"{folder / CHECKPOINT_FILE}: nothing to resume there")
    if not resume and (unfinished or finished):
        what = "an unfinished training" if unfinished else "a finished training"
        raise ConfigurationError(f"{folder} holds {what}: take another --out, or --resume an unfinished one")


def _rate(share: float, warm_up: float) -> float:
    """Of the learning rate: a rise, then half a cosine."""
    if share < warm_up:
        return (share + warm_up / 10) / (1.1 * warm_up)
    falling = (share - warm_up) / (1 - warm_up)
    return LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * falling))
