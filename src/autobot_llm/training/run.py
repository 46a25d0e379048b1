"""One training from a model folder and texts to a result folder. Knows which parts a training has; knows nothing of
terminals.

A result folder holds what the engine loads, and metrics.json. While a training is under way it also holds checkpoint.pt
and, where the answers were made by this training, answers.safetensors; both go when it is finished.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from autobot_llm.engine.models.whole_file import write_json
from autobot_llm.engine.tokenizer import Tokenizer
from autobot_llm.errors import ConfigurationError
from autobot_llm.training.answers import Answers, answer
from autobot_llm.training.draft import DraftOptions, DraftTask
from autobot_llm.training.eagle import EagleOptions, EagleTask
from autobot_llm.training.forward import Model
from autobot_llm.training.joint import JointOptions, JointTask
from autobot_llm.training.loop import CHECKPOINT_FILE, METRICS_FILE, LoopOptions, Status, Task, check_folder, train
from autobot_llm.training.medusa import MedusaOptions, MedusaTask
from autobot_llm.training.prompts import read_prompts

ANSWERS_SUFFIX = ".safetensors"
ANSWERS_FILE = f"answers{ANSWERS_SUFFIX}"
HELD_OUT = 0.05  # of the answers, where no others are given to measure with
SHORTEST_ANSWER = 32  # tokens that every prompt leaves room for, where positions are counted

OnProgress = Callable[[str, int, int], None]
OnMethod = MedusaOptions | JointOptions | EagleOptions | DraftOptions


@dataclass(frozen=True, slots=True)
class DataOptions:
    """How answers are made. None: by the device and the model.

    `num_positions`: most tokens of prompt and answer together; `max_tokens`: of an answer alone, so that a model that
    falls into repeating itself is not learned from for long. `temperatures`: one after the other; 0 is greedy.
    `batch_size`: sequences computed together. `time_limit` in seconds.
    """

    num_prompts: int | None = None
    num_positions: int | None = None
    max_tokens: int = 256
    temperatures: tuple[float, ...] = (0.0, 0.7)
    batch_size: int | None = None
    seed: int = 0
    time_limit: float | None = None

    def __post_init__(self) -> None:
        if not self.temperatures or min(self.temperatures) < 0:
            raise ConfigurationError(f"temperatures={self.temperatures}: expected one or more, each 0 or more")
        for name in ("num_prompts", "num_positions", "max_tokens", "batch_size", "time_limit"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigurationError(f"{name}={value}: expected more than 0")


@dataclass(frozen=True, slots=True)
class Listeners:
    """Who hears how far a training is, and who may stop it."""

    on_progress: OnProgress | None = None
    on_status: Callable[[Status], None] | None = None
    should_stop: Callable[[], bool] = lambda: False


def load_target(folder: Path, device: Literal["auto", "cpu", "cuda"]) -> Model:
    """The model to learn from: bfloat16 on a GPU, float32 on a CPU. Raises ModelLoadError, ConfigurationError."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigurationError("device='cuda': this torch sees no GPU; expected auto or cpu")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:  # cuDNN's attention makes a plan for every new length, and an answer has a new length at every step
        torch.backends.cuda.enable_cudnn_sdp(False)
    return Model.load(folder, dtype=torch.bfloat16 if on_gpu else torch.float32, device="cuda" if on_gpu else "cpu")


def make_answers(
    model: Model, folder: Path, paths: Sequence[Path], options: DataOptions, listeners: Listeners
) -> Answers:
    """Read prompts and let the model continue them. Raises ConfigurationError for the files and for sizes."""
    on_gpu = model.weights.device.type == "cuda"
    longest = model.config.max_position_embeddings
    num_positions = options.num_positions or min(longest, 1024 if on_gpu else 256)
    if not SHORTEST_ANSWER < num_positions <= longest:
        raise ConfigurationError(f"num_positions={num_positions}: expected {SHORTEST_ANSWER + 1} to {longest}")
    prompts = read_prompts(
        paths,
        Tokenizer.from_folder(folder),
        num_prompts=options.num_prompts or (16384 if on_gpu else 256),
        max_tokens=num_positions - SHORTEST_ANSWER,
        seed=options.seed,
    )
    deadline = None if options.time_limit is None else time.monotonic() + options.time_limit

    def should_stop() -> bool:
        return listeners.should_stop() or (deadline is not None and time.monotonic() > deadline)

    def on_progress(num_done: int, num_total: int) -> None:
        if listeners.on_progress is not None:
            listeners.on_progress("answers", num_done, num_total)

    return answer(
        model,
        prompts,
        num_positions=num_positions,
        max_tokens=options.max_tokens,
        temperatures=options.temperatures,
        batch_size=options.batch_size or (1024 if on_gpu else 16),
        seed=options.seed,
        on_progress=on_progress,
        should_stop=should_stop,
    )


