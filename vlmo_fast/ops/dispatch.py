"""The one door: which implementation of an op runs for which device, dtype and shape.

Every public op asks `select` once, after validation. Selection is a pure function of its arguments: no environment
variable, no global switch, no look at the tensors' values. `explain` prints the same function as a table.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple, ParamSpec, TypeVar

import torch

from vlmo_fast import extensions

__all__ = ["Choice", "Problem", "capability_of", "explain", "implementations", "select", "triton_interprets"]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """What a choice may depend on.

    Attributes:
        device: device type, "cpu" or "cuda" (any other type gets the portable implementations).
        dtype: dtype of the op's main input.
        needs_grad: whether a gradient will be asked for.
        head_dim: width of an attention head, for attention.
        interpreted: whether Triton's interpreter runs kernels on CPU tensors, which a caller asked for by name.
        num_ranks: processes whose batches make one.
        capability: of a CUDA device, e.g. (9, 0), where the op asks for it.
        only_bias_grad: whether of attention's inputs the bias alone wants a gradient.
    """

    device: str
    dtype: torch.dtype
    needs_grad: bool = True
    head_dim: int | None = None
    interpreted: bool = False
    num_ranks: int = 1
    capability: tuple[int, int] | None = None
    only_bias_grad: bool = False


class Choice(NamedTuple):
    """One row of `explain`: the implementation that an op uses, and why."""

    op: str
    device: str
    dtype: str
    implementation: str
    reason: str


class _Implementation(NamedTuple):
    """A candidate; `accepts` gives (True, why it is right here) or (False, why it is not)."""

    name: str
    accepts: Callable[[Problem], tuple[bool, str]]
    automatic: Callable[[Problem], bool] = lambda problem: True
    extension: str | None = None  # of `csrc/`, which it needs


def triton_interprets() -> bool:
    """Whether kernels defined from now on run in Triton's interpreter, by Triton's own switch for it."""
    return os.environ.get("TRITON_INTERPRET") in ("1", "true", "on")


def _by_name(problem: Problem) -> bool:
    """Not automatic: compiled and inspected, interpreted where it can be, but not run on a GPU yet."""
    return False


def constant(function: Callable[P, T]) -> Callable[P, T]:
    """Have `torch.compile` take the function's result once, as a constant.

    As `torch.compiler.assume_constant_result`, which loads the compiler for it: two seconds that eager code can spare.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device; None for others."""
    return _capability(device.index) if device.type == "cuda" else None


@constant
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


def _everywhere(why: str) -> Callable[[Problem], tuple[bool, str]]:
    return lambda problem: (True, why)


@constant
def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


def _runs_triton(problem: Problem) -> tuple[bool, str]:
    if problem.device != "cuda" and not problem.interpreted:
        return False, "needs a CUDA device"
    if not _is_installed("triton"):
        return False, "needs the package triton"
    if problem.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False, "takes float32, float16 and bfloat16"
    return True, "runs here"


def _triton_attention(problem: Problem) -> tuple[bool, str]:
    accepted, reason = _runs_triton(problem)
    if not accepted:
        return False, reason
    if problem.capability is not None and problem.capability < (8, 0):
        return False, "needs compute capability 8.0"
    if problem.head_dim is not None and problem.head_dim > 128:
        return False, "takes heads up to 128 wide"
    return True, "reads the bias tile by tile, adds up its gradient in a fixed order, keeps no scores"


def _triton_ffn(problem: Problem) -> tuple[bool, str]:
    if problem.capability is not None and problem.capability < (8, 0):
        return False, "needs compute capability 8.0"
    accepted, reason = _runs_triton(problem)
    return accepted, "grouped products with bias, GELU, scales and residual in their epilogues" if accepted else reason


def _takes_xformers(problem: Problem) -> tuple[bool, str]:
    if problem.device != "cuda":
        return False, f"xformers runs on CUDA devices, not on {problem.device}"
    if problem.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return False, "xformers takes float32, float16 and bfloat16"
    if problem.capability is not None and problem.capability > (9, 0):
        return False, f"xformers takes a bias up to compute capability 9.0, this device has {problem.capability}"
    if problem.only_bias_grad:
        return False, "xformers gives no gradient of the bias alone"
    if not _is_installed("xformers"):
        return False, "the package xformers is not installed"
    return True, "xformers' memory-efficient attention: one kernel for all shapes"


def _half_precision_inference(problem: Problem) -> bool:
    return not problem.needs_grad and problem.dtype in (torch.float16, torch.bfloat16)


def _takes_sdpa(why: str) -> Callable[[Problem], tuple[bool, str]]:
    def accepts(problem: Problem) -> tuple[bool, str]:
        # Its memory-efficient kernel saves what gradients need only where query, key or value want one; else it would
        # read what was not saved (pytorch#148476).
        if problem.only_bias_grad and problem.device == "cuda":
            return False, "torch's CUDA kernels give no gradient of the bias alone"
        return True, why

    return accepts


_CHUNKED = _Implementation("chunked", _everywhere("blocks of rows: torch's matmuls, memory linear in N"))
_STORED = _Implementation(
    "eager",
    lambda problem: (
        (True, "the reference: stores the N x N logits")
        if problem.num_ranks == 1
        else (False, "the reference computes the batch of one process")
    ),
)


def _cpu_extension(problem: Problem) -> tuple[bool, str]:
    if problem.device != "cpu":
        return False, "the cpu extension runs on a CPU"
    if problem.dtype == torch.float64:
        return False, "the cpu extension computes in float32"
    return True, "blocks of rows: torch's matmuls, and between them one sweep in C++"


def _cpu_attention(problem: Problem) -> tuple[bool, str]:
    if problem.device != "cpu":
        return False, "the cpu extension runs on a CPU"
    if problem.dtype != torch.float32:
        return False, "the cpu extension's attention takes float32"
    return True, "C++, each head of each sequence in the core's cache; no scores are stored"


@constant
def _has_avx2() -> bool:
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


def _where_it_gains(problem: Problem) -> bool:
    """With the four lanes of older instruction sets torch's products are faster (docs/log.md); ARM was not measured."""
    return _has_avx2()


