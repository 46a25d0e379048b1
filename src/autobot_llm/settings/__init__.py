"""Settings: one frozen, validated value made from the command line, the environment, `.env` and the defaults.

Knows every setting's name, type, default and reader; knows nothing of what the readers do with it. This package is
the only reader of the environment. `registry` declares the settings, `about` explains them, `load`
reads them, `rows` shows them.
"""

from __future__ import annotations

from autobot_llm.settings.load import load_settings
from autobot_llm.settings.meaning import ProviderName
from autobot_llm.settings.registry import SETTINGS, CloudSettings, Setting, Settings, tenant_of
from autobot_llm.settings.rows import SettingRow, describe_settings, ineffective_settings, settings_page

__all__ = [
    "SETTINGS",
    "CloudSettings",
    "ProviderName",
    "Setting",
    "SettingRow",
    "Settings",
    "describe_settings",
    "ineffective_settings",
    "load_settings",
    "settings_page",
    "tenant_of",
]
