"""The knob translator: facts that agree over all releases, the fate of each knob, and the arguments that result."""

from __future__ import annotations

import shlex
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autobot_llm.engine.kv_cache.policy import BLOCK_SIZE
from autobot_llm.errors import ConfigurationError
from autobot_llm.providers.native import get_batching_config
from autobot_llm.settings import SETTINGS, Settings, load_settings
from autobot_llm.tuning.knobs import (
    CONTINUOUS_BATCHING_CONFIG,
    CUDA_GRAPH_CONFIG,
    DESIGN_CONFIGS,
    ENGINES,
    KV_CACHE_CONFIG,
    OPTIMIZED_VLLM_CONFIG,
    Fate,
    KnobAnswer,
    accepts,
    facts_of,
    installed_version,
    translate_knobs,
    translate_settings,
)
from autobot_llm.tuning.knobs.from_settings import WORKLOADS
from autobot_llm.tuning.knobs.versions import is_before, reading_of, release_of
from autobot_llm.tuning.knobs.vllm import READ, VLLM

# Values with which every knob of the table can be asked about; True serves for those that are not named.
VALUES: dict[str, Any] = {
    "speculative_model": "some/draft", "speculative_method": "medusa", "quantization_type": "fp8",
    "kv_cache_dtype": "fp8", "attention_backend": "flashinfer", "scheduling_policy": "priority",
    "preemption_mode": "swap", "performance_mode": "balanced", "enable_async_output_proc": False,
    "cuda_graph_batch_sizes": [1, 2, 4], "speculative_disable_by_batch_size": 4, "num_speculative_tokens": 5,
    "quantization": "fp8", "kv_offloading_backend": "native", "VLLM_ATTENTION_BACKEND": "FLASHINFER",
    "speculative_config.method": "ngram", "compilation_config.cudagraph_mode": "FULL",
}  # fmt: skip
releases = st.sampled_from(READ)
names = st.sampled_from(sorted(VLLM.knobs))


def answers(version: str, knobs: Any, engine: str = "vllm") -> dict[str, KnobAnswer]:
    return {answer.name: answer for answer in translate_knobs(engine, version, knobs).knobs}


def answer(version: str, name: str, value: Any, **others: Any) -> KnobAnswer:
    return answers(version, {name: value, **others})[name]


def is_told(version: str, name: str) -> bool:
    context = {"num_speculative_tokens": 5} if name == "speculative_disable_by_batch_size" else {}
    return answer(version, name, VALUES.get(name, True), **context).to is not None


# --- facts over all releases


@given(names, releases)
def test_a_removed_knob_was_there_in_the_release_before_it_went(name: str, version: str) -> None:
    found = answer(version, name, VALUES.get(name, True))
    if found.fate is not Fate.REMOVED:
        return
    assert found.removed_in is not None
    assert not is_before(version, found.removed_in)
    assert not is_told(found.removed_in, name)
    assert is_told(READ[READ.index(found.removed_in) - 1], name)


@given(names, releases)
def test_a_knob_that_never_existed_is_in_no_earlier_release(name: str, version: str) -> None:
    if answer(version, name, VALUES.get(name, True)).fate is Fate.NEVER_EXISTED:
        assert not any(is_told(earlier, name) for earlier in READ[: READ.index(version) + 1])


@given(names, releases)
def test_what_is_told_is_an_argument_that_the_release_has(name: str, version: str) -> None:
    found = answer(version, name, VALUES.get(name, True))
    assert (found.to is None) == (found.fate in (Fate.REMOVED, Fate.NEVER_EXISTED))
    if found.to is not None:
        argument = VLLM.arguments[found.to.partition("=")[0]]
        assert any(span.holds(version) for span in argument.spans)


@given(releases)
def test_spans_begin_and_end_at_releases_that_were_read(version: str) -> None:
    every = [
        span
        for argument in VLLM.arguments.values()
        for spans in (argument.spans, *(argument.values or {}).values())
        for span in spans
    ]
    edges = {edge for span in every for edge in (span.since, span.gone_by) if edge}
    assert edges <= set(READ)
    assert all(span.since is None or span.gone_by is None or is_before(span.since, span.gone_by) for span in every)


@pytest.mark.parametrize("engine", ENGINES)
def test_every_way_of_a_table_leads_to_an_argument_of_that_table(engine: str) -> None:
    facts = facts_of(engine)
    for knob in facts.knobs.values():
        for way in knob.ways:
            assert {way.to, *way.also} <= set(facts.arguments), knob.name


