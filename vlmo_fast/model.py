"""VLMo's network: blocks that share attention between modalities and pick their feed-forward expert by modality.

    H' = Attention(LN(H)) + H
    H  = MoME-FFN(LN(H')) + H'         (VLMo, arXiv:2111.02358, section 3)

`MoMETransformer` is a dual encoder (an image or a text alone runs through its own experts) and a fusion encoder (a pair
runs jointly: each token through the expert of its modality in the lower blocks, all through the vision-language expert
in the top ones). The code reads in call order: output, backbone, embeddings, block, attention, expert.

Shape suffixes: B batch, T text tokens, P image tokens ([CLS] included), S tokens of the sequence, D width, L layers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vlmo_fast import ops
from vlmo_fast.config import MoMEConfig
from vlmo_fast.positions import RelativePositionBias, resize_absolute_positions

__all__ = ["MoMEOutput", "MoMETransformer"]

TEXT_TYPE, IMAGE_TYPE = 0, 1  # rows of the modality type table; a second image (NLVR2) takes the row after IMAGE_TYPE


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


class TokenGroup(NamedTuple):
    """Adjacent tokens of each sequence that share a modality expert."""

    expert: str
    num_tokens: int


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

    def set_attention_backend(self, backend: str) -> None:
        """Have every block's attention run on one implementation: "auto", or a name that the attention op knows."""
        known = ("auto", *ops.implementations("attention"))
        if backend not in known:
            raise ValueError(f"MoMETransformer: attention backend must be one of {list(known)}, got {backend!r}")
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend

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
        self._validate(input_ids, attention_mask, pixel_values, image_type_ids, use_vl_branch, bool_masked_pos)
        window = None if pixel_values is None else self._window(pixel_values, interpolate_pos_encoding)
        num_text = 0 if input_ids is None else input_ids.shape[1]

        parts = []
        if input_ids is not None:
            text_type = self.modality_type_embeddings.weight[TEXT_TYPE]
            parts.append(self.text_embeddings(input_ids) + text_type)  # (B, T, D)
        if pixel_values is not None:
            assert window is not None
            types = IMAGE_TYPE if image_type_ids is None else image_type_ids
            image_type = self.modality_type_embeddings.weight[types]  # (D,) or (B, D)
            image_type = image_type if image_type.ndim == 1 else image_type[:, None]
            parts.append(self.image_embeddings(pixel_values, window, bool_masked_pos) + image_type)  # (B, P, D)
        x = torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]  # (B, S, D)

        positions = None
        if self.relative_position_bias is not None:
            positions = self.relative_position_bias.prepare(num_text, window)
        key_mask = _key_mask(attention_mask, x.shape[1])

        first_vl_layer = self.config.first_vl_layer
        vl_group = (TokenGroup("vl", x.shape[1]),)
        text_group, image_group = TokenGroup("language", num_text), TokenGroup("vision", x.shape[1] - num_text)
        own_groups = tuple(group for group in (text_group, image_group) if group.num_tokens)
        states: list[Tensor] = [x]
        branch_point = x
        for layer in range(len(self.blocks)):
            if layer == first_vl_layer:
                branch_point = x
            fuse = len(parts) > 1 and layer >= first_vl_layer
            groups = vl_group if fuse else own_groups
            x = self._run_block(layer, x, groups, positions, key_mask, cls_only)
            if output_hidden_states:
                states.append(x)

        vl_states: list[Tensor] = []
        y = branch_point
        for layer in range(first_vl_layer, len(self.blocks)) if use_vl_branch else ():
            y = self._run_block(layer, y, vl_group, positions, key_mask, cls_only)
            if output_hidden_states:
                vl_states.append(y)

        last = self.norm(x)
        vl_last = self.norm(y) if use_vl_branch else None
        is_image, is_text = input_ids is None, pixel_values is None
        return MoMEOutput(
            last_hidden_state=last,
            pooler_output=torch.tanh(self.pooler(last[:, 0])) if self.pooler and len(parts) > 1 else None,
            image_embeds=_unit(self.image_projection, last) if is_image else None,
            text_embeds=_unit(self.text_projection, last) if is_text else None,
            vl_last_hidden_state=vl_last,
            vl_image_embeds=_unit(self.vl_image_projection, vl_last) if is_image else None,
            vl_text_embeds=_unit(self.vl_text_projection, vl_last) if is_text else None,
            hidden_states=tuple(states) if output_hidden_states else None,
            vl_hidden_states=tuple(vl_states) if output_hidden_states and use_vl_branch else None,
        )

    def _run_block(
        self,
        layer: int,
        x: Tensor,
        groups: tuple[TokenGroup, ...],
        positions: tuple[Tensor, Tensor] | None,
        key_mask: Tensor | None,
        cls_only: bool,
    ) -> Tensor:
        def run(x: Tensor) -> Tensor:
            bias = None
            if self.relative_position_bias is not None and positions is not None:
                bias = self.relative_position_bias(layer, *positions)  # (heads, S, S); recomputed, not kept
            output: Tensor = self.blocks[layer](x, groups, bias, key_mask, cls_only and layer == len(self.blocks) - 1)
            return output

        if self.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(run, x, use_reentrant=False)
        return run(x)

    def _window(self, pixel_values: Tensor, interpolate: bool) -> int:
        """Patches along a side of these images."""
        height, width = pixel_values.shape[-2:]
        size, patch = self.config.image_size, self.config.patch_size
        if interpolate:
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

        if input_ids is None and pixel_values is None:
            fail("input_ids or pixel_values", "be given", "neither")
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


