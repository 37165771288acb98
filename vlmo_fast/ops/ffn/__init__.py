"""The feed-forward experts of a block, grouped by modality: one op for the whole residual branch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from vlmo_fast.ops.dispatch import capability_of, load, select, triton_interprets
from vlmo_fast.ops.registration import autocast_dtype, register
from vlmo_fast.ops.types import ExpertWeights, Problem

__all__ = ["FFNBackend", "mome_ffn"]


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
        ImportError: the backend must be built first; names the command.
    """
    experts = [ExpertWeights(*expert) for expert in experts]
    dtype = _validate(x, group_sizes, experts, layer_scale, row_scale)
    columns = list(map(list, zip(*experts, strict=True)))  # one list for each parameter
    leaves = [x, layer_scale, *(weight for column in columns for weight in column)]
    needs_grad = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
    problem = Problem(
        *(x.device.type, dtype, needs_grad), interpreted=triton_interprets(), capability=capability_of(x.device)
    )
    name = select("mome_ffn", problem, backend)
    implementation = load("mome_ffn", name)
    out: Tensor
    if isinstance(implementation, FFNBackend):
        out, _ = torch.ops.vlmo_fast.mome_ffn(
            x, group_sizes, *columns, layer_scale, row_scale, eps, needs_grad, save_activation, name
        )
    else:
        out = implementation(x, group_sizes, experts, layer_scale, row_scale, eps)
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
    autocast = _autocast(x)
    if autocast is not None:
        return autocast
    if torch.promote_types(x.dtype, dtype) != x.dtype:
        fail("experts[0].fc1_weight", f"not be wider than x, which is {x.dtype}", dtype, TypeError)
    return dtype


def _autocast(x: Tensor) -> torch.dtype | None:
    """The dtype of the linear layers under autocast, which leaves float64 alone."""
    return None if x.dtype == torch.float64 else autocast_dtype(x.device.type)


class FFNBackend(ABC):
    """An implementation of `mome_ffn` inside its custom op. Tensors are as there, and linear layers share a dtype."""

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        group_sizes: Sequence[int],
        experts: Sequence[ExpertWeights],
        layer_scale: Tensor | None,
        row_scale: Tensor | None,
        eps: float,
        save: bool,
        save_activation: bool,
    ) -> tuple[Tensor, list[Tensor]]:
        """The result, (N, D), and what `backward` needs, if `save`; else nothing.

        With `save_activation` GELU's outputs are among that.
        """

    @abstractmethod
    def saved(
        self, x: Tensor, group_sizes: Sequence[int], hidden: int, dtype: torch.dtype, scaled: bool, activation: bool
    ) -> list[Tensor]:
        """Empty tensors of the shapes and dtypes that `forward` saves.

        Args:
            x: (N, D), perhaps a fake tensor, whose `new_empty` is to be used.
            group_sizes: rows of each group, perhaps symbols.
            hidden: F, inner width of the experts.
            dtype: of the linear layers.
            scaled: whether there is a layer scale.
            activation: whether GELU's outputs are saved.
        """

    @abstractmethod
    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        group_sizes: Sequence[int],
        experts: Sequence[ExpertWeights],
        layer_scale: Tensor | None,
        row_scale: Tensor | None,
        saved: Sequence[Tensor],
        eps: float,
        trained: Sequence[bool],
    ) -> tuple[Tensor, Tensor, list[tuple[Tensor, ...]]]:
        """Gradients of x, of the layer scale (empty without one), and of each expert's six parameters.

        The last are empty tensors for experts that are not `trained`.
        """


# `arguments` are those of the schemas below: six lists of weights, the two scales, and what each op has of its own.


def _forward(x: Tensor, group_sizes: Sequence[int], *arguments: Any) -> tuple[Tensor, list[Tensor]]:
    *columns, layer_scale, row_scale, eps, save, save_activation, name = arguments
    backend: FFNBackend = load("mome_ffn", name)
    return backend.forward(
        x, group_sizes, _experts(columns), layer_scale, row_scale, eps, save, save and save_activation
    )


def _backward(
    grad: Tensor, x: Tensor, group_sizes: Sequence[int], *arguments: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    *columns, layer_scale, row_scale, saved, eps, trained, name = arguments
    backend: FFNBackend = load("mome_ffn", name)
    d_x, d_layer_scale, d_experts = backend.backward(
        grad, x, group_sizes, _experts(columns), layer_scale, row_scale, saved, eps, trained
    )
    return d_x, d_layer_scale, [gradient for expert in d_experts for gradient in expert]


def _experts(columns: Sequence[Sequence[Tensor]]) -> list[ExpertWeights]:
    return [ExpertWeights(*expert) for expert in zip(*columns, strict=True)]


def _fake(x: Tensor, group_sizes: Sequence[int], *arguments: Any) -> tuple[Tensor, list[Tensor]]:
    *columns, layer_scale, _, _, save, save_activation, name = arguments
    out = x.new_empty(x.shape)
    if not save:
        return out, []
    fc1_weight = _experts(columns)[0].fc1_weight
    backend: FFNBackend = load("mome_ffn", name)
    saved = backend.saved(
        x, group_sizes, fc1_weight.shape[0], fc1_weight.dtype, layer_scale is not None, save_activation
    )
    return out, saved


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


def _cast(x: Tensor, group_sizes: Sequence[int], *rest: Any) -> tuple[Any, ...]:
    """The linear layers in autocast's dtype; norm, statistics and residual stream stay as they are."""
    norm_weight, norm_bias, *layers = rest[:6]
    dtype = _autocast(x)
    if dtype is not None:
        layers = [[tensor.to(dtype) for tensor in column] for column in layers]
    return x, group_sizes, norm_weight, norm_bias, *layers, *rest[6:]


def _flops(x: Sequence[int], group_sizes: Sequence[int], *columns: Any, **_: Any) -> int:
    """Two matrix products."""
    (hidden,) = columns[3][0]
    return 4 * x[0] * x[1] * int(hidden)


def _backward_flops(grad: Any, x: Sequence[int], group_sizes: Sequence[int], *rest: Any, **_: Any) -> int:
    """Two matrix products for the rows, and two more for the weights of each expert that trains."""
    (hidden,), trained = rest[3][0], rest[-2]
    rows = x[0] + sum(size for size, wanted in zip(group_sizes, trained, strict=True) if wanted)
    return 4 * rows * x[1] * int(hidden)


_WEIGHTS = (
    "SymInt[] group_sizes, Tensor[] norm_weight, Tensor[] norm_bias, Tensor[] fc1_weight, Tensor[] fc1_bias, "
    "Tensor[] fc2_weight, Tensor[] fc2_bias, Tensor? layer_scale, Tensor? row_scale"
)
register(
    f"mome_ffn(Tensor x, {_WEIGHTS}, float eps, bool save, bool save_activation, str implementation) "
    "-> (Tensor, Tensor[])",
    _forward,
    fake=_fake,
    flops=_flops,
    setup_context=_setup_context,
    autograd=_autograd,
    cast=_cast,
)
register(
    f"mome_ffn_backward(Tensor grad, Tensor x, {_WEIGHTS}, Tensor[] saved, float eps, bool[] trained, "
    "str implementation) -> (Tensor, Tensor, Tensor[])",
    _backward,
    fake=_fake_backward,
    flops=_backward_flops,
    backward_of="mome_ffn",
)
