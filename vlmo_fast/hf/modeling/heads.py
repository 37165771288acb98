"""Heads that more than one task has."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vlmo_fast.hf.configuration import VLMoConfig

__all__ = ["MaskedLMHead", "PairClassifier"]


class MaskedLMHead(nn.Module):
    """BERT's prediction head: dense, GELU, norm, decoder. The decoder is not tied to the word embeddings."""

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.text_layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits of the vocabulary, (..., V), from hidden states (..., D)."""
        logits: Tensor = self.decoder(self.norm(F.gelu(self.dense(hidden))))
        return logits


class PairClassifier(nn.Module):
    """Classifier over pooled pairs: Linear to 2 D, LayerNorm, GELU, Linear."""

    def __init__(self, input_size: int, config: VLMoConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(input_size, 2 * config.hidden_size)
        self.norm = nn.LayerNorm(2 * config.hidden_size)
        self.fc2 = nn.Linear(2 * config.hidden_size, config.num_labels)

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits of the labels, (B, num_labels), from the pooled pairs (B, input_size)."""
        logits: Tensor = self.fc2(F.gelu(self.norm(self.fc1(pooled))))
        return logits
