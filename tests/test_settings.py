"""Settings: every name is read, checked, explained, and shown with where it came from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobot_llm.errors import ConfigurationError
from autobot_llm.settings import (
    SETTINGS,
    CloudSettings,
    Setting,
    Settings,
    describe_settings,
    ineffective_settings,
    load_settings,
    settings_page,
)
from autobot_llm.settings.about import ABOUT
from autobot_llm.settings.values import BadValue, Size, check, parse_text, show

NO_FILE = Path("does-not-exist.env")
FAMILIES = ("models", "clouds")
SCALARS = [setting for setting in SETTINGS if setting.field not in FAMILIES]

# One accepted text with its value, other than the default, and one refused text, for every setting.
EXAMPLES: dict[str, tuple[str, Any, str | None]] = {
    "provider": ("ollama", "ollama", "openrouter"),
    "default_model": ("/models/one", "/models/one", None),
    "timeout": ("12.5", 12.5, "-1"),
    "ollama_endpoint": ("http://box:1", "http://box:1", "box:1"),
    "ollama_keep_alive": ("-1m", "-1m", "30"),
    "vllm_endpoints": ("http://a, https://b", ("http://a", "https://b"), "http://a,b"),
    "vllm_api_key": ("sk-3", "sk-3", None),
    "openai_endpoint": ("https://o/v1", "https://o/v1", "ftp://o"),
    "anthropic_endpoint": ("https://a", "https://a", "https://"),
    "openai_api_key": ("sk-1", "sk-1", None),
    "anthropic_api_key": ("sk-2", "sk-2", None),
    "host": ("0.0.0.0", "0.0.0.0", None),
    "port": ("0", 0, "65536"),
    "api_keys": ("a, b", ("a", "b"), ","),
    "max_body_bytes": ("2MiB", 2 * 2**20, "2XB"),
    "shutdown_grace": ("0", 0.0, "-1"),
    "log_level": ("DEBUG", "debug", "loud"),
    "device": ("cpu", "cpu", "tpu"),
    "compiled_step": ("off", "off", "maybe"),
    "cpu_threads": ("2", 2, "0"),
    "max_model_len": ("1024", 1024, "0"),
    "max_queued_requests": ("5", 5, "0"),
    "max_num_seqs": ("8", 8, "1.5"),
    "max_num_batched_tokens": ("512", 512, "many"),
    "workload": ("batch", "batch", "fast"),
    "max_waiting_time_ms": ("12.5", 12.5, "0"),
    "scheduling_policy": ("Priority", "priority", "lifo"),
    "preemption": ("swap", "swap", "kill"),
    "swap_memory": ("1GiB", 2**30, "-1"),
    "kv_cache_memory": ("512MB", 512_000_000, "0"),
    "gpu_memory_utilization": ("0.5", 0.5, "1.1"),
    "prefix_caching": ("no", False, "perhaps"),
    "cached_prefixes": (
        '["You are kind.", "Be brief, \u00e4."]',
        ("You are kind.", "Be brief, \u00e4."),
        "You are kind.",
    ),
    "warm_prefixes": ("no", False, "-"),
    "cache_dir": ("/tmp/x", Path("/tmp/x"), "~nobody-of-this-name/x"),
    "attention_backend": ("triton", "triton", "magic"),
    "cuda_graphs": ("on", "on", "2"),
    "kv_cache_dtype": ("int8", "int8", "int9"),
    "kv_sliding_window": ("4096", 4096, "-1"),
    "kv_heavy_hitters": ("0.5", 0.5, "1.5"),
    "speculation_enabled": ("0", False, "2"),
    "speculation_method": ("ngram", "ngram", "guess"),
    "speculation_draft_model": ("tiny-draft", "tiny-draft", None),
    "speculation_heads": ("/tmp/heads", Path("/tmp/heads"), "~nobody-of-this-name/x"),
    "speculation_num_tokens": ("3", 3, "65"),
    "speculation_use_ngram": ("false", False, "n"),
    "speculation_min_acceptance_rate": ("0.6", 0.6, "1.01"),
    "quantization_type": ("gptq", "gptq", "int3"),
    "quantization_calibration": ("/text.txt", Path("/text.txt"), None),
    "llm_compressor": ("install", "install", "maybe"),
    "use_quantized_models": ("on", True, "y es"),
    "vllm_multi_step": ("4", 4, "0"),
    "vllm_prefix_caching": ("off", False, "-"),
    "vllm_async_output": ("off", False, "-"),
    "cloud_connection_pool_size": ("7", 7, "0"),
    "cloud_connection_max_age": ("12.5", 12.5, "0"),
    "cloud_http_version": ("1.1", "1.1", "3"),
    "cloud_warm_up": ("yes", True, "perhaps"),
    "https_proxy": ("http://u:p@box:3128", "http://u:p@box:3128", "socks5://box:1080"),
    "http_proxy": ("box:3128", "box:3128", "https://box"),
    "no_proxy": ("a.example, 10.0.0.0/8", ("a.example", "10.0.0.0/8"), ","),
    "cloud_batch_window_ms": ("0", 0.0, "-0.1"),
    "cloud_max_batch_size": ("3", 3, "0"),
    "cloud_retry_max_attempts": ("0", 0, "-1"),
    "cloud_max_queued_requests": ("5", 5, "-1"),
    "batch_dir": ("/tmp/batches", Path("/tmp/batches"), "~nobody-of-this-name/x"),
    "cloud_rate_limits": ("o/m 5rpm 100tpm, *  9tpm", ("o/m 5rpm 100tpm", "*  9tpm"), "o/m 0rpm"),
    "cloud_batch_completions": ("true", True, "maybe"),
    "cloud_hedging": ("all", "all", "some"),
    "cloud_prices": ("/tmp/prices.json", Path("/tmp/prices.json"), "~nobody-of-this-name/x"),
    "fallbacks": ("a > b, *>c/d", ("a > b", "*>c/d"), "a >"),
    "cloud_budget_per_day": ("1.5", 1.5, "0"),
    "cloud_budget_per_month": ("20", 20.0, "inf"),
    "prompt_compression_enabled": ("yes", True, "2"),
    "prompt_compression_ratio": ("0.5", 0.5, "0"),
    "cache_enabled": ("no", False, "2"),
    "cache_l1_size": ("0", 0, "-1"),
    "cache_l2_ttl": ("1", 1.0, "nan"),
    "redis_url": ("redis://h:1/0", "redis://h:1/0", "http://h"),
    "embedding_cache_size": ("0", 0, "-1"),
    "embedding_cache_ttl": ("60", 60.0, "0"),
    "semantic_cache_threshold": ("0.95", 0.95, "1.5"),
}


def load(environ: dict[str, str] | None = None, **more: Any) -> Settings:
    return load_settings(**{"environ": environ or {}, "env_file": None, **more})


def test_every_field_of_settings_is_in_the_registry() -> None:
    about_settings = {"sources", "warnings"}
    assert {*ABOUT} == {*Settings.__struct_fields__} - about_settings
    assert {*EXAMPLES} == {setting.field for setting in SCALARS}
    assert len({setting.variable for setting in SETTINGS}) == len(SETTINGS)


@pytest.mark.parametrize("setting", SCALARS, ids=lambda setting: setting.field)
def test_every_setting_is_read_from_its_variable(setting: Setting) -> None:
    text, value, _ = EXAMPLES[setting.field]
    settings = load({setting.variable: f" {text} "})
    assert getattr(settings, setting.field) == value != setting.default
    assert settings.sources == {setting.variable: "environment"}
    assert settings.warnings == ()


@pytest.mark.parametrize(
    "setting", [one for one in SCALARS if EXAMPLES[one.field][2] is not None], ids=lambda setting: setting.field
)
def test_a_bad_value_names_the_variable_and_what_is_accepted(setting: Setting) -> None:
    bad = EXAMPLES[setting.field][2]
    assert bad is not None
    with pytest.raises(ConfigurationError) as refusal:
        load({setting.variable: bad})
    shown = "********" if setting.about.secret else repr(bad)
    assert str(refusal.value).startswith(f"{setting.variable}={shown}: expected ")


def test_the_accepted_values_are_listed_in_words() -> None:
    with pytest.raises(ConfigurationError) as refusal:
        load({"AUTOBOT_KV_CACHE_DTYPE": "int9"})
    assert str(refusal.value) == "AUTOBOT_KV_CACHE_DTYPE='int9': expected auto, int8, fp8 or float16"


def test_a_choice_that_may_be_unset_lists_its_values_too() -> None:
    with pytest.raises(ConfigurationError) as refusal:
        load({"AUTOBOT_SCHEDULING_POLICY": "lifo"})
    assert str(refusal.value) == "AUTOBOT_SCHEDULING_POLICY='lifo': expected fcfs, priority or off"
    assert load({"AUTOBOT_SCHEDULING_POLICY": "off"}).scheduling_policy is None


def test_texts_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prefixes.json"
    path.write_text('["First,\\nwith two lines.", "Second."]', encoding="utf-8")
    assert load({"AUTOBOT_CACHED_PREFIXES": f"@{path}"}).cached_prefixes == ("First,\nwith two lines.", "Second.")


@pytest.mark.parametrize("content", ["", "First.", '"First."', "[1]", '[""]', '{"a": "b"}', "\xff"])
def test_a_file_that_holds_no_texts_is_refused_with_its_name(tmp_path: Path, content: str) -> None:
    path = tmp_path / "prefixes.json"
    path.write_text(content, encoding="latin-1")
    for name in (path, tmp_path, tmp_path / "missing.json"):
        with pytest.raises(ConfigurationError) as refusal:
            load({"AUTOBOT_CACHED_PREFIXES": f"@{name}"})
        assert str(refusal.value) == (
            f"AUTOBOT_CACHED_PREFIXES='@{name}': "
            "expected a JSON list of texts, or @ and the path of a file that holds one"
        )


def test_all_bad_values_are_reported_at_once() -> None:
    with pytest.raises(ConfigurationError) as refusal:
        load({"AUTOBOT_PORT": "x", "AUTOBOT_DEVICE": "tpu"}, overrides={"timeout": -3})
    assert sorted(str(refusal.value).splitlines()) == [
        "AUTOBOT_DEVICE='tpu': expected auto, cpu or cuda",
        "AUTOBOT_LLM_TIMEOUT=-3 (command line): expected a number above 0, or off",
        "AUTOBOT_PORT='x': expected an integer from 0 to 65535",
    ]


@pytest.mark.parametrize("setting", SCALARS, ids=lambda setting: setting.field)
def test_a_shown_value_can_be_set_again(setting: Setting) -> None:
    value = EXAMPLES[setting.field][1]
    assert parse_text(setting.kind, show(setting.kind, value)) == value


@given(st.integers(min_value=1, max_value=2**62))
def test_a_shown_size_can_be_read_again(num_bytes: int) -> None:
    assert parse_text(Size, show(Size, num_bytes)) == num_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("16", 16), ("16B", 16), ("16KB", 16_000), ("16 mib", 16 * 2**20), ("1.5GiB", 3 * 2**29), ("2g", 2 * 10**9)],
)
def test_sizes_take_decimal_and_binary_units(text: str, num_bytes: int) -> None:
    assert parse_text(Size, text) == num_bytes


@given(st.text())
def test_no_text_breaks_the_reading_of_a_value(text: str) -> None:
    for setting in SCALARS:
        try:
            value = parse_text(setting.kind, text)
        except BadValue:
            continue
        assert check(setting.kind, value) == value


def test_the_command_line_beats_the_environment_beats_the_file_beats_the_default(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("AUTOBOT_PORT=1\nAUTOBOT_HOST=file\nAUTOBOT_DEVICE=cpu\n")
    environ = {"AUTOBOT_PORT": "2", "AUTOBOT_HOST": "environment"}
    settings = load_settings(environ=environ, env_file=env_file, overrides={"port": 3, "host": None})
    assert (settings.port, settings.host, settings.device, settings.workload) == (3, "environment", "cpu", "mixed")
    assert settings.sources == {
        "AUTOBOT_PORT": "command line",
        "AUTOBOT_HOST": "environment",
        "AUTOBOT_DEVICE": ".env",
    }


def test_only_the_value_that_wins_has_to_be_right() -> None:
    assert load({"AUTOBOT_PORT": "wrong"}, overrides={"port": "9000"}).port == 9000


def test_off_unsets_a_value_of_a_weaker_source(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("AUTOBOT_LLM_TIMEOUT=5\n")
    assert load_settings(environ={}, env_file=env_file).timeout == 5
    assert load_settings(environ={"AUTOBOT_LLM_TIMEOUT": "off"}, env_file=env_file).timeout is None
    assert load_settings(environ={"AUTOBOT_LLM_TIMEOUT": ""}, env_file=env_file).timeout == 5


def test_an_override_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"unknown setting 'prot'; did you mean port\?"):
        load(overrides={"prot": 1})


def test_the_model_of_a_type_is_read_for_any_type(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("AUTOBOT_CHAT_MODEL=weak\nAUTOBOT_MY_TASK_MODEL=m\n")
    settings = load_settings(environ={"AUTOBOT_CHAT_MODEL": "strong"}, env_file=env_file)
    assert settings.models == {"chat": "strong", "my_task": "m"}
    rows = {row.variable: row for row in describe_settings(settings)}
    assert (rows["AUTOBOT_CHAT_MODEL"].value, rows["AUTOBOT_CHAT_MODEL"].source) == ("strong", "environment")
    assert rows["AUTOBOT_MY_TASK_MODEL"].source == ".env"


def test_a_near_miss_of_the_default_model_is_pointed_out() -> None:
    (warning,) = load({"AUTOBOT_DEFAULT_MODEL": "x"}).warnings
    assert "did you mean AUTOBOT_DEFAULT_LLM_MODEL?" in warning


def test_named_clouds_are_read_and_need_an_endpoint() -> None:
    settings = load({"AUTOBOT_CLOUD_FAST_ONE_ENDPOINT": "https://f/v1", "AUTOBOT_CLOUD_FAST_ONE_API_KEY": "k"})
    assert settings.clouds == {"fast_one": CloudSettings(endpoint="https://f/v1", api_key="k")}
    with pytest.raises(ConfigurationError, match="AUTOBOT_CLOUD_X_API_KEY is set without AUTOBOT_CLOUD_X_ENDPOINT"):
        load({"AUTOBOT_CLOUD_X_API_KEY": "k"})
    with pytest.raises(ConfigurationError, match="AUTOBOT_CLOUD_X_ENDPOINT='x': expected an address"):
        load({"AUTOBOT_CLOUD_X_ENDPOINT": "x"})


def test_an_unknown_name_is_reported_with_the_one_that_was_meant(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("AUTOBOT_FROBNICATE=1\nOTHER=1\n")
    settings = load_settings(environ={"AUTOBOT_CACH_ENABLED": "1", "PATH": "/bin"}, env_file=env_file)
    assert settings.warnings == (
        "unknown setting AUTOBOT_CACH_ENABLED; did you mean AUTOBOT_CACHE_ENABLED?",
        "unknown setting AUTOBOT_FROBNICATE (.env)",
    )


def test_one_api_key_may_be_given_under_the_short_name_but_not_beside_the_long_one() -> None:
    assert load({"AUTOBOT_API_KEY": "a"}).api_keys == ("a",)
    with pytest.raises(ConfigurationError, match="are both set"):
        load({"AUTOBOT_API_KEY": "a", "AUTOBOT_API_KEYS": "b"})


def test_a_missing_env_file_is_no_error() -> None:
    assert load_settings(environ={}, env_file=NO_FILE).sources == {}


def test_env_file_values_are_taken_as_they_stand(tmp_path: Path) -> None:
    env_file = tmp_path / ".env"
    env_file.write_text("\ufeffexport AUTOBOT_HOST='a b' # why\nAUTOBOT_API_KEYS=x${HOME}\n", encoding="utf-8")
    settings = load_settings(environ={}, env_file=env_file)
    assert (settings.host, settings.api_keys) == ("a b", ("x${HOME}",))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"A=1\nAUTOBOT_PORT 9000\n", "line 2: expected NAME=value"),
        (b"AUTOBOT_HOST='secret\n", "line 1: expected NAME=value"),
        (b"\nAUTOBOT_PORT\n", "expected AUTOBOT_PORT=value"),
        (b"A=\xff\n", "cannot be read"),
    ],
)
def test_a_malformed_env_file_is_refused_without_showing_it(tmp_path: Path, content: bytes, complaint: str) -> None:
    env_file = tmp_path / ".env"
    env_file.write_bytes(content)
    with pytest.raises(ConfigurationError, match=complaint) as refusal:
        load_settings(environ={}, env_file=env_file)
    assert "secret" not in str(refusal.value)


def test_an_env_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_settings(environ={}, env_file=tmp_path)


def test_secrets_are_masked_wherever_settings_are_shown() -> None:
    settings = load(
        {
            "AUTOBOT_API_KEYS": "hush1",
            "OPENAI_API_KEY": "hush2",
            "ANTHROPIC_API_KEY": "hush3",
            "AUTOBOT_REDIS_URL": "redis://:hush4@h/0",
            "AUTOBOT_CLOUD_X_ENDPOINT": "https://me:hush5@h",
            "AUTOBOT_CLOUD_X_API_KEY": "hush6",
            "AUTOBOT_OLLAMA_ENDPOINT": "http://me:hush7@h",
        }
    )
    assert "hush" not in str(describe_settings(settings))
    shown = repr(settings)
    assert not any(f"hush{number}" in shown for number in (1, 2, 3, 4, 6))


def test_a_value_set_in_a_program_is_checked_as_well() -> None:
    with pytest.raises(ConfigurationError) as refusal:
        Settings(port=-1, gpu_memory_utilization=float("nan"), models={"chat": ""})
    assert len(str(refusal.value).splitlines()) == 3


def test_rows_tell_where_a_value_came_from() -> None:
    rows = {row.variable: row for row in describe_settings(load({"AUTOBOT_PORT": "9"}, overrides={"host": "h"}))}
    assert (rows["AUTOBOT_PORT"].value, rows["AUTOBOT_PORT"].source) == ("9", "environment")
    assert (rows["AUTOBOT_HOST"].source, rows["AUTOBOT_HOST"].default) == ("command line", "127.0.0.1")
    assert rows["AUTOBOT_LLM_TIMEOUT"].source == "default"
    in_program = {row.variable: row.source for row in describe_settings(Settings(port=9))}
    assert (in_program["AUTOBOT_PORT"], in_program["AUTOBOT_HOST"]) == ("program", "default")


def test_settings_without_effect_are_listed_only_when_the_user_set_them() -> None:
    assert ineffective_settings(load()) == []
    native = load({"AUTOBOT_VLLM_MULTI_STEP": "4", "AUTOBOT_DEVICE": "cpu"})
    assert [(row.variable, row.effect) for row in ineffective_settings(native)] == [
        ("AUTOBOT_VLLM_MULTI_STEP", "no effect on provider native, only on vllm")
    ]
    remote = load({"AUTOBOT_LLM_PROVIDER": "openai", "AUTOBOT_DEVICE": "cpu"})
    assert [(row.variable, row.effect) for row in ineffective_settings(remote)] == [
        ("AUTOBOT_DEVICE", "no effect on provider openai, only on native")
    ]
    (told,) = ineffective_settings(load({"AUTOBOT_LLM_PROVIDER": "ollama", "AUTOBOT_KV_CACHE_DTYPE": "int8"}))
    assert told.effect == "no effect here: `autobot-llm knobs --engine ollama` says how its server is told"


def test_the_user_cache_folder_follows_the_environment_that_was_given() -> None:
    assert load({"HOME": "/home/x"}).cache_dir.parts[:3] == ("/", "home", "x")


def test_everything_lossy_is_off_by_default() -> None:
    settings = load()
    assert settings.quantization_type == "none"
    assert not settings.use_quantized_models
    assert settings.kv_cache_dtype == "auto"
    assert settings.kv_sliding_window == settings.kv_heavy_hitters == 0
    assert not settings.prompt_compression_enabled
    assert settings.semantic_cache_threshold is None


def test_the_page_of_settings_is_current() -> None:
    page = Path(__file__).parent.parent / "docs" / "settings.md"
    assert page.read_text(encoding="utf-8") == settings_page()


def test_a_child_process_keeps_the_proxies_and_gets_no_key() -> None:
    program = (
        "from autobot_llm.settings.child import child_environment\n"
        "print(sorted(child_environment({'MORE': '1'}).items()))"
    )
    ours = {"OPENAI_API_KEY": "hush", "AUTOBOT_API_KEYS": "hush", "HTTPS_PROXY": "http://p:1", "no_proxy": "a"}
    done = subprocess.run([sys.executable, "-c", program], env=ours, capture_output=True, text=True, check=True)
    assert "('HTTPS_PROXY', 'http://p:1')" in done.stdout and "('no_proxy', 'a')" in done.stdout
    assert "('MORE', '1')" in done.stdout
    assert "hush" not in done.stdout and "AUTOBOT" not in done.stdout
