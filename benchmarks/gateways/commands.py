"""How each gateway is started and set up. Knows their options; measures nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from pathlib import Path

from gateways import wire
from gateways.processes import BENCHMARKS, Command, clean_environment

KEY = "sk-the-key-of-the-benchmark"
LITELLM_VERSIONS = ("litellm[proxy]>=1.106,<1.107", "litellm[proxy]")  # the first that installs
LITELLM_ENVIRONMENT = BENCHMARKS.parent / "build" / "litellm"
_AUTHORIZATION = {"authorization": f"Bearer {KEY}"}
_START = "import sys; from autobot_llm.cli.main import main; sys.exit(main())"
_ONE_TRY = {"AUTOBOT_CLOUD_RETRY_MAX_ATTEMPTS": "0"}


def ours(upstream_port: int, *, probed: bool = False) -> Command:
    """Our server, with its defaults and an API key, in front of an OpenAI-compatible provider.

    `probed` has it tell its number of tasks (`soak`), and repeat nothing: of requests that wait for their next try only
    failures are left in the end, and then the provider is not asked any more.
    """
    start = [sys.executable, "-m", "gateways.probed"] if probed else [sys.executable, "-c", _START]
    return Command(
        name="autobot_llm",
        arguments=[*start, "serve"],
        environment={
            "AUTOBOT_LLM_PROVIDER": "openai",
            "AUTOBOT_OPENAI_ENDPOINT": f"http://127.0.0.1:{upstream_port}/v1",
            "AUTOBOT_API_KEYS": KEY,
            "AUTOBOT_PORT": "{port}",
            "OPENAI_API_KEY": "sk-of-the-upstream",
            **({"PYTHONPATH": str(BENCHMARKS)} | _ONE_TRY if probed else {}),
        },
        headers=_AUTHORIZATION,
    )


def litellm(upstream_port: int, environment: Path, folder: Path, *, caches: bool = False) -> Command:
    """LiteLLM's proxy as it is fairest to it: no database, no retries, quiet, one worker, its own price list.

    `caches` has it keep answers in its memory, which it does not unasked.
    """
    # YAML includes JSON.
    config = folder / ("litellm-cache.yaml" if caches else "litellm.yaml")
    settings: dict[str, object] = {"num_retries": 0, "telemetry": False}
    if caches:
        settings |= {"cache": True, "cache_params": {"type": "local"}}
    parameters = {
        "model": f"openai/{wire.MODEL}",
        "api_base": f"http://127.0.0.1:{upstream_port}/v1",
        "api_key": "sk-of-the-upstream",
    }
    config.write_text(
        json.dumps(
            {
                "model_list": [{"model_name": wire.MODEL, "litellm_params": parameters}],
                "litellm_settings": settings,
                "router_settings": {"num_retries": 0},
                "general_settings": {"master_key": KEY},
            }
        )
    )
    options = ["--config", str(config), "--host", "127.0.0.1", "--port", "{port}", "--num_workers", "1"]
    return Command(
        name="LiteLLM",
        arguments=[str(environment / "bin" / "litellm"), *options],
        environment={
            "PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "LITELLM_LOG": "ERROR",
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        },
        headers=_AUTHORIZATION,
    )


def install_litellm(environment: Path) -> str:
    """Make LiteLLM's own virtual environment where there is none, and return its version.

    Raises RuntimeError with pip's last words where it cannot be installed.
    """
    python = environment / "bin" / "python"
    if not (environment / "bin" / "litellm").exists():
        print(f"installing LiteLLM into {environment}: a minute or two", file=sys.stderr, flush=True)
        venv.create(environment, with_pip=True, clear=True)
        for wanted in LITELLM_VERSIONS:
            command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wanted]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                break
        else:
            raise RuntimeError(f"LiteLLM cannot be installed: {done.stderr[-1500:]}")
    ask = "import importlib.metadata; print(importlib.metadata.version('litellm'))"
    return subprocess.check_output([str(python), "-c", ask], text=True, env=clean_environment()).strip()