@pytest.mark.parametrize(
    ("name", "value", "last", "gone"),
    [
        ("num_scheduler_steps", 8, "0.10.0", "0.10.1.1"),
        ("disable_async_output_proc", True, "0.10.2", "0.11.0"),
        ("preemption_mode", "swap", "0.10.2", "0.11.0"),
        ("max_seq_len_to_capture", 8192, "0.10.2", "0.11.0"),
        ("swap_space", 4, "0.16.0", "0.18.1"),
        ("speculative_method", "medusa", "0.32.0", "0.33.0"),
        ("quantization", "bitsandbytes", "0.26.0", "0.30.0"),
        ("speculative_token_tree", "[(0,)]", "0.18.1", "0.22.1"),
        ("VLLM_ATTENTION_BACKEND", "FLASHINFER", "0.14.1", "0.15.1"),
        ("attention_backend", "XFORMERS", "0.11.0", "0.12.0"),
    ],
)
def test_a_knob_goes_with_the_release_that_dropped_it(name: str, value: Any, last: str, gone: str) -> None:
    assert answer(last, name, value).to is not None
    assert (answer(gone, name, value).fate, answer(gone, name, value).removed_in) == (Fate.REMOVED, gone)
    assert answer("0.33", name, value).removed_in == gone


@pytest.mark.parametrize(
    ("name", "value", "before", "since"),
    [
        ("attention_backend", "FLEX_ATTENTION", "0.9.0.1", "0.10.0"),
        ("kv_cache_dtype", "int8", "0.18.1", "0.22.1"),
        ("max_num_queued_reqs", 9, "0.26.0", "0.30.0"),
        ("performance_mode", "throughput", "0.16.0", "0.18.1"),
        ("kv_offloading_size", 4, "0.11.0", "0.12.0"),
    ],
)
def test_a_knob_that_is_still_to_come_says_when(name: str, value: Any, before: str, since: str) -> None:
    early = answer(before, name, value)
    assert (early.fate, early.note) == (Fate.NEVER_EXISTED, f"comes in {since}")
    assert answer(since, name, value).to is not None


def test_a_draft_model_is_not_told_to_the_releases_that_refused_it() -> None:
    takes = [version for version in READ if accepts("vllm", version, "speculative_config.method", "draft_model")]
    assert takes == ["0.8.5", "0.9.0.1", *READ[READ.index("0.15.1") :]]


def test_knobs_that_vllm_never_had_name_what_is_nearest() -> None:
    found = answers("0.33", {"enable_async_output_proc": True, "max_waiting_time_ms": 50, "min_acceptance_rate": 0.6})
    assert {one.fate for one in found.values()} == {Fate.NEVER_EXISTED}
    assert "async_scheduling" in found["enable_async_output_proc"].instead
    assert "max_num_queued_reqs" in found["max_waiting_time_ms"].instead
    assert "no switch" in found["min_acceptance_rate"].instead


# --- versions


@pytest.mark.parametrize(
    ("asked", "release"),
    [
        ("0.33", "0.33.0"), ("v0.33.0", "0.33.0"), ("0.33.0rc1+cu129", "0.33.0"), ("0.8", "0.8.5"), ("0.8.2", "0.8.5"),
        ("0.9", "0.9.0.1"), ("0.10", "0.10.2"), ("0.10.1", "0.10.1.1"), ("0.10.1.2", "0.10.1.1"), ("0.13.0", "0.12.0"),
        ("0.17", "0.16.0"), ("0.29.1", "0.26.0"), ("0.34", "0.33.0"), ("1.0", "0.33.0"),
        ("0.33.0.dev7+g1a2b", "0.33.0"), ("0.16.0-rc1", "0.16.0"),
    ],
)  # fmt: skip
def test_a_version_is_answered_by_a_read_release(asked: str, release: str) -> None:
    assert reading_of(asked, READ, "vllm").release == release


def test_a_version_between_two_says_so_and_where_the_next_differs() -> None:
    translation = translate_knobs("vllm", "0.17", {"swap_space": 4, "max_num_seqs": 8})
    assert translation.facts_from == "0.16.0"
    assert "0.17 was not read; 0.16.0 answers for it" in translation.notes[0]
    notes = {one.name: one.note for one in translation.knobs}
    assert "0.18.1" in notes["swap_space"]
    assert "removed" in notes["swap_space"]
    assert notes["max_num_seqs"] == ""


@pytest.mark.parametrize("version", ["0.7.3", "0.33.0.dev!", "latest", "", "33", "0.33,1"])
def test_a_bad_version_is_refused_with_the_known_ones(version: str) -> None:
    with pytest.raises(ConfigurationError, match=r"of vllm: expected 0\.8 to 0\.33"):
        translate_knobs("vllm", version, {})


