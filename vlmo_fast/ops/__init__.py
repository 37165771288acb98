"""The public operations of vlmo_fast, a file for each: validate, choose an implementation at the one door, run it."""

from __future__ import annotations

from vlmo_fast.ops._attention import attention
from vlmo_fast.ops._contrastive import ContrastiveLSE, contrastive_loss, contrastive_lse
from vlmo_fast.ops._ffn import ExpertWeights, mome_ffn
from vlmo_fast.ops._packed_attention import packed_attention
from vlmo_fast.ops._ranks import RetrievalRanks, SimilarityTopk, recall_at_k, retrieval_ranks, similarity_topk
from vlmo_fast.ops._sampling import HardNegatives, sample_hard_negatives
from vlmo_fast.ops.dispatch import Choice, Problem, explain, implementations, select

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
    "mome_ffn",
    "packed_attention",
    "recall_at_k",
    "retrieval_ranks",
    "sample_hard_negatives",
    "select",
    "similarity_topk",
]
