"""The public operations of vlmo_fast: each validates, asks the one door for an implementation, and runs it."""

from __future__ import annotations

from vlmo_fast.ops.dispatch import Choice, explain, implementations, select
from vlmo_fast.ops.ffn import mome_ffn
from vlmo_fast.ops.matmul import linear
from vlmo_fast.ops.packed import packed_attention
from vlmo_fast.ops.padded import attention
from vlmo_fast.ops.pairs.contrastive import contrastive_loss
from vlmo_fast.ops.pairs.lse import ContrastiveLSE, contrastive_lse
from vlmo_fast.ops.pairs.ranks import RetrievalRanks, SimilarityTopk, recall_at_k, retrieval_ranks, similarity_topk
from vlmo_fast.ops.pairs.sampling import HardNegatives, sample_hard_negatives
from vlmo_fast.ops.types import ExpertWeights, Problem

__all__ = [
    "Choice",
    "ContrastiveLSE",
    "HardNegatives",
    "ExpertWeights",
    "Problem",
    "RetrievalRanks",
    "SimilarityTopk",
    "attention",
    "contrastive_loss",
    "contrastive_lse",
    "explain",
    "implementations",
    "linear",
    "mome_ffn",
    "packed_attention",
    "recall_at_k",
    "retrieval_ranks",
    "sample_hard_negatives",
    "select",
    "similarity_topk",
]
