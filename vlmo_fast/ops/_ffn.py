"""The feed-forward experts of a block, grouped by modality: one op for the whole residual branch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vlmo_fast.ops import _ffn_torch, reference
from vlmo_fast.ops.dispatch import Problem, capability_of, select, triton_interprets

__all__ = ["ExpertWeights", "mome_ffn"]


class ExpertWeights(NamedTuple):
    """Parameters of one modality expert: its norm and its two linear layers.

    Attributes:
        norm_weight: (D,).
        norm_bias: (D,).
        fc1_weight: (F, D).
        fc1_bias: (F,).
        fc2_weight: (D, F).
        fc2_bias: (D,).
    """

    norm_weight: Tensor
    norm_bias: Tensor
    fc1_weight: Tensor
    fc1_bias: Tensor
    fc2_weight: Tensor
    fc2_bias: Tensor


def mome_ffn(
    x: Tensor,
    group_sizes: Sequence[int],
    experts: Sequence[ExpertWeights],
    layer_scale: Tensor | None = None,
    row_scale: Tensor | None = None,
    *,
    eps: float = 1e-6,
    save_activation: bool = False,
    backend: str = "auto",
) -> Tensor:
    """The residual branch of the modality experts: rows of `x` in adjacent groups, each through an expert of its own.

    Replaces, for group g with the rows r (VLMo, arXiv:2111.02358, section 3; GELU is the exact one, with erf):
        x[r] + row_scale[r, None] * layer_scale * fc2_g(gelu(fc1_g(layer_norm_g(x[r]))))

    Kept for the backward pass are x, the norm's statistics, and fc1's output (of a batch's first few dozen rows fc2's,
    too, if there is a layer scale); GELU is computed anew.

    Args:
        x: (N, D), any float dtype and strides.
        group_sizes: rows of each group, in order; host integers that add up to N. A group may be empty.
        experts: parameters of each group's expert. The linear layers share one float dtype, in which the products are
            computed; x may be wider (a float32 residual stream). Under autocast they are cast to its dtype.
        layer_scale: (D,) factor of each channel of the branch, shared by the groups, or None.
        row_scale: (N,) factor of each row of the branch, or None: stochastic depth, already divided by the probability
            of keeping a sample. It gets no gradient.
        eps: epsilon of the norms.
        save_activation: keep GELU's output as well: twice the memory for one elementwise pass less.
        backend: "auto", or one of `ops.implementations("mome_ffn")`.

    Returns:
        (N, D), contiguous, dtype of x. Differentiable once ("eager": any number of times).

    Raises:
        ValueError: sizes do not add up, shapes do not fit, devices differ, or the backend is unknown.
        TypeError: a dtype is not a float, the linear layers' dtypes differ, or theirs is wider than that of x.
        NotImplementedError: the backend cannot run here (names those that can), or has no second derivative.
    """
    experts = [ExpertWeights(*expert) for expert in experts]
    dtype = _validate(x, group_sizes, experts, layer_scale, row_scale)
    columns = list(map(list, zip(*experts, strict=True)))  # one list for each parameter
    leaves = [x, layer_scale, *(weight for column in columns for weight in column)]
    needs_grad = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
    interpreted = backend == "triton" and triton_interprets()
    capability = capability_of(x.device)
    problem = Problem(x.device.type, dtype, needs_grad, interpreted=interpreted, capability=capability)
    implementation = select("mome_ffn", problem, backend)
    if implementation == "eager":
        return reference.mome_ffn(x, group_sizes, experts, layer_scale, row_scale, eps)
    out: Tensor = torch.ops.vlmo_fast.mome_ffn(
        x, group_sizes, *columns, layer_scale, row_scale, eps, needs_grad, save_activation, implementation
    )[0]
    return out


def _validate(
    x: Tensor,
    group_sizes: Sequence[int],
    experts: Sequence[ExpertWeights],
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
) -> torch.dtype:
    """Raise, or return the dtype of the products."""

    def fail(argument: str, rule: str, actual: Any, error: type[Exception] = ValueError) -> NoReturn:
        raise error(f"mome_ffn: {argument} must {rule}, got {actual}")

    if x.ndim != 2:
        fail("x", "be (N, D)", tuple(x.shape))
    if not x.is_floating_point():
        fail("x", "be of a float dtype", x.dtype, TypeError)
    rows, width = x.shape
    if not experts or len(group_sizes) != len(experts):
        fail("group_sizes", "name a size for each expert, one at least", f"{len(group_sizes)} for {len(experts)}")
    if any(size < 0 for size in group_sizes) or sum(group_sizes) != rows:
        fail("group_sizes", f"be counts that add up to the {rows} rows of x", list(group_sizes))
    hidden = len(experts[0].fc1_bias)
    shapes = ((width,), (width,), (hidden, width), (hidden,), (width, hidden), (width,))
    named: dict[str, tuple[Tensor, tuple[int, ...]]] = {}
    for index, expert in enumerate(experts):
        for field, tensor, shape in zip(ExpertWeights._fields, expert, shapes, strict=True):
            named[f"experts[{index}].{field}"] = tensor, shape
    if layer_scale is not None:
        named["layer_scale"] = layer_scale, (width,)
    if row_scale is not None:
        named["row_scale"] = row_scale, (rows,)
        if row_scale.requires_grad:
            fail("row_scale", "not require a gradient (it is a random mask)", "requires_grad=True")
    for name, (tensor, shape) in named.items():
        if tensor.shape != shape:
            fail(name, f"be {shape}", tuple(tensor.shape))
        if not tensor.is_floating_point():
            fail(name, "be of a float dtype", tensor.dtype, TypeError)
        if tensor.device != x.device:
            fail(name, f"be on the device of x, {x.device}", tensor.device)
    dtype = experts[0].fc1_weight.dtype
    for name, (tensor, _) in named.items():
        if ".fc" in name and tensor.dtype != dtype:
            fail(name, f"be {dtype} like experts[0].fc1_weight", tensor.dtype, TypeError)
    if _autocasts(x):
        return torch.get_autocast_dtype(x.device.type)
    if torch.promote_types(x.dtype, dtype) != x.dtype:
        fail("experts[0].fc1_weight", f"not be wider than x, which is {x.dtype}", dtype, TypeError)
    return dtype


def _autocasts(x: Tensor) -> bool:
    device = x.device.type
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64


def _implementation(name: str) -> ModuleType:
    return import_module("vlmo_fast.kernels.ffn") if name == "triton" else _ffn_torch


# `arguments` are those of the schemas below: six lists of weights, the two scales, and what each op has of its own.
# What is saved for the backward pass is the implementation's own affair.


def _forward(x: Tensor, group_sizes: Sequence[int], *arguments: Any) -> tuple[Tensor, list[Tensor]]:
    *columns, layer_scale, row_scale, eps, save, save_activation, implementation = arguments
    run = _implementation(implementation).forward
    out, saved = run(x, group_sizes, _experts(columns), layer_scale, row_scale, eps, save, save and save_activation)
    return out, saved


def _backward(
    grad: Tensor, x: Tensor, group_sizes: Sequence[int], *arguments: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    *columns, layer_scale, row_scale, saved, eps, trained, implementation = arguments
    run = _implementation(implementation).backward
    d_x, d_layer_scale, d_experts = run(
        grad, x, group_sizes, _experts(columns), layer_scale, row_scale, saved, eps, trained
    )
    return d_x, d_layer_scale, [gradient for expert in d_experts for gradient in expert]


def _experts(columns: Sequence[Sequence[Tensor]]) -> list[ExpertWeights]:
    return [ExpertWeights(*expert) for expert in zip(*columns, strict=True)]


def _fake(x: Tensor, group_sizes: Sequence[int], *arguments: Any) -> tuple[Tensor, list[Tensor]]:
    *columns, layer_scale, _, _, save, save_activation, implementation = arguments
    out = x.new_empty(x.shape)
    if not save:
        return out, []
    rows, width = x.shape
    is_triton = implementation == "triton"
    statistics = x.new_empty(3 if is_triton else 2, rows, dtype=torch.promote_types(x.dtype, torch.float32))
    fc1_weight = _experts(columns)[0].fc1_weight
    sizes = [rows] if is_triton else group_sizes  # whoever calls matrix products has many tensors
    z = [x.new_empty(size, fc1_weight.shape[0], dtype=fc1_weight.dtype) for size in sizes]
    h = [torch.empty_like(tensor) for tensor in z] if save_activation else []
    has_branch = layer_scale is not None and not is_triton
    branch = [x.new_empty(torch.sym_min(rows, _ffn_torch.FEW_ROWS), width)] if has_branch else []
    return out, [statistics, *z, *h, *branch]


def _fake_backward(
    grad: Tensor, x: Tensor, group_sizes: Sequence[int], *arguments: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    *columns, layer_scale, _, _, _, trained, _ = arguments
    d_experts = [
        tensor.new_empty(tensor.shape if wanted else (0,))
        for expert, wanted in zip(_experts(columns), trained, strict=True)
        for tensor in expert
    ]
    d_layer_scale = x.new_empty(0) if layer_scale is None else layer_scale.new_empty(layer_scale.shape)
    return x.new_empty(x.shape), d_layer_scale, d_experts


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, list[Tensor]]) -> None:
    x, group_sizes, *columns, layer_scale, row_scale, eps, _, _, implementation = inputs
    _, saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, layer_scale, row_scale, *(weight for column in columns for weight in column), *saved)
    ctx.sizes, ctx.eps, ctx.implementation = list(group_sizes), eps, implementation


def _autograd(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    nothing, num_groups = (None,) * 6, len(ctx.sizes)
    if grad is None:
        return (None, None, *([None] * num_groups for _ in nothing), *nothing)
    x, layer_scale, row_scale, *rest = ctx.saved_tensors
    columns = [rest[column * num_groups : (column + 1) * num_groups] for column in range(6)]
    saved = rest[6 * num_groups :]
    wanted = ctx.needs_input_grad[2:8]  # six lists of flags
    trained = [any(flags) for flags in zip(*wanted, strict=True)]
    d_x, d_layer_scale, d_weights = torch.ops.vlmo_fast.mome_ffn_backward(
        grad, x, ctx.sizes, *columns, layer_scale, row_scale, saved, ctx.eps, trained, ctx.implementation
    )
    d_columns = [
        [d_weights[6 * group + column] if flags[group] else None for group in range(num_groups)]
        for column, flags in enumerate(wanted)
    ]
    return (d_x, None, *d_columns, None if layer_scale is None else d_layer_scale, None, None, None, None, None)


def _no_second_derivative(ctx: Any, *_: Any) -> NoReturn:
    raise NotImplementedError("mome_ffn: backend must be 'eager' for derivatives of derivatives, got another")


def _autocast_rule(device: str) -> Callable[..., Any]:
    """The linear layers in autocast's dtype; norm, statistics and residual stream stay as they are."""

    def rule(x: Tensor, group_sizes: Sequence[int], *rest: Any) -> Any:
        norm_weight, norm_bias, *layers = rest[:6]
        if _autocasts(x):
            dtype = torch.get_autocast_dtype(device)
            layers = [[tensor.to(dtype) for tensor in column] for column in layers]
        with torch.autocast(device, enabled=False):
            return torch.ops.vlmo_fast.mome_ffn(x, group_sizes, norm_weight, norm_bias, *layers, *rest[6:])

    return rule


