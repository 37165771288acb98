"""Tokens from ids and pixels: words, patches, positions and the type of each modality.

Shape suffixes: B batch, T text tokens, P image tokens ([CLS] included), D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmo_fast.config import MoMEConfig
from vlmo_fast.positions import resize_absolute_positions
from vlmo_fast.watch import is_plain

__all__ = ["IMAGE_TYPE", "TEXT_TYPE", "ImageEmbeddings", "TextEmbeddings", "UnusedPositions", "rows_of"]

TEXT_TYPE, IMAGE_TYPE = 0, 1  # rows of the modality type table; a second image (NLVR2) takes the row after IMAGE_TYPE


def rows_of(table: nn.Module, index: Tensor | int | slice) -> Tensor:
    """Rows of an embedding table: (D,) for a number, (..., D) for a tensor (...) or a slice up to a row."""
    if is_plain(table, nn.Embedding):
        assert isinstance(table, nn.Embedding)
        return table.weight[index]
    if not isinstance(index, Tensor):
        device = next((parameter.device for parameter in table.parameters()), None)
        rows = range(index.stop) if isinstance(index, slice) else index
        index = torch.tensor(rows, device=device)
    embedded: Tensor = table(index)
    return embedded


class TextEmbeddings(nn.Module):
    """BERT's embeddings: word, token type 0 and, in models with absolute positions, position; then norm and dropout."""

    def __init__(self, config: MoMEConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.adds_positions = config.position_embedding_type == "absolute"
        self.position_embeddings: nn.Embedding | UnusedPositions
        if self.adds_positions:
            self.position_embeddings = nn.Embedding(config.max_text_length, config.hidden_size)
        else:
            self.position_embeddings = UnusedPositions(config)
        # BERT's two segments; VLMo's text is the first
        self.token_type_embeddings = nn.Embedding(2, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, config.text_layer_norm_eps)
        self.dropout = nn.Dropout(config.text_embedding_dropout)

    def forward(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Tokens (..., D) of ids (..., T) and their places in the text, (T,) or (...); None means 0, 1, ..."""
        x = self.word_embeddings(input_ids) + rows_of(self.token_type_embeddings, 0)
        if self.adds_positions:
            x = x + rows_of(self.position_embeddings, slice(input_ids.shape[-1]) if positions is None else positions)
        return self.dropout(self.norm(x))


class UnusedPositions(nn.Module):
    """Text positions in a model with relative ones: present in released checkpoints but unused.

    Kept as a buffer, so that checkpoints round-trip to the bit.
    """

    weight: Tensor

    def __init__(self, config: MoMEConfig) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(config.max_text_length, config.hidden_size))


class ImageEmbeddings(nn.Module):
    """Linear projection of the patches behind a [CLS] token, plus absolute positions where the model has them."""

    def __init__(self, config: MoMEConfig, add_mask_token: bool) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.window_size = config.window_size
        self.stem: nn.Conv2d | None = None
        channels = config.num_channels
        if config.stem_patch_size is not None:
            self.stem = _patch_projection(channels, width, config.stem_patch_size)
            channels, patch = width, patch // config.stem_patch_size
        self.projection = _patch_projection(channels, width, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width)) if add_mask_token else None
        self.position_embeddings: nn.Parameter | None = None
        if config.position_embedding_type == "absolute":
            self.position_embeddings = nn.Parameter(torch.zeros(1, config.num_image_tokens, width))

    @property
    def pixel_dtype(self) -> torch.dtype | None:
        """Dtype of the weights that the pixels meet; None where these are none of a convolution's own."""
        first = self.projection if self.stem is None else self.stem
        return first.weight.dtype if is_plain(first, nn.Conv2d) else None

    def forward(self, pixel_values: Tensor, window_size: int, bool_masked_pos: Tensor | None) -> Tensor:
        """Tokens (B, P, D) of images (B, C, H, W) of `window_size` patches a side, those masked (B, P - 1) replaced."""
        if self.stem is not None:
            pixel_values = F.gelu(self.stem(pixel_values))
        patches = self.projection(pixel_values).flatten(2).transpose(1, 2)  # (B, P - 1, D), row-major
        if bool_masked_pos is not None:
            if bool_masked_pos.shape != patches.shape[:2]:
                raise ValueError(
                    f"MoMETransformer: bool_masked_pos must be (B, patches) = {tuple(patches.shape[:2])}, "
                    f"got {tuple(bool_masked_pos.shape)}"
                )
            assert self.mask_token is not None
            patches = torch.where(bool_masked_pos[:, :, None], self.mask_token.to(patches.dtype), patches)
        x = torch.cat([self.cls_token.to(patches.dtype).expand(len(patches), -1, -1), patches], dim=1)  # (B, P, D)
        if self.position_embeddings is not None:
            x = x + resize_absolute_positions(self.position_embeddings, self.window_size, window_size)
        return x


def _patch_projection(num_channels: int, width: int, patch_size: int) -> nn.Conv2d:
    """A linear map of each patch."""
    return nn.Conv2d(num_channels, width, kernel_size=patch_size, stride=patch_size)
