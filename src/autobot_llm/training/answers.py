"""What a model said to many prompts: the material that all trainers learn from. Knows tokens, files and batches; knows
nothing of what is learned.

A set is one safetensors file: token ids [N, S] filled up with zeros, where each answer starts and ends, its category,
and how it was made.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it

from autobot_llm.engine.models.whole_file import write_tensors
from autobot_llm.errors import ConfigurationError
from autobot_llm.training.forward import BatchCache, Model
from autobot_llm.training.prompts import Prompt

LENGTH_STEP = 64  # lengths of batches, in tokens: few different shapes, and little to fill up
STEPS_BETWEEN_LOOKS = 16  # at whether all answers have ended: each look waits for the device


# N sequences, S positions, B sequences of a batch
@dataclass(frozen=True, slots=True)
class Batch:
    """Sequence b's answer is `ids_BS[b, starts_B[b] : ends_B[b]]`; what comes after `ends_B` means nothing. The two are
    on the host, so that nobody waits for a device to know which rows count."""

    ids_BS: torch.Tensor
    starts_B: torch.Tensor
    ends_B: torch.Tensor

    def drafts_from(self, distance: int) -> torch.Tensor:
        """The positions p where a draft may begin, and token p + `distance` is part of the answer: of sequence b as
        number b * S + p, in rising order, int64 [R] on the device of the ids.

        The first draft begins when the answer's first token is known, at the prompt's last position.
        """
        p_S = torch.arange(self.ids_BS.shape[1])
        counts_BS = (p_S + 1 >= self.starts_B[:, None]) & (p_S + distance < self.ends_B[:, None])
        return self.carried(counts_BS.flatten().nonzero().flatten())

    def carried(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the host on the device of the ids; nobody waits for it there."""
        if self.ids_BS.is_cuda:
            return tensor.pin_memory().to(self.ids_BS.device, non_blocking=True)
        return tensor


