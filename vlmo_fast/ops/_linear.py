"""Matrix products with a weight, on the library that is fastest at them.

On a CPU that is oneDNN or MKL, which is behind `torch.mm` and `F.linear`. With AVX-512 oneDNN is the faster one, a
little on Intel's processors and twofold on AMD's, of whose vector units MKL uses half. With AVX2 alone MKL is: by a
tenth, and more on AMD's (docs/log.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from vlmo_fast.ops.dispatch import constant

__all__ = ["linear", "product", "product_gelu", "uses_onednn", "whole"]

MANY_ROWS, ROW_STEP = 256, 4  # of a product on oneDNN: more rows than that are made a multiple of the step; see `whole`


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` of rows, (N, D) -> (N, E), as differentiable as that.

    In half precision, under autocast, where MKL multiplies, and where a compiler or another tracer follows, it is
    `F.linear` itself.
    """
    is_seen = torch.compiler.is_compiling() or type(x) is not Tensor or type(weight) not in (Tensor, torch.nn.Parameter)
    if is_seen or x.dtype != torch.float32 or not uses_onednn(x) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    result: Tensor = torch.ops.vlmo_fast.linear(x, weight, bias)
    return result


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product x weight^T + bias, contiguous; autograd does not see it."""
    if uses_onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def product_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU of the product, which oneDNN computes along with it."""
    if uses_onednn(x):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "none")
    return F.gelu(F.linear(x, weight, bias))


def whole(x: Tensor) -> Tensor:
    """The rows of a product with zeros after them, a few at most, so that oneDNN divides them into blocks that suit it.

    Where blocks divide the number of rows it takes those: of 37 rows for 481 = 13 * 37, which make the product up to a
    half slower than that of 484 rows (docs/log.md). Counts with such divisors are rare, but not known in advance.
    """
    missing = -len(x) % ROW_STEP
    return F.pad(x, (0, 0, 0, missing)) if missing and len(x) > MANY_ROWS and uses_onednn(x) else x


def uses_onednn(x: Tensor) -> bool:
    """OneDNN is there, is not switched off, takes the dtype and is the faster one; there are rows (it refuses none)."""
    if not (x.device.type == "cpu" and x.numel() > 0 and torch.backends.mkldnn.is_available()):
        return False
    if not torch.backends.mkldnn.enabled:
        return False
    if x.dtype == torch.float32:
        return not _mkl_is_faster()
    return x.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@constant
def _mkl_is_faster() -> bool:
    """In float32, on this machine: measured on Zen 3, Zen 4, Zen 5 and Sapphire Rapids, and there by AVX2 alone."""
    return torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX2"


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return product(whole(x), weight, bias)[: len(x)]


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias = ctx.needs_input_grad
    return (
        linear(grad, weight.t()) if wants_x else None,
        linear(grad.t(), x.t()) if wants_weight else None,
        grad.sum(0) if wants_bias else None,
    )


torch.library.define("vlmo_fast::linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
torch.library.impl("vlmo_fast::linear", "default", _forward)
torch.library.register_fake("vlmo_fast::linear", lambda x, weight, bias: x.new_empty(len(x), len(weight)))
torch.library.register_autograd("vlmo_fast::linear", _autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.vlmo_fast.linear)
def _flops(x: Any, weight: Any, bias: Any = None, **_: Any) -> int:
    return 2 * int(x[0] * x[1] * weight[0])
