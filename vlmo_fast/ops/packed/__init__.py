"""Attention with a shared bias over packed sequences."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from vlmo_fast.ops.dispatch import capability_of, load, select, triton_interprets
from vlmo_fast.ops.packed.plan import Packing
from vlmo_fast.ops.registration import register
from vlmo_fast.ops.types import Problem

__all__ = ["PackedAttentionBackend", "packed_attention"]


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    bias: Tensor | None = None,
    *,
    host_segments: Tensor | None = None,
    max_length: int,
    cls_only: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multi-head attention within each sequence of a packed batch, with a bias that the sequences share.

    Replaces, for each sequence with the rows r (its text's, then its image's) and their bias rows p:
        softmax(scale * query[r] key[r]^T + bias[:, p][:, :, p]) value[r]

    No S x S scores are kept for the backward pass, and the bias is never repeated for the sequences.

    Args:
        query: (N, H, d), any float dtype, any stride between rows and heads; with `cls_only` (B, H, d), one query a
            sequence, that of its first token.
        key: (N, H, d), dtype and device of the query.
        value: (N, H, d), dtype and device of the query.
        segments: (B, 2, 3) int32 on the query's device: of each sequence its text, then its image, each (first row,
            length, first bias row), with length 0 where there is none. No row may belong to two segments, no bias row
            to both segments of a sequence.
        bias: (H, R, R), any float dtype, added to the scaled scores, or None. bias[h, i, j] is between a query with
            bias row i and a key with bias row j. Sequences whose gradients overlap are summed in a fixed order.
        host_segments: `segments` on the CPU, for implementations that plan on the host; None for a copy when one is
            needed, which waits for the device. Not needed for tensors on a CPU.
        max_length: tokens of the longest sequence, or an upper bound.
        cls_only: whether only the first token of each sequence attends.
        scale: factor of the scores; None means d ** -0.5.
        backend: "auto", or one of `ops.implementations("packed_attention")`.

    Returns:
        (N, H, d), or (B, H, d) with `cls_only`, in the query's dtype; 0 in rows that no sequence owns. Differentiable
        once in query, key, value and bias ("eager": any number of times).

    Raises:
        ValueError: shapes or devices disagree, segments overlap or leave their range (looked at on the host only), or
            the backend is unknown.
        TypeError: dtypes disagree.
        NotImplementedError: the backend cannot run here (names those that can), or has no second derivative.
        ImportError: the backend must be built first; names the command.
    """
    _validate(query, key, value, segments, bias, host_segments, cls_only)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (query, key, value, bias))
    problem = Problem(
        *(query.device.type, query.dtype, needs_grad, query.shape[-1]),
        interpreted=triton_interprets(),
        capability=capability_of(query.device),
    )
    name = select("packed_attention", problem, backend)
    implementation = load("packed_attention", name)
    out: Tensor
    if isinstance(implementation, PackedAttentionBackend):
        out, _ = torch.ops.vlmo_fast.packed_attention(
            query, key, value, segments, host_segments, bias, max_length, cls_only, scale, name
        )
    else:
        out = implementation(query, key, value, segments, bias, cls_only, scale)
    return out


def _validate(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    bias: Tensor | None,
    host_segments: Tensor | None,
    cls_only: bool,
) -> None:
    def fail(argument: str, rule: str, actual: Any, error: type[Exception] = ValueError) -> None:
        raise error(f"packed_attention: {argument} must {rule}, got {actual}")

    if key.ndim != 3 or key.shape != value.shape:
        fail("key and value", "be (N, H, d) alike", f"{tuple(key.shape)} and {tuple(value.shape)}")
    if segments.ndim != 3 or segments.shape[1:] != (2, 3):
        fail("segments", "be (B, 2, 3)", tuple(segments.shape))
    if segments.dtype != torch.int32:
        fail("segments", "be int32", segments.dtype, TypeError)
    rows = segments.shape[0] if cls_only else key.shape[0]
    if query.shape != (rows, *key.shape[1:]):
        fail("query", f"be {'(B, H, d)' if cls_only else '(N, H, d)'} = {(rows, *key.shape[1:])}", tuple(query.shape))
    if not (query.dtype == key.dtype == value.dtype and query.is_floating_point()):
        found = f"{query.dtype}, {key.dtype} and {value.dtype}"
        fail("query, key and value", "share one float dtype", found, TypeError)
    tensors = {"key": key, "value": value, "segments": segments, "bias": bias}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != query.device:
            fail(name, f"be on the query's device {query.device}", tensor.device)
    if bias is not None:
        if bias.ndim != 3 or bias.shape[0] != key.shape[1] or bias.shape[1] != bias.shape[2]:
            fail("bias", f"be (H, R, R) with H = {key.shape[1]}", tuple(bias.shape))
        if not bias.is_floating_point():
            fail("bias", "be of a float dtype", bias.dtype, TypeError)
    if host_segments is not None:
        if host_segments.device.type != "cpu" or host_segments.dtype != torch.int32:
            fail("host_segments", "be int32 on the CPU", f"{host_segments.dtype} on {host_segments.device}", TypeError)
        if host_segments.shape != segments.shape:
            fail("host_segments", f"be {tuple(segments.shape)} like segments", tuple(host_segments.shape))