def _cuda_tiles(first: int, last: int, what: str) -> Callable[[Problem], tuple[bool, str]]:
    """Tile kernels for devices of compute capability `first` to `last`."""

    def accepts(problem: Problem) -> tuple[bool, str]:
        if problem.device != "cuda":
            return False, "the cuda extension runs on CUDA devices"
        if problem.dtype not in (torch.bfloat16, torch.float16):
            return False, "the tile kernels take bfloat16 and float16"
        if problem.capability is None or not first <= problem.capability[0] <= last:
            return False, f"needs compute capability {first} to {last}, this device has {problem.capability}"
        return True, what

    return accepts


def _cuda_blocks(problem: Problem) -> tuple[bool, str]:
    if problem.device != "cuda":
        return False, "the cuda extension runs on CUDA devices"
    if problem.dtype == torch.float64:
        return False, "the block kernels compute in float32"
    return True, "blocks of rows: torch's matmuls, and between them CUDA kernels"


@constant
def _is_built(name: str) -> bool:
    return extensions.is_built(name)


def _is_missing(candidate: _Implementation) -> bool:
    return candidate.extension is not None and not _is_built(candidate.extension)


_LOG_SUM_EXP = (
    _Implementation("cpu", _cpu_extension, extension="cpu"),
    _Implementation("cuda-sm90a", _cuda_tiles(9, 9, "tiles by TMA and WGMMA, S never stored"), _by_name, "cuda"),
    _Implementation("cuda", _cuda_tiles(8, 99, "tiles by mma.sync, S never stored"), _by_name, "cuda"),
    _Implementation("cuda-blocks", _cuda_blocks, _by_name, "cuda"),
    _CHUNKED,
    _STORED,
)

