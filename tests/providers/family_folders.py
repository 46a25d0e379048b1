"""Model folders that write tool calls as each family does: the embedded model's weights under another chat template."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

TINY = Path(__file__).parents[2] / "src" / "autobot_llm" / "assets" / "tiny"

_TURNS = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}CALL{% endfor %}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
_TOOLS = "{% if tools %}<|user|>\nHEAD{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|end|>\n{% endif %}"


def _template(head: str, call: str) -> str:
    return _TOOLS.replace("HEAD", head) + _TURNS.replace("CALL", call)


_CALL = '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
TEMPLATES = {
    "hermes": _template("Answer with <tool_call></tool_call>.\n", f"<tool_call>\n{_CALL}\n</tool_call>"),
    "llama": _template(
        'Answer with {"name": function name, "parameters": dictionary of argument name and its value}.\n',
        _CALL.replace("arguments", "parameters", 1),
    ),
    "mistral": _template(
        "[AVAILABLE_TOOLS]",
        "{% if call.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
        f"[TOOL_CALLS][{_CALL}]",
    ),
    "xml": _template("<tool_call><function=name></function></tool_call>", ""),
}


def family_folder(folder: Path, family: str, *, special_marker: str | None = None) -> Path:
    """`special_marker` becomes a special token, in the place of one that these templates do not use."""
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(TINY / name, folder / name)
    settings = json.loads((TINY / "tokenizer_config.json").read_text())
    settings["chat_template"] = TEMPLATES[family]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    text = (TINY / "tokenizer.json").read_text()
    if special_marker is not None:
        text = text.replace('"<|system|>"', json.dumps(special_marker))
    (folder / "tokenizer.json").write_text(text)
    return folder
