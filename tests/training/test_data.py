"""What is learned from: prompts out of files, and what the model itself says to them."""

from __future__ import annotations

import gzip
import json
import lzma
import random
from pathlib import Path

import pytest
import torch
from model_folders import TINY, change_json, write_random_model

from autobot_llm.engine.tokenizer import Tokenizer
from autobot_llm.errors import ConfigurationError
from autobot_llm.training.answers import Answers, answer
from autobot_llm.training.forward import Model
from autobot_llm.training.prompts import Prompt, read_prompts

CHAT = (
    "<|user|>\nTell me a story.<|end|>\n<|assistant|>\nOnce there was a fox.<|end|>\n"
    "<|user|>\nAnd then?<|end|>\n<|assistant|>\nIt slept.<|end|>\n<|endoftext|>\n"
    "<|user|>\nWhat is rain?<|end|>\n<|assistant|>\nWater.<|end|>\n<|endoftext|>"
)
PROSE = "\n\n".join(f"The fox number {i} went over the hill and looked for the red hen." for i in range(60))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(TINY)


def test_every_answer_of_a_conversation_becomes_a_prompt_that_ends_where_it_begins(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = tmp_path / "chats.txt"
    path.write_text(CHAT)
    prompts = read_prompts([path], tokenizer, num_prompts=None, max_tokens=200, seed=0)
    texts = {tokenizer.decode(prompt.ids, skip_special_tokens=False) for prompt in prompts}
    first = "<|user|>\nTell me a story.<|end|>\n<|assistant|>\n"
    assert texts == {
        first,
        first + "Once there was a fox.<|end|>\n<|user|>\nAnd then?<|end|>\n<|assistant|>\n",
        "<|user|>\nWhat is rain?<|end|>\n<|assistant|>\n",
    }
    assert {prompt.category for prompt in prompts} == {"chats"}


@pytest.mark.parametrize("ending", [".txt", ".txt.xz", ".txt.gz"])
def test_plain_documents_are_cut_packed_or_not(tmp_path: Path, tokenizer: Tokenizer, ending: str) -> None:
    path = tmp_path / f"prose{ending}"
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    with opener(path, "wb") as file:
        file.write(PROSE.encode())
    prompts = read_prompts([path], tokenizer, num_prompts=4, max_tokens=64, seed=0)
    assert len(prompts) == 4
    for prompt in prompts:
        assert 16 <= len(prompt.ids) <= 64
        assert tokenizer.decode(prompt.ids)[:8] == "The fox "
    assert prompts == read_prompts([path], tokenizer, num_prompts=4, max_tokens=64, seed=0)
    assert prompts != read_prompts([path], tokenizer, num_prompts=4, max_tokens=64, seed=1)


def test_lines_of_prompts_keep_their_category_and_long_ones_are_left_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "prompts.jsonl"
    lines = [
        {"category": "story", "messages": [{"role": "user", "content": "Tell me a story."}]},
        {"prompt": "def add(a, b):"},
        {"category": "long", "prompt": "word " * 300},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    prompts = read_prompts([path], tokenizer, num_prompts=None, max_tokens=100, seed=0)
    assert [prompt.category for prompt in prompts] == ["story", "prompts"]
    assert tokenizer.decode(prompts[0].ids, skip_special_tokens=False).endswith("<|assistant|>\n")


def test_a_file_without_prompts_is_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    for name, content, complaint in (
        ("empty.txt", b"", "empty.txt: no prompt"),
        ("bad.jsonl", b'{"text": 1}', "bad.jsonl: line 1: expected an object with messages or prompt"),
        ("latin.txt", b"\xe9\xff", "latin.txt: cannot be read as text"),
        ("cut.txt.xz", lzma.compress(b"x" * 1000)[:-9], "cut.txt.xz: cannot be read as text"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigurationError, match=complaint):
            read_prompts([tmp_path / name], tokenizer, num_prompts=9, max_tokens=99, seed=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("model")
    write_random_model(folder, "llama")
    change_json(folder / "config.json", eos_token_id=list(range(0, 8192, 40)))  # answers end soon
    (folder / "generation_config.json").unlink(missing_ok=True)
    return Model.load(folder, dtype=torch.float32, device="cpu")


def prompts_of(*lengths: int) -> list[Prompt]:
    chooser = random.Random(4)
    return [Prompt(tuple(chooser.randrange(8192) for _ in range(length)), f"c{length % 2}") for length in lengths]


def test_greedy_answers_of_a_batch_are_those_of_each_prompt_alone(model: Model) -> None:
    prompts = prompts_of(5, 17, 9, 30, 2)
    made = answer(model, prompts, num_positions=48, temperatures=(0.0,), batch_size=3, seed=0)
    assert made.num_sequences == 5
    found = {tuple(ids[:start].tolist()): (ids, int(start), int(end)) for ids, start, end in
             zip(made.ids_NS, made.starts_N, made.ends_N, strict=True)}  # fmt: skip
    for prompt in prompts:
        ids = list(prompt.ids)
        while len(ids) < 48:
            ids.append(int(model.logits(model.hidden(torch.tensor([ids])).normed_BSE[0, -1]).argmax()))
            if ids[-1] in model.config.eos_token_ids:
                break
        got, start, end = found[prompt.ids]
        assert start == len(prompt.ids)
        assert got[:end].tolist() == ids
    assert made.num_answer_tokens == int((made.ends_N - made.starts_N).sum())


def test_an_answer_has_at_most_so_many_tokens(model: Model) -> None:
    prompts = prompts_of(5, 17, 9)
    short, long = (
        answer(model, prompts, num_positions=48, max_tokens=most, temperatures=(0.0,), batch_size=3, seed=0)
        for most in (4, None)
    )
    lengths = (long.ends_N - long.starts_N).clamp(max=4)
    assert (short.ends_N - short.starts_N).tolist() == lengths.tolist()
    for row in range(3):
        end = int(short.ends_N[row])
        assert torch.equal(short.ids_NS[row, :end], long.ids_NS[row, :end])


def test_a_seed_repeats_sampled_answers_and_greedy_rows_stay_greedy(model: Model) -> None:
    prompts = prompts_of(6, 6, 6, 6)
    greedy, sampled, again, other = (
        answer(model, prompts, num_positions=24, temperatures=temperatures, batch_size=4, seed=seed)
        for temperatures, seed in (((0.0,), 0), ((0.0, 1.5), 0), ((0.0, 1.5), 0), ((0.0, 1.5), 1))
    )
    assert torch.equal(sampled.ids_NS, again.ids_NS)
    assert not torch.equal(sampled.ids_NS, other.ids_NS)
    assert torch.equal(sampled.ids_NS[::2], greedy.ids_NS[::2])
    assert not torch.equal(sampled.ids_NS[1::2], greedy.ids_NS[1::2])


def answers(ends: list[int]) -> Answers:
    ids_NS = torch.arange(len(ends) * 300).view(len(ends), 300)
    categories = ["a", "b"] * (len(ends) // 2)
    return Answers(ids_NS, torch.full((len(ends),), 3), torch.tensor(ends), categories, "m")


def test_an_epoch_has_every_sequence_once_and_no_step_is_too_large() -> None:
    chooser = random.Random(0)
    some = answers([chooser.randrange(5, 300) for _ in range(40)])
    seen: list[int] = []
    batches = list(some.batches(1024, random.Random("0 0")))
    for batch in batches:
        assert batch.ids_BS.numel() <= 1024
        assert int(batch.ends_B.max()) <= batch.ids_BS.shape[1]
        seen += (batch.ids_BS[:, 0] // 300).tolist()
    assert sorted(seen) == list(range(40))
    rest = list(some.batches(1024, random.Random("0 0"), first=3))
    assert all(torch.equal(one.ids_BS, other.ids_BS) for one, other in zip(rest, batches[3:], strict=True))


def test_a_part_of_every_category_is_held_out() -> None:
    some = answers([50] * 20)
    learned, held_out = some.split(0.1, seed=0)
    assert sorted(held_out.categories) == ["a", "b"]
    both = torch.cat((learned.ids_NS, held_out.ids_NS))
    assert sorted(both[:, 0].tolist()) == some.ids_NS[:, 0].tolist()


def test_drafts_begin_at_the_prompts_last_token_and_stay_in_the_answer() -> None:
    batch = next(answers([9, 9]).batches(64 * 2, random.Random(0)))
    # tokens 3 to 8 are the answer: a draft begun at p = 2 knows token 3 and proposes token 4 first
    length = batch.ids_BS.shape[1]
    assert batch.drafts_from(2).tolist() == [*range(2, 7), *range(length + 2, length + 7)]
    assert batch.drafts_from(4).tolist() == [*range(2, 5), *range(length + 2, length + 5)]


def test_several_sets_are_one_as_long_as_the_longest() -> None:
    one, other = answers([50, 60]), answers([7] * 4)
    other.ids_NS = other.ids_NS[:, :20]
    both = Answers.together([one, other])
    assert both.ids_NS.shape == (6, 300) and both.categories == ["a", "b"] * 3
    assert torch.equal(both.ids_NS[2:, :20], other.ids_NS) and not both.ids_NS[2:, 20:].any()
    assert both.ends_N.tolist() == [50, 60, 7, 7, 7, 7]


def test_a_set_is_kept_in_a_file(tmp_path: Path) -> None:
    some = answers([50, 60])
    some.save(tmp_path / "deep" / "set.safetensors", seed=3)
    loaded = Answers.load(tmp_path / "deep" / "set.safetensors")
    assert torch.equal(loaded.ids_NS, some.ids_NS.int())
    assert (loaded.categories, loaded.model) == (["a", "b"], "m")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["set.safetensors"]
    (tmp_path / "other").write_bytes(b"nothing")
    with pytest.raises(ConfigurationError, match="not a set"):
        Answers.load(tmp_path / "other")
