"""Find a quantized variant of a model, or make one. Knows where to look and in which order; computes nothing itself.

A variant that is known and there comes first, then one that was made before, then one is made now: by llm-compressor
where its environment is there or may be made, else by our own quantizers. The result says which.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.quantization import compressor
from autobot_llm.engine.quantization.calibration import sequences_of
from autobot_llm.engine.quantization.quantize import QuantizedFolder, describe, quantize_folder
from autobot_llm.engine.quantization.registry import variants_of
from autobot_llm.engine.quantization.scheme import QuantizationConfig, QuantizationType
from autobot_llm.engine.tokenizer import Tokenizer
from autobot_llm.errors import ConfigurationError, ModelLoadError

OnProgress = Callable[[str, int, int], None]
Origin = Literal["unquantized", "already quantized", "known variant", "cache", "quantized now"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A folder to run. `by` made it ("autobot_llm", "llm-compressor", else whoever published it); `reason` says why."""

    folder: Path
    origin: Origin
    by: str
    reason: str


class Hub(Protocol):
    """Where published models are."""

    def fetch(self, name: str) -> Path | None:
        """The folder of a model, downloaded if need be; None where there is none or nobody can be asked."""
        ...


class LocalHub:
    """Variants that lie beside the model's own folder, under its name with a suffix."""

    def fetch(self, name: str) -> Path | None:
        folder = Path(name).expanduser()
        return folder if (folder / "config.json").is_file() else None


class QuantizedModelLoader:
    """Loads or makes quantized models of one configuration.

    `calibration_text` is what calibrated types read. `compressor_mode`: "off" uses our own quantizers; "installed"
    uses llm-compressor where its environment was made before; "install" makes it. `hub` is asked for known variants.
    `environ` is what llm-compressor's process sees; None: all that this one does.
    """

    def __init__(
        self,
        config: QuantizationConfig | None = None,
        *,
        calibration_text: str | None = None,
        compressor_mode: Literal["off", "installed", "install"] = "off",
        hub: Hub | None = None,
        environ: Mapping[str, str] | None = None,
        on_progress: OnProgress | None = None,
    ) -> None:
        self.config = config or QuantizationConfig()
        self._text = calibration_text
        self._mode = compressor_mode
        self._hub = hub or LocalHub()
        self._environ = environ
        self._on_progress = on_progress

    def load_or_quantize(self, model: str | Path, cache_dir: Path) -> LoadedModel:
        """The folder of a quantized variant of `model`, a folder or a name that the hub knows.

        Raises ConfigurationError where `model` is neither, or calibration needs a text; ModelLoadError for a folder
        that is no model.
        """
        kind = self.config.type
        if kind is QuantizationType.NONE:
            return LoadedModel(self._source(model), "unquantized", "", "no quantization was asked for")
        if (variant := self.find_variant(model)) is not None:
            return variant
        source = self._source(model)
        folder = self._cached(source, cache_dir)
        if (folder / "config.json").is_file():
            by = _maker(folder)
            return LoadedModel(folder, "cache", by, f"quantized before by {by}")
        if kind.needs_calibration and self._text is None:
            raise ConfigurationError(
                f"{kind.value} needs a text to calibrate with: AUTOBOT_QUANTIZATION_CALIBRATION; w4 and fp8 need none"
            )
        made = quantize_to(
            source, folder, self.config, self._text, cache_dir,
            compressor_mode=self._mode, on_progress=self._on_progress, environ=self._environ,
        )  # fmt: skip
        return LoadedModel(folder, "quantized now", made.by, f"quantized now by {made.by}")

    def find_variant(self, model: str | Path) -> LoadedModel | None:
        """A published variant of the type, or the model itself where it is quantized."""
        kind, source = self.config.type, Path(model).expanduser()
        if source.is_dir() and (stored := load_config(source).quantization) is not None:
            return LoadedModel(source, "already quantized", "its publisher", f"the folder is {stored.scheme.name}")
        for name in variants_of(str(model), kind):
            if (found := self._hub.fetch(name)) is not None and self._fits(found):
                return LoadedModel(found, "known variant", "its publisher", f"{name} is a known {kind.value} variant")
        return None

    def _cached(self, source: Path, cache_dir: Path) -> Path:
        """Where a model that was made of `source` is kept."""
        return cache_dir / "quantized" / f"{source.name}-{self.config.type.value}-{self._key(source)}"

    def _source(self, model: str | Path) -> Path:
        source = Path(model).expanduser()
        if source.is_dir():
            return source
        if (found := self._hub.fetch(str(model))) is not None:
            return found
        raise ConfigurationError(f"model {str(model)!r}: expected a model folder, or a name that the hub knows")

    def _fits(self, folder: Path) -> bool:
        """Whether a variant is quantized in a way that we read."""
        try:
            return load_config(folder).quantization is not None
        except ModelLoadError:
            return False

    def _key(self, source: Path) -> str:
        """Of everything that the result depends on."""
        files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(source.iterdir()) if p.is_file()]
        text = hashlib.blake2b((self._text or "").encode("utf-8", "replace"), digest_size=8).hexdigest()
        told = json.dumps([str(source.resolve()), files, asdict(self.config), text, self._mode])
        return hashlib.blake2b(told.encode(), digest_size=6).hexdigest()


