"""Write the page docs/settings.md to standard output."""

import sys

from autobot_llm.settings.rows import settings_page

sys.stdout.write(settings_page())