# In order of preference: "auto" takes the first that accepts the problem and is `automatic` there.
_IMPLEMENTATIONS: dict[str, tuple[_Implementation, ...]] = {
    "attention": (
        _Implementation("cpu", _cpu_attention, _where_it_gains, "cpu"),
        _Implementation(
            "sdpa",
            _takes_sdpa("torch's fused attention; no S x S scores in device memory where its kernels take the bias"),
            automatic=lambda problem: problem.device != "cpu",
        ),
        _Implementation("eager", _everywhere("the reference; on a CPU faster than torch's fused one")),
        _Implementation("xformers", _takes_xformers, automatic=lambda problem: False),
    ),
    "packed_attention": (
        _Implementation("cpu", _cpu_attention, _where_it_gains, "cpu"),
        _Implementation("triton", _triton_attention, _by_name),
        # Before torch's, which in half precision may be cuDNN's kernel: that plans anew for each shape, tens of
        # milliseconds, and lengths and numbers of sequences seldom come twice.
        _Implementation("xformers", _takes_xformers, _half_precision_inference),
        _Implementation(
            "sdpa",
            _everywhere("torch's fused attention, a call for each shape of sequence; backward written out"),
            # In half precision it rounds the bias, which the backward pass does not, and on a CPU it is the slower one.
            automatic=lambda problem: (
                problem.dtype in (torch.float32, torch.float64) or (problem.device != "cpu" and not problem.needs_grad)
            ),
        ),
        _Implementation("bucketed", _everywhere("matrix products and softmax for each shape of sequence")),
        _Implementation("eager", _everywhere("the reference: a loop over the sequences")),
    ),
    "mome_ffn": (
        _Implementation("triton", _triton_ffn, _by_name),
        _Implementation("torch", _everywhere("matrix products group by group, nothing concatenated; no GELU saved")),
        _Implementation("eager", _everywhere("the reference: a loop over the experts")),
    ),
    "contrastive_loss": _LOG_SUM_EXP,
    "contrastive_lse": _LOG_SUM_EXP,
    "sample_hard_negatives": (_CHUNKED, _STORED),
    "retrieval_ranks": (_CHUNKED, _STORED),
    "similarity_topk": (_CHUNKED, _STORED),
}


def implementations(op: str) -> tuple[str, ...]:
    """Names of all implementations of an op, preferred first."""
    return tuple(candidate.name for candidate in _IMPLEMENTATIONS[op])


def select(op: str, problem: Problem, backend: str = "auto") -> str:
    """The implementation that `op` uses for `problem`.

    Args:
        op: a key of the table.
        problem: device, dtype and shape.
        backend: "auto", or the name of one implementation.

    Raises:
        ValueError: the op has no implementation of that name.
        NotImplementedError: the implementation asked for cannot run this problem; names those that can.
        ImportError: the implementation asked for needs an extension that is not built; names the build command.
    """
    candidates = _IMPLEMENTATIONS[op]
    if backend == "auto":
        for candidate in candidates:
            if candidate.automatic(problem) and candidate.accepts(problem)[0] and not _is_missing(candidate):
                return candidate.name
        raise NotImplementedError(f"{op}: no implementation takes {problem}")
    for candidate in candidates:
        if candidate.name == backend:
            accepted, reason = candidate.accepts(problem)
            if accepted and _is_missing(candidate):
                assert candidate.extension
                raise ImportError(
                    f"{op}: backend {backend!r} must be built first, got no {candidate.extension} extension; "
                    f"to build it: {extensions.build_command(candidate.extension)}"
                )
            if accepted:
                return backend
            able = [other.name for other in candidates if other.accepts(problem)[0] and not _is_missing(other)]
            raise NotImplementedError(f"{op}: backend {backend!r} cannot run here ({reason}); these can: {able}")
    raise ValueError(f"{op}: backend must be 'auto' or one of {list(implementations(op))}, got {backend!r}")


def explain() -> list[Choice]:
    """Which implementation each op uses on each device and dtype, and why: the door's decisions as a table."""
    rows = []
    for op, candidates in _IMPLEMENTATIONS.items():
        for device in ("cpu", "cuda"):
            for dtype in (torch.float32, torch.bfloat16):
                problem = Problem(device=device, dtype=dtype)
                name = select(op, problem)
                reason = next(c.accepts(problem)[1] for c in candidates if c.name == name)
                rows.append(Choice(op, device, str(dtype).removeprefix("torch."), name, reason))
    return rows
