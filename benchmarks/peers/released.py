"""The forward and the losses of the released VLMo, written anew: the peer for whole models.

It does what microsoft/unilm's `vlmo/` (commit 768a3c87) does, the way it does it, in eager torch on our weights:

- texts are padded to the maximum length, and padded positions are computed like real ones;
- images, texts and pairs run in passes of their own; an image or a text alone takes a base branch through all layers
  and, in pre-training, a second branch through the vision-language experts of the top layers (14 block calls for the
  base model; 12 without it);
- scores and softmax are float32 and stored, (B, heads, S, S); the relative biases of all layers are gathered at once;
- every token goes through every layer and through the final norm, whatever is asked for;
- contrastive logits are computed once for each direction; hard negatives are drawn sample by sample; matching takes
  three passes over the pairs, masked language modelling a fourth.

What it leaves out is what neither side pays for: dropout and drop path (inactive in `eval`), logging, and the gathering
of other processes' features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmo_fast import MoMEConfig

__all__ = ["Features", "Losses", "Negatives", "Released", "pad_texts"]

IMAGE_NORM_EPS, TEXT_NORM_EPS = 1e-6, 1e-12
MLM_WEIGHT = 0.25


class Features(NamedTuple):
    """Of a pass: `hidden` (B, S, D) after the final norm, `embedding` (B, D), and the second branch's or None."""

    hidden: Tensor
    embedding: Tensor
    vl_embedding: Tensor | None = None


class Negatives(NamedTuple):
    """For each text an image that is not its own, and for each image such a text; (B,) int64 each."""

    images: Tensor
    texts: Tensor


class Losses(NamedTuple):
    """Of a pre-training step, 0-d each, and the negatives that it used."""

    total: Tensor
    itc: Tensor
    mlm: Tensor
    itm: Tensor
    negatives: Negatives