class PackedAttentionBackend(ABC):
    """An implementation of `packed_attention` inside its custom op. Tensors are as there."""

    @abstractmethod
    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, packing: Packing, scale: float
    ) -> tuple[Tensor, Tensor]:
        """The result, contiguous, 0 in rows that no sequence owns; and what `saved` describes."""

    @abstractmethod
    def saved(self, query: Tensor, key: Tensor) -> Tensor:
        """An empty tensor like the one that `forward` saves, by the `new_empty` of the (perhaps fake) query."""

    @abstractmethod
    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        out: Tensor,
        saved: Tensor,
        packing: Packing,
        scale: float,
        bias_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of query, key and value, contiguous, and of the bias in its dtype (empty if not wanted)."""


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    host_segments: Tensor | None,
    bias: Tensor | None,
    max_length: int,
    cls_only: bool,
    scale: float,
    name: str,
) -> tuple[Tensor, Tensor]:
    backend: PackedAttentionBackend = load("packed_attention", name)
    packing = Packing(segments, host_segments, max_length, cls_only)
    return backend.forward(query, key, value, bias, packing, scale)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    host_segments: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    saved: Tensor,
    max_length: int,
    cls_only: bool,
    scale: float,
    bias_grad: bool,
    name: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    backend: PackedAttentionBackend = load("packed_attention", name)
    packing = Packing(segments, host_segments, max_length, cls_only)
    return backend.backward(grad, query, key, value, bias, out, saved, packing, scale, bias_grad)


def _fake(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    backend: PackedAttentionBackend = load("packed_attention", rest[-1])
    return query.new_empty(query.shape), backend.saved(query, key)


def _fake_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    host_segments: Tensor | None,
    bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias_grad = rest[-2]
    d_bias = bias.new_empty(bias.shape) if bias is not None and bias_grad else query.new_empty(0)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), d_bias


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, segments, host_segments, bias, *ctx.options = inputs
    out, stats = output
    ctx.mark_non_differentiable(stats)
    ctx.save_for_backward(query, key, value, segments, host_segments, bias, out, stats)


def _autograd(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    query, key, value, segments, host_segments, bias, out, stats = ctx.saved_tensors
    max_length, cls_only, scale, implementation = ctx.options
    bias_grad = ctx.needs_input_grad[5]
    d_query, d_key, d_value, d_bias = torch.ops.vlmo_fast.packed_attention_backward(
        *(grad, query, key, value, segments, host_segments, bias, out, stats),
        *(max_length, cls_only, scale, bias_grad, implementation),
    )
    return d_query, d_key, d_value, None, None, d_bias if bias_grad else None, None, None, None, None


# Shapes do not tell how long each sequence is: as if all were of the largest length.


def _flops(query: Any, key: Any, value: Any, segments: Any, *rest: Any, **_: Any) -> int:
    max_length = rest[2]
    return 4 * int(query[0] * query[1] * query[2] * max_length)


def _flops_backward(grad: Any, query: Any, key: Any, value: Any, segments: Any, *rest: Any, **_: Any) -> int:
    max_length = rest[4]
    return 10 * int(query[0] * query[1] * query[2] * max_length)


_INPUTS = "Tensor query, Tensor key, Tensor value, Tensor segments, Tensor? host_segments, Tensor? bias"
register(
    f"packed_attention({_INPUTS}, SymInt max_length, bool cls_only, float scale, str implementation) "
    "-> (Tensor, Tensor)",
    _forward,
    fake=_fake,
    flops=_flops,
    setup_context=_setup_context,
    autograd=_autograd,
)
register(
    f"packed_attention_backward(Tensor grad, {_INPUTS}, Tensor out, Tensor stats, SymInt max_length, bool cls_only, "
    "float scale, bool bias_grad, str implementation) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    fake=_fake_backward,
    flops=_flops_backward,
    backward_of="packed_attention",
)
