"""What the backbone asks of its inputs, as errors that name the argument, the rule and what came."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from vlmo_fast.config import MoMEConfig
from vlmo_fast.embeddings import IMAGE_TYPE
from vlmo_fast.packing import PackedLayout
from vlmo_fast.watch import values_are_visible

__all__ = ["check_inputs", "check_packed", "window_of"]


def check_inputs(
    config: MoMEConfig,
    *,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    pixel_values: Tensor | None = None,
    image_type_ids: Tensor | int | None = None,
    use_vl_branch: bool = False,
    bool_masked_pos: Tensor | None = None,
    has_mask_token: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise where inputs of `MoMETransformer.forward` break a rule that it states.

    Args:
        config: the model's.
        input_ids: as there.
        attention_mask: as there.
        pixel_values: as there.
        image_type_ids: as there.
        use_vl_branch: as there.
        bool_masked_pos: as there.
        has_mask_token: whether the model has one.
        dtype: of the weights that the pixels meet; None where that cannot be told.

    Raises:
        ValueError: shapes, lengths, ids or options break a rule.
        TypeError: an input is no tensor, or of a wrong dtype.
    """

    def fail(argument: str, rule: str, actual: Any, error: type[Exception] = ValueError) -> None:
        raise error(f"MoMETransformer: {argument} must {rule}, got {actual}")

    given = (("input_ids", input_ids), ("attention_mask", attention_mask), ("pixel_values", pixel_values))
    for name, value in (*given, ("bool_masked_pos", bool_masked_pos)):
        if value is not None and not isinstance(value, Tensor):
            fail(name, "be a tensor", type(value).__name__, TypeError)
    if image_type_ids is not None and not isinstance(image_type_ids, int | Tensor):
        fail("image_type_ids", "be an int or a tensor", type(image_type_ids).__name__, TypeError)
    if input_ids is not None:
        if input_ids.ndim != 2 or 0 in input_ids.shape:
            fail("input_ids", "be (B, T) with B and T at least 1", tuple(input_ids.shape))
        if input_ids.dtype not in (torch.int64, torch.int32):
            fail("input_ids", "be int64 or int32", input_ids.dtype, TypeError)
        if input_ids.shape[1] > config.max_text_length:
            fail("input_ids", f"have at most max_text_length={config.max_text_length} tokens", input_ids.shape[1])
        if values_are_visible(input_ids) and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < config.vocab_size:
            span = f"{int(input_ids.min())} to {int(input_ids.max())}"
            fail("input_ids", f"be in [0, vocab_size={config.vocab_size})", span)
    if attention_mask is not None:
        if input_ids is None:
            fail("attention_mask", "come with input_ids", "no input_ids")
        elif attention_mask.shape != input_ids.shape:
            fail("attention_mask", f"be {tuple(input_ids.shape)} like input_ids", tuple(attention_mask.shape))
        if values_are_visible(attention_mask) and not bool((attention_mask[:, 0] != 0).all()):
            rows = (attention_mask[:, 0] == 0).nonzero().flatten().tolist()
            fail("attention_mask", "keep [CLS], column 0, of every text", f"0 in rows {rows[:8]}")
    if pixel_values is not None:
        if pixel_values.ndim != 4 or pixel_values.shape[1] != config.num_channels or not len(pixel_values):
            shape = tuple(pixel_values.shape)
            fail("pixel_values", f"be (B, {config.num_channels}, H, W) with B at least 1", shape)
        if not pixel_values.is_floating_point():
            fail("pixel_values", "be of a float dtype (normalised pixels)", pixel_values.dtype, TypeError)
        if dtype is not None and pixel_values.dtype != dtype and not _autocasts(pixel_values, dtype):
            fail("pixel_values", f"have the dtype of the model's weights, {dtype}", pixel_values.dtype, TypeError)
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
            in_range = not values_are_visible(image_type_ids) or bool(
                ((image_type_ids >= IMAGE_TYPE) & (image_type_ids <= last_type)).all()
            )
        if not in_range:
            fail("image_type_ids", f"be from {IMAGE_TYPE} to num_image_types={last_type}", image_type_ids)
    if bool_masked_pos is not None:
        if not has_mask_token:
            raise ValueError("MoMETransformer: bool_masked_pos needs a model built with add_mask_token=True")
        if bool_masked_pos.dtype != torch.bool:
            fail("bool_masked_pos", "be bool", bool_masked_pos.dtype, TypeError)
    if use_vl_branch and (input_ids is not None and pixel_values is not None):
        fail("use_vl_branch", "be False for a pair (its top layers always run the vl experts)", True)
    if use_vl_branch and not config.num_vl_layers:
        fail("use_vl_branch", "be False where num_vl_layers is 0", True)