class Released:
    """The release's passes over the weights of one of our models.

    Args:
        model: a `MoMETransformer`, or a `VLMoForPreTraining` for the losses. Its parameters are used where they are, so
            gradients arrive in the model.
    """

    def __init__(self, model: nn.Module) -> None:
        backbone = model.get_submodule("backbone") if hasattr(model, "backbone") else model
        self.config = backbone.config
        self.weights = backbone.state_dict(keep_vars=True)
        self.heads = model.state_dict(keep_vars=True)
        self.biases_of: dict[tuple[bool, bool], Tensor] = {}
        if self.config.position_embedding_type == "relative":
            for kind in ((True, False), (False, True), (True, True)):  # (text, image)
                index = relative_index(*kind, self.config.max_text_length, self.config)
                self.biases_of[kind] = index.to(self.weights["relative_position_bias.table"].device)

    # Passes

    def image(self, pixel_values: Tensor, vl_branch: bool = False) -> Features:
        """Images alone: the pass of fine-tuning, or with the second branch that of pre-training."""
        return self._alone(self._embed_images(pixel_values), None, "vision", "image", vl_branch)

    def text(self, input_ids: Tensor, attention_mask: Tensor, vl_branch: bool = False) -> Features:
        """Texts alone, padded to `max_text_length`."""
        return self._alone(self._embed_texts(input_ids), attention_mask, "language", "text", vl_branch)

    def pair(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Features:
        """Pairs: modality experts below, the vision-language expert in the top layers."""
        text, image = self._embed_texts(input_ids), self._embed_images(pixel_values)
        mask = torch.cat([attention_mask, attention_mask.new_ones(image.shape[:2])], dim=1)
        x = torch.cat([text, image], dim=1)
        biases = self._biases(True, True)
        for layer in range(self.config.num_hidden_layers):
            x = self._attend(layer, x, biases, mask)
            if layer < self.config.first_vl_layer:
                length = text.shape[1]
                halves = self._expert(layer, "language", x[:, :length]), self._expert(layer, "vision", x[:, length:])
                x = torch.cat(halves, dim=1)
            else:
                x = self._expert(layer, "vl", x)
        hidden = self._norm(x, "norm", IMAGE_NORM_EPS)
        return Features(hidden, torch.tanh(self._linear(hidden[:, 0], "pooler")))

    def _alone(self, x: Tensor, mask: Tensor | None, expert: str, modality: str, vl_branch: bool) -> Features:
        biases = self._biases(modality == "text", modality == "image")
        if mask is None:
            mask = torch.ones(x.shape[:2], dtype=torch.int64, device=x.device)
        branch_point = x
        for layer in range(self.config.num_hidden_layers):
            if layer == self.config.first_vl_layer:
                branch_point = x
            x = self._expert(layer, expert, self._attend(layer, x, biases, mask))
        hidden = self._norm(x, "norm", IMAGE_NORM_EPS)
        embedding = F.normalize(self._linear(hidden[:, 0], f"{modality}_projection"), dim=-1)
        if not vl_branch:
            return Features(hidden, embedding)
        y = branch_point
        for layer in range(self.config.first_vl_layer, self.config.num_hidden_layers):
            y = self._expert(layer, "vl", self._attend(layer, y, biases, mask))
        vl_first = self._norm(y, "norm", IMAGE_NORM_EPS)[:, 0]
        return Features(hidden, embedding, F.normalize(self._linear(vl_first, f"vl_{modality}_projection"), dim=-1))

    # Losses

    def losses(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        pixel_values: Tensor,
        input_ids_masked: Tensor,
        mlm_labels: Tensor,
        negatives: Negatives | None = None,
    ) -> Losses:
        """A step of vision-language pre-training; negatives are drawn where none are given."""
        fused = self.pair(input_ids_masked, attention_mask, pixel_values)
        words = self._predict_words(fused.hidden[:, : input_ids.shape[1]])
        mlm = F.cross_entropy(words.flatten(0, 1), mlm_labels.flatten(), ignore_index=-100)

        image = self.image(pixel_values, vl_branch=True)
        text = self.text(input_ids, attention_mask, vl_branch=True)
        scale = self.heads["logit_scale"].exp()
        itc = contrast(image.embedding, text.embedding, scale)
        if image.vl_embedding is not None and text.vl_embedding is not None:
            vl_scale = self.heads["vl_logit_scale"].exp()
            itc = (itc + contrast(image.vl_embedding, text.vl_embedding, vl_scale)) / 2

        if negatives is None:
            negatives = draw_negatives(image.embedding, text.embedding, scale)
        passes = [
            self.pair(input_ids, attention_mask, pixel_values),
            self.pair(input_ids, attention_mask, pixel_values[negatives.images]),
            self.pair(input_ids[negatives.texts], attention_mask[negatives.texts], pixel_values),
        ]
        pooled = torch.cat([features.embedding for features in passes])  # (3 B, D)
        matches = torch.zeros(len(pooled), dtype=torch.int64, device=pooled.device)
        matches[: len(input_ids)] = 1
        itm = F.cross_entropy(self._linear(pooled, "itm_head"), matches)
        total = MLM_WEIGHT * mlm + itc + itm
        return Losses(total, itc, mlm, itm, negatives)

    def _predict_words(self, hidden: Tensor) -> Tensor:
        x = F.gelu(self._linear(hidden, "mlm_head.dense"))
        return self._linear(self._norm(x, "mlm_head.norm", TEXT_NORM_EPS), "mlm_head.decoder")

    # Parts

    def _embed_texts(self, input_ids: Tensor) -> Tensor:
        config, weights = self.config, self.weights
        if input_ids.shape[1] != config.max_text_length:
            raise ValueError(
                f"Released: input_ids must be padded to {config.max_text_length} tokens, got {input_ids.shape[1]}"
            )
        x = F.embedding(input_ids, weights["text_embeddings.word_embeddings.weight"])
        x = x + weights["text_embeddings.token_type_embeddings.weight"][0]
        if config.position_embedding_type == "absolute":
            x = x + weights["text_embeddings.position_embeddings.weight"]
        return self._norm(x, "text_embeddings.norm", TEXT_NORM_EPS) + weights["modality_type_embeddings.weight"][0]

    def _embed_images(self, pixel_values: Tensor) -> Tensor:
        config, weights = self.config, self.weights
        patches = F.conv2d(
            pixel_values,
            weights["image_embeddings.projection.weight"],
            weights["image_embeddings.projection.bias"],
            stride=config.patch_size,
        )
        patches = patches.flatten(2).transpose(1, 2)
        x = torch.cat([weights["image_embeddings.cls_token"].expand(len(patches), -1, -1), patches], dim=1)
        if config.position_embedding_type == "absolute":
            x = x + weights["image_embeddings.position_embeddings"]
        return x + weights["modality_type_embeddings.weight"][1]

    def _biases(self, text: bool, image: bool) -> tuple[Tensor, ...] | None:
        """Relative biases of every layer, (heads, S, S) each."""
        if not self.biases_of:
            return None
        gathered = F.embedding(self.biases_of[text, image], self.weights["relative_position_bias.table"])
        return gathered.permute(2, 0, 1).contiguous().chunk(self.config.num_hidden_layers)

    def _attend(self, layer: int, x: Tensor, biases: tuple[Tensor, ...] | None, mask: Tensor) -> Tensor:
        """The attention half of a block: x + scale * attention(norm(x))."""
        weights, block, heads = self.weights, f"blocks.{layer}", self.config.num_attention_heads
        q_bias, v_bias = weights[f"{block}.attention.q_bias"], weights[f"{block}.attention.v_bias"]
        normed = self._norm(x, f"{block}.attention_norm", IMAGE_NORM_EPS)
        bias = torch.cat([q_bias, torch.zeros_like(v_bias), v_bias])
        qkv = F.linear(normed, weights[f"{block}.attention.qkv.weight"], bias)
        query, key, value = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, S, d) each
        query = query * self.config.head_dim**-0.5
        precise = torch.promote_types(x.dtype, torch.float32)
        scores = query.to(precise) @ key.to(precise).transpose(-2, -1)  # (B, heads, S, S)
        if biases is not None:
            scores = scores + biases[layer].unsqueeze(0)
        scores = scores.masked_fill(~mask.bool()[:, None, None, :], float("-inf"))
        attended = scores.softmax(dim=-1).to(x.dtype) @ value
        output = self._linear(attended.transpose(1, 2).flatten(2), f"{block}.attention.projection")
        return x + self._scaled(output, f"{block}.attention_layer_scale")

    def _expert(self, layer: int, name: str, x: Tensor) -> Tensor:
        """The other half: x + scale * expert(norm(x))."""
        expert = f"blocks.{layer}.experts.{name}"
        inner = F.gelu(self._linear(self._norm(x, f"{expert}.norm", IMAGE_NORM_EPS), f"{expert}.fc1"))
        return x + self._scaled(self._linear(inner, f"{expert}.fc2"), f"blocks.{layer}.ffn_layer_scale")

    def _scaled(self, x: Tensor, name: str) -> Tensor:
        return self.weights[name] * x if name in self.weights else x

    def _linear(self, x: Tensor, name: str) -> Tensor:
        weights = self.weights if f"{name}.weight" in self.weights else self.heads
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def _norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        weights = self.weights if f"{name}.weight" in self.weights else self.heads
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def contrast(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Mean of both directions' cross-entropies, the logits computed for each."""
    labels = torch.arange(len(images), device=images.device)
    precise = torch.promote_types(images.dtype, torch.float32)
    per_image = (scale * images @ texts.t()).to(precise)
    per_text = (scale * texts @ images.t()).to(precise)
    return (F.cross_entropy(per_image, labels) + F.cross_entropy(per_text, labels)) / 2


def draw_negatives(images: Tensor, texts: Tensor, scale: Tensor) -> Negatives:
    """One draw a sample from the softmax of the similarities, the own partner's weight set to zero."""
    with torch.no_grad():
        per_text = (scale * texts @ images.t()).softmax(dim=1)
        per_image = (scale * images @ texts.t()).softmax(dim=1)
        per_text.fill_diagonal_(0)
        per_image.fill_diagonal_(0)
        drawn_images = [int(torch.multinomial(row, 1).item()) for row in per_text]
        drawn_texts = [int(torch.multinomial(row, 1).item()) for row in per_image]
    return Negatives(torch.tensor(drawn_images, device=images.device), torch.tensor(drawn_texts, device=images.device))


def pad_texts(texts: list[Tensor], length: int) -> tuple[Tensor, Tensor]:
    """Ids, 0 where padded, and the mask, 1 where real, of texts padded to `length`; (B, length) int64 each."""
    padded = torch.stack([F.pad(text, (0, length - len(text))) for text in texts])
    real = torch.tensor([len(text) for text in texts], device=padded.device)
    return padded, (torch.arange(length, device=padded.device) < real[:, None]).long()


def relative_index(text: bool, image: bool, text_length: int, config: MoMEConfig) -> Tensor:
    """Row of the bias table for each (query, key), from the rule alone: where the two tokens are tells the row."""
    side, span = config.window_size, config.text_relative_span
    image_rows = (2 * side - 1) ** 2 + 3
    cross, text_rows = image_rows, image_rows + 2
    last = text_rows + 2 * span
    positions = torch.arange(text_length if text else 0)
    patches = torch.cartesian_prod(torch.arange(side), torch.arange(side)) if image else torch.zeros(0, 2)
    num_text, num_image = len(positions), len(patches) + 1 if image else 0
    index = torch.empty(num_text + num_image, num_text + num_image, dtype=torch.int64)
    if text:
        words = index[:num_text, :num_text]
        words.copy_(text_rows + span - 2 + positions[None, :] - positions[:, None])
        words[0, :], words[:, 0] = last - 3, last - 2
        words[0, 0] = last - 1
    if image:
        picture = index[num_text:, num_text:]
        apart = patches[:, None] - patches[None, :] + side - 1  # (patches, patches, 2)
        picture[1:, 1:] = apart[..., 0] * (2 * side - 1) + apart[..., 1]
        picture[0, :], picture[:, 0] = image_rows - 3, image_rows - 2
        picture[0, 0] = image_rows - 1
    if text and image:
        index[:num_text, num_text:] = cross
        index[num_text:, :num_text] = cross + 1
    return index
