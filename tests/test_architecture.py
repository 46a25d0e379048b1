"""The shape of the package: who imports whom, how light an import is, and that the packaging files agree."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
SOURCE = REPOSITORY / "src" / "autobot_llm"
MAX_LINES = 420
MAX_IMPORT_SECONDS = 0.3
ENGINE_LIBRARIES = ("torch", "numpy", "transformers", "tokenizers", "safetensors", "jinja2")
# Settings are read in one place. These two do not read settings: one tells torch's OpenMP how to wait, before torch is
# loaded; the other asks for the name of the compiler, as every build does.
TOUCH_THE_ENVIRONMENT = ("engine/__init__.py", "engine/kernels/cpu/build.py")


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def name_of(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def pyproject() -> dict[str, dict[str, object]]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


def required_names(*extras: str) -> set[str]:
    """Names of the direct dependencies: of the light install, and of these extras."""
    project = pyproject()["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in extras)]  # type: ignore[index]
    names = {re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0] for lines in lists for line in lines}  # type: ignore[attr-defined]
    return {name for name in names if name != "autobot_llm"}


@pytest.mark.parametrize("module", ["autobot_llm", "autobot_llm.server.app", "autobot_llm.cli.main"])
def test_the_gateway_imports_without_the_engine_and_its_libraries(module: str) -> None:
    loaded = python(f"import sys, {module}; print(*sys.modules)").split()
    found = [name for name in loaded if name in ENGINE_LIBRARIES or name.startswith("autobot_llm.engine")]
    assert found == []


def test_importing_the_package_takes_less_than_the_promised_time() -> None:
    # of the processor, so that a busy machine is not taken for a heavy import
    code = "import time; start = time.process_time(); import autobot_llm; print(time.process_time() - start)"
    assert min(float(python(code)) for _ in range(3)) < MAX_IMPORT_SECONDS


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the contracts of pyproject.toml against the sources in `folder`/src."""
    code = "from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True, no_logo=True))"
    return subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, 'src'); {code}"],
        cwd=folder, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_the_import_contracts_hold() -> None:
    done = lint_imports(REPOSITORY)
    assert done.returncode == 0, done.stdout
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("providers/base.py", "import autobot_llm.interface"),
        ("errors.py", "import autobot_llm.settings"),
        ("interface.py", "import autobot_llm.engine.executor"),
        ("engine/sequence.py", "import autobot_llm.types"),
        ("routing.py", "import torch"),
        ("server/app.py", "import numpy"),
        ("helpers.py", ""),
    ],
)
def test_a_forbidden_import_breaks_a_contract(tmp_path: Path, module: str, statement: str) -> None:
    shutil.copytree(SOURCE, tmp_path / "src" / "autobot_llm", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    with (tmp_path / "src" / "autobot_llm" / module).open("a", encoding="utf-8") as file:
        file.write(f"\n\ndef broken() -> None:\n    {statement or 'pass'}\n")
    done = lint_imports(tmp_path)
    assert "1 broken" in done.stdout, done.stdout


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_a_module_is_short_enough_and_says_what_it_does(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    if text:
        assert ast.get_docstring(ast.parse(text)), "a module opens with what it does and what it does not know"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_only_the_settings_read_the_environment(path: Path) -> None:
    if name_of(path).startswith("settings/") or name_of(path) in TOUCH_THE_ENVIRONMENT:
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    reads = [
        node.lineno for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    ]
    assert reads == [], f"{path}: the environment is read in lines {reads}"


def test_every_direct_dependency_is_pinned_once_and_explained() -> None:
    constraints = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8")
    pins = [line.partition("==")[0] for line in constraints.splitlines() if "==" in line]
    explained = (REPOSITORY / "docs" / "dependencies.md").read_text(encoding="utf-8")
    direct = required_names("engine", "llmlingua", "redis", "test", "lint")
    assert len(pins) == len(set(pins))
    assert direct <= set(pins)
    assert {name for name in direct if f"| {name} |" not in explained} == set()


def test_the_package_says_that_it_is_typed_and_carries_its_licence() -> None:
    assert (SOURCE / "py.typed").is_file()
    licence = (REPOSITORY / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


def test_what_is_shipped_beside_the_code_has_a_card_and_stays_small() -> None:
    folders = [folder for folder in (SOURCE / "assets").iterdir() if (folder / "config.json").exists()]
    assert {folder.name for folder in folders} == {"tiny", "tiny-draft", "tiny-eagle3", "tiny-medusa"}
    assert all("CC BY-SA 4.0" in (folder / "MODEL_CARD.md").read_text(encoding="utf-8") for folder in folders)
    assert sum(file.stat().st_size for file in (SOURCE / "assets").rglob("*") if file.is_file()) < 50_000_000
