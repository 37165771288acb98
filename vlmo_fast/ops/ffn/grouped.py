"""The modality experts on torch's own operators: each group's rows are views, each result goes where it belongs.

Nothing is concatenated, sliced into copies or stacked. Where oneDNN multiplies (`ops/matmul.py`), bias and GELU come
with the products for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmo_fast.ops.ffn import FFNBackend
from vlmo_fast.ops.matmul import library_for
from vlmo_fast.ops.types import ExpertWeights

__all__ = ["BACKEND"]

FEW_ROWS = 48  # of a batch, whose branch is kept: for few rows the passes over Q below cost more than they save


class _Grouped(FFNBackend):
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
        """Saves what `saved` says: of each group z, and if asked for h, and the branch of the first rows of all."""
        library = library_for(experts[0].fc1_weight)
        out = x.new_empty(x.shape)
        statistics = x.new_empty((2, len(x)) if save else (0,), dtype=torch.promote_types(x.dtype, torch.float32))
        saved_z, saved_h = [], []
        saved_branch = [x.new_empty(x[:FEW_ROWS].shape)] if save and layer_scale is not None else []
        scale = None if layer_scale is None else layer_scale.to(x.dtype)
        for rows, expert in zip(_groups(group_sizes), experts, strict=True):
            normed, mean, rstd = _norm(x[rows], expert, eps)  # (n, D), (n, 1), (n, 1)
            count, normed = len(normed), library.pad_rows(normed)  # n of (m, D), m >= n
            if save:
                statistics[0, rows], statistics[1, rows] = mean.flatten(), rstd.flatten()
                z = library.product(normed, expert.fc1_weight, expert.fc1_bias)  # (m, F)
                h = F.gelu(z)
                saved_z.append(z[:count])
                if save_activation:
                    saved_h.append(h[:count])
            else:
                h = library.product_gelu(normed, expert.fc1_weight, expert.fc1_bias)
            branch = library.product(h, expert.fc2_weight, expert.fc2_bias)[:count].to(x.dtype)  # (n, D)
            for first in saved_branch:
                first[rows] = branch[: len(first[rows])]
            if row_scale is not None:
                branch *= row_scale[rows, None]
            if scale is None:
                torch.add(x[rows], branch, out=out[rows])
            else:
                torch.addcmul(x[rows], branch, scale, out=out[rows])
        return out, [statistics, *saved_z, *saved_h, *saved_branch] if save else []

    def saved(
        self, x: Tensor, group_sizes: Sequence[int], hidden: int, dtype: torch.dtype, scaled: bool, activation: bool
    ) -> list[Tensor]:
        """Mean and reciprocal deviation (2, N); fc1's outputs z, GELU's h; with a layer scale fc2's first rows."""
        rows, width = x.shape
        statistics = x.new_empty((2, rows), dtype=torch.promote_types(x.dtype, torch.float32))
        z = [x.new_empty((size, hidden), dtype=dtype) for size in group_sizes]
        h = [torch.empty_like(tensor) for tensor in z] if activation else []
        branch = [x.new_empty((torch.sym_min(rows, FEW_ROWS), width))] if scaled else []
        return [statistics, *z, *h, *branch]

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
        """With g = row_scale * grad and Q = g^T h, fc2's weight gets layer_scale * Q.

        The layer scale gets, without the value of the branch, rowsum(Q * W2) + b2 * sum(g).
        """
        library = library_for(experts[0].fc1_weight)
        statistics, *rest = saved
        branch = rest.pop() if layer_scale is not None else x[:0]
        z, h = rest[: len(experts)], rest[len(experts) :]
        d_x = x.new_empty(x.shape)
        accumulator = statistics.dtype
        d_layer_scale = x.new_zeros(0 if layer_scale is None else len(layer_scale), dtype=accumulator)
        d_experts: list[tuple[Tensor, ...]] = []
        for index, (rows, expert) in enumerate(zip(_groups(group_sizes), experts, strict=True)):
            dtype = expert.fc1_weight.dtype
            g = grad[rows] if row_scale is None else grad[rows] * row_scale[rows, None].to(grad.dtype)  # (n, D)
            d_branch = g if layer_scale is None else g * layer_scale.to(g.dtype)
            if layer_scale is not None or trained[index]:
                activation = h[index] if h else F.gelu(z[index])  # (n, F)
                if layer_scale is None:
                    q, total = (
                        library.product(g.to(dtype).t(), activation.t()),
                        g.sum(0, dtype=accumulator),
                    )  # (D, F), (D,)
                elif rows.stop <= len(branch):
                    d_layer_scale += (g * branch[rows]).sum(0, dtype=accumulator)
                    q, total = (
                        library.product(d_branch.to(dtype).t(), activation.t()),
                        d_branch.sum(0, dtype=accumulator),
                    )
                else:
                    q, total = library.product(g.to(dtype).t(), activation.t()), g.sum(0, dtype=accumulator)
                    d_layer_scale += torch.linalg.vecdot(q, expert.fc2_weight) + expert.fc2_bias * total
                    if trained[index]:
                        q *= layer_scale.to(dtype)[:, None]
                        total *= layer_scale
                del activation
            padded = library.product(
                library.pad_rows(d_branch.to(dtype)), expert.fc2_weight.t()
            )  # (m, F), of h until the line after next
            d_z = padded[: len(g)]  # (n, F); the rows after them are zeros
            torch.ops.aten.gelu_backward.grad_input(d_z, z[index], grad_input=d_z)
            d_normed = library.product(padded, expert.fc1_weight.t())[: len(g)].to(x.dtype)  # (n, D)
            part, norm_weight, norm_bias = x[rows], *_norm_parameters(x, expert)
            through_norm, d_norm_weight, d_norm_bias = torch.ops.aten.native_layer_norm_backward(
                *(d_normed, part, part.shape[1:]),
                *(statistics[0, rows, None], statistics[1, rows, None]),
                *(norm_weight, norm_bias, [True, trained[index], trained[index]]),
            )
            torch.add(grad[rows], through_norm, out=d_x[rows])
            if trained[index]:
                normed, _, _ = _norm(part, expert, eps)
                d_fc1 = library.product(d_z.t(), normed.t()), d_z.sum(0, dtype=accumulator)
                gradients = (d_norm_weight, d_norm_bias, *d_fc1, q, total)
                d_experts.append(tuple(d.to(weight.dtype) for d, weight in zip(gradients, expert, strict=True)))
            else:
                d_experts.append(tuple(weight.new_empty(0) for weight in expert))
        return d_x, d_layer_scale if layer_scale is None else d_layer_scale.to(layer_scale.dtype), d_experts


BACKEND = _Grouped()


def _groups(group_sizes: Sequence[int]) -> Iterator[slice]:
    end = 0
    for size in group_sizes:
        end += size
        yield slice(end - size, end)


def _norm_parameters(x: Tensor, expert: ExpertWeights) -> tuple[Tensor, Tensor]:
    """Like the rows; on a CPU float32 beside half-precision rows, since the statistics are float32 only then."""
    dtype = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
    return expert.norm_weight.to(dtype), expert.norm_bias.to(dtype)


def _norm(part: Tensor, expert: ExpertWeights, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    weight, bias = _norm_parameters(part, expert)
    normed, mean, rstd = torch.native_layer_norm(part, part.shape[1:], weight, bias, eps)
    return normed.to(expert.fc1_weight.dtype), mean, rstd
