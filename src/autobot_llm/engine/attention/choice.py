"""Choose what computes attention on a device, and make it. Knows each backend's needs, as data; knows no kernel.

Our Triton kernels come first wherever they run. The others are chosen by name, until a measurement puts one of them
first on some hardware.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Final, Literal, get_args

import torch

from autobot_llm.engine.attention.paged import BLOCK_SIZE, AttentionShape, PagedAttention
from autobot_llm.engine.attention.sdpa_paged import SdpaPagedAttention
from autobot_llm.engine.kv_cache.storage import QUANTIZED_DTYPES
from autobot_llm.errors import ConfigurationError

BackendName = Literal["triton", "flashinfer", "flash_attention", "sdpa"]
SETTING: Final = "AUTOBOT_ATTENTION_BACKEND"

_HALVES = (torch.bfloat16, torch.float16)
_ANY, _LATER = (0, 0), (1000, 0)


@dataclass(frozen=True, slots=True)
class Hardware:
    """A device as far as attention depends on it. `capability` is CUDA's compute capability, (0, 0) elsewhere."""

    kind: Literal["cuda", "rocm", "cpu"]
    capability: tuple[int, int] = _ANY

    @classmethod
    def of(cls, device: torch.device) -> Hardware:
        if device.type != "cuda":
            return cls("cpu")
        if torch.version.hip is not None:
            return cls("rocm")
        return cls("cuda", torch.cuda.get_device_capability(device))

    @classmethod
    def here(cls) -> Hardware:
        """The current GPU, or the CPU where there is none."""
        return cls.of(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def __str__(self) -> str:
        if self.kind != "cuda":
            return {"rocm": "a ROCm GPU", "cpu": "a CPU"}[self.kind]
        return f"compute capability {self.capability[0]}.{self.capability[1]}"


def is_importable(module: str) -> bool:
    return find_spec(module) is not None


@dataclass(frozen=True, slots=True)
class Need:
    """What a backend must be able to do. `is_installed` answers for a module's name."""

    hardware: Hardware
    head_size: int = 128
    dtype: torch.dtype = torch.bfloat16
    enable_jit: bool = True
    is_installed: Callable[[str], bool] = is_importable


@dataclass(frozen=True, slots=True)
class _Backend:
    """What a backend takes. Empty `dtypes` or `head_sizes`: any. `capabilities`: from the first on, before the second.

    `compiles`: its kernels, when they are first needed.
    """

    name: BackendName
    kinds: tuple[str, ...]
    capabilities: tuple[tuple[int, int], tuple[int, int]] = (_ANY, _LATER)
    head_sizes: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    module: str | None = None
    compiles: bool = False

    def why_not(self, need: Need) -> str | None:
        """Why it cannot run, or None."""
        hardware, (first, last) = need.hardware, self.capabilities
        if hardware.kind not in self.kinds:
            return f"it runs on {' and '.join(self.kinds)}, and this is {hardware}"
        if hardware.kind == "cuda" and not first <= hardware.capability < last:
            upper = " or later" if last == _LATER else f" to below {last[0]}.{last[1]}"
            return f"it needs compute capability {first[0]}.{first[1]}{upper}, and this is {hardware}"
        if self.dtypes and need.dtype not in self.dtypes:
            return f"it computes {' and '.join(map(_name, self.dtypes))}, and the cache is {_name(need.dtype)}"
        if self.head_sizes and need.head_size not in self.head_sizes:
            return f"it takes heads of {', '.join(map(str, self.head_sizes))}, and the model's are {need.head_size}"
        if self.compiles and not need.enable_jit:
            return "it compiles its kernels when they are first needed, and enable_jit is off"
        if self.module is not None and not need.is_installed(self.module):
            return f"the module {self.module} is not installed"
        return None


_AMPERE, _HOPPER, _BLACKWELL = (8, 0), (9, 0), (10, 0)
_BACKENDS: Final[Mapping[str, _Backend]] = {
    backend.name: backend
    for backend in (
        _Backend(
            "triton", ("cuda",), (_AMPERE, _LATER), (64, 128), (*_HALVES, *QUANTIZED_DTYPES), "triton", compiles=True
        ),
        _Backend("flashinfer", ("cuda",), (_AMPERE, _LATER), (64, 128, 256), _HALVES, "flashinfer", compiles=True),
        # of FlashAttention only version 3 takes blocks of 16 positions, and that is written for Hopper alone
        _Backend("flash_attention", ("cuda",), (_HOPPER, _BLACKWELL), (64, 128, 256), _HALVES, "flash_attn_interface"),
        _Backend("sdpa", ("cuda", "rocm", "cpu")),
    )
}
_BEST_FIRST: Final[tuple[BackendName, ...]] = ("triton", "sdpa")
"""What is tried unasked."""


@dataclass(frozen=True, slots=True)
class FlashAttentionConfig:
    """How attention is to be computed. Options that nothing here could honour are refused when it is built.

    `backend`: a name, or "auto" for the best. `use_cuda_graph`: steps may be captured. `enable_jit`: kernels may be
    compiled at run time. `page_size`: positions in a block of the cache. `use_block_sparse`: attention reads the cache
    by block tables. `use_fp8_attention`: products in 8 bits.
    """

    backend: str = "flashinfer"
    use_cuda_graph: bool = True
    enable_jit: bool = True
    page_size: int = BLOCK_SIZE
    use_block_sparse: bool = True
    use_fp8_attention: bool = False

    def __post_init__(self) -> None:
        accepted = ("auto", *get_args(BackendName))
        if self.backend not in accepted:
            raise ConfigurationError(
                f"{SETTING}={self.backend!r}: expected {', '.join(accepted[:-1])} or {accepted[-1]}"
            )
        if self.page_size != BLOCK_SIZE:
            raise ConfigurationError(f"page_size={self.page_size}: expected {BLOCK_SIZE}, the cache's block size")
        if not self.use_block_sparse:
            raise ConfigurationError(
                "use_block_sparse=False: expected True, because the cache is kept in blocks and has no other layout"
            )
        if self.use_fp8_attention:
            raise ConfigurationError(
                "use_fp8_attention=True: expected False, because products are computed in 16 bits; "
                "AUTOBOT_KV_CACHE_DTYPE=fp8 stores keys and values in 8"
            )


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """A backend that can run here, and why it was chosen."""

    name: BackendName
    reason: str


def get_optimal_attention_backend(need: Need | None = None) -> AttentionChoice:
    """The best backend for what is needed; by default, for this machine, heads of 128 and a cache of bfloat16."""
    need = need or Need(Hardware.here())
    passed_over: list[str] = []
    for name in _BEST_FIRST:
        why_not = _BACKENDS[name].why_not(need)
        if why_not is None:
            return AttentionChoice(name, "; ".join(passed_over) or f"the best on {need.hardware}")
        passed_over.append(f"not {name}: {why_not}")
    raise AssertionError("sdpa runs everywhere")


def choose_attention(config: FlashAttentionConfig, need: Need) -> AttentionChoice:
    """The backend that `config` names, or the best for "auto". Raises ConfigurationError where it cannot run."""
    need = replace(need, enable_jit=config.enable_jit)
    if config.backend == "auto":
        return get_optimal_attention_backend(need)
    chosen = _BACKENDS[config.backend]
    why_not = chosen.why_not(need)
    if why_not is not None:
        able = ["auto", *(name for name, backend in _BACKENDS.items() if backend.why_not(need) is None)]
        raise ConfigurationError(f"{SETTING}={config.backend!r} cannot run here: {why_not}; expected {_either(able)}")
    return AttentionChoice(chosen.name, f"chosen by {SETTING}")


def make_attention(
    config: FlashAttentionConfig | str,
    shape: AttentionShape,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> PagedAttention:
    """The chosen backend over these caches, [num_blocks, K, 16, D] for each layer. A name stands for a config of it.

    Raises ConfigurationError where it cannot run on the caches' device.
    """
    if isinstance(config, str):
        config = FlashAttentionConfig(backend=config)
    choice = choose_attention(config, Need(Hardware.of(keys[0].device), shape.head_size, keys[0].dtype))
    can_capture, reason = config.use_cuda_graph, choice.reason
    # each is imported where it is made: what the others need may not be installed
    if choice.name == "triton":
        from autobot_llm.engine.attention.triton_paged import TritonPagedAttention

        max_sequences = min(max_num_seqs, max_num_batched_tokens)  # a step has a token of each
        return TritonPagedAttention(
            shape, keys, values, max_sequences=max_sequences, reason=reason, can_capture=can_capture
        )
    if choice.name == "flashinfer":
        from autobot_llm.engine.attention.flashinfer import FlashInferAttention

        return FlashInferAttention(shape, keys, values, reason=reason, can_capture=can_capture)
    if choice.name == "flash_attention":
        from autobot_llm.engine.attention.flash_attention import FlashAttention

        return FlashAttention(shape, keys, values, reason=reason, can_capture=can_capture)
    return SdpaPagedAttention(shape, keys, values, reason=reason)


def _either(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