@given(st.lists(st.integers(0, 99), min_size=2, max_size=4), st.lists(st.integers(0, 99), min_size=2, max_size=4))
def test_versions_are_ordered_by_their_numbers(one: list[int], other: list[int]) -> None:
    left, right = (".".join(map(str, numbers)) for numbers in (one, other))
    assert release_of(left) == tuple(one)
    assert not (is_before(left, right) and is_before(right, left))
    length = max(len(one), len(other))
    assert is_before(left, right) == (one + [0] * (length - len(one)) < other + [0] * (length - len(other)))


# --- command lines, as they are to come out


def command_line(version: str, knobs: Any) -> str:
    return translate_knobs("vllm", version, knobs).command_line("vllm", "serve", "M")


@pytest.mark.parametrize(
    ("version", "config", "expected"),
    [
        (
            "0.33",
            OPTIMIZED_VLLM_CONFIG,
            "vllm serve M --enable-chunked-prefill --max-num-batched-tokens 8192 --enable-prefix-caching"
            " --gpu-memory-utilization 0.9"
            """ --speculative-config '{"method":"ngram","num_speculative_tokens":5}'""",
        ),
        (
            "0.10.0",
            OPTIMIZED_VLLM_CONFIG,
            "vllm serve M --num-scheduler-steps 8 --enable-chunked-prefill --max-num-batched-tokens 8192"
            " --enable-prefix-caching --gpu-memory-utilization 0.9 --swap-space 4"
            """ --speculative-config '{"method":"ngram","num_speculative_tokens":5}'""",
        ),
        ("0.33", KV_CACHE_CONFIG, "vllm serve M --kv-cache-dtype int8_per_token_head --block-size 16"),
        ("0.12", KV_CACHE_CONFIG, "vllm serve M --block-size 16"),
        (
            "0.33",
            CONTINUOUS_BATCHING_CONFIG,
            "vllm serve M --max-num-seqs 256 --max-num-batched-tokens 8192 --scheduling-policy fcfs",
        ),
        (
            "0.8.5",
            CONTINUOUS_BATCHING_CONFIG,
            "vllm serve M --max-num-seqs 256 --max-num-batched-tokens 8192 --scheduling-policy fcfs"
            " --preemption-mode swap",
        ),
        ("0.33", CUDA_GRAPH_CONFIG, "vllm serve M --cudagraph-capture-sizes 1 2 4 8 16 32"),
        ("0.11", CUDA_GRAPH_CONFIG, "vllm serve M --cuda-graph-sizes 1 2 4 8 16 32"),
        (
            "0.8.5",
            CUDA_GRAPH_CONFIG,
            "vllm serve M --max-seq-len-to-capture 8192"
            """ --compilation-config '{"cudagraph_capture_sizes":[1,2,4,8,16,32]}'""",
        ),
        ("0.14.1", {"attention_backend": "triton"}, "vllm serve M --attention-backend TRITON_ATTN"),
        ("0.12", {"attention_backend": "triton"}, "VLLM_ATTENTION_BACKEND=TRITON_ATTN vllm serve M"),
        ("0.10.0", {"attention_backend": "triton"}, "VLLM_ATTENTION_BACKEND=TRITON_ATTN_VLLM_V1 vllm serve M"),
        ("0.10.2", {"enable_async_output_proc": False}, "vllm serve M --disable-async-output-proc"),
        ("0.33", {"enable_async_output_proc": False}, "vllm serve M --no-async-scheduling"),
        ("0.33", {"enable_prefix_caching": False}, "vllm serve M --no-enable-prefix-caching"),
        ("0.33", {"enforce_eager": False}, "vllm serve M"),
        (
            "0.33",
            {"speculative_model": "d", "num_speculative_tokens": 3, "speculative_disable_by_batch_size": 4},
            """vllm serve M --speculative-config '{"model":"d","num_speculative_tokens":3,"""
            """"num_speculative_tokens_per_batch_size":[[1,4,3],[5,5,0]]}'""",
        ),
        (
            "0.16",
            {"speculative_model": "d", "num_speculative_tokens": 3, "speculative_disable_by_batch_size": 4},
            "vllm serve M --speculative-config"
            """ '{"model":"d","num_speculative_tokens":3,"disable_by_batch_size":4}'""",
        ),
        (
            "0.9.0.1",
            {"speculative_method": "eagle", "speculative_model": "h", "num_speculative_tokens": 2},
            """vllm serve M --speculative-config '{"method":"eagle","model":"h","num_speculative_tokens":2}'""",
        ),
        (
            "0.33",
            {"speculative_method": "eagle", "speculative_model": "h", "num_speculative_tokens": 2},
            """vllm serve M --speculative-config '{"method":"eagle3","model":"h","num_speculative_tokens":2}'""",
        ),
        (
            "0.33",
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4}},
            "vllm serve M --speculative-config"
            """ '{"method":"ngram","num_speculative_tokens":5,"prompt_lookup_max":4}'""",
        ),
        ("0.33", {"served_model_name": "it's"}, """vllm serve M --served-model-name 'it'"'"'s'"""),
    ],
)
def test_the_command_line_is(version: str, config: Any, expected: str) -> None:
    assert command_line(version, config) == expected
    assert shlex.split(command_line(version, config))  # it is a line that a shell understands