def run(
    folder: Path,
    out: Path,
    data: Sequence[Path],
    method: OnMethod,
    loop: LoopOptions,
    *,
    data_options: DataOptions,
    eval_data: Path | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    resume: bool = False,
    listeners: Listeners,
) -> dict[str, Any]:
    """Train, and return what metrics.json says; its "complete" is False after a stop, which leaves a checkpoint.

    `data` and `eval_data` are sets that `make_answers` made, or texts to make them of. Without `eval_data` a part of
    the answers is held out. Raises what the parts raise.
    """
    check_folder(out, resume)
    torch.manual_seed(loop.seed)
    model = load_target(folder, device)
    answers = _answers(model, folder, out, data, data_options, resume, listeners).to(model.weights.device)
    if eval_data is None:
        learned, held_out = answers.split(HELD_OUT, loop.seed)
    else:
        learned = answers
        held_out = _eval_answers(model, folder, eval_data, data_options, listeners).to(model.weights.device)
    for name, some in (("learn from", learned), ("measure with", held_out)):
        if some.num_sequences == 0:
            raise ConfigurationError(f"{', '.join(map(str, data))}: too few answers to {name}")
    task = _task(model, folder, method, learned)
    outcome = train(
        task, learned, held_out, loop, out, resume=resume, on_status=listeners.on_status,
        should_stop=listeners.should_stop,
    )  # fmt: skip
    document: dict[str, Any] = {
        "method": task.name,
        "model": model.name,
        "complete": outcome.is_complete,
        "steps": outcome.step,
        "seconds": round(outcome.seconds, 1),
        "loss": outcome.loss,
        "device": torch.cuda.get_device_name() if model.weights.device.type == "cuda" else "cpu",
        "num_parameters": sum(parameter.numel() for group in task.groups() for parameter in group.parameters),
        "num_answers": learned.num_sequences,
        "num_answer_tokens": learned.num_answer_tokens,
        "num_held_out": held_out.num_sequences,
        "held_out": "a part of the answers" if eval_data is None else eval_data.name,
        "labels": "the target's argmax, teacher-forced on its own answers",
        "options": asdict(loop) | {name: str(value) for name, value in asdict(method).items()},
    }
    if isinstance(task, JointTask):
        document |= task.about()
    if outcome.accuracies is not None:
        document["accuracies"] = outcome.accuracies.document()
        write_json(out / METRICS_FILE, document)
        for name in (CHECKPOINT_FILE, ANSWERS_FILE):
            (out / name).unlink(missing_ok=True)
    return document


def _task(model: Model, folder: Path, method: OnMethod, learned: Answers) -> Task:
    if isinstance(method, MedusaOptions):
        return MedusaTask(model, method)
    if isinstance(method, JointOptions):
        return JointTask(model, method, folder)
    if isinstance(method, EagleOptions):
        return EagleTask(model, method, learned)
    return DraftTask(model, method, folder)


def _answers(
    model: Model,
    folder: Path,
    out: Path,
    data: Sequence[Path],
    options: DataOptions,
    resume: bool,
    listeners: Listeners,
) -> Answers:
    """The sets that are given, the one that an interrupted training made, or a new one, kept for such a case."""
    made = [path for path in data if path.suffix == ANSWERS_SUFFIX]
    if made:
        if len(made) < len(data):
            raise ConfigurationError(f"{', '.join(map(str, data))}: expected answers alone, or texts alone")
        return Answers.together([_of_this_model(model, path) for path in made])
    kept = out / ANSWERS_FILE
    if resume and kept.exists():
        return _of_this_model(model, kept)
    answers = make_answers(model, folder, data, options, listeners)
    answers.save(kept, data=[str(path) for path in data])
    return answers


def _eval_answers(model: Model, folder: Path, path: Path, options: DataOptions, listeners: Listeners) -> Answers:
    if path.suffix == ANSWERS_SUFFIX:
        return _of_this_model(model, path)
    greedy = replace(options, num_prompts=None, temperatures=(0.0,), time_limit=None)
    return make_answers(model, folder, [path], greedy, listeners)


def _of_this_model(model: Model, path: Path) -> Answers:
    answers = Answers.load(path)
    if (
        int(answers.ids_NS.max()) >= model.config.vocab_size
        or answers.ids_NS.shape[1] > model.config.max_position_embeddings
    ):
        raise ConfigurationError(f"{path}: answers of {answers.model}, which do not fit {model.name}")
    return answers
