"""What the planner says of a model, beside what a process really allocates for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from autobot_llm.cli.main import cli
from autobot_llm.errors import ConfigurationError
from autobot_llm.tuning.plan import card_named, make_plan, recommend

GIB = 2**30
MISTRAL = {
    "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-5, "torch_dtype": "bfloat16",
}  # fmt: skip
# a few hundred megabytes, so that a process's own needs do not hide them
MIDDLE = {**MISTRAL, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12, "vocab_size": 8192,
          "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 8192}  # fmt: skip


def folder_of(tmp_path: Path, config: dict[str, object]) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_mistral_7b_is_as_large_as_it_is_known_to_be(tmp_path: Path) -> None:
    plan = make_plan(folder_of(tmp_path, MISTRAL), 24 * GIB)
    assert plan.num_parameters == 7_241_732_096
    whole, _, eight, eight_bit_cache, four, _ = plan.rows
    assert whole.weight_bytes == 14_483_464_192
    assert whole.kv_bytes_per_token * 4096 == GIB // 2  # 8 heads for keys and values
    assert eight.weight_bytes < 7.6e9 and four.weight_bytes < 4.3e9
    assert eight_bit_cache.kv_bytes_per_token < 0.52 * whole.kv_bytes_per_token
    assert whole.max_context == 32768 and whole.sequences[8192] == 6


MEASURE = """
import json, sys
from pathlib import Path
import torch
from autobot_llm.engine.attention.sdpa import SdpaAttention
from autobot_llm.engine.models.config import load_config
from autobot_llm.engine.models.shapes import expected_shapes
from autobot_llm.engine.quantization.rounding import round_to_nearest
from autobot_llm.engine.quantization.scheme import QuantizationConfig, QuantizationType, scheme_of

def resident():
    import ctypes, gc, psutil
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what rounding needed meanwhile goes back to the system
    return psutil.Process().memory_info().rss

folder, kind, num_blocks = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
config = load_config(folder)
scheme = None if kind == "none" else scheme_of(QuantizationConfig(type=QuantizationType(kind)))
torch.set_num_threads(1)
if scheme is not None:
    round_to_nearest(torch.ones(128, 128), scheme, torch.bfloat16, search=False)
before = resident()
tensors = []
for name, shape in expected_shapes(config).items():
    tensor = torch.ones(shape, dtype=torch.bfloat16)
    if scheme is not None and len(shape) == 2 and name.startswith("model.layers."):
        for rows in tensor.split(256):  # so that what rounding needs meanwhile is little
            quantized = round_to_nearest(rows, scheme, torch.bfloat16, search=False)
            tensors += [quantized.stored.clone(), quantized.scales_OG.clone()]
            del quantized, rows
    else:
        tensors.append(tensor)
    del tensor