def quantize_to(
    source: Path,
    folder: Path,
    config: QuantizationConfig,
    calibration_text: str | None,
    cache_dir: Path,
    *,
    compressor_mode: str = "off",
    on_progress: OnProgress | None = None,
    environ: Mapping[str, str] | None = None,
) -> QuantizedFolder:
    """Quantize with llm-compressor where the mode asks for it and it can, else with our own quantizers.

    The result's `by` says which, and why where llm-compressor was asked for and did not do it.
    """
    sequences_BL = None
    if config.type.reads_calibration and calibration_text is not None:
        sequences_BL = sequences_of(
            calibration_text,
            Tokenizer.from_folder(source),
            num_sequences=config.calibration_samples,
            length=min(config.calibration_sequence_length, load_config(source).max_position_embeddings),
        )
    why_ours = ""
    if compressor_mode != "off":
        try:
            return _by_llm_compressor(
                source, folder, config, sequences_BL, cache_dir, compressor_mode, on_progress, environ
            )
        except compressor.CompressorError as error:
            why_ours = f" ({error.message})"
    made = quantize_folder(source, folder, config, sequences_BL=sequences_BL, on_progress=on_progress)
    _note_maker(folder, made.by)
    return replace(made, by=made.by + why_ours)


def _by_llm_compressor(
    source: Path,
    folder: Path,
    config: QuantizationConfig,
    sequences_BL: torch.Tensor | None,
    cache_dir: Path,
    mode: str,
    on_progress: OnProgress | None,
    environ: Mapping[str, str] | None,
) -> QuantizedFolder:
    if (reason := compressor.why_not(config)) is not None:
        raise compressor.CompressorError(reason)
    start = time.monotonic()
    if folder.exists():
        raise ConfigurationError(f"{folder} exists already: name another folder, or remove it")
    tell = on_progress or (lambda what, done, total: None)
    if mode == "install" and not compressor.is_installed(cache_dir):
        tell("llm-compressor is being installed, once: 1.5 GB", 0, 0)
    python = compressor.environment(cache_dir, may_install=mode == "install", environ=environ)
    tell("by llm-compressor", 0, 0)
    sequences = sequences_BL.tolist() if sequences_BL is not None and config.type.needs_calibration else []
    compressor.compress(python, source, folder, config, sequences, environ)
    _note_maker(folder, LLM_COMPRESSOR)
    return describe(source, folder, by=LLM_COMPRESSOR, seconds=time.monotonic() - start)


LLM_COMPRESSOR = "llm-compressor"
_MAKER = "quantized_by.json"


def _note_maker(folder: Path, by: str) -> None:
    (folder / _MAKER).write_text(json.dumps({"by": by, "at": int(time.time())}) + "\n")


def _maker(folder: Path) -> str:
    try:
        found: Any = json.loads((folder / _MAKER).read_text())
        return str(found["by"])
    except (OSError, ValueError, KeyError):
        return "somebody who left no note"
