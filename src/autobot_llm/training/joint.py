"""Train a model and its Medusa heads together (Medusa-2), from heads that stage 1 trained. Knows the loss and what is
written; knows nothing of texts.

The model learns to hold more of the coming tokens in the state that its heads read, and is pulled towards itself: its
loss is the cross entropy against its own distribution before the training (self-distillation), to which the heads' loss
is added with a small weight. It learns at a fraction of the heads' rate, after a longer rise. The result is another
model: what it says differs from what the first one says, so speculation with it is lossless towards itself alone.
Source: section 2.2.2 and 2.3.2 of the Medusa paper (arXiv 2401.10774).
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own name for it

from autobot_llm.engine.models.whole_file import write_tensors
from autobot_llm.engine.speculative.medusa.checkpoint import load_medusa_heads
from autobot_llm.errors import ConfigurationError
from autobot_llm.training.accuracy import Accuracies
from autobot_llm.training.answers import Answers, Batch
from autobot_llm.training.draft import TOKENIZER_FILES, as_parameters, parameters_of, published
from autobot_llm.training.forward import Model
from autobot_llm.training.loop import Group
from autobot_llm.training.medusa import WEIGHT_DECAY, count_right, rows_and_labels, save

HEADS_WEIGHT = 0.2  # of the heads' loss beside the model's own
MODEL_RATE = 0.1
WARM_UP = 0.2  # of the training, for the model; the heads have theirs
HEADS_FOLDER = "medusa"  # below the model's


# B sequences, S positions, R rows that count, E hidden size, V vocabulary
@dataclass(frozen=True, slots=True)
class JointOptions:
    """`init`: the heads of stage 1, for the model as it is. `model_rate`: the model's share of the learning rate."""

    init: Path
    model_rate: float = MODEL_RATE

    def __post_init__(self) -> None:
        if not 0 < self.model_rate <= 1:
            raise ConfigurationError(f"model_rate={self.model_rate}: expected more than 0, at most 1")


class JointTask:
    name = "medusa-2"

    def __init__(self, model: Model, options: JointOptions, folder: Path) -> None:
        """`folder` is the model's. Raises ConfigurationError for a quantized one, ModelLoadError for the heads."""
        if model.config.quantization is not None:
            raise ConfigurationError(f"{folder}: a quantized model cannot be trained; take the one it was made of")
        self.before = model
        self._folder, self._model_rate = folder, options.model_rate
        device = model.weights.device
        self.model = Model(model.config, as_parameters(model.weights, device), f"{model.name}-medusa-2")
        self.heads = load_medusa_heads(
            options.init, hidden_size=model.config.hidden_size, vocab_size=model.config.vocab_size,
            lm_head_VE=self.model.weights.lm_head_VE.detach(), device=device,
        ).heads.requires_grad_()  # fmt: skip
        self._agreement = (0, 0)

    def groups(self) -> list[Group]:
        model = list(parameters_of(self.model.weights).values())
        return [Group(list(self.heads.parameters())), Group(model, self._model_rate, WARM_UP)]

    def learn(self, batch: Batch) -> torch.Tensor:
        known_R = batch.drafts_from(1)
        with torch.no_grad():
            wanted_RV = self.before.logits_at(batch.ids_BS, known_R).float()
        choice_R = wanted_RV.argmax(dim=-1)
        with self._autocast():
            normed_TE = self.model.hidden(batch.ids_BS).normed_BSE.flatten(0, 1)
            logits_RV = self.model.logits(normed_TE[known_R])
        loss = -(wanted_RV.softmax(dim=-1) * logits_RV.float().log_softmax(dim=-1)).sum() / max(1, known_R.shape[0])
        for head, (rows_RE, labels_R) in enumerate(rows_and_labels(batch, normed_TE, choice_R, len(self.heads))):
            with self._autocast():
                logits_RV = self.heads.head_logits(head, rows_RE)
            summed = F.cross_entropy(logits_RV.float(), labels_R, reduction="sum")
            loss = loss + HEADS_WEIGHT * WEIGHT_DECAY**head * summed / max(1, labels_R.shape[0])
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    @torch.no_grad()
    def evaluate(self, answers: Answers, batch_size: int) -> Accuracies:
        """Of the heads, against the model's choice as it is now; and how often that is its choice before."""
        num_same = num_rows = 0
        for batch in answers.batches(batch_size, random.Random(0)):
            rows_R = batch.drafts_from(1)
            with self._autocast():
                now_R = self.model.logits_at(batch.ids_BS, rows_R).argmax(dim=-1)
            num_same += int((now_R == self.before.logits_at(batch.ids_BS, rows_R).argmax(dim=-1)).sum())
            num_rows += rows_R.shape[0]
        self._agreement = num_same, num_rows
        return count_right(self.model, self.heads, answers, batch_size, self._autocast)

    def about(self) -> dict[str, Any]:
        """What metrics.json says of the model beside the heads' figures, as of the last evaluation."""
        num_same, num_rows = self._agreement
        return {
            "lossy": f"another model than {self.before.name}: its answers are its own",
            "agreement": num_same / max(1, num_rows),
        }

    def state(self) -> dict[str, torch.Tensor]:
        heads = {f"heads.{name}": tensor for name, tensor in self.heads.state_dict().items()}
        return heads | {f"model.{name}": tensor for name, tensor in parameters_of(self.model.weights).items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(state[name])

    def export(self, folder: Path, accuracies: Accuracies) -> None:
        """A model folder as the first one, in its dtype, and the heads in a folder below it, where they are found."""
        config = self.model.config
        dtype: torch.dtype = getattr(torch, config.checkpoint_dtype or "bfloat16")
        tensors = {name: tensor.detach().to(dtype) for name, tensor in published(config, self.model.weights)}
        write_tensors(folder / "model.safetensors", tensors)
        for name in ("config.json", *TOKENIZER_FILES):
            if (self._folder / name).exists():
                shutil.copyfile(self._folder / name, folder / name)
        save(folder / HEADS_FOLDER, self.heads, self.model.name, accuracies)

    def _autocast(self) -> torch.autocast:
        """bfloat16 on a GPU; master weights stay float32."""
        device = self.model.weights.device.type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda")
