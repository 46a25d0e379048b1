"""Which weights a model is to be run with, by the settings. Knows settings; knows nothing of how weights are made."""

from __future__ import annotations

from pathlib import Path

from autobot_llm.engine.quantization.loader import QuantizedModelLoader
from autobot_llm.engine.quantization.online import ONLINE_TYPES
from autobot_llm.engine.quantization.scheme import QuantizationConfig, QuantizationType
from autobot_llm.errors import ConfigurationError
from autobot_llm.providers.base import OnProgress
from autobot_llm.settings import Settings
from autobot_llm.settings.child import child_environment


def quantized_weights(
    settings: Settings, folder: Path, on_progress: OnProgress | None
) -> tuple[Path, QuantizationType]:
    """The folder to load, and what to quantize it to while it is loaded.

    Without a calibration text, types that need none are made at load, in memory; INT8 is rounded without SmoothQuant
    then. With one, and for GPTQ and AWQ, a folder is looked up or made under the cache directory, once.
    """
    kind = QuantizationType.from_setting(settings.quantization_type)
    if kind is QuantizationType.NONE:
        return folder, kind
    path = settings.quantization_calibration
    if path is None and kind in ONLINE_TYPES:
        return folder, kind
    text = None
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(
                f"AUTOBOT_QUANTIZATION_CALIBRATION={str(path)!r} cannot be read: {error}"
            ) from error
    loader = QuantizedModelLoader(
        QuantizationConfig(type=kind),
        calibration_text=text,
        compressor_mode=settings.llm_compressor,
        on_progress=on_progress,
        environ=child_environment({}),
    )
    return loader.load_or_quantize(folder, settings.cache_dir).folder, QuantizationType.NONE
