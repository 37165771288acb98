"""VLMo's network: blocks that share attention between modalities and pick their feed-forward expert by modality.

    H' = Attention(LN(H)) + H
    H  = MoME-FFN(LN(H')) + H'         (VLMo, arXiv:2111.02358, section 3)

`MoMETransformer` is a dual encoder (an image or a text alone runs through its own experts) and a fusion encoder (a pair
runs jointly: each token through the expert of its modality in the lower blocks, all through the vision-language expert
in the top ones). The code reads in call order: output, backbone, embeddings, block, attention, expert.

Tokens travel as one matrix of rows, those of texts before those of images, so that each expert owns a contiguous range
of them (`vlmo_fast.packing`). `forward` takes the usual padded batches; `forward_packed` takes any mixture of texts,
images and pairs without padding.

Shape suffixes: B batch, T text tokens, P image tokens ([CLS] included), S tokens of the sequence, N rows, D width,
L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vlmo_fast import ops
from vlmo_fast.config import MoMEConfig
from vlmo_fast.outputs import MoMEOutput, PackedOutput
from vlmo_fast.packing import Groups, LayerRows, PackedLayout, PaddedRows, pack
from vlmo_fast.positions import LayerBiases, RelativePositionBias, resize_absolute_positions
from vlmo_fast.serving.graphs import Captured

__all__ = ["MoMEOutput", "MoMETransformer", "PackedOutput"]

NUM_KEPT_BIASES = 4
TEXT_TYPE, IMAGE_TYPE = 0, 1  # rows of the modality type table; a second image (NLVR2) takes the row after IMAGE_TYPE


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
        self._kept_biases: dict[tuple[int, tuple[int, ...]], tuple[Tensor, int, LayerBiases]] = {}
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

    @property
    def _chooses_attention(self) -> bool:
        """Whether nobody asked for an implementation of attention by name."""
        return all(m.backends["attention"] == "auto" for m in self.modules() if isinstance(m, Attention))

    def set_backend(self, op: str, backend: str) -> None:
        """Have every block run one of its ops on one implementation.

        Args:
            op: "attention" (of padded batches), "packed_attention", or "mome_ffn" (the experts, but for those of which
                a part was replaced or is watched: these are called as modules).
            backend: "auto", or one of `ops.implementations(op)`; a name that cannot run is refused when it should.
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
            max_graphs: shapes kept; the one that was not used for the longest time goes first.

        Returns:
            What to call with the same keywords, in evaluation mode: see `vlmo_fast.serving.Captured`.

        Example:
            >>> encode = MoMETransformer(MoMEConfig.from_preset("base")).eval().captured()
            >>> encode(pixel_values=torch.rand(1, 3, 224, 224)).image_embeds.shape
            torch.Size([1, 768])
        """
        return Captured(self, "forward_packed" if packed else "__call__", max_graphs=max_graphs)

    def init_weights(self, module: nn.Module) -> None:
        """Initialise the parameters that `module` itself owns (not its children's), the released way."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, ImageEmbeddings):
            for parameter in (module.cls_token, module.mask_token, module.position_embeddings):
                if parameter is not None:
                    nn.init.normal_(parameter, std=std)
        elif isinstance(module, UnusedPositions):
            nn.init.zeros_(module.weight)
        elif isinstance(module, RelativePositionBias):
            nn.init.zeros_(module.table)
        elif isinstance(module, Attention):
            nn.init.zeros_(module.q_bias)
            nn.init.zeros_(module.v_bias)
        elif isinstance(module, MoMEBlock) and self.config.layer_scale_init_value is not None:
            assert module.attention_layer_scale is not None and module.ffn_layer_scale is not None
            nn.init.constant_(module.attention_layer_scale, self.config.layer_scale_init_value)
            nn.init.constant_(module.ffn_layer_scale, self.config.layer_scale_init_value)

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
        self._validate(input_ids, attention_mask, pixel_values, image_type_ids, use_vl_branch, bool_masked_pos)
        window = None if pixel_values is None else self.window_of(pixel_values, interpolate_pos_encoding)
        if cls_only and not output_hidden_states and attention_mask is not None and self._chooses_attention:
            lengths = _visible_lengths(attention_mask)
            if lengths is not None and input_ids is not None:
                return self._forward_unpadded(
                    lengths, window, input_ids, pixel_values, image_type_ids, use_vl_branch, bool_masked_pos
                )

        parts = []
        if input_ids is not None:
            parts.append(self._embed_text(input_ids))
        if pixel_values is not None:
            assert window is not None
            parts.append(self._embed_image(pixel_values, window, image_type_ids, bool_masked_pos))
        num_text = 0 if input_ids is None else input_ids.shape[1]
        num_image = 0 if pixel_values is None else parts[-1].shape[1]
        rows = PaddedRows(len(parts[0]), num_text, num_image, _key_mask(attention_mask, num_image))
        last_rows = replace(rows, cls_only=cls_only)
        biases = self._biases(num_text, () if window is None else (window,))
        x = _join([part.flatten(0, 1) for part in parts])  # (N, D)

        num_layers, first_vl_layer = len(self.blocks), self.config.first_vl_layer
        is_pair = len(parts) > 1
        states, vl_states, branch_point = [rows.padded(x)] if output_hidden_states else [], [], x
        for layer in range(num_layers):
            if layer == first_vl_layer:
                branch_point = x
            here = last_rows if layer == num_layers - 1 else rows
            groups = here.fusion_groups if is_pair and layer >= first_vl_layer else here.modality_groups
            x = self._run_block(layer, x, here, groups, biases)
            if output_hidden_states:
                states.append(here.padded(x))
        y = branch_point
        for layer in range(first_vl_layer, num_layers) if use_vl_branch else ():
            here = last_rows if layer == num_layers - 1 else rows
            y = self._run_block(layer, y, here, here.fusion_groups, biases)
            if output_hidden_states:
                vl_states.append(here.padded(y))

        last = self.norm(last_rows.padded(x))
        vl_last = self.norm(last_rows.padded(y)) if use_vl_branch else None
        is_image, is_text = input_ids is None, pixel_values is None
        return MoMEOutput(
            last_hidden_state=last,
            pooler_output=torch.tanh(self.pooler(last[:, 0])) if self.pooler and is_pair else None,
            image_embeds=_unit(self.image_projection, last[:, 0]) if is_image else None,
            text_embeds=_unit(self.text_projection, last[:, 0]) if is_text else None,
            vl_last_hidden_state=vl_last,
            vl_image_embeds=_unit(self.vl_image_projection, vl_last[:, 0])
            if is_image and vl_last is not None
            else None,
            vl_text_embeds=_unit(self.vl_text_projection, vl_last[:, 0]) if is_text and vl_last is not None else None,
            hidden_states=tuple(states) if output_hidden_states else None,
            vl_hidden_states=tuple(vl_states) if output_hidden_states and use_vl_branch else None,
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
        self._validate_packed(layout, input_ids, images, image_type_ids, bool_masked_pos)
        parts = []
        if len(layout.text_index):
            assert input_ids is not None
            parts.append(self._embed_text(input_ids[layout.text_index, layout.text_position], layout.text_position))
        if images:
            types: Sequence[Tensor | int | None] = [image_type_ids] * len(images)
            if isinstance(image_type_ids, Tensor):
                types = image_type_ids.split([len(pixels) for pixels in images])
            embedded = [
                self._embed_image(pixels, pixels.shape[-1] // self.config.patch_size, types_, bool_masked_pos)
                for pixels, types_ in zip(images, types, strict=True)
            ]
            tokens = _join([image.flatten(0, 1) for image in embedded])
            parts.append(tokens if layout.image_rows is None else tokens[layout.image_rows])
        x = _join(parts)  # (N, D)
        biases = self._biases(layout.text_span, layout.windows)

        num_layers, first_vl_layer = len(self.blocks), self.config.first_vl_layer
        for layer in range(num_layers):
            if layer == first_vl_layer and layout.branch_rows is not None:
                x = x[layout.branch_rows]
            rows = layout.lower if layer < first_vl_layer else layout.upper
            rows = layout.last if layer == num_layers - 1 else rows
            groups = rows.modality_groups if layer < first_vl_layer else rows.fusion_groups
            x = self._run_block(layer, x, rows, groups, biases)

        x = self.norm(x)
        first = {kind: layout.first_tokens(x, kind) for kind in layout.kinds}
        return PackedOutput(
            last_hidden_state=x,
            pooler_output=torch.tanh(self.pooler(first["pair"])) if self.pooler and "pair" in first else None,
            image_embeds=_unit(self.image_projection, first.get("image")),
            text_embeds=_unit(self.text_projection, first.get("text")),
            vl_image_embeds=_unit(self.vl_image_projection, first.get("vl_image")),
            vl_text_embeds=_unit(self.vl_text_projection, first.get("vl_text")),
        )

    def _forward_unpadded(
        self,
        lengths: Tensor,
        window: int | None,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        image_type_ids: Tensor | int | None,
        use_vl_branch: bool,
        bool_masked_pos: Tensor | None,
    ) -> MoMEOutput:
        """`forward` for first tokens alone, without computing the padding."""
        numbers = torch.arange(len(lengths))
        is_pair = pixel_values is not None
        layout = pack(
            lengths,
            [] if window is None else [window] * len(lengths),
            texts=None if is_pair else numbers,
            pairs=numbers[:, None].expand(-1, 2) if is_pair else None,
            vl_branch=use_vl_branch,
            device=input_ids.device,
        )
        packed = self.forward_packed(layout, input_ids, pixel_values, image_type_ids, bool_masked_pos)
        kind = "pair" if is_pair else "text"
        last = layout.first_tokens(packed.last_hidden_state, kind)[:, None]
        vl_last = layout.first_tokens(packed.last_hidden_state, "vl_text")[:, None] if use_vl_branch else None
        return MoMEOutput(
            last_hidden_state=last,
            pooler_output=packed.pooler_output,
            text_embeds=packed.text_embeds,
            vl_last_hidden_state=vl_last,
            vl_text_embeds=packed.vl_text_embeds,
        )

    def _embed_text(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Tokens of texts, (..., D), from ids (...) and their places."""
        return self.text_embeddings(input_ids, positions) + self.modality_type_embeddings.weight[TEXT_TYPE]

    def _embed_image(
        self, pixel_values: Tensor, window: int, image_type_ids: Tensor | int | None, bool_masked_pos: Tensor | None
    ) -> Tensor:
        """Tokens of images of one size, (B, P, D)."""
        types = IMAGE_TYPE if image_type_ids is None else image_type_ids
        image_type = self.modality_type_embeddings.weight[types]  # (D,) or (B, D)
        image_type = image_type if image_type.ndim == 1 else image_type[:, None]
        return self.image_embeddings(pixel_values, window, bool_masked_pos) + image_type

    def _biases(self, num_text: int, windows: tuple[int, ...]) -> LayerBiases | None:
        """The biases of all layers.

        In evaluation without gradients those of the last few shapes are kept, until the table changes or `train` or
        `eval` is called (which code that writes through `.data`, unseen by autograd, should do). A CUDA graph reads the
        table itself, and owns what it makes of it.
        """
        module = self.relative_position_bias
        if module is None:
            return None
        table = module.table
        traced = torch.compiler.is_compiling() or type(table.detach()) is not Tensor
        if self.training or torch.is_grad_enabled() or traced or _is_recorded(table):
            return module(num_text, windows)
        key = (num_text, windows)
        kept_table, kept_version, biases = self._kept_biases.pop(key, (None, 0, None))
        if kept_table is not table or kept_version != table._version or biases is None:
            biases = module(num_text, windows)
        while len(self._kept_biases) >= NUM_KEPT_BIASES:
            self._kept_biases.pop(next(iter(self._kept_biases)))
        self._kept_biases[key] = (table, table._version, biases)
        return biases

    def _apply(self, *args: Any, **kwargs: Any) -> MoMETransformer:
        """What `to`, `half`, `cuda` and the like come down to; they replace the table's data unseen."""
        self._kept_biases.clear()
        return super()._apply(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """As in torch, without what evaluation keeps."""
        return {**self.__dict__, "_kept_biases": {}}

    def train(self, mode: bool = True) -> MoMETransformer:
        """As in torch; drops what evaluation keeps from one call to the next."""
        self._kept_biases.clear()
        return super().train(mode)

    def _run_block(
        self, layer: int, x: Tensor, rows: PaddedRows | LayerRows, groups: Groups, biases: LayerBiases | None
    ) -> Tensor:
        def run(x: Tensor) -> Tensor:
            output: Tensor = self.blocks[layer](x, rows, groups, None if biases is None else biases[layer])
            return output

        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(run, x, use_reentrant=False)
        return run(x)

    def window_of(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> int:
        """Patches along a side of these images, (B, C, H, W); ValueError where their size is not allowed."""
        height, width = pixel_values.shape[-2:]
        size, patch = self.config.image_size, self.config.patch_size
        if interpolate_pos_encoding:
            if height != width or height % patch or height < patch:
                raise ValueError(
                    f"MoMETransformer: pixel_values must be square, with a side that is a multiple of {patch} pixels, "
                    f"got {height} x {width}"
                )
        elif (height, width) != (size, size):
            raise ValueError(
                f"MoMETransformer: pixel_values must be {size} x {size} pixels, got {height} x {width}; "
                "interpolate_pos_encoding=True accepts other sizes"
            )
        return int(height) // patch

    def _validate_packed(
        self,
        layout: PackedLayout,
        input_ids: Tensor | None,
        images: list[Tensor],
        image_type_ids: Tensor | int | None,
        bool_masked_pos: Tensor | None,
    ) -> None:
        def fail(argument: str, rule: str, actual: object) -> None:
            raise ValueError(f"MoMETransformer.forward_packed: {argument} must {rule}, got {actual}")

        if layout.branch_rows is not None and not self.config.num_vl_layers:
            fail("layout", "be without vl_branch where num_vl_layers is 0", "one with it")
        if (input_ids is None) != (not layout.num_texts):
            fail("input_ids", "be given for a layout of texts, and only then", "None" if input_ids is None else "some")
        if input_ids is not None and (
            input_ids.ndim != 2 or len(input_ids) != layout.num_texts or input_ids.shape[1] < layout.longest_text
        ):
            rule = f"be the layout's ({layout.num_texts}, {layout.longest_text} or more)"
            fail("input_ids", rule, tuple(input_ids.shape))
        patch = self.config.patch_size
        for pixels in images:
            self._validate(None, None, pixels, None, False, None)
            self.window_of(pixels, interpolate_pos_encoding=True)
        sizes = [(pixels.shape[-1] // patch, len(pixels)) for pixels in images]
        runs = tuple((window, sum(n for _, n in run)) for window, run in groupby(sizes, key=lambda size: size[0]))
        if runs != layout.image_runs:
            wanted, got = (
                ", ".join(f"{n} of {w * patch} px" for w, n in of) or "none" for of in (layout.image_runs, runs)
            )
            fail("pixel_values", f"be the layout's images ({wanted})", got)
        if bool_masked_pos is not None and len(images) != 1:
            fail("bool_masked_pos", "come with images of one size", f"{len(images)} tensors of images")
        self._validate(input_ids, None, None, None, False, None)
        if image_type_ids is not None or bool_masked_pos is not None:
            everything = images[0][:1].expand(sum(map(len, images)), -1, -1, -1) if images else None
            self._validate(None, None, everything, image_type_ids, False, bool_masked_pos)

    def _validate(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        pixel_values: Tensor | None,
        image_type_ids: Tensor | int | None,
        use_vl_branch: bool,
        bool_masked_pos: Tensor | None,
    ) -> None:
        config = self.config

        def fail(argument: str, rule: str, actual: Any, error: type[Exception] = ValueError) -> None:
            raise error(f"MoMETransformer: {argument} must {rule}, got {actual}")

        if input_ids is not None:
            if input_ids.ndim != 2 or 0 in input_ids.shape:
                fail("input_ids", "be (B, T) with B and T at least 1", tuple(input_ids.shape))
            if input_ids.dtype not in (torch.int64, torch.int32):
                fail("input_ids", "be int64 or int32", input_ids.dtype, TypeError)
            if input_ids.shape[1] > config.max_text_length:
                fail("input_ids", f"have at most max_text_length={config.max_text_length} tokens", input_ids.shape[1])
            if (
                _values_are_visible(input_ids)
                and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < config.vocab_size
            ):
                span = f"{int(input_ids.min())} to {int(input_ids.max())}"
                fail("input_ids", f"be in [0, vocab_size={config.vocab_size})", span)
        if attention_mask is not None:
            if input_ids is None:
                fail("attention_mask", "come with input_ids", "no input_ids")
            elif attention_mask.shape != input_ids.shape:
                fail("attention_mask", f"be {tuple(input_ids.shape)} like input_ids", tuple(attention_mask.shape))
            if _values_are_visible(attention_mask) and not bool((attention_mask[:, 0] != 0).all()):
                rows = (attention_mask[:, 0] == 0).nonzero().flatten().tolist()
                fail("attention_mask", "keep [CLS], column 0, of every text", f"0 in rows {rows[:8]}")
        if pixel_values is not None:
            if pixel_values.ndim != 4 or pixel_values.shape[1] != config.num_channels or not len(pixel_values):
                shape = tuple(pixel_values.shape)
                fail("pixel_values", f"be (B, {config.num_channels}, H, W) with B at least 1", shape)
            if not pixel_values.is_floating_point():
                fail("pixel_values", "be of a float dtype (normalised pixels)", pixel_values.dtype, TypeError)
            if input_ids is not None and len(pixel_values) != len(input_ids):
                fail("pixel_values", f"have the batch size of input_ids, {len(input_ids)}", len(pixel_values))
        elif image_type_ids is not None or bool_masked_pos is not None:
            fail("image_type_ids and bool_masked_pos", "come with pixel_values", "no pixel_values")
        if image_type_ids is not None:
            last_type = config.num_image_types
            if isinstance(image_type_ids, int):
                in_range = IMAGE_TYPE <= image_type_ids <= last_type
            else:
                assert pixel_values is not None
                if image_type_ids.dtype not in (torch.int64, torch.int32):
                    fail("image_type_ids", "be int64 or int32", image_type_ids.dtype, TypeError)
                if image_type_ids.shape != (len(pixel_values),):
                    fail("image_type_ids", f"be an int or ({len(pixel_values)},)", tuple(image_type_ids.shape))
                in_range = not _values_are_visible(image_type_ids) or bool(
                    ((image_type_ids >= IMAGE_TYPE) & (image_type_ids <= last_type)).all()
                )
            if not in_range:
                fail("image_type_ids", f"be from {IMAGE_TYPE} to num_image_types={last_type}", image_type_ids)
        if bool_masked_pos is not None:
            if self.image_embeddings.mask_token is None:
                fail("bool_masked_pos", "go to a model made with add_mask_token=True", "a model without mask token")
            if bool_masked_pos.dtype != torch.bool:
                fail("bool_masked_pos", "be bool", bool_masked_pos.dtype, TypeError)
        if use_vl_branch and (input_ids is not None and pixel_values is not None):
            fail("use_vl_branch", "be False for a pair (its top layers always run the vl experts)", True)
        if use_vl_branch and not config.num_vl_layers:
            fail("use_vl_branch", "be False where num_vl_layers is 0", True)


def _values_are_visible(tensor: Tensor) -> bool:
    """Whether looking at values is free: not where it would wait for a device or break a graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and type(tensor) is Tensor


def _is_recorded(tensor: Tensor) -> bool:
    """Whether what is computed from it becomes part of a CUDA graph."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _key_mask(attention_mask: Tensor | None, num_image_tokens: int) -> Tensor | None:
    """(B, S) bool, False for padding; image tokens are always real."""
    return None if attention_mask is None else F.pad(attention_mask != 0, (0, num_image_tokens), value=True)


def _visible_lengths(attention_mask: Tensor) -> Tensor | None:
    """Tokens of each text, (B,) int64, where the mask can be looked at, there is padding, and all of it at the ends."""
    if not _values_are_visible(attention_mask):
        return None
    real = attention_mask != 0
    lengths = real.sum(dim=1)
    is_prefix = torch.equal(real, torch.arange(real.shape[1]) < lengths[:, None])
    return lengths if is_prefix and int(lengths.min()) < real.shape[1] else None


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat([*parts])


def _unit(projection: nn.Linear | None, first_tokens: Tensor | None) -> Tensor | None:
    """Unit-norm projection of first tokens, (B, D)."""
    if projection is None or first_tokens is None:
        return None
    return F.normalize(projection(first_tokens), dim=-1)


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
        self.token_type_embeddings = nn.Embedding(
            2, config.hidden_size
        )  # BERT's two segments; VLMo's text is the first
        self.norm = nn.LayerNorm(config.hidden_size, config.text_layer_norm_eps)
        self.dropout = nn.Dropout(config.text_embedding_dropout)

    def forward(self, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """Tokens (..., D) of ids (..., T) and their places in the text, (T,) or (...); None means 0, 1, ..."""
        x = self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0]
        if self.adds_positions:
            table = self.position_embeddings.weight
            x = x + (table[: input_ids.shape[-1]] if positions is None else table[positions])
        return self.dropout(self.norm(x))


class UnusedPositions(nn.Module):
    """Text positions in a model with relative ones: released checkpoints carry them, never used nor trained.

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

    def forward(self, pixel_values: Tensor, window_size: int, bool_masked_pos: Tensor | None) -> Tensor:
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


class MoMEBlock(nn.Module):
    """Shared attention, then one feed-forward expert per token group; both residual, pre-norm, scaled per channel."""

    def __init__(self, config: MoMEConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        # Stochastic depth grows linearly over the layers.
        self.drop_path_rate = config.drop_path_rate * layer / max(config.num_hidden_layers - 1, 1)
        self.backends = {"mome_ffn": "auto"}
        self.attention_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.attention = Attention(config)
        names = ("language", "vision", "vl") if layer >= config.first_vl_layer else ("language", "vision")
        self.experts = nn.ModuleDict({name: Expert(config) for name in names})
        self.attention_layer_scale: nn.Parameter | None = None
        self.ffn_layer_scale: nn.Parameter | None = None
        if config.layer_scale_init_value is not None:
            self.attention_layer_scale = nn.Parameter(torch.empty(width))
            self.ffn_layer_scale = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, rows: PaddedRows | LayerRows, groups: Groups, bias: Tensor | None = None) -> Tensor:
        """One block.

        Args:
            x: (N, D).
            rows: which row is which token, and which rows are wanted.
            groups: expert and number of wanted rows of each group, in order.
            bias: (heads, R, R) or None.

        Returns:
            (M, D), the wanted rows.
        """
        attended = self.attention(self.attention_norm(x), rows, bias)
        x = rows.keep(x) + _scaled(attended, self.attention_layer_scale, self._row_scale(x, rows, num_draws=1))
        row_scale = self._row_scale(x, rows, num_draws=1 if groups == rows.fusion_groups else 2)
        sizes, experts = [size for _, size in groups], [cast("Expert", self.experts[name]) for name, _ in groups]
        if all(expert.is_plain for expert in experts):
            weights = [expert.weights() for expert in experts]
            eps, backend = experts[0].norm.eps, self.backends["mome_ffn"]
            return ops.mome_ffn(x, sizes, weights, self.ffn_layer_scale, row_scale, eps=eps, backend=backend)
        branches = [expert(part) for expert, part in zip(experts, x.split(sizes), strict=True)]
        return x + _scaled(_join(branches), self.ffn_layer_scale, row_scale)

    def _row_scale(self, x: Tensor, rows: PaddedRows | LayerRows, num_draws: int) -> Tensor | None:
        """Stochastic depth: (M,), 0 for rows whose residual branch is dropped, else 1 / (1 - rate).

        Drawn once for each sequence, or (`num_draws` = 2) once for its text and once for its image, as in the release,
        where the experts of a pair drop theirs apart.
        """
        if not self.training or not self.drop_path_rate:
            return None
        keep = torch.empty(rows.num_sequences, num_draws, dtype=x.dtype, device=x.device)
        keep = keep.bernoulli_(1 - self.drop_path_rate).div_(1 - self.drop_path_rate)
        return rows.per_row(keep.expand(-1, 2))


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call is what the class computes from the parameters: the module is not replaced, nor has it a hook."""
    return (
        type(module) is kind
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and ("forward" not in module.__dict__ or _function(module.__dict__["forward"]) is kind.forward)
    )


def _function(method: Any) -> Any:
    """The function of a bound method; None for any other callable."""
    return getattr(method, "__func__", None)


def _scaled(branch: Tensor, layer_scale: Tensor | None, row_scale: Tensor | None) -> Tensor:
    branch = branch if layer_scale is None else layer_scale * branch
    return branch if row_scale is None else row_scale[:, None] * branch


class Attention(nn.Module):
    """Multi-head self-attention with query and value biases, shared by all modalities."""

    def __init__(self, config: MoMEConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.backends = {"attention": "auto", "packed_attention": "auto"}
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.v_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, rows: PaddedRows | LayerRows, bias: Tensor | None = None) -> Tensor:
        """Attend within sequences, from the wanted rows to all: (N, D) -> (M, D)."""
        weight, no_bias = self.qkv.weight, torch.zeros_like(self.v_bias)  # keys have no bias
        if rows.keeps_all:
            qkv = ops.linear(x, weight, torch.cat([self.q_bias, no_bias, self.v_bias]))
            query, key, value = qkv.unflatten(1, (3, self.num_heads, -1)).unbind(1)  # (N, heads, d) each
        else:
            width = len(no_bias)
            query = ops.linear(rows.keep(x), weight[:width], self.q_bias).unflatten(1, (self.num_heads, -1))
            key_value = ops.linear(x, weight[width:], torch.cat([no_bias, self.v_bias]))
            key, value = key_value.unflatten(1, (2, self.num_heads, -1)).unbind(1)
        attended = rows.attend(query, key, value, bias, self.backends).flatten(1)
        output = self.projection
        plain = _is_plain(output, nn.Linear)
        return self.dropout(ops.linear(attended, output.weight, output.bias) if plain else output(attended))


class Expert(nn.Module):
    """A modality expert: fc2(gelu(fc1(LN(x)))), with its own norm and the exact (erf) GELU.

    A block computes its experts as one op (`ops.mome_ffn`) straight from their parameters. An expert that is not plain,
    because a part of it was replaced (an adapter, a quantised layer) or is watched by a hook, is called as a module.
    """

    def __init__(self, config: MoMEConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """The expert's branch, without the residual, (..., D)."""
        return self.dropout(self.fc2(F.gelu(self.fc1(self.norm(x)))))

    @property
    def is_plain(self) -> bool:
        """Whether the parameters alone say what `forward` computes."""
        if type(self.dropout) is not nn.Dropout or (self.training and self.dropout.p):
            return False
        kinds = ((self, Expert), (self.norm, nn.LayerNorm), (self.fc1, nn.Linear), (self.fc2, nn.Linear))
        return all(_is_plain(module, kind) for module, kind in kinds)

    def weights(self) -> ops.ExpertWeights:
        """The parameters, as the op takes them."""
        return ops.ExpertWeights(
            self.norm.weight, self.norm.bias, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
        )