def _no_autocast(device: str) -> Callable[..., Any]:
    def rule(*arguments: Any) -> Any:
        with torch.autocast(device, enabled=False):
            return torch.ops.vlmo_fast.mome_ffn_backward(*arguments)

    return rule


_WEIGHTS = (
    "SymInt[] group_sizes, Tensor[] norm_weight, Tensor[] norm_bias, Tensor[] fc1_weight, Tensor[] fc1_bias, "
    "Tensor[] fc2_weight, Tensor[] fc2_bias, Tensor? layer_scale, Tensor? row_scale"
)
_library = torch.library.Library("vlmo_fast", "FRAGMENT")
_library.define(
    f"mome_ffn(Tensor x, {_WEIGHTS}, float eps, bool save, bool save_activation, str implementation) "
    "-> (Tensor, Tensor[])"
)
_library.define(
    f"mome_ffn_backward(Tensor grad, Tensor x, {_WEIGHTS}, Tensor[] saved, float eps, bool[] trained, "
    "str implementation) -> (Tensor, Tensor, Tensor[])"
)
_library.impl("mome_ffn", _forward, "CompositeExplicitAutograd")
_library.impl("mome_ffn_backward", _backward, "CompositeExplicitAutograd")
for _device in ("cpu", "cuda"):
    _library.impl("mome_ffn", _autocast_rule(_device), f"Autocast{_device.upper()}")
    _library.impl("mome_ffn_backward", _no_autocast(_device), f"Autocast{_device.upper()}")
torch.library.register_fake("vlmo_fast::mome_ffn", _fake, lib=_library)
torch.library.register_fake("vlmo_fast::mome_ffn_backward", _fake_backward, lib=_library)
torch.library.register_autograd("vlmo_fast::mome_ffn", _autograd, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("vlmo_fast::mome_ffn_backward", _no_second_derivative, lib=_library)


@register_flop_formula(torch.ops.vlmo_fast.mome_ffn)
def _flops(x: Sequence[int], group_sizes: Sequence[int], *columns: Any, **_: Any) -> int:
    """Two matrix products."""
    (hidden,) = columns[3][0]
    return 4 * x[0] * x[1] * int(hidden)


@register_flop_formula(torch.ops.vlmo_fast.mome_ffn_backward)
def _backward_flops(grad: Any, x: Sequence[int], group_sizes: Sequence[int], *rest: Any, **_: Any) -> int:
    """Two matrix products for the rows, and two more for the weights of each expert that trains."""
    (hidden,), trained = rest[3][0], rest[-2]
    rows = x[0] + sum(size for size, wanted in zip(group_sizes, trained, strict=True) if wanted)
    return 4 * rows * x[1] * int(hidden)
