"""`autobot-llm train`: what is learned is written, loads, and is better than before; an interruption loses nothing."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Driver, greedy, with_kernels
from model_folders import TINY, write_random_model

from autobot_llm.cli.main import main
from autobot_llm.engine.load import load_engine
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.models.weights import load_weights
from autobot_llm.engine.options import EngineOptions
from autobot_llm.engine.request import EngineRequest
from autobot_llm.engine.speculative.eagle import load_eagle
from autobot_llm.engine.speculative.heads import find_heads, make_medusa
from autobot_llm.engine.speculative.medusa import MedusaConfig, MedusaDecoder
from autobot_llm.engine.speculative.policy import Always
from autobot_llm.engine.speculative.speculator import Speculator
from autobot_llm.errors import ConfigurationError
from autobot_llm.training.accuracy import read_accuracies
from autobot_llm.training.answers import Answers, answer
from autobot_llm.training.draft import DraftOptions, DraftTask
from autobot_llm.training.eagle import EagleOptions, EagleTask, most_frequent
from autobot_llm.training.forward import Model
from autobot_llm.training.joint import JointOptions, JointTask
from autobot_llm.training.loop import LoopOptions, Status, Task, train
from autobot_llm.training.medusa import MedusaOptions, MedusaTask
from autobot_llm.training.prompts import Prompt

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from training_table import page

COMMAND = (sys.executable, "-c", "import sys; from autobot_llm.cli.main import main; sys.exit(main())", "train")
METHODS = ("medusa", "eagle3", "draft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model, whose choices repeat themselves enough to be learned in seconds."""
    folder = tmp_path_factory.mktemp("model")
    write_random_model(folder, "llama", num_hidden_layers=6, initializer_range=0.12)
    return folder


@pytest.fixture(scope="module")
def answers(folder: Path) -> Answers:
    model = Model.load(folder, dtype=torch.float32, device="cpu")
    prompts = [Prompt((7 + i % 8, 50 + i), "even" if i % 2 == 0 else "odd") for i in range(24)]
    return answer(model, prompts, num_positions=40, temperatures=(0.0,), batch_size=48, seed=0)


def task(method: str, folder: Path, answers: Answers) -> Task:
    model = Model.load(folder, dtype=torch.float32, device="cpu")
    torch.manual_seed(0)
    if method == "medusa":
        return MedusaTask(model, MedusaOptions(num_heads=3))
    if method == "eagle3":
        return EagleTask(model, EagleOptions(num_steps=3, draft_vocab_size=4096), answers)
    return DraftTask(model, DraftOptions(num_layers=1), folder)


@pytest.mark.parametrize("method", METHODS)
def test_a_training_lowers_its_loss_and_says_how_good_it_became(
    method: str, folder: Path, answers: Answers, tmp_path: Path
) -> None:
    seen: list[Status] = []
    options = LoopOptions(steps=20, batch_size=1024, learning_rate=1e-2, evaluate_every=10)
    outcome = train(task(method, folder, answers), answers, answers, options, tmp_path / "out", on_status=seen.append)
    assert outcome.is_complete and outcome.step == 20
    assert outcome.loss < 0.98 * seen[0].loss
    assert [status.step for status in seen] == [1, 10, 20]
    assert outcome.accuracies is not None
    assert set(outcome.accuracies.by_category) == {"overall", "even", "odd"}
    for one, five in zip(outcome.accuracies.top(1), outcome.accuracies.top(5), strict=True):
        assert 0 <= one <= five <= 1


