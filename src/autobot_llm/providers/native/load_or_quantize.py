"""Which weights a model is to be run with, by the settings. Knows settings; knows nothing of how weights are made."""

from __future__ import annotations

import logging
from pathlib import Path

from autobot_llm.engine.quantization.loader import LoadedModel, QuantizedModelLoader
from autobot_llm.engine.quantization.online import ONLINE_TYPES
from autobot_llm.engine.quantization.scheme import QuantizationConfig, QuantizationType
from autobot_llm.errors import ConfigurationError
from autobot_llm.providers.base import OnProgress
from autobot_llm.settings import Settings
from autobot_llm.settings.child import child_environment

log = logging.getLogger(__name__)

# Of AUTOBOT_USE_QUANTIZED_MODELS, which names no type: those that lose least come first.
PREFERRED = (
    QuantizationType.W8A8,
    QuantizationType.FP8,
    QuantizationType.GPTQ,
    QuantizationType.AWQ,
    QuantizationType.W4,
)


def quantized_weights(
    settings: Settings, folder: Path, on_progress: OnProgress | None
) -> tuple[Path, QuantizationType]:
    """The folder to load, and what to quantize it to while it is loaded.

    A variant beside the model comes first. Without a calibration text, types that need none are made at load, in
    memory; INT8 is rounded without SmoothQuant then. With one, and for GPTQ and AWQ, a folder is made under the cache
    directory, once. AUTOBOT_USE_QUANTIZED_MODELS alone takes a variant beside the model, of any type,
    and makes none.
    """
    kind = QuantizationType.from_setting(settings.quantization_type)
    if kind is QuantizationType.NONE:
        return variant_of(settings, folder), kind
    path = settings.quantization_calibration
    text = None if path is None else _read(path)
    loader = QuantizedModelLoader(
        QuantizationConfig(type=kind),
        calibration_text=text,
        compressor_mode=settings.llm_compressor,
        on_progress=on_progress,
        environ=child_environment({}),
    )
    if text is None and kind in ONLINE_TYPES:
        found = loader.find_variant(folder)
        return (folder, kind) if found is None else (_told(folder, found), QuantizationType.NONE)
    return _told(folder, loader.load_or_quantize(folder, settings.cache_dir)), QuantizationType.NONE


def variant_of(settings: Settings, folder: Path) -> Path:
    """The published variant that the settings would have in a folder's place; `folder` where there is none."""
    kind = QuantizationType.from_setting(settings.quantization_type)
    kinds = (kind,) if kind is not QuantizationType.NONE else PREFERRED if settings.use_quantized_models else ()
    for one in kinds:
        if (found := QuantizedModelLoader(QuantizationConfig(type=one)).find_variant(folder)) is not None:
            return _told(folder, found)
    return folder


def _told(folder: Path, found: LoadedModel) -> Path:
    log.info("%s: %s, in %s", folder.name, found.reason, found.folder)
    return found.folder


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"AUTOBOT_QUANTIZATION_CALIBRATION={str(path)!r} cannot be read: {error}") from error