def test_drafting_without_a_method_is_left_out_as_a_whole_and_says_so() -> None:
    translation = translate_knobs("vllm", "0.33", {"num_speculative_tokens": 5, "speculative_method": "medusa"})
    assert translation.arguments == ()
    found = {one.name: one for one in translation.knobs}
    assert "left out" in found["num_speculative_tokens"].note
    assert found["speculative_method"].removed_in == "0.33.0"
    assert "our own engine" in found["speculative_method"].instead


def test_two_knobs_that_contradict_each_other_are_refused_by_name() -> None:
    with pytest.raises(ConfigurationError, match="speculative_model and speculative_method contradict each other"):
        translate_knobs("vllm", "0.33", {"speculative_model": "[ngram]", "speculative_method": "draft_model"})
    same = {"speculative_model": "[ngram]", "speculative_method": "ngram", "num_speculative_tokens": 5}
    assert "ngram" in command_line("0.33", same)


def test_an_unknown_knob_is_refused_with_the_one_that_was_perhaps_meant() -> None:
    with pytest.raises(ConfigurationError, match="unknown knob 'max_num_seq' for vllm; did you mean max_num_seqs"):
        translate_knobs("vllm", "0.33", {"max_num_seq": 1})
    with pytest.raises(ConfigurationError, match="engine 'sglang': expected vllm, ollama, native"):
        translate_knobs("sglang", "1.0", {})


# --- the other engines


def test_ollama_gets_options_and_environment() -> None:
    translation = translate_knobs(
        "ollama", "0.31", {"max_model_len": 8192, "max_num_seqs": 4, "kv_cache_dtype": "int8", "block_size": 16}
    )
    assert translation.arguments == ()
    assert translation.options == {"num_ctx": 8192}
    assert translation.environment == {
        "OLLAMA_NUM_PARALLEL": "4",
        "OLLAMA_KV_CACHE_TYPE": "q8_0",
        "OLLAMA_FLASH_ATTENTION": "1",
    }


@pytest.mark.parametrize("name", ["speculative_model", "speculative_method", "ngram_prompt_lookup_max"])
def test_ollama_knows_no_drafting_but_an_attached_model(name: str) -> None:
    found = answers("0.30", {name: "x"}, "ollama")[name]
    assert found.fate is Fate.NEVER_EXISTED
    assert "attached" in found.instead


def test_our_engine_gets_settings_that_are_settings() -> None:
    knobs = {name: value for config in DESIGN_CONFIGS.values() for name, value in config.items()}
    told = translate_knobs("native", "0.1.0", knobs).settings
    settings = Settings(**told)  # each value is one that the setting accepts
    assert settings.swap_memory == 4 * 2**30
    assert settings.kv_cache_dtype == "int8"
    assert settings.kv_sliding_window == 4096
    assert settings.speculation_method == "ngram"
    assert (settings.max_num_seqs, settings.preemption) == (256, "swap")


def test_our_engines_block_size_is_told_as_it_is() -> None:
    (answer,) = translate_knobs("native", "0.1.0", {"block_size": 32}).knobs
    assert answer.instead == f"nothing: blocks hold {BLOCK_SIZE} tokens"


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_knows_every_name_of_the_design(engine: str) -> None:
    for config in DESIGN_CONFIGS.values():
        translation = translate_knobs(engine, facts_of(engine).read[-1], config)
        assert [one.name for one in translation.knobs] == list(config)


# --- settings


