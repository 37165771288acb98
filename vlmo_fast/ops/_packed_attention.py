"""Attention with a shared bias over packed sequences."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vlmo_fast.ops import _attention_cpu, _buckets, reference
from vlmo_fast.ops.dispatch import Problem, capability_of, select, triton_interprets

__all__ = ["packed_attention"]


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
    interpreted = backend == "triton" and triton_interprets()
    capability = capability_of(query.device)
    problem = Problem(
        query.device.type, query.dtype, needs_grad, query.shape[-1], interpreted=interpreted, capability=capability
    )
    implementation = select("packed_attention", problem, backend)
    if implementation == "eager":
        with torch.autocast(query.device.type, enabled=False):
            return reference.packed_attention(query, key, value, segments, bias, cls_only, scale)
    out, _ = torch.ops.vlmo_fast.packed_attention(
        query, key, value, segments, host_segments, bias, max_length, cls_only, scale, implementation
    )
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


def _plan(
    segments: Tensor, host_segments: Tensor | None, num_rows: int, bias: Tensor | None, max_length: int
) -> _buckets.Plan:
    """The packing on the host, checked."""
    if segments.device.type == "cpu" or host_segments is None:
        host_segments = segments.cpu()
    plan = _buckets.plan(host_segments)
    if plan.lowest < 0:
        raise ValueError(f"packed_attention: segments must not be negative, got {plan.lowest}")
    if plan.end_row > num_rows:
        raise ValueError(f"packed_attention: segments must stay within {num_rows} rows, got {plan.end_row}")
    if plan.overlaps:
        raise ValueError("packed_attention: segments must not overlap, got a row in two of them")
    if bias is not None and plan.shared_places:
        raise ValueError("packed_attention: segments must not share bias rows in one sequence, got a text that does")
    if bias is not None and plan.end_place > bias.shape[1]:
        raise ValueError(f"packed_attention: segments must stay within {bias.shape[1]} bias rows, got {plan.end_place}")
    if plan.max_length > max_length:
        raise ValueError(f"packed_attention: max_length must be at least {plan.max_length} tokens, got {max_length}")
    return plan


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
    implementation: str,
) -> tuple[Tensor, Tensor]:
    # Scores and softmax stay in float32. Triton launches on the current device, which need not be the tensors'.
    with torch.autocast(query.device.type, enabled=False), torch.cuda.device_of(query):
        if implementation == "triton":
            from vlmo_fast.kernels import attention as kernels

            whole, alignment = _facts(query, key, segments, host_segments, bias, max_length, cls_only)
            out = _room(query, whole)
            stats = kernels.forward(query, key, value, segments, bias, max_length, cls_only, scale, alignment, out)
            return out, stats
        plan = _plan(segments, host_segments, len(key), bias, max_length)
        if implementation == "cpu":
            out = _room(query, _is_whole(plan, query, cls_only))
            queries = _attention_cpu.first_tokens(segments) if cls_only else segments
            return out, _attention_cpu.forward(query, key, value, queries, segments, bias, None, scale, out)
        out = _buckets.attend(query, key, value, plan, bias, cls_only, scale, implementation)
        return out, query.new_empty(0, dtype=torch.float32)


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    host_segments: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    stats: Tensor,
    max_length: int,
    cls_only: bool,
    scale: float,
    bias_grad: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(query.device.type, enabled=False), torch.cuda.device_of(query):
        if implementation == "triton":
            from vlmo_fast.kernels import attention as kernels

            whole, alignment = _facts(query, key, segments, host_segments, bias, max_length, cls_only)
            all_keys = whole if not cls_only else _facts(key, key, segments, host_segments, bias, max_length, False)[0]
            d_query, d_key, d_value = _room(query, whole), _room(key, all_keys), _room(value, all_keys)
            d_bias = None
            if bias is not None and bias_grad:
                d_bias = torch.empty_like(bias, memory_format=torch.contiguous_format)
            kernels.backward(
                *(grad, query, key, value, segments, bias, out, stats, max_length, cls_only, scale, alignment),
                *(d_query, d_key, d_value, d_bias),
            )
            return d_query, d_key, d_value, query.new_empty(0) if d_bias is None else d_bias
        plan = _plan(segments, host_segments, len(key), bias, max_length)
        if implementation == "cpu":
            of_query = _room(query, _is_whole(plan, query, cls_only))
            whole = _is_whole(plan, key, False)
            gradients = of_query, _room(key, whole), _room(value, whole)
            queries = _attention_cpu.first_tokens(segments) if cls_only else segments
            d_bias = _attention_cpu.backward(
                *(grad, query, key, value, queries, segments, bias, None, scale, stats, gradients, bias_grad)
            )
            return *gradients, d_bias
        return _buckets.attend_backward(grad, query, key, value, plan, bias, cls_only, scale, bias_grad)


def _facts(
    query: Tensor,
    key: Tensor,
    segments: Tensor,
    host_segments: Tensor | None,
    bias: Tensor | None,
    max_length: int,
    cls_only: bool,
) -> tuple[bool, int]:
    """Whether each row of the query belongs to a sequence, and the alignment of bias rows, as far as the host knows."""
    if segments.device.type != "cpu" and host_segments is None:
        return False, 1
    plan = _plan(segments, host_segments, len(key), bias, max_length)
    return _is_whole(plan, query, cls_only), plan.place_alignment


def _is_whole(plan: _buckets.Plan, rows: Tensor, cls_only: bool) -> bool:
    """Whether each row belongs to a sequence."""
    return not plan.empty_sequences if cls_only else plan.num_tokens == len(rows)


def _room(like: Tensor, whole: bool) -> Tensor:
    """A contiguous tensor for results: zeros where some rows may belong to no sequence."""
    make = torch.empty if whole else torch.zeros
    return make(like.shape, dtype=like.dtype, device=like.device)


def _fake(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    implementation = rest[-1]
    stats = (2, key.shape[1], query.shape[0]) if implementation in ("triton", "cpu") else (0,)
    return query.new_empty(query.shape), query.new_empty(stats, dtype=torch.float32)


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


def _no_second_derivative(ctx: Any, *_: Any) -> NoReturn:
    raise NotImplementedError("packed_attention: backend must be 'eager' for derivatives of derivatives, got another")


torch.library.define(
    "vlmo_fast::packed_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor segments, Tensor? host_segments, Tensor? bias, "
    "SymInt max_length, bool cls_only, float scale, str implementation) -> (Tensor, Tensor)",
)
torch.library.define(
    "vlmo_fast::packed_attention_backward",
    "(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor segments, Tensor? host_segments, Tensor? bias, "
    "Tensor out, Tensor stats, SymInt max_length, bool cls_only, float scale, bool bias_grad, str implementation) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl("vlmo_fast::packed_attention", "default", _forward)
torch.library.impl("vlmo_fast::packed_attention_backward", "default", _backward)
torch.library.register_fake("vlmo_fast::packed_attention", _fake)
torch.library.register_fake("vlmo_fast::packed_attention_backward", _fake_backward)
torch.library.register_autograd("vlmo_fast::packed_attention", _autograd, setup_context=_setup_context)
torch.library.register_autograd("vlmo_fast::packed_attention_backward", _no_second_derivative)


# Shapes do not tell how long each sequence is: as if all were of the largest length.


@register_flop_formula(torch.ops.vlmo_fast.packed_attention)
def _flops(query: Any, key: Any, value: Any, segments: Any, *rest: Any, **_: Any) -> int:
    max_length = rest[2]
    return 4 * int(query[0] * query[1] * query[2] * max_length)


@register_flop_formula(torch.ops.vlmo_fast.packed_attention_backward)
def _flops_backward(grad: Any, query: Any, key: Any, value: Any, segments: Any, *rest: Any, **_: Any) -> int:
    max_length = rest[4]
    return 10 * int(query[0] * query[1] * query[2] * max_length)