def test_accuracies_are_counted_by_rank(folder: Path, answers: Answers) -> None:
    """A draft that is the model itself is right at its first try, always."""
    learning = DraftTask(Model.load(folder, dtype=torch.float32, device="cpu"), DraftOptions(init=folder), folder)
    accuracies = learning.evaluate(answers, 2048)
    assert accuracies.by_category["odd"] == [[1.0] + [0.0] * 9]
    assert read_accuracies(json.loads(json.dumps(accuracies.document()))).overall == accuracies.overall


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_training_goes_on_to_the_very_result(
    method: str, folder: Path, answers: Answers, tmp_path: Path
) -> None:
    learned, held_out = answers.split(0.1, 0)
    options = LoopOptions(steps=12, batch_size=512)
    whole = task(method, folder, answers)
    train(whole, learned, held_out, options, tmp_path / "whole")
    stopped = task(method, folder, answers)
    looks = iter(range(100))
    outcome = train(stopped, learned, held_out, options, tmp_path / "parts", should_stop=lambda: next(looks) == 5)
    assert not outcome.is_complete and outcome.step == 5
    with pytest.raises(ConfigurationError, match="unfinished training"):
        train(stopped, learned, held_out, options, tmp_path / "parts")
    resumed = task(method, folder, answers)
    assert train(resumed, learned, held_out, options, tmp_path / "parts", resume=True).step == 12
    expected = whole.state()
    for name, tensor in resumed.state().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-5, msg=name)
    other = task("medusa" if method != "medusa" else "draft", folder, answers)
    with pytest.raises(ConfigurationError, match=f"a training of {method}, not of"):
        train(other, learned, held_out, options, tmp_path / "parts", resume=True)
    with pytest.raises(ConfigurationError, match="nothing to resume"):
        train(other, learned, held_out, options, tmp_path / "nowhere", resume=True)


def test_a_time_limit_ends_a_training_well(folder: Path, answers: Answers, tmp_path: Path) -> None:
    learned, held_out = answers.split(0.1, 0)
    options = LoopOptions(steps=10**6, batch_size=512, time_limit=1.5)
    begun = time.monotonic()
    outcome = train(task("medusa", folder, answers), learned, held_out, options, tmp_path / "out")
    assert outcome.is_complete and 0 < outcome.step < 10**6
    assert time.monotonic() - begun < 60
    assert (tmp_path / "out" / "medusa_lm_head.safetensors").exists()


def test_the_most_frequent_tokens_are_those_of_the_answers() -> None:
    ids = torch.tensor([[9, 9, 9, 5, 5, 3, 8, 8, 8]])
    some = Answers(ids, torch.tensor([3]), torch.tensor([6]), ["a"], "m")
    assert most_frequent(some, 10, 3).tolist() == [0, 3, 5], "prompt and filling do not count; then the first unused"


