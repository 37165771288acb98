"""The public operations of vlmo_fast, a file for each: validate, choose an implementation at the one door, run it."""

from __future__ import annotations

from vlmo_fast.ops._attention import attention
from vlmo_fast.ops._contrastive import contrastive_loss
from vlmo_fast.ops._ffn import ExpertWeights, mome_ffn
from vlmo_fast.ops._packed_attention import packed_attention
from vlmo_fast.ops.dispatch import Choice, Problem, explain, implementations, select

__all__ = [
    "Choice",
    "ExpertWeights",
    "Problem",
    "attention",
    "contrastive_loss",
    "explain",
    "implementations",
    "mome_ffn",
    "packed_attention",
    "select",
]