@dataclass(slots=True)
class Answers:
    """A set in memory; token ids on any device, the rest on the host."""

    ids_NS: torch.Tensor
    starts_N: torch.Tensor
    ends_N: torch.Tensor
    categories: list[str]
    model: str

    @property
    def num_sequences(self) -> int:
        return self.ids_NS.shape[0]

    @property
    def num_answer_tokens(self) -> int:
        return int((self.ends_N - self.starts_N).sum())

    def to(self, device: torch.device | str) -> Answers:
        return Answers(self.ids_NS.to(device), self.starts_N, self.ends_N, self.categories, self.model)

    def rows(self, numbers: Sequence[int]) -> Answers:
        index = torch.tensor(list(numbers), dtype=torch.int64)
        ids_NS = self.ids_NS[index.to(self.ids_NS.device)]
        categories = [self.categories[i] for i in numbers]
        return Answers(ids_NS, self.starts_N[index], self.ends_N[index], categories, self.model)

    @classmethod
    def together(cls, sets: Sequence[Answers]) -> Answers:
        """All answers of several sets of one model, on the host."""
        length = max(one.ids_NS.shape[1] for one in sets)
        return cls(
            torch.cat([F.pad(one.ids_NS.cpu(), (0, length - one.ids_NS.shape[1])) for one in sets]),
            torch.cat([one.starts_N for one in sets]),
            torch.cat([one.ends_N for one in sets]),
            [category for one in sets for category in one.categories],
            sets[0].model,
        )

    def split(self, share: float, seed: int) -> tuple[Answers, Answers]:
        """A random part of this share, at least one sequence of each category, and the rest: rest first."""
        chooser = random.Random(seed)
        held: set[int] = set()
        for category in sorted(set(self.categories)):
            members = [i for i, name in enumerate(self.categories) if name == category]
            held |= set(chooser.sample(members, max(1, round(share * len(members)))))
        rest = [i for i in range(self.num_sequences) if i not in held]
        return self.rows(rest), self.rows(sorted(held))

    def batches(self, num_tokens: int, chooser: random.Random, *, first: int = 0) -> Iterator[Batch]:
        """Once through the set in random order, from batch `first`: sequences of like length, about `num_tokens`
        positions together."""
        for numbers, length in self._plan_batches(num_tokens, chooser)[first:]:
            index = torch.tensor(numbers)
            ids_BS = self.ids_NS[index.to(self.ids_NS.device), :length].long()
            yield Batch(ids_BS, self.starts_N[index], self.ends_N[index])

    def _plan_batches(self, num_tokens: int, chooser: random.Random) -> list[tuple[list[int], int]]:
        """The rows and the length of each batch."""
        lengths = [min(-(-end // LENGTH_STEP) * LENGTH_STEP, self.ids_NS.shape[1]) for end in self.ends_N.tolist()]
        order = sorted(range(len(lengths)), key=lambda i: (lengths[i], chooser.random()))
        plans: list[tuple[list[int], int]] = []
        numbers: list[int] = []
        for i in order:
            if numbers and (len(numbers) + 1) * lengths[i] > num_tokens:
                plans.append((numbers, lengths[numbers[-1]]))
                numbers = []
            numbers.append(i)
        if numbers:
            plans.append((numbers, lengths[numbers[-1]]))
        chooser.shuffle(plans)
        return plans

    def save(self, path: Path, **how: object) -> None:
        """Write the set, whole or not at all; `how` it was made is kept with it."""
        tensors = {"ids": self.ids_NS.int(), "starts": self.starts_N.int(), "ends": self.ends_N.int()}
        about = {"categories": json.dumps(self.categories), "model": self.model, "how": json.dumps(how, default=str)}
        write_tensors(path, tensors, about)

    @classmethod
    def load(cls, path: Path) -> Answers:
        """Raises ConfigurationError for a file that is no such set."""
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in ("ids", "starts", "ends")}
            categories = json.loads(about["categories"])
        except (safetensors.SafetensorError, OSError, KeyError, ValueError) as exc:
            raise ConfigurationError(f"{path}: not a set that `autobot-llm train data` wrote: {exc}") from exc
        return cls(tensors["ids"], tensors["starts"].long(), tensors["ends"].long(), categories, about["model"])


@torch.no_grad()
def answer(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    num_positions: int,
    temperatures: Sequence[float],
    batch_size: int,
    seed: int,
    max_tokens: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Answers:
    """Let `model` continue every prompt, up to an end-of-sequence token, by `max_tokens` tokens, or to `num_positions`
    tokens in all.

    Prompt i is answered at temperature `temperatures[i % len]`; 0 is greedy. Sequences of like length are computed
    together, `batch_size` at once. `should_stop` is asked between batches; what is done by then is returned.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    device = model.weights.device
    generator = torch.Generator(device).manual_seed(seed)
    chunks = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    random.Random(seed).shuffle(chunks)
    ids, starts, ends, categories = [], [], [], []
    for number, chunk in enumerate(chunks):
        if number and should_stop():
            break
        chosen = [prompts[i] for i in chunk]
        chosen_temperatures = torch.tensor([temperatures[i % len(temperatures)] for i in chunk], device=device)
        ids_BS, starts_B, ends_B = _answer_batch(
            model, chosen, num_positions, max_tokens or num_positions, chosen_temperatures, generator
        )
        ids.append(ids_BS.int().cpu())
        starts.append(starts_B.cpu())
        ends.append(ends_B.cpu())
        categories += [prompt.category for prompt in chosen]
        if on_progress is not None:
            on_progress(len(categories), len(prompts))
    return Answers(torch.cat(ids), torch.cat(starts), torch.cat(ends), categories, model.name)


def _answer_batch(
    model: Model,
    prompts: Sequence[Prompt],
    num_positions: int,
    max_tokens: int,
    temperatures_B: torch.Tensor,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All sequences advance one position at a time; where a prompt is longer than the shortest, its own tokens go in
    instead of what was sampled. So nothing is padded, and every step has one shape."""
    device = temperatures_B.device
    starts = [len(prompt.ids) for prompt in prompts]
    ids_BS = torch.zeros(len(prompts), num_positions, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids_BS[row, : starts[row]] = torch.tensor(prompt.ids)
    ids_BS = ids_BS.to(device)
    starts_B = torch.tensor(starts, device=device)
    ends_B = (starts_B + max_tokens).clamp_(max=num_positions)
    eos_ids = torch.tensor(sorted(model.config.eos_token_ids) or [-1], device=device)
    is_greedy = not bool((temperatures_B > 0).any())
    cache = BatchCache.empty(model, len(prompts), num_positions)
    first = min(starts)
    normed_BE = model.hidden(ids_BS[:, :first], cache=cache).normed_BSE[:, -1]
    for position in range(first, num_positions):
        logits_BV = model.logits(normed_BE)
        chosen_B = logits_BV.argmax(dim=-1) if is_greedy else _sampled(logits_BV, temperatures_B, generator)
        in_answer_B = starts_B <= position
        token_B = torch.where(in_answer_B, chosen_B, ids_BS[:, position])
        ids_BS[:, position] = token_B
        ends_now_B = in_answer_B & (position < ends_B) & (token_B[:, None] == eos_ids).any(dim=-1)
        ends_B = torch.where(ends_now_B, position + 1, ends_B)
        is_last = position + 1 == num_positions
        if is_last or (position % STEPS_BETWEEN_LOOKS == 0 and bool((ends_B <= position + 1).all())):
            break
        normed_BE = model.hidden(token_B[:, None], first=position, cache=cache).normed_BSE[:, 0]
    return ids_BS, starts_B, ends_B


def _sampled(logits_BV: torch.Tensor, temperatures_B: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One draw from each row at its temperature (the Gumbel-max trick); temperature 0 is the argmax."""
    noise_BV = torch.empty_like(logits_BV, dtype=torch.float32).exponential_(generator=generator)
    return (logits_BV.float() - temperatures_B[:, None] * noise_BV.log_()).argmax(dim=-1)
