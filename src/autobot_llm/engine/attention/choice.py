"""Choose what computes attention on a device, and make it. Knows each backend's needs, as data; knows no kernel.

Our Triton kernels come first wherever they run; the others are chosen by name (docs/results: none was faster).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Final, Literal, get_args

import torch

from autobot_llm.engine.attention.paged import BLOCK_SIZE, AttentionShape, PagedAttention
from autobot_llm.engine.attention.sdpa_paged import SdpaPagedAttention
from autobot_llm.errors import ConfigurationError

BackendName = Literal["triton", "flashinfer", "flash_attention", "sdpa"]
SETTING: Final = "AUTOBOT_ATTENTION_BACKEND"

_HALVES = (torch.bfloat16, torch.float16)
_ANY = (0, 0)


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


@dataclass(frozen=True, slots=True)
class _Backend:
    """What a backend needs. Empty `dtypes` or `head_sizes`: any. `capabilities`: from the first to before the second."""

    name: BackendName
    kinds: tuple[str, ...] = ("cuda",)
    capabilities: tuple[tuple[int, int], tuple[int, int]] = (_ANY, (99, 0))
    head_sizes: tuple[int, ...] = ()
    dtypes: tuple[torch.dtype, ...] = ()
    module: str | None = None
    compiles: bool = False  # kernels, when they are first needed

    def why_not(
        self,
        hardware: Hardware,
        head_size: int,
        dtype: torch.dtype,
        enable_jit: bool,
        is_installed: Callable[[str], bool],
    ) -> str | None:
        """Why it cannot run, or None."""
        first, last = self.capabilities
        if hardware.kind not in self.kinds:
            return f"it runs on {' and '.join(self.kinds)}, and this is {hardware}"
        if hardware.kind == "cuda" and not first <= hardware.capability < last:
            wanted = f"{first[0]}.{first[1]}" + (" or later" if last[0] == 99 else f" to below {last[0]}.{last[1]}")
            return f"it needs compute capability {wanted}, and this is {hardware}"
        if self.dtypes and dtype not in self.dtypes:
            return f"it computes {' and '.join(map(_name, self.dtypes))}, and the cache is {_name(dtype)}"
        if self.head_sizes and head_size not in self.head_sizes:
            return f"it takes heads of {', '.join(map(str, self.head_sizes))}, and the model's are {head_size}"
        if self.compiles and not enable_jit:
            return "it compiles its kernels when they are first needed, and enable_jit is off"
        if self.module is not None and not is_installed(self.module):
            return f"{self.module} is not installed"
        return None


# in the order in which they are tried
_BACKENDS: Final = (
    _Backend("triton", ("cuda",), ((8, 0), (99, 0)), (64, 128), _HALVES, module="triton", compiles=True),
    _Backend("flashinfer", ("cuda",), ((8, 0), (99, 0)), (64, 128, 256), _HALVES, module="flashinfer", compiles=True),
    # of FlashAttention only version 3 takes blocks of 16 positions, and that is written for Hopper alone
    _Backend("flash_attention", ("cuda",), ((9, 0), (10, 0)), (64, 96, 128, 192, 256), _HALVES, "flash_attn_interface"),
    _Backend("sdpa", ("cuda", "rocm", "cpu")),
)
# where one of several is not the first in the list but better there, it goes here, with its measurement
_UNASKED: Final[tuple[BackendName, ...]] = ("triton", "sdpa")


@dataclass(frozen=True, slots=True)
class FlashAttentionConfig:
    """How attention is to be computed. Options that nothing here could honour are refused when it is built.

    `backend`: a name, or "auto" for the best. `use_cuda_graph`: steps may be captured. `enable_jit`: kernels may be
    compiled at run time. `page_size`: positions in a block of the cache. `use_block_sparse`: attention reads the cache
    by block tables. `use_fp8_attention`: keys and values in 8 bits.
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
            raise ConfigurationError("use_fp8_attention=True: expected False, because the cache keeps 16 bits a number")


@dataclass(frozen=True, slots=True)
class AttentionChoice:
    """A backend that can run here, and why it was chosen."""

    name: BackendName
    reason: str


def get_optimal_attention_backend(
    hardware: Hardware | None = None,
    *,
    head_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    enable_jit: bool = True,
    is_installed: Callable[[str], bool] | None = None,
) -> AttentionChoice:
    """The best backend for a device (this machine's by default), heads of this size and a cache of this dtype."""
    hardware = hardware or Hardware.here()
    passed_over = []
    for name in _UNASKED:
        why_not = _why_not(name, hardware, head_size, dtype, enable_jit, is_installed)
        if why_not is None:
            reason = f"the first that runs on {hardware}" if not passed_over else "; ".join(passed_over)
            return AttentionChoice(name, reason)
        passed_over.append(f"not {name}: {why_not}")
    raise AssertionError("sdpa runs everywhere")


def choose_attention(
    config: FlashAttentionConfig,
    hardware: Hardware,
    *,
    head_size: int,
    dtype: torch.dtype,
    is_installed: Callable[[str], bool] | None = None,
) -> AttentionChoice:
    """The backend that `config` asks for, or the best for "auto". Raises ConfigurationError where it cannot run."""
    if config.backend == "auto":
        return get_optimal_attention_backend(
            hardware, head_size=head_size, dtype=dtype, enable_jit=config.enable_jit, is_installed=is_installed
        )
    why_not = {
        backend.name: _why_not(backend.name, hardware, head_size, dtype, config.enable_jit, is_installed)
        for backend in _BACKENDS
    }
    if why_not[config.backend] is not None:  # type: ignore[index]
        able = [name for name, reason in why_not.items() if reason is None]
        raise ConfigurationError(
            f"{SETTING}={config.backend!r} cannot run here: {why_not[config.backend]}; "  # type: ignore[index]
            f"expected auto or {' or '.join(able)}"
        )
    return AttentionChoice(config.backend, f"chosen by {SETTING}")  # type: ignore[arg-type]


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
    choice = choose_attention(config, Hardware.of(keys[0].device), head_size=shape.head_size, dtype=keys[0].dtype)
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


def _why_not(
    name: BackendName,
    hardware: Hardware,
    head_size: int,
    dtype: torch.dtype,
    enable_jit: bool,
    is_installed: Callable[[str], bool] | None,
) -> str | None:
    backend = next(backend for backend in _BACKENDS if backend.name == name)
    return backend.why_not(hardware, head_size, dtype, enable_jit, is_installed or _is_installed)


def _is_installed(module: str) -> bool:
    return find_spec(module) is not None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
