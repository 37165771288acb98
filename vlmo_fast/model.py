"""VLMo's network: blocks that share attention between modalities and pick their feed-forward expert by modality.

`MoMETransformer` is a dual encoder (an image or a text alone runs through its own experts) and a fusion encoder (a pair
runs jointly: each token through the expert of its modality in the lower blocks, all through the vision-language expert
in the top ones; VLMo, arXiv:2111.02358, section 3).

A forward pass is four steps, whatever the batch:

    plan     which row of one matrix is which token          `vlmo_fast.rows`, `vlmo_fast.packing`
    embed    the tokens, texts' rows before images'          `vlmo_fast.embeddings`
    trunk    the blocks, one after another                   `vlmo_fast.block`
    heads    embeddings and pooled pairs from first tokens

`forward` takes the usual padded batches; `forward_packed` takes any mixture of texts, images and pairs without padding.

Shape suffixes: B batch, T text tokens, P image tokens ([CLS] included), S tokens of the sequence, N rows, M output
rows, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vlmo_fast import ops
from vlmo_fast._validation import check_inputs, check_packed, window_of
from vlmo_fast.block import Attention, MoMEBlock, join
from vlmo_fast.config import MoMEConfig
from vlmo_fast.embeddings import IMAGE_TYPE, TEXT_TYPE, ImageEmbeddings, TextEmbeddings, rows_of
from vlmo_fast.initialization import initialize
from vlmo_fast.outputs import MoMEOutput, PackedOutput
from vlmo_fast.packing import PackedLayout, pack_padded
from vlmo_fast.positions import KeptBiases, LayerBiases, RelativePositionBias
from vlmo_fast.rows import PaddedRows, Plan, plan_padded
from vlmo_fast.serving.graphs import Captured

__all__ = ["MoMEOutput", "MoMETransformer", "PackedOutput"]


class MoMETransformer(nn.Module):
    """The VLMo backbone: image encoder, text encoder and fusion encoder in one set of weights.

    Args:
        config: sizes and options.
        add_pooler: whether pairs get a `pooler_output`.
        add_projections: whether images and texts get contrastive embeddings.
        add_vl_projections: whether the vision-language branch gets contrastive embeddings of its own.
        add_mask_token: whether masked patches can be given (`bool_masked_pos`), for masked image modelling.

    Attributes:
        gradient_checkpointing: set to True to recompute each block in the backward pass instead of storing it.

    Example:
        >>> model = MoMETransformer(MoMEConfig.from_preset("base"))
        >>> model(pixel_values=torch.rand(2, 3, 224, 224)).image_embeds.shape
        torch.Size([2, 768])
    """

    def __init__(
        self,
        config: MoMEConfig,
        *,
        add_pooler: bool = True,
        add_projections: bool = True,
        add_vl_projections: bool = True,
        add_mask_token: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(config, MoMEConfig):
            raise TypeError(f"MoMETransformer: config must be a MoMEConfig, got {type(config).__name__}")
        self.config = config
        self.gradient_checkpointing = False
        self._kept_biases = KeptBiases()
        width = config.hidden_size

        def projection(wanted: bool) -> nn.Linear | None:
            return nn.Linear(width, width, bias=False) if wanted else None

        add_vl_projections = add_vl_projections and config.num_vl_layers > 0
        self.text_embeddings = TextEmbeddings(config)
        self.image_embeddings = ImageEmbeddings(config, add_mask_token)
        self.modality_type_embeddings = nn.Embedding(IMAGE_TYPE + config.num_image_types, width)
        self.relative_position_bias: RelativePositionBias | None = None
        if config.position_embedding_type == "relative":
            self.relative_position_bias = RelativePositionBias(
                config.num_hidden_layers, config.num_attention_heads, config.window_size, config.text_relative_span
            )
        self.blocks = nn.ModuleList(MoMEBlock(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.pooler: nn.Linear | None = nn.Linear(width, width) if add_pooler else None
        self.image_projection = projection(add_projections)
        self.text_projection = projection(add_projections)
        self.vl_image_projection = projection(add_vl_projections)
        self.vl_text_projection = projection(add_vl_projections)
        self.apply(self.init_weights)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_type_ids: Tensor | int | None = None,
        use_vl_branch: bool = False,
        bool_masked_pos: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        cls_only: bool = False,
        output_hidden_states: bool = False,
    ) -> MoMEOutput:
        """Encode images, texts, or image-text pairs.

        Args:
            input_ids: token ids, (B, T) integer, T from 1 to `max_text_length`; [CLS] first. Padding to a fixed
                length is never needed: a text gives the same results in a shorter batch.
            attention_mask: (B, T), True or 1 for real tokens; None where all are. Column 0, [CLS], must be real.
            pixel_values: (B, C, H, W) float, H = W = `image_size`.
            image_type_ids: row of the modality type table for the images: an int, or (B,) integers; None means 1. Row 2
                is the second image of a pair of images (NLVR2).
            use_vl_branch: for an image or a text alone, also run the top layers with their vision-language experts
                from the output of the layer below them (the second contrastive branch of pre-training).
            bool_masked_pos: (B, P - 1) bool, True for patches replaced by the mask token.
            interpolate_pos_encoding: accept images of another size (still square, and a multiple of `patch_size`),
                resizing the positions as the released fine-tuning does.
            cls_only: compute only [CLS], the sequence's first token, in the last layer: all that pooled and
                contrastive outputs need, in less time. Hidden states of that layer are then (B, 1, D).
            output_hidden_states: return `hidden_states`, and `vl_hidden_states` with `use_vl_branch`.

        Returns:
            `MoMEOutput`.

        Raises:
            ValueError: no input, or shapes, lengths or ids break a rule above; ids and masks are only looked at on CPU.
            TypeError: an input has the wrong dtype.
        """
        if input_ids is None and pixel_values is None:
            raise ValueError("MoMETransformer: input_ids or pixel_values must be given, got neither")
        check_inputs(
            self.config,
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            image_type_ids=image_type_ids,
            use_vl_branch=use_vl_branch,
            bool_masked_pos=bool_masked_pos,
            has_mask_token=self.image_embeddings.mask_token is not None,
            dtype=self.image_embeddings.pixel_dtype,
        )
        windows = () if pixel_values is None else (self.window_of(pixel_values, interpolate_pos_encoding),)
        images = [] if pixel_values is None else [pixel_values]
        kind = "image" if input_ids is None else "text" if pixel_values is None else "pair"
        if cls_only and not output_hidden_states and input_ids is not None:
            layout = pack_padded(attention_mask, windows, vl_branch=use_vl_branch, device=input_ids.device)
            if layout is not None and self._chooses_attention:
                x = self._embed(layout, input_ids, images, image_type_ids, bool_masked_pos)
                x = self.norm(self._trunk(layout, x, self._biases(layout)))
                vl_last = layout.first_tokens(x, "vl_text")[:, None] if use_vl_branch else None
                return self._output(kind, layout.first_tokens(x, kind)[:, None], vl_last)

        num_sequences, num_text = (len(images[0]), 0) if input_ids is None else input_ids.shape
        if torch.jit.is_tracing():  # a tracer's sizes are tensors; the groups of rows are host integers
            num_sequences, num_text = int(num_sequences), int(num_text)
        plan = plan_padded(num_sequences, num_text, windows, attention_mask, cls_only=cls_only)
        biases = self._biases(plan)
        x = self._embed(plan, input_ids, images, image_type_ids, bool_masked_pos)
        states: list[Tensor] | None = [plan.lower.padded(x)] if output_hidden_states else None
        vl_states: list[Tensor] | None = [] if output_hidden_states and use_vl_branch else None
        first_vl_layer = self.config.first_vl_layer
        lower = self._trunk(plan, x, biases, states, end=first_vl_layer)
        x = self._trunk(plan, lower, biases, states, first=first_vl_layer)
        y = None
        if use_vl_branch:
            y = self._trunk(replace(plan, fuses=True), lower, biases, vl_states, first=first_vl_layer)
        last = self.norm(plan.last.padded(x))
        vl_last = None if y is None else self.norm(plan.last.padded(y))
        return self._output(kind, last, vl_last)._replace(
            hidden_states=None if states is None else tuple(states),
            vl_hidden_states=None if vl_states is None else tuple(vl_states),
        )

    def forward_packed(
        self,
        layout: PackedLayout,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | Sequence[Tensor] | None = None,
        image_type_ids: Tensor | int | None = None,
        bool_masked_pos: Tensor | None = None,
    ) -> PackedOutput:
        """Encode any mixture of texts, images and pairs in one pass, without a padded token.

        Args:
            layout: the plan of the batch, from `vlmo_fast.pack`.
            input_ids: (texts, T) integers, T at least the longest text; what follows a text's end is not read.
            pixel_values: the images, (images, C, H, W) float; images of several sizes as a sequence of such tensors,
                which together hold them in the order of the layout. Positions are resized for sizes other than
                `image_size`.
            image_type_ids: row of the modality type table for the images: an int, or (images,); None means 1.
            bool_masked_pos: (images, P - 1) bool, True for patches replaced by the mask token; images of one size only.

        Returns:
            `PackedOutput`.

        Raises:
            ValueError: the tensors are not those that the layout plans for.
            TypeError: an input has the wrong dtype.
        """
        images = [pixel_values] if isinstance(pixel_values, Tensor) else list(pixel_values or ())
        check_packed(
            self.config,
            layout,
            input_ids,
            images,
            image_type_ids,
            bool_masked_pos,
            has_mask_token=self.image_embeddings.mask_token is not None,
            dtype=self.image_embeddings.pixel_dtype,
        )
        x = self._embed(layout, input_ids, images, image_type_ids, bool_masked_pos)
        x = self.norm(self._trunk(layout, x, self._biases(layout)))
        heads = self._heads({kind: layout.first_tokens(x, kind) for kind in layout.kinds})
        return PackedOutput(last_hidden_state=x, **heads)

    def _embed(
        self,
        plan: Plan,
        input_ids: Tensor | None,
        images: Sequence[Tensor],
        image_type_ids: Tensor | int | None,
        bool_masked_pos: Tensor | None,
    ) -> Tensor:
        """The tokens of a plan, (N, D), from ids (B, T) and tensors of images (n, C, H, W) of one size each."""
        parts = []
        if input_ids is not None:
            ids, positions = plan.place_texts(input_ids)
            if ids.numel():
                texts = self.text_embeddings(ids, positions) + rows_of(self.modality_type_embeddings, TEXT_TYPE)
                parts.append(texts.flatten(0, -2))
        if images:
            types: Sequence[Tensor | int | None] = [image_type_ids] * len(images)
            if isinstance(image_type_ids, Tensor):
                types = image_type_ids.split([len(pixels) for pixels in images])
            tokens = [self._embed_images(*each, bool_masked_pos) for each in zip(images, types, strict=True)]
            parts.append(plan.place_images(join([image.flatten(0, 1) for image in tokens])))
        return join(parts)

    def _embed_images(
        self, pixel_values: Tensor, image_type_ids: Tensor | int | None, bool_masked_pos: Tensor | None
    ) -> Tensor:
        """Tokens of images of one size, (B, P, D)."""
        window = pixel_values.shape[-1] // self.config.patch_size
        types = IMAGE_TYPE if image_type_ids is None else image_type_ids
        image_type = rows_of(self.modality_type_embeddings, types)  # (D,) or (B, D)
        image_type = image_type if image_type.ndim == 1 else image_type[:, None]
        return self.image_embeddings(pixel_values, window, bool_masked_pos) + image_type

    def _trunk(
        self,
        plan: Plan,
        x: Tensor,
        biases: LayerBiases | None,
        states: list[Tensor] | None = None,
        first: int = 0,
        end: int | None = None,
    ) -> Tensor:
        """The blocks from `first` to before `end`, one after another: (N, D) to (M, D), the output rows of the last.

        Hidden states of a padded batch, (B, S, D), are appended to `states`.
        """
        num_layers, first_vl_layer = len(self.blocks), self.config.first_vl_layer
        for layer in range(first, num_layers if end is None else end):
            is_fusion = layer >= first_vl_layer
            if layer == first_vl_layer and plan.branch_rows is not None:
                x = x[plan.branch_rows]
            rows = plan.last if layer == num_layers - 1 else plan.upper if is_fusion else plan.lower
            groups = rows.fusion_groups if is_fusion and plan.fuses else rows.modality_groups
            bias = None if biases is None else biases[layer]
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(self.blocks[layer], x, rows, groups, bias, use_reentrant=False)
            else:
                x = self.blocks[layer](x, rows, groups, bias)
            if states is not None:
                assert isinstance(rows, PaddedRows)
                states.append(rows.padded(x))
        return x

    def _output(self, kind: str, last: Tensor, vl_last: Tensor | None) -> MoMEOutput:
        """What `forward` returns for sequences of a kind: (B, S or 1, D), and the same on the VL branch."""
        first = {kind: last[:, 0]}
        if vl_last is not None:
            first[f"vl_{kind}"] = vl_last[:, 0]
        return MoMEOutput(last_hidden_state=last, vl_last_hidden_state=vl_last, **self._heads(first))

    def _heads(self, first: dict[str, Tensor]) -> dict[str, Any]:
        """Pooled pairs and contrastive embeddings from the first tokens (B, D) of each kind of sequence."""

        def unit(projection: nn.Module | None, kind: str) -> Tensor | None:
            return None if projection is None or kind not in first else F.normalize(projection(first[kind]), dim=-1)

        pooled = None if self.pooler is None or "pair" not in first else torch.tanh(self.pooler(first["pair"]))
        return {
            "pooler_output": pooled,
            "image_embeds": unit(self.image_projection, "image"),
            "text_embeds": unit(self.text_projection, "text"),
            "vl_image_embeds": unit(self.vl_image_projection, "vl_image"),
            "vl_text_embeds": unit(self.vl_text_projection, "vl_text"),
        }

    def _biases(self, plan: Plan) -> LayerBiases | None:
        """The relative-position biases of all layers, or None in a model with absolute positions."""
        module = self.relative_position_bias
        return None if module is None else self._kept_biases(module, plan.text_span, plan.windows)

    def window_of(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> int:
        """Patches along a side of these images, (B, C, H, W); ValueError where their size is not allowed."""
        return window_of(self.config, pixel_values, interpolate=interpolate_pos_encoding)

    def init_weights(self, module: nn.Module) -> None:
        """Initialise the parameters that `module` itself owns (not its children's), the released way."""
        initialize(module, self.config)

    @property
    def _chooses_attention(self) -> bool:
        """Whether nobody asked for an implementation of attention by name."""
        return all(m.backends["attention"] == "auto" for m in self.modules() if isinstance(m, Attention))

    def set_backend(self, op: str, backend: str) -> None:
        """Have every block run one of its ops on one implementation.

        Args:
            op: "attention" (of padded batches), "packed_attention", or "mome_ffn" (the experts, but for those of which
                a part was replaced or is watched: these are called as modules).
            backend: "auto", or one of `ops.implementations(op)`; a backend that cannot run raises on
                the first forward that needs it.
        """
        modules = [module for module in self.modules() if isinstance(module, Attention | MoMEBlock)]
        known = sorted({name for module in modules for name in module.backends})
        if op not in known:
            raise ValueError(f"MoMETransformer: op must be one of {known}, got {op!r}")
        names = ("auto", *ops.implementations(op))
        if backend not in names:
            raise ValueError(f"MoMETransformer: {op} backend must be one of {list(names)}, got {backend!r}")
        for module in modules:
            if op in module.backends:
                module.backends[op] = backend

    def set_attention_backend(self, backend: str) -> None:
        """`set_backend` for attention in padded batches and in packed ones."""
        for op in ("attention", "packed_attention"):
            self.set_backend(op, backend)

    def captured(self, *, packed: bool = False, max_graphs: int = 32) -> Captured:
        """Inference with a CUDA graph for each shape of inputs; on a CPU the model is just called.

        One image, one text and one pair are a few hundred launches each, which take longer than their arithmetic.

        Args:
            packed: whether `forward_packed` is called in place of `forward`; the graphs are then a layout's own.
            max_graphs: shapes kept; the least recently used is evicted.

        Returns:
            What to call with the same keywords, in evaluation mode: see `vlmo_fast.serving.Captured`.

        Example:
            >>> encode = MoMETransformer(MoMEConfig.from_preset("base")).eval().captured()
            >>> encode(pixel_values=torch.rand(1, 3, 224, 224)).image_embeds.shape
            torch.Size([1, 768])
        """
        return Captured(self, "forward_packed" if packed else "__call__", max_graphs=max_graphs)
