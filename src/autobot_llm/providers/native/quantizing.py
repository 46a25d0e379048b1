"""Quantize a model on order and judge the result: the command line's door to the engine's quantizers.

Knows the steps and what makes a result worth keeping; knows nothing of how weights are rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autobot_llm.engine.quantization.loader import quantize_to
from autobot_llm.engine.quantization.quality import Quality, compare
from autobot_llm.engine.quantization.quantize import QuantizedFolder
from autobot_llm.engine.quantization.scheme import QuantizationConfig, QuantizationType
from autobot_llm.errors import ConfigurationError
from autobot_llm.providers.native.provider import model_folder
from autobot_llm.settings.child import child_environment

TAIL_SHARE = 0.1  # of the calibration text, kept for measuring where no other text is given
# What a type may cost in perplexity before it is called a loss: the bars of the project.
ACCEPTED_CHANGE = {"w8a8": 0.005, "w8": 0.005, "w4": 0.05, "gptq": 0.05, "awq": 0.05, "fp8": 0.008}


@dataclass(frozen=True, slots=True)
class Order:
    """What a user asks for; see the command line's help."""

    model: str
    kind: str
    out: Path | None
    calibration_text: str | None
    evaluation_text: str | None
    samples: int
    length: int
    windows: int
    group_size: int
    alpha: float
    compressor_mode: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was made, how good it is, on which text that was measured, and whether it is worth keeping."""

    made: QuantizedFolder
    quality: Quality | None
    measured_on: str
    verdict: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """One flat-ish document of the report."""
        return {
            **{name: value for name, value in asdict(self.made).items() if name != "scheme"},
            "folder": str(self.made.folder),
            "scheme": self.made.scheme.name,
            "quality": None if self.quality is None else self.quality.as_json(),
            "measured_on": self.measured_on,
            "verdict": list(self.verdict),
        }


def carry_out(order: Order, cache_dir: Path, on_progress: Callable[[str, int, int], None]) -> Outcome:
    """Quantize, measure, judge. Raises ConfigurationError before anything is written for an order that cannot work."""
    source = model_folder(order.model)
    folder = order.out or Path(f"{source.name}-{order.kind}")
    config = QuantizationConfig(
        type=QuantizationType(order.kind),
        smooth_quant_alpha=order.alpha,
        group_size=order.group_size,
        calibration_samples=order.samples,
        calibration_sequence_length=order.length,
    )
    calibration, evaluation, measured_on = _texts(order)
    if config.type.needs_calibration and calibration is None:
        raise ConfigurationError(f"--type {order.kind} needs --calibration FILE; w8, w4 and fp8 need none")
    made = quantize_to(
        source, folder, config, calibration, cache_dir, compressor_mode=order.compressor_mode, on_progress=on_progress,
        environ=child_environment({}),
    )  # fmt: skip
    quality = None
    if evaluation is not None:
        quality = compare(source, folder, evaluation, cache_dir, num_windows=order.windows, on_progress=on_progress)
    return Outcome(made, quality, measured_on, tuple(_verdict(order.kind, made, quality)))


def _texts(order: Order) -> tuple[str | None, str | None, str]:
    """To calibrate with, to measure on, and which text the latter is."""
    if order.evaluation_text is not None:
        return order.calibration_text, order.evaluation_text, "the text of --evaluate"
    if order.calibration_text is None:
        return None, None, "nothing: there was no --evaluate"
    cut = int(len(order.calibration_text) * (1 - TAIL_SHARE))
    where = "the last tenth of the calibration text, which calibration did not read"
    return order.calibration_text[:cut], order.calibration_text[cut:], where


def _verdict(kind: str, made: QuantizedFolder, quality: Quality | None) -> Iterator[str]:
    """What is better and what is worse. Nothing is called better that was not measured to be."""
    share = 1 - made.num_linear_bytes / made.num_linear_bytes_before
    smaller = f"linear weights take {100 * share:.0f} % less"
    if share <= 0:
        smaller = "no smaller than before: not worth keeping"
    if quality is None:
        yield f"{smaller}; its quality was not measured, so nothing is said of it (--evaluate FILE)"
        return
    change, limit = quality.perplexity_change, ACCEPTED_CHANGE[kind]
    if change > limit:
        yield f"worse: perplexity is {100 * change:.2f} % higher, and {100 * limit:.2f} % is what {kind} may cost"
    else:
        yield f"{smaller}, for {100 * change:+.2f} % of perplexity (lossy; {100 * limit:.2f} % is the limit)"
    faster = quality.speedup
    if faster < 0.97:
        yield f"decoding here is slower: {faster:.2f} times the speed"
    elif faster <= 1.03:
        yield "decoding here is as fast as before"
    else:
        yield f"decoding here is {faster:.2f} times as fast"