def run(*arguments: object, code: int = 0) -> tuple[str, str]:
    """What the command prints, and what it says on stderr."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        returned = main(["train", *map(str, arguments)])
    said, complained = (stream.buffer.getvalue().decode() for stream in (out, err))  # type: ignore[attr-defined]
    assert returned == code, complained
    return said, complained


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"category": kind, "messages": [{"role": "user", "content": f"Tell me about {what}."}]}
        for kind in ("chat", "story")
        for what in ("foxes", "rain", "the sea", "bread")
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


QUICK: tuple[Any, ...] = ("--device", "cpu", "--sequence-length", 48, "--steps", 2, "--batch-size", 256)


def test_the_command_trains_all_three_for_the_embedded_model(tmp_path: Path, prompts: Path) -> None:
    answers = tmp_path / "answers.safetensors"
    said, _ = run("data", "--model", TINY, "--data", prompts, "--out", answers, "--sequence-length", 48, "--device",
                  "cpu",
                  "--json")  # fmt: skip
    assert json.loads(said)["num_answers"] == 8
    outs = {method: tmp_path / method for method in METHODS}
    for method, out in outs.items():
        said, _ = run(
            method, "--model", TINY, "--data", answers, "--eval-data", answers, "--out", out, *QUICK, "--json"
        )
        document = json.loads(said)
        assert document == json.loads((out / "metrics.json").read_text())
        assert document["complete"] and document["steps"] == 2
        assert set(document["accuracies"]) == {"overall", "chat", "story"}
        assert not (out / "checkpoint.pt").exists()
    weights = load_weights(TINY, load_config(TINY), dtype=torch.float32, device="cpu")
    decoder = MedusaDecoder(MedusaConfig(5, 384, 8192), lm_head_VE=weights.lm_head_VE)
    assert decoder.load_heads(outs["medusa"]) and decoder.num_heads == 5
    assert sum(path.stat().st_size for path in outs["medusa"].iterdir()) < 4 * 2**20
    eagle = load_eagle(outs["eagle3"], vocab_size=8192, target_hidden_size=384, lm_head_VE=weights.lm_head_VE)
    assert eagle.config.feature_layers == (2, 4, 5)
    draft = load_config(outs["draft"])
    assert (draft.hidden_size, draft.num_layers, draft.vocab_size) == (192, 2, 8192)
    load_weights(outs["draft"], draft, dtype=None, device="cpu")
    table, _ = run("tree", outs["medusa"], "--nodes", "4,16")
    assert table.splitlines()[0].split() == ["nodes", "depth", "overall", "chat", "story"]
    assert [line.split()[0] for line in table.splitlines()[1:]] == ["4", "16"]
    headings = [line for line in page(tmp_path) if line.startswith("##")]
    assert headings == ["## medusa", "## eagle3", "## draft", "## Trees for the Medusa heads"]


def test_a_draft_goes_on_from_another_and_stays_what_it_was_until_it_learns(tmp_path: Path, folder: Path) -> None:
    write_random_model(tmp_path / "small", "llama", num_hidden_layers=1, hidden_size=32)
    model = Model.load(folder, dtype=torch.float32, device="cpu")
    learning = DraftTask(model, DraftOptions(init=tmp_path / "small"), folder)
    learning.export(tmp_path / "out", None)  # type: ignore[arg-type]
    was, written = (
        load_weights(path, load_config(path), dtype=torch.bfloat16, device="cpu")
        for path in (tmp_path / "small", tmp_path / "out")
    )
    assert torch.equal(was.embed_VE, written.embed_VE)
    for old, new in zip(was.layers, written.layers, strict=True):
        assert torch.equal(old.qkv_weight, new.qkv_weight) and torch.equal(old.gate_up_weight, new.gate_up_weight)
    (tmp_path / "small" / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    with pytest.raises(ConfigurationError, match="another tokenizer"):
        DraftTask(model, DraftOptions(init=tmp_path / "small"), folder)


def test_an_eagle_draft_goes_on_from_another_and_may_know_more_tokens(
    folder: Path, answers: Answers, tmp_path: Path
) -> None:
    model = Model.load(folder, dtype=torch.float32, device="cpu")
    answers = answers.rows(range(8))
    first = EagleTask(model, EagleOptions(num_steps=2, draft_vocab_size=512, feature_layers=(1, 3, 6)), answers)
    options = LoopOptions(steps=10, batch_size=1024, learning_rate=1e-2)
    learned = train(first, answers, answers, options, tmp_path / "first")
    assert learned.accuracies is not None
    same = EagleTask(model, EagleOptions(num_steps=2, init=tmp_path / "first"), answers)
    assert torch.equal(same.draft.d2t, first.draft.d2t)
    more = EagleTask(model, EagleOptions(num_steps=2, draft_vocab_size=8192, init=tmp_path / "first"), answers)
    assert more.draft.t2d.all()
    assert more.evaluate(answers, 1024).top(1)[0] > 0.5 * learned.accuracies.top(1)[0] > 0
    for name in ("fc.weight", "midlayer.mlp.down_proj.weight"):
        expected = first.state()[name].to(torch.bfloat16).float()
        assert torch.equal(same.state()[name], expected) and torch.equal(more.state()[name], expected)
    assert train(more, answers, answers, options, tmp_path / "more").accuracies is not None
    with pytest.raises(ConfigurationError, match="has its feature layers"):
        EagleTask(model, EagleOptions(init=tmp_path / "first", feature_layers=(1, 3, 6)), answers)


def test_stage_2_makes_another_model_that_the_engine_runs_with_its_heads(
    folder: Path, answers: Answers, tmp_path: Path
) -> None:
    model = Model.load(folder, dtype=torch.float32, device="cpu")
    answers = answers.rows(range(8))
    options = LoopOptions(steps=6, batch_size=1024, learning_rate=1e-2)
    train(task("medusa", folder, answers), answers, answers, options, tmp_path / "heads")
    joint = JointTask(model, JointOptions(tmp_path / "heads", model_rate=0.02), folder)
    seen: list[Status] = []
    before = joint.evaluate(answers, 1024)
    assert joint.about()["agreement"] == 1.0, "as yet it is the same model"
    outcome = train(joint, answers, answers, replace(options, steps=15), tmp_path / "out", on_status=seen.append)
    assert outcome.accuracies is not None and outcome.loss < seen[0].loss
    assert outcome.accuracies.top(1)[0] > before.top(1)[0]
    assert 0.5 < joint.about()["agreement"] <= 1.0
    again = JointTask(model, JointOptions(tmp_path / "heads"), folder)
    again.load_state({name: tensor.clone() for name, tensor in joint.state().items()})
    assert again.evaluate(answers, 1024) == outcome.accuracies, "its heads project as the model does now"
    config = load_config(tmp_path / "out")
    assert config == load_config(folder)
    made = load_weights(tmp_path / "out", config, dtype=torch.float32, device="cpu")
    assert not torch.equal(made.layers[0].down_weight, model.weights.layers[0].down_weight)
    heads = find_heads(tmp_path / "out", "medusa")
    assert heads == tmp_path / "out" / "medusa"
    engine = load_engine(
        EngineOptions(tmp_path / "out", with_kernels(tmp_path), device="cpu", max_model_len=64, cpu_threads=1)
    )
    said = []
    for speculator in (None, Speculator(3, costly=make_medusa(heads, tmp_path / "out", config), policy=Always(3))):
        engine.speculator = speculator
        driver = Driver(engine)
        driver.add(0, EngineRequest([7, 50], (greedy(24),)))
        driver.run()
        said.append(driver.texts[0, 0])
    assert said[0] == said[1] and speculator is not None and speculator.num_accepted > 0
    engine.close()
    with pytest.raises(ConfigurationError, match="model_rate=2"):
        JointOptions(tmp_path, model_rate=2)


def test_ctrl_c_saves_and_resume_goes_on(tmp_path: Path, prompts: Path) -> None:
    out = tmp_path / "heads"
    arguments = ["medusa", "--model", TINY, "--data", prompts, "--out", out, "--device", "cpu", "--sequence-length", 48,
                 "--batch-size", 256, "--steps", 100_000]  # fmt: skip
    process = subprocess.Popen([*COMMAND, *map(str, arguments)], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "answers.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume goes on" in said
    assert (out / "checkpoint.pt").exists()
    step = int(said.split("stopped at step ")[1].split(";")[0])
    arguments[-1] = step + 2
    said, _ = run(*arguments, "--resume", "--json")
    assert json.loads(said)["steps"] == step + 2
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "medusa_lm_head.safetensors", "metrics.json"]


def test_wrong_arguments_are_named(tmp_path: Path, prompts: Path) -> None:
    common = ("--model", TINY, "--data", prompts, "--device", "cpu")
    for arguments, complaint in (
        (("data", *common, "--out", tmp_path / "x.bin"), "ends with .safetensors"),
        (
            ("medusa", *common, "--out", tmp_path / "x", "--sequence-length", 4096),
            "num_positions=4096: expected 33 to 2048",
        ),
        (("eagle3", *common, *QUICK, "--out", tmp_path / "x", "--feature-layers", "2,5"), "expected 3 numbers"),
        (("eagle3", *common, *QUICK, "--out", tmp_path / "y", "--feature-layers", "2,5,9"), "from 0 to 8"),
        (
            ("draft", *common, *QUICK, "--out", tmp_path / "z", "--hidden-size", 100),
            "hidden_size=100: expected",
        ),
        (("medusa", *common, "--out", tmp_path / "x", "--temperatures", "-1"), "temperatures"),
        (("medusa", *common, "--out", tmp_path / "x", "--stage", 2), "--stage 2 and --init HEADS go together"),
        (
            ("medusa", *common, "--out", tmp_path / "x", "--stage", 2, "--init", TINY, "--num-heads", 3),
            "those of --init",
        ),
        (("medusa", *common, "--out", tmp_path / "x", "--model-rate", 1), "stage 1 leaves the model as it is"),
        (("medusa", *common, *QUICK, "--out", tmp_path / "w", "--stage", 2, "--init", TINY), "no tensor of Medusa"),
        (("tree", tmp_path), "no metrics of a finished training"),
    ):
        _, said = run(*arguments, code=2)
        assert complaint in said
