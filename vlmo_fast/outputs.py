"""What the network returns, for padded batches and for packed ones."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["MoMEOutput", "PackedOutput"]


class MoMEOutput(NamedTuple):
    """What `MoMETransformer` returns. A field is None where its path did not run or was not asked for.

    Attributes:
        last_hidden_state: (B, S, D), after the final norm; text tokens first, then image [CLS] and patches. With
            `cls_only`, (B, 1, D): the first token.
        pooler_output: (B, D), tanh(dense([T_CLS])) of a pair.
        image_embeds: (B, D), unit-norm contrastive embedding of an image alone.
        text_embeds: (B, D), unit-norm contrastive embedding of a text alone.
        vl_last_hidden_state: (B, S, D), the same sequence with the vision-language experts in the top layers.
        vl_image_embeds: (B, D), unit-norm contrastive embedding of the image on that branch.
        vl_text_embeds: (B, D), unit-norm contrastive embedding of the text on that branch.
        hidden_states: L + 1 tensors (B, S, D): the embeddings, then each block's output, before the final norm.
        vl_hidden_states: num_vl_layers tensors (B, S, D): output of each block of the vision-language branch.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    vl_last_hidden_state: Tensor | None = None
    vl_image_embeds: Tensor | None = None
    vl_text_embeds: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    vl_hidden_states: tuple[Tensor, ...] | None = None


class PackedOutput(NamedTuple):
    """What `MoMETransformer.forward_packed` returns.

    A field is None where the batch has no sequence of its kind, or the model no head for it.

    Attributes:
        last_hidden_state: (M, D), the output rows after the final norm; `PackedLayout.unpack` gives those of a kind.
        pooler_output: (pairs, D), tanh(dense([T_CLS])).
        image_embeds: (images, D), unit-norm contrastive embeddings of the images alone.
        text_embeds: (texts, D), unit-norm contrastive embeddings of the texts alone.
        vl_image_embeds: (images, D), unit-norm contrastive embeddings on the vision-language branch.
        vl_text_embeds: (texts, D), unit-norm contrastive embeddings on the vision-language branch.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None = None
    image_embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    vl_image_embeds: Tensor | None = None
    vl_text_embeds: Tensor | None = None
