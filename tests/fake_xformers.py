"""A stand-in for xformers, whose kernels need a GPU: its own rules for what it is given, and the definition."""

import pytest
import torch


def install(monkeypatch):
    """In place of `xformers.ops.memory_efficient_attention`; skips where xformers is not installed."""
    pytest.importorskip("xformers")
    import xformers.ops
    from xformers.ops.fmha import Inputs, cutlass

    of_the_machine = ("device=cpu", "dtype=torch.float64", "bf16 is only supported on A100")

    def memory_efficient_attention(query, key, value, attn_bias=None, scale=None):
        inputs = Inputs(query, key, value, attn_bias, scale=scale)  # (B, S, heads, d) each
        inputs.validate_inputs()
        reasons = [why for op in (cutlass.FwOp, cutlass.BwOp) for why in op.not_supported_reasons(inputs)]
        assert all(why.startswith(of_the_machine) for why in reasons), reasons
        assert query.shape[-1] % 8 == value.shape[-1] % 8 == 0  # asked of CUDA tensors only
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * scale
        scores = scores if attn_bias is None else scores + attn_bias
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)

    monkeypatch.setattr(xformers.ops, "memory_efficient_attention", memory_efficient_attention)
