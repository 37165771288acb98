"""The one door: which implementation of an op runs for which device, dtype and shape, and where its code is.

Every public op asks `select` once, after validation, and runs what `load` gives for the answer. The choice depends on
the arguments and on what is installed: packages, built libraries, the capability of the CPU, and torch's own switch for
oneDNN. No environment variable of ours, no look at the tensors' values. `explain` prints every candidate as a table.

A row of the table owns its code, which is imported when it is first run. The code is one of two:

- a function with the signature of the op's reference, made of operators that autograd follows ("eager", say);
- an object of the op's class (`ffn.FFNBackend`, `padded.AttentionBackend`, ...), whose `forward` and `backward` run
  inside the op's custom op, and whose `saved` describes what the one keeps for the other. Autograd is off in there: a
  backward pass that calls `torch.autograd.grad` on the forward pass raises.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch

from vlmo_fast import extensions
from vlmo_fast.ops.types import Problem

__all__ = ["Choice", "Row", "capability_of", "constant", "explain", "implementations", "load", "select"]

P = ParamSpec("P")
T = TypeVar("T")


class Choice(NamedTuple):
    """A candidate for an op, one row of `explain`.

    Attributes:
        op: its name.
        device: device type.
        dtype: of the main input.
        rank: 1 for what "auto" runs, 2 for what it would run in its place, and so on; None for what "auto" never takes.
        implementation: the candidate's name.
        reason: why it is right here, or why it is not.
    """

    op: str
    device: str
    dtype: str
    rank: int | None
    implementation: str
    reason: str


@dataclass(frozen=True)
class Row:
    """A candidate of the table.

    Attributes:
        name: what a caller passes as `backend`.
        code: the implementation itself, or where it is: "module:attribute" below `vlmo_fast.ops`.
        accepts: (True, why it is right for the problem) or (False, why it is not). Asked before anything is imported.
        automatic: whether "auto" may take it for the problem.
        extension: library of `csrc/` that it needs.
    """

    name: str
    code: Any
    accepts: Callable[[Problem], tuple[bool, str]]
    automatic: Callable[[Problem], bool] = lambda problem: True
    extension: str | None = None
    implementation: Any = field(default=None, init=False, repr=False, compare=False)  # the code, once `load` ran

    def __post_init__(self) -> None:
        if isinstance(self.code, str):
            module, _, attribute = self.code.partition(":")
            path = Path(__file__).parent.joinpath(*module.split("."))
            has_code = attribute and (path.with_suffix(".py").is_file() or (path / "__init__.py").is_file())
        else:
            has_code = callable(self.code) or callable(getattr(self.code, "forward", None))
            object.__setattr__(self, "implementation", self.code)
        if not has_code:
            raise ValueError(f"Row: {self.name!r} has no code; give a function, an object or its address")


def _by_name(problem: Problem) -> bool:
    """Not automatic: compiled and inspected, interpreted where it can be, but not run on a GPU yet."""
    return False


def constant(function: Callable[P, T]) -> Callable[P, T]:
    """Have `torch.compile` take the function's result once, as a constant.

    As `torch.compiler.assume_constant_result`, which loads the compiler for it: two seconds that eager code can spare.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant
def triton_interprets() -> bool:
    """Whether kernels defined from now on run in Triton's interpreter, by Triton's own switch for it."""
    return os.environ.get("TRITON_INTERPRET") in ("1", "true", "on")


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


def _one_process(problem: Problem) -> tuple[bool, str]:
    if problem.num_ranks > 1:
        return False, "the reference computes the batch of one process"
    return True, "the reference: stores the N x N logits"


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
    """Below AVX2 torch's matmuls win (docs/log.md); ARM was not measured."""
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
def _why_no_onednn(dtype: torch.dtype) -> str | None:
    return _why_never_onednn(dtype) or (
        None if torch.backends.mkldnn.enabled else "oneDNN is switched off by torch's flag"
    )


@cache
def _why_never_onednn(dtype: torch.dtype) -> str | None:
    if not torch.backends.mkldnn.is_available():
        return "this torch has no oneDNN"
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "oneDNN has no bfloat16 on this processor"
    return None if dtype in (torch.float32, torch.bfloat16) else "oneDNN takes float32 and bfloat16 here"


