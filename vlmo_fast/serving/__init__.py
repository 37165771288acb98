"""Serving: inference recorded in CUDA graphs."""

from vlmo_fast.serving.graphs import Captured

__all__ = ["Captured"]