def test_the_settings_become_arguments_of_todays_vllm() -> None:
    settings = Settings(
        workload="interactive", max_num_seqs=32, kv_cache_dtype="fp8", attention_backend="flashinfer",
        cuda_graphs="off", vllm_prefix_caching=False, speculation_draft_model="d", speculation_num_tokens=4,
        quantization_type="fp8", max_model_len=4096, gpu_memory_utilization=0.5,
    )  # fmt: skip
    line = translate_settings("vllm", "0.33", settings).command_line()
    assert line == (
        "--performance-mode interactivity --max-num-seqs 32 --max-num-batched-tokens 4096 --max-model-len 4096"
        " --gpu-memory-utilization 0.5 --attention-backend FLASHINFER --enforce-eager --kv-cache-dtype fp8"
        " --quantization fp8 --no-enable-prefix-caching --speculative-config"
        """ '{"method":"draft_model","model":"d","num_speculative_tokens":4}'"""
    )


def test_each_answer_names_the_setting_that_asked() -> None:
    translation = translate_settings("vllm", "0.33", Settings())
    variables = {setting.variable for setting in SETTINGS}
    assert {one.variable for one in translation.knobs} <= variables
    assert "AUTOBOT_VLLM_MULTI_STEP" in {one.variable for one in translation.knobs}


def test_automatic_speculation_without_a_draft_model_stays_off_and_says_so() -> None:
    translation = translate_settings("vllm", "0.33", Settings())
    assert "--speculative-config" not in translation.arguments
    assert any("speculation stays off" in note for note in translation.notes)
    insisting = translate_settings("vllm", "0.33", Settings(speculation_method="ngram"))
    assert '"method":"ngram"' in insisting.command_line()
    assert not any("speculation" in note for note in insisting.notes)
    assert "num_speculative_tokens" not in {
        one.name for one in translate_settings("vllm", "0.33", Settings(speculation_enabled=False)).knobs
    }


def test_drafting_from_the_text_has_to_be_asked_for() -> None:
    asked = load_settings(environ={"AUTOBOT_SPECULATION_USE_NGRAM": "true"}, env_file=None)
    assert '"method":"ngram"' in translate_settings("vllm", "0.33", asked).command_line()
    refused = load_settings(environ={"AUTOBOT_SPECULATION_USE_NGRAM": "false"}, env_file=None)
    assert "speculative" not in translate_settings("vllm", "0.33", refused).command_line()


def test_settings_left_alone_say_nothing_to_engines_they_do_not_concern() -> None:
    assert translate_settings("ollama", "0.30", Settings()).knobs == ()
    assert translate_settings("native", "0.1.0", Settings()).knobs == ()
    changed = translate_settings("ollama", "0.30", Settings(kv_sliding_window=64, max_num_seqs=2))
    assert {one.name: one.fate for one in changed.knobs} == {
        "max_num_seqs": Fate.RENAMED,
        "sliding_window": Fate.NEVER_EXISTED,
    }


@given(releases, st.sampled_from(["interactive", "batch", "mixed"]), st.booleans())
def test_any_release_can_be_told_the_settings(version: str, workload: Any, is_eager: bool) -> None:
    settings = Settings(workload=workload, cuda_graphs="off" if is_eager else "auto", speculation_method="ngram")
    translation = translate_settings("vllm", version, settings)
    assert ("--enforce-eager" in translation.arguments) == is_eager
    assert msgspec.json.decode(msgspec.json.encode(translation))["facts_from"] == version


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_workload_means_the_same_figures_as_on_our_engine(workload: str) -> None:
    profile = get_batching_config(workload)
    wanted = WORKLOADS[workload]
    assert (wanted["max_num_seqs"], wanted["max_num_batched_tokens"]) == (
        profile.max_num_seqs,
        profile.max_num_batched_tokens,
    )


# --- the real thing


def installed_parser() -> Any:
    """The argument parser of the installed vLLM. It can be made only where vLLM finds a device to run on."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        return EngineArgs.add_cli_args(FlexibleArgumentParser())
    except RuntimeError as exc:
        pytest.skip(f"the installed vllm makes no parser here: {exc}")


@pytest.mark.skipif(installed_version("vllm") is None, reason="vllm is not installed here")
@pytest.mark.parametrize("config", [*DESIGN_CONFIGS, "settings"])
def test_the_installed_vllm_parses_the_arguments(config: str) -> None:
    version = installed_version("vllm")
    assert version is not None
    settings = Settings(speculation_method="ngram", kv_cache_dtype="int8", attention_backend="flashinfer")
    translation = (
        translate_settings("vllm", version, settings)
        if config == "settings"
        else translate_knobs("vllm", version, DESIGN_CONFIGS[config])
    )
    parsed = installed_parser().parse_args(list(translation.arguments))
    for flag in (argument for argument in translation.arguments if argument.startswith("--")):
        name = flag.removeprefix("--no-").removeprefix("--").replace("-", "_")
        assert getattr(parsed, name) is not None