def _takes_onednn(problem: Problem) -> tuple[bool, str]:
    if problem.device != "cpu":
        return False, "oneDNN multiplies on a CPU"
    why_not = _why_no_onednn(problem.dtype)
    return why_not is None, why_not or "oneDNN: with wide vectors products of a few hundred rows are faster than in MKL"


def uses_onednn(problem: Problem) -> bool:
    """Whether oneDNN is the library to take where it can be: not where a tracer must see torch's own product."""
    if problem.dtype == torch.float32:
        return (problem.inside or not problem.traced) and not _mkl_is_faster()
    return problem.inside  # elsewhere `F.linear` takes oneDNN by itself


@constant
def _mkl_is_faster() -> bool:
    """In float32, on this machine: measured on Zen 3, Zen 4, Zen 5 and Sapphire Rapids, and there by AVX2 alone."""
    return torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"


@constant
def _is_built(name: str) -> bool:
    return extensions.is_built(name)


_CHUNKED = "blocks of rows: torch's matmuls, memory linear in N"


def _log_sum_exp(reference: str) -> tuple[Row, ...]:
    """Of the loss and of the log-sum-exps under it, alike but for the reference: same names, same code."""
    return (
        Row("cpu", "pairs.blocks:CPU", _cpu_extension, extension="cpu"),
        Row(
            *("cuda-sm90a", "pairs.tiles:SM90A", _cuda_tiles(9, 9, "tiles by TMA and WGMMA, S never stored")),
            automatic=_by_name,
            extension="cuda",
        ),
        Row(
            *("cuda", "pairs.tiles:SM80", _cuda_tiles(8, 99, "tiles by mma.sync, S never stored")),
            automatic=_by_name,
            extension="cuda",
        ),
        Row("cuda-blocks", "pairs.blocks:CUDA", _cuda_blocks, _by_name, "cuda"),
        Row("chunked", "pairs.blocks:CHUNKED", _everywhere(_CHUNKED)),
        Row("eager", reference, _one_process),
    )


# In order of preference: "auto" takes the first that accepts the problem and is `automatic` there.
TABLE: dict[str, tuple[Row, ...]] = {
    "attention": (
        Row("cpu", "padded.cpu:BACKEND", _cpu_attention, _where_it_gains, "cpu"),
        Row(
            "sdpa",
            "padded.fused:sdpa",
            _takes_sdpa("torch's fused attention; no S x S scores in device memory where its kernels take the bias"),
            automatic=lambda problem: problem.device != "cpu",
        ),
        Row("eager", "padded.eager:attention", _everywhere("the reference; on a CPU faster than torch's fused one")),
        Row("xformers", "padded.fused:xformers", _takes_xformers, _by_name),
    ),
    "packed_attention": (
        Row("cpu", "packed.cpu:BACKEND", _cpu_attention, _where_it_gains, "cpu"),
        Row("triton", "packed.triton:BACKEND", _triton_attention, _by_name),
        # Before torch's, which in half precision may be cuDNN's kernel: that plans anew for each shape, tens of
        # milliseconds, and lengths and numbers of sequences seldom come twice.
        Row("xformers", "packed.bucketed:XFORMERS", _takes_xformers, _half_precision_inference),
        Row(
            "sdpa",
            "packed.bucketed:SDPA",
            _everywhere("torch's fused attention, a call for each shape of sequence; backward written out"),
            # In half precision it rounds the bias, which the backward pass does not, and on a CPU it is the slower one.
            automatic=lambda problem: (
                problem.dtype in (torch.float32, torch.float64) or (problem.device != "cpu" and not problem.needs_grad)
            ),
        ),
        Row(
            "bucketed", "packed.bucketed:MATMULS", _everywhere("matrix products and softmax for each shape of sequence")
        ),
        Row("eager", "packed.eager:packed_attention", _everywhere("the reference: a loop over the sequences")),
    ),
    "mome_ffn": (
        Row("triton", "ffn.triton:BACKEND", _triton_ffn, _by_name),
        Row(
            "torch",
            "ffn.grouped:BACKEND",
            _everywhere("matrix products group by group, nothing concatenated; no GELU saved"),
        ),
        Row("eager", "reference:mome_ffn", _everywhere("the reference: a loop over the experts")),
    ),
    "linear": (
        Row("onednn", "matmul:ONEDNN", _takes_onednn, uses_onednn),
        Row("torch", "matmul:TORCH", _everywhere("torch's own product: MKL or oneDNN on a CPU, cuBLAS on CUDA")),
    ),
    "contrastive_loss": _log_sum_exp("reference:contrastive_loss"),
    "contrastive_lse": _log_sum_exp("reference:contrastive_lse"),
    "sample_hard_negatives": (
        Row("chunked", "pairs.sampling:draw", _everywhere(_CHUNKED)),
        Row("eager", "pairs.sampling:draw_eagerly", _one_process),
    ),
    "retrieval_ranks": (
        Row("chunked", "pairs.ranks:ranks_in_blocks", _everywhere(_CHUNKED)),
        Row("eager", "reference:retrieval_ranks", _one_process),
    ),
    "similarity_topk": (
        Row("chunked", "pairs.ranks:topk_in_blocks", _everywhere(_CHUNKED)),
        Row("eager", "reference:similarity_topk", _one_process),
    ),
}