def check_packed(
    config: MoMEConfig,
    layout: PackedLayout,
    input_ids: Tensor | None,
    images: list[Tensor],
    image_type_ids: Tensor | int | None,
    bool_masked_pos: Tensor | None,
    *,
    has_mask_token: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise where inputs of `MoMETransformer.forward_packed` are not those that the layout plans for.

    Args:
        config: the model's.
        layout: the plan.
        input_ids: as there.
        images: tensors of images of one size each.
        image_type_ids: as there.
        bool_masked_pos: as there.
        has_mask_token: as in `check_inputs`.
        dtype: as in `check_inputs`.

    Raises:
        ValueError: shapes, numbers, ids or options do not fit.
        TypeError: an input has the wrong dtype.
    """

    def fail(argument: str, rule: str, actual: object) -> None:
        raise ValueError(f"MoMETransformer.forward_packed: {argument} must {rule}, got {actual}")

    if not isinstance(layout, PackedLayout):
        kind = type(layout).__name__
        raise TypeError(f"MoMETransformer.forward_packed: layout must be a PackedLayout, made by pack, got {kind}")
    check_inputs(config, input_ids=input_ids)
    if layout.branch_rows is not None and not config.num_vl_layers:
        raise ValueError(
            "MoMETransformer.forward_packed: layout was packed with vl_branch=True, but the model has num_vl_layers=0"
        )
    if (input_ids is None) != (not layout.num_texts):
        fail("input_ids", "be given for a layout of texts, and only then", "None" if input_ids is None else "some")
    if input_ids is not None and (len(input_ids) != layout.num_texts or input_ids.shape[1] < layout.longest_text):
        rule = f"be the layout's ({layout.num_texts}, {layout.longest_text} or more)"
        fail("input_ids", rule, tuple(input_ids.shape))
    patch = config.patch_size
    for pixels in images:
        check_inputs(config, pixel_values=pixels, dtype=dtype)
        window_of(config, pixels, interpolate=True)
    sizes = [(pixels.shape[-1] // patch, len(pixels)) for pixels in images]
    runs = tuple((window, sum(n for _, n in run)) for window, run in groupby(sizes, key=lambda size: size[0]))
    if runs != layout.image_runs:
        wanted, got = (", ".join(f"{n} of {w * patch} px" for w, n in of) or "none" for of in (layout.image_runs, runs))
        fail("pixel_values", f"be the layout's images ({wanted})", got)
    if bool_masked_pos is not None and len(images) != 1:
        fail("bool_masked_pos", "come with images of one size", f"{len(images)} tensors of images")
    if image_type_ids is not None or bool_masked_pos is not None:
        everything = images[0][:1].expand(sum(map(len, images)), -1, -1, -1) if images else None
        check_inputs(
            config,
            pixel_values=everything,
            image_type_ids=image_type_ids,
            bool_masked_pos=bool_masked_pos,
            has_mask_token=has_mask_token,
        )


def window_of(config: MoMEConfig, pixel_values: Tensor, *, interpolate: bool) -> int:
    """Patches along a side of images, (B, C, H, W); ValueError where their size is not allowed."""
    height, width = pixel_values.shape[-2:]
    size, patch = config.image_size, config.patch_size
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


def _autocasts(pixel_values: Tensor, dtype: torch.dtype) -> bool:
    """Whether autocast brings pixels and weights to one dtype; float64 it leaves alone."""
    device = pixel_values.device.type
    is_enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return is_enabled and torch.float64 not in (pixel_values.dtype, dtype)
