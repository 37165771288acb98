"""Matrix products with a weight, on the library that is fastest at them.

On a CPU that is oneDNN or MKL, which is behind `torch.mm` and `F.linear`. With AVX-512 oneDNN is the faster one, a
little on Intel's processors and twofold on AMD's, of whose vector units MKL uses half. With AVX2 alone MKL is: by a
tenth, and more on AMD's (docs/log.md).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmo_fast.ops.dispatch import load, select
from vlmo_fast.ops.registration import register
from vlmo_fast.ops.types import Problem

__all__ = ["Library", "library_for", "linear"]

MANY_ROWS, ROW_STEP = 256, 4  # of a product on oneDNN: beyond that, a multiple of the step; see `pad_rows`


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """Linear layer of rows on the library that is fastest at it.

    Replaces, as differentiable as that:
        torch.nn.functional.linear(x, weight, bias)

    Args:
        x: (N, D), any float dtype.
        weight: (E, D), dtype and device of x.
        bias: (E,), or None.
        backend: "auto", or one of `ops.implementations("linear")`. In half precision, under autocast, and where a
            compiler or another tracer follows, "auto" is "torch".

    Returns:
        (N, E).

    Raises:
        ValueError: the backend is unknown, or x is not (N, D).
        NotImplementedError: the backend cannot run here; names those that can.
        RuntimeError: torch's own, where shapes or dtypes disagree.
    """
    if x.ndim != 2:
        raise ValueError(f"linear: x must be (N, D), got {tuple(x.shape)}")
    traced = (
        torch.compiler.is_compiling()
        or type(x) is not Tensor
        or type(weight) not in (Tensor, torch.nn.Parameter)
        or (x.device.type == "cpu" and torch.is_autocast_enabled("cpu"))
    )
    name = select("linear", Problem(x.device.type, x.dtype, traced=traced), backend)
    library: Library = load("linear", name)
    if library.autograd_follows:
        return library.product(x, weight, bias)
    result: Tensor = torch.ops.vlmo_fast.linear(x, weight, bias, name)
    return result


def library_for(weight: Tensor) -> Library:
    """What multiplies with a weight inside another op.

    Args:
        weight: any tensor of the products' dtype and device.
    """
    library: Library = load("linear", select("linear", _inside(weight.device.type, weight.dtype)))
    return library


@cache
def _inside(device: str, dtype: torch.dtype) -> Problem:
    return Problem(device, dtype, inside=True)


class Library(ABC):
    """An implementation of `linear`, and of the products inside other ops.

    Attributes:
        autograd_follows: whether autograd differentiates `product`; otherwise it runs inside the custom op.
    """

    autograd_follows = False

    @abstractmethod
    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """X weight^T + bias, (N, E), contiguous."""

    @abstractmethod
    def product_gelu(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """GELU of the product, the exact one."""

    def pad_rows(self, x: Tensor) -> Tensor:
        """The rows, with a few of zeros after them where the library is faster with them."""
        return x


class _Torch(Library):
    autograd_follows = True

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def product_gelu(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias))


class _OneDNN(Library):
    """It takes no empty operand."""

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not x.numel():
            return F.linear(x, weight, bias)
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return result

    def product_gelu(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if not x.numel():
            return F.gelu(F.linear(x, weight, bias))
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "none")
        return result

    def pad_rows(self, x: Tensor) -> Tensor:
        """Zero-pad the rows to a multiple of 4: oneDNN picks bad block sizes for counts such as 481 = 13 * 37.

        Where blocks divide the number of rows it takes those: of 37 rows for 481, which make the product up to a half
        slower than that of 484 rows (docs/log.md). Counts with such divisors are rare, but not known in advance.
        """
        missing = -len(x) % ROW_STEP
        return F.pad(x, (0, 0, 0, missing)) if missing and len(x) > MANY_ROWS and x.numel() else x


TORCH, ONEDNN = _Torch(), _OneDNN()


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
    library: Library = load("linear", name)
    return library.product(library.pad_rows(x), weight, bias)[: len(x)]


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, name: str) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None, str], output: Tensor) -> None:
    x, weight, *_ = inputs
    ctx.save_for_backward(x, weight)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
    return (
        linear(grad, weight.t()) if wants_x else None,
        linear(grad.t(), x.t()) if wants_weight else None,
        grad.sum(0) if wants_bias else None,
        None,
    )


def _flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * int(x[0] * x[1] * weight[0])


register(
    "linear(Tensor x, Tensor weight, Tensor? bias, str implementation) -> Tensor",
    _forward,
    fake=_fake,
    flops=_flops,
    setup_context=_setup_context,
    autograd=_autograd,
)