with_weights = resident()
cpu = torch.device("cpu")
attention = SdpaAttention(config, num_blocks=num_blocks, block_size=16, dtype=torch.bfloat16, device=cpu)
attention.storage.numbers_2LNKD.fill_(1)
print(json.dumps([with_weights - before, resident() - with_weights]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is told this way on Linux")
@pytest.mark.parametrize(("kind", "row"), [("none", 0), ("w8a8", 2), ("gptq", 4)])
def test_weights_and_cache_take_what_was_planned_within_five_per_cent(tmp_path: Path, kind: str, row: int) -> None:
    folder, num_blocks = folder_of(tmp_path, MIDDLE), 512
    planned = make_plan(folder, 24 * GIB).rows[row]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folder), kind, str(num_blocks)],
        capture_output=True, text=True, check=False,
        env={"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "PATH": ""}, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    weights, cache = json.loads(done.stdout)
    assert weights == pytest.approx(planned.weight_bytes, rel=0.05)
    assert cache == pytest.approx(num_blocks * 16 * planned.kv_bytes_per_token, rel=0.05)


def test_the_engines_own_plan_gives_the_same_cache(tmp_path: Path) -> None:
    from autobot_llm.engine.memory import DeviceMemory, MemoryDemand, plan_cache
    from autobot_llm.tuning.plan.fit import CONTEXT_BYTES

    row = make_plan(folder_of(tmp_path, MISTRAL), 24 * GIB).rows[0]
    demand = MemoryDemand(
        weight_bytes=row.weight_bytes, activation_bytes=row.activation_bytes, graph_bytes=row.graph_bytes,
        block_bytes=16 * row.kv_bytes_per_token, block_size=16, max_model_len=32768, max_num_seqs=128, utilization=0.9,
    )  # fmt: skip
    engine = plan_cache(DeviceMemory(total=24 * GIB, free=24 * GIB - CONTEXT_BYTES), demand)
    assert engine.num_bytes == row.cache_bytes


@pytest.mark.parametrize("name", ["RTX 4090", "4090", "rtx-4090", "NVIDIA GeForce RTX 4090"])
def test_a_card_is_known_however_it_is_spelt(name: str) -> None:
    assert card_named(name).name == "RTX4090"


def test_an_unknown_card_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(ConfigurationError, match=r"--gpu 'Voodoo2': expected T4, .*H100.*, or --gpu-memory"):
        card_named("Voodoo2")


def test_recommendations_fit_the_card(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, MISTRAL)
    native, vllm, ollama = recommend(make_plan(folder, 24 * GIB), card_named("3090"))
    assert native.text == "autobot-llm serve --model model"
    assert "--quantization" not in vllm.text
    assert ollama.text.startswith("MODEL-fp16")
    native, vllm, ollama = recommend(make_plan(folder, 12 * GIB), card_named("4070"))
    assert native.text == "AUTOBOT_QUANTIZATION_TYPE=fp8 autobot-llm serve --model model --max-model-len 19968"
    assert "--quantization fp8" in vllm.text and "--max-model-len" in vllm.text
    assert ollama.text == "MODEL-q8_0 with num_ctx=8192"
    _, vllm, _ = recommend(make_plan(folder, 12 * GIB), card_named("3060"))
    assert "vllm serve model-w8a8" in vllm.text and "no fp8" in vllm.reason
    _, vllm, ollama = recommend(make_plan(folder, 8 * GIB))
    assert "vllm serve model-gptq" in vllm.text
    assert ollama.text == "MODEL-q4_K_M with num_ctx=8192"
    assert [one.text for one in recommend(make_plan(folder, 3 * GIB))] == ["", "", ""]


def test_a_window_holds_more_and_longer_sequences(tmp_path: Path) -> None:
    """A sequence of 32,768 tokens looks back 4,096, and a quarter of that is read at a time."""
    whole = make_plan(folder_of(tmp_path, MISTRAL), 24 * GIB)
    asked = make_plan(tmp_path / "model", 24 * GIB, sliding_window=4096)
    assert (whole.window, asked.window, asked.is_window_lossy) == (0, 4096, True)
    for before, after in zip(whole.rows, asked.rows, strict=True):
        assert after.cache_bytes == before.cache_bytes
        num_kept = -(-(4095 + 15 + 1024) // 16) * 16
        assert after.sequences[32768] == after.cache_bytes // after.kv_bytes_per_token // num_kept
        assert after.sequences[32768] >= 5 * before.sequences[32768]
        assert after.sequences[2048] == before.sequences[2048]
    assert make_plan(tmp_path / "model", 20 * GIB, sliding_window=4096).rows[0].max_context == 32768
    assert 0 < make_plan(tmp_path / "model", 20 * GIB).rows[0].max_context < 32768
    assert "--kv-sliding-window 4096" in recommend(asked)[0].text
    (tmp_path / "model" / "config.json").write_text(json.dumps({**MISTRAL, "sliding_window": 4096}))
    own = make_plan(tmp_path / "model", 24 * GIB)
    assert own.rows == asked.rows and not own.is_window_lossy
    with pytest.raises(ConfigurationError, match="AUTOBOT_KV_SLIDING_WINDOW=7: expected 0 "):
        make_plan(tmp_path / "model", 24 * GIB, sliding_window=7)


def test_the_command_prints_a_table_and_json(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, MISTRAL)
    done = CliRunner().invoke(cli, ["plan", str(folder / "config.json"), "--gpu-memory", "8GiB"])
    assert done.exit_code == 0, done.output
    assert "4-bit" in done.stdout and "7.24B parameters" in done.stdout
    done = CliRunner().invoke(cli, ["plan", str(folder), "--gpu", "H100", "--json"])
    told = json.loads(done.stdout)
    assert told["card"] == "H100" and len(told["rows"]) == 6
    assert [one["engine"] for one in told["recommendations"]] == ["native", "vllm", "ollama"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "either --gpu NAME or --gpu-memory SIZE"),
        (("--gpu-memory", "much"), "--gpu-memory 'much': expected a size"),
    ],
)
def test_a_mistake_is_told_by_name(tmp_path: Path, arguments: tuple[str, ...], complaint: str) -> None:
    done = CliRunner().invoke(cli, ["plan", str(folder_of(tmp_path, MISTRAL)), *arguments])
    assert done.exit_code != 0
    assert complaint in (str(done.exception) if isinstance(done.exception, ConfigurationError) else done.output)


def test_planning_needs_no_torch(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, MISTRAL)
    code = (
        "import sys; from autobot_llm.cli.main import main; "
        f"main(['plan', {str(folder)!r}, '--gpu', 'L4']); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