def implementations(op: str) -> tuple[str, ...]:
    """Names of all implementations of an op, preferred first."""
    return tuple(row.name for row in TABLE[op])


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
    rows = TABLE[op]
    if backend == "auto":
        for row in rows:
            if row.automatic(problem) and _verdict(row, problem)[0]:
                return row.name
        raise NotImplementedError(f"{op}: no implementation takes {problem}")
    for row in rows:
        if row.name == backend:
            if _verdict(row, problem)[0]:
                return backend
            accepted, reason = row.accepts(problem)
            if accepted:
                assert row.extension
                raise ImportError(f"{op}: backend {backend!r} needs {_not_built(row.extension)}")
            able = [other.name for other in rows if _verdict(other, problem)[0]]
            raise NotImplementedError(f"{op}: backend {backend!r} cannot run here ({reason}); these can: {able}")
    raise _unknown(op, backend)


def load(op: str, name: str) -> Any:
    """The code of an implementation, imported when it is first asked for.

    Raises:
        ValueError: the op has no implementation of that name.
    """
    return TABLE[op][_import(op, name)].implementation


@constant
def _import(op: str, name: str) -> int:
    """The number of the row, whose code is there afterwards."""
    for number, row in enumerate(TABLE[op]):
        if row.name == name:
            if row.implementation is None:
                module, _, attribute = row.code.partition(":")
                object.__setattr__(row, "implementation", getattr(import_module(f"vlmo_fast.ops.{module}"), attribute))
            return number
    raise _unknown(op, name)


def _verdict(row: Row, problem: Problem) -> tuple[bool, str]:
    """Whether a candidate can run a problem now, and why or why not."""
    accepted, reason = row.accepts(problem)
    if accepted and row.extension is not None and not _is_built(row.extension):
        return False, f"needs {_not_built(row.extension)}"
    return accepted, reason


def _not_built(extension: str) -> str:
    return f"the {extension} extension, which is not built; build it with: {extensions.build_command(extension)}"


def _unknown(op: str, name: str) -> ValueError:
    return ValueError(f"{op}: backend must be 'auto' or one of {list(implementations(op))}, got {name!r}")


def explain(op: str | None = None, problem: Problem | None = None) -> list[Choice]:
    """Every candidate of an op for a problem, with its rank and the reason for it: the door's decisions as a table.

    Args:
        op: one op, or None for all.
        problem: what it is asked for, or None for a call with gradients on a CPU and on CUDA, in float32 and bfloat16.

    Returns:
        The candidates of each problem, those that "auto" takes first and in its order.

    Raises:
        ValueError: the op is unknown.
    """
    if op is not None and op not in TABLE:
        raise ValueError(f"explain: op must be one of {sorted(TABLE)}, got {op!r}")
    problems = (
        [problem] if problem else [Problem(d, t) for d in ("cpu", "cuda") for t in (torch.float32, torch.bfloat16)]
    )
    return [choice for name in TABLE if op in (None, name) for asked in problems for choice in _ranked(name, asked)]


def _ranked(op: str, problem: Problem) -> list[Choice]:
    ranked: list[Choice] = []
    others: list[Choice] = []
    dtype = str(problem.dtype).removeprefix("torch.")
    for row in TABLE[op]:
        able, reason = _verdict(row, problem)
        if able and row.automatic(problem):
            ranked.append(Choice(op, problem.device, dtype, len(ranked) + 1, row.name, reason))
        else:
            reason = f"by name alone: {reason}" if able else f"cannot run: {reason}"
            others.append(Choice(op, problem.device, dtype, None, row.name, reason))
    return ranked + others