def _key_mask(attention_mask: Tensor | None, num_tokens: int) -> Tensor | None:
    """(B, S) bool, False for padding; image tokens are always real."""
    if attention_mask is None:
        return None
    return F.pad(attention_mask != 0, (0, num_tokens - attention_mask.shape[1]), value=True)


def _unit(projection: nn.Linear | None, hidden: Tensor | None) -> Tensor | None:
    """Unit-norm projection of the first token, (B, D)."""
    if projection is None or hidden is None:
        return None
    return F.normalize(projection(hidden[:, 0]), dim=-1)


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

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0]
        if self.adds_positions:
            x = x + self.position_embeddings.weight[: input_ids.shape[1]]
        return self.dropout(self.norm(x))  # (B, T, D)


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
        self.attention_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.attention = Attention(config)
        names = ("language", "vision", "vl") if layer >= config.first_vl_layer else ("language", "vision")
        self.experts = nn.ModuleDict({name: Expert(config) for name in names})
        self.attention_layer_scale: nn.Parameter | None = None
        self.ffn_layer_scale: nn.Parameter | None = None
        if config.layer_scale_init_value is not None:
            self.attention_layer_scale = nn.Parameter(torch.empty(width))
            self.ffn_layer_scale = nn.Parameter(torch.empty(width))

    def forward(
        self,
        x: Tensor,
        groups: tuple[TokenGroup, ...],
        bias: Tensor | None = None,
        key_mask: Tensor | None = None,
        cls_only: bool = False,
    ) -> Tensor:
        """One block.

        Args:
            x: (B, S, D).
            groups: the token groups of a sequence in order; their lengths add up to S.
            bias: (heads, S, S) or None.
            key_mask: (B, S) bool or None.
            cls_only: whether only the first token is wanted.

        Returns:
            (B, S, D), or (B, 1, D) with `cls_only`.
        """
        attended = self.attention(self.attention_norm(x), bias, key_mask, cls_only)
        if cls_only:
            x, groups = x[:, :1], (TokenGroup(groups[0].expert, 1),)
        x = x + self._branch(attended, self.attention_layer_scale)
        parts = []
        for group, part in zip(groups, x.split([group.num_tokens for group in groups], dim=1), strict=True):
            parts.append(part + self._branch(self.experts[group.expert](part), self.ffn_layer_scale))
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _branch(self, x: Tensor, layer_scale: Tensor | None) -> Tensor:
        x = x if layer_scale is None else layer_scale * x
        return drop_path(x, self.drop_path_rate if self.training else 0.0)


class Attention(nn.Module):
    """Multi-head self-attention with query and value biases, shared by all modalities."""

    def __init__(self, config: MoMEConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.backend = "auto"
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.v_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(
        self, x: Tensor, bias: Tensor | None = None, key_mask: Tensor | None = None, cls_only: bool = False
    ) -> Tensor:
        """Attend from every token, or with `cls_only` from the first alone, to all: (B, S or 1, D)."""
        weight, no_bias = self.qkv.weight, torch.zeros_like(self.v_bias)  # keys have no bias
        if cls_only:
            query = F.linear(x[:, :1], weight[: len(no_bias)], self.q_bias)
            key, value = F.linear(x, weight[len(no_bias) :], torch.cat([no_bias, self.v_bias])).chunk(2, dim=-1)
            bias = None if bias is None else bias[:, :1]
        else:
            qkv = F.linear(x, weight, torch.cat([self.q_bias, no_bias, self.v_bias]))
            query, key, value = qkv.chunk(3, dim=-1)
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in (query, key, value)
        )  # (B, heads, S, d) each
        attended = ops.attention(query, key, value, bias, key_mask, backend=self.backend)
        return self.dropout(self.projection(attended.transpose(1, 2).flatten(2)))


class Expert(nn.Module):
    """A modality expert: fc2(gelu(fc1(LN(x)))), with its own norm and the exact (erf) GELU."""

    def __init__(self, config: MoMEConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(F.gelu(self.fc1(self.norm(x)))))


def drop_path(x: Tensor, rate: float) -> Tensor:
    """Stochastic depth: zero a residual branch per sample with probability `rate`, scaling the others to the mean."""
    if rate == 0.0:
        return x
    keep = torch.empty((len(x), 1, 1), dtype=x.dtype, device=x.device).bernoulli_(1 - rate)
    return x * keep / (1 - rate)
