"""What `MoMETransformer` refuses, and in which words."""

import copy

import pytest
import torch
from networks import build, inputs, shared

from vlmo_fast import MoMETransformer, pack

IDS, MASK, PIXELS = inputs()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "input_ids or pixel_values must be given, got neither"),
        ({"input_ids": IDS[0]}, ValueError, r"input_ids must be \(B, T\) with B and T at least 1, got \(6,\)"),
        ({"input_ids": IDS[:0]}, ValueError, r"input_ids must be \(B, T\) .* got \(0, 6\)"),
        ({"input_ids": IDS[:, :0]}, ValueError, r"input_ids must be \(B, T\) .* got \(3, 0\)"),
        ({"input_ids": IDS.float()}, TypeError, r"input_ids must be int64 or int32, got torch\.float32"),
        ({"input_ids": IDS.repeat(1, 2)}, ValueError, "input_ids must have at most max_text_length=10 tokens, got 12"),
        ({"input_ids": IDS.clamp(max=3) + 47}, ValueError, r"input_ids must be in \[0, vocab_size=50\), got .* to 50"),
        ({"input_ids": IDS - 50}, ValueError, r"input_ids must be in \[0, vocab_size=50\), got -\d+ to -\d+"),
        ({"attention_mask": MASK, "pixel_values": PIXELS}, ValueError, "attention_mask must come with input_ids"),
        (
            {"input_ids": IDS, "attention_mask": MASK[:, :5]},
            ValueError,
            r"attention_mask must be \(3, 6\) like input_ids, got \(3, 5\)",
        ),
        (
            {"input_ids": IDS, "attention_mask": torch.tensor([[1], [0], [0]]).expand(3, 6)},
            ValueError,
            r"attention_mask must keep \[CLS\], column 0, of every text, got 0 in rows \[1, 2\]",
        ),
        ({"pixel_values": PIXELS[0]}, ValueError, r"pixel_values must be \(B, 3, H, W\) .* got \(3, 24, 24\)"),
        ({"pixel_values": PIXELS[:, :2]}, ValueError, r"pixel_values must be \(B, 3, H, W\) .* got \(3, 2, 24, 24\)"),
        ({"pixel_values": PIXELS[:0]}, ValueError, r"pixel_values must be .* B at least 1, got \(0, 3, 24, 24\)"),
        ({"pixel_values": PIXELS.byte()}, TypeError, r"pixel_values must be of a float dtype .* got torch\.uint8"),
        (
            {"input_ids": IDS, "pixel_values": PIXELS[:2]},
            ValueError,
            "pixel_values must have the batch size of input_ids, 3, got 2",
        ),
        (
            {"pixel_values": PIXELS[..., :16]},
            ValueError,
            "pixel_values must be 24 x 24 pixels, got 24 x 16; interpolate_pos_encoding=True accepts other sizes",
        ),
        (
            {"pixel_values": PIXELS[..., :16], "interpolate_pos_encoding": True},
            ValueError,
            "must be square, with a side that is a multiple of 8 pixels, got 24 x 16",
        ),
        (
            {"pixel_values": PIXELS[..., :20, :20], "interpolate_pos_encoding": True},
            ValueError,
            "multiple of 8 pixels, got 20 x 20",
        ),
        (
            {"pixel_values": PIXELS[..., :0, :0], "interpolate_pos_encoding": True},
            ValueError,
            "multiple of 8 pixels, got 0 x 0",
        ),
        ({"input_ids": IDS, "image_type_ids": 1}, ValueError, "image_type_ids and bool_masked_pos must come with"),
        (
            {"input_ids": IDS, "bool_masked_pos": torch.ones(3, 9, dtype=torch.bool)},
            ValueError,
            "image_type_ids and bool_masked_pos must come with pixel_values, got no pixel_values",
        ),
        ({"pixel_values": PIXELS, "image_type_ids": 0}, ValueError, "be from 1 to num_image_types=1, got 0"),
        ({"pixel_values": PIXELS, "image_type_ids": 2}, ValueError, "be from 1 to num_image_types=1, got 2"),
        (
            {"pixel_values": PIXELS, "image_type_ids": torch.tensor([1, 1, 2])},
            ValueError,
            r"image_type_ids must be from 1 to num_image_types=1, got tensor\(\[1, 1, 2\]\)",
        ),
        (
            {"pixel_values": PIXELS, "image_type_ids": torch.tensor([1, 1])},
            ValueError,
            r"image_type_ids must be an int or \(3,\), got \(2,\)",
        ),
        (
            {"pixel_values": PIXELS, "bool_masked_pos": torch.ones(3, 9, dtype=torch.bool)},
            ValueError,
            "bool_masked_pos needs a model built with add_mask_token=True",
        ),
        (
            {"input_ids": IDS, "pixel_values": PIXELS, "use_vl_branch": True},
            ValueError,
            "use_vl_branch must be False for a pair",
        ),
    ],
)
def test_refuses(arguments, error, message):
    with pytest.raises(error, match=f"^MoMETransformer: .*{message}"):
        shared()(**arguments)


def test_refuses_masks_of_the_wrong_kind():
    model = build(add_mask_token=True)
    with pytest.raises(TypeError, match=r"bool_masked_pos must be bool, got torch\.int64"):
        model(pixel_values=PIXELS, bool_masked_pos=torch.ones(3, 9, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"bool_masked_pos must be \(B, patches\) = \(3, 9\), got \(3, 10\)"):
        model(pixel_values=PIXELS, bool_masked_pos=torch.ones(3, 10, dtype=torch.bool))
    with pytest.raises(TypeError, match="config must be a MoMEConfig, got dict"):
        MoMETransformer({})


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8], ids=str)
def test_refuses_type_ids_that_torch_would_take_for_a_mask(dtype):
    """With as many images as rows, `weight[ids]` gives rows 0 and 1: a wrong answer without an error."""
    pixels = PIXELS[:2]
    try:
        out = shared()(pixel_values=pixels, image_type_ids=torch.ones(2, dtype=dtype))
    except TypeError as error:
        assert "image_type_ids" in str(error)  # noqa: PT017 - either a refusal or the right rows
    else:
        assert torch.equal(out.image_embeds, shared()(pixel_values=pixels).image_embeds)


def test_refuses_float_type_ids():
    with pytest.raises(TypeError, match="image_type_ids"):
        shared()(pixel_values=PIXELS, image_type_ids=torch.ones(3))


def test_inputs_of_another_dtype_or_kind_are_named() -> None:
    model, (ids, _, pixels) = build(), inputs()
    with pytest.raises(TypeError, match=r"dtype of the model's weights, torch.float32, got torch.float64"):
        model(pixel_values=pixels.double())
    with pytest.raises(TypeError, match=r"weights, torch.float16, got torch.float32"):
        copy.deepcopy(model).half()(pixel_values=pixels)
    with pytest.raises(TypeError, match="input_ids must be a tensor, got list"):
        model(input_ids=ids.tolist())
    with pytest.raises(TypeError, match="image_type_ids must be an int or a tensor, got list"):
        model(pixel_values=pixels, image_type_ids=[1, 1, 1])
    with pytest.raises(TypeError, match="input_ids must be a tensor, got list"):
        model.forward_packed(pack([3]), [[1, 2, 3]])
    with pytest.raises(TypeError, match="layout must be a PackedLayout, made by pack, got list"):
        model.forward_packed([3], ids)
    with torch.autocast("cpu", torch.bfloat16):
        model(pixel_values=pixels)
        with pytest.raises(TypeError, match=r"weights, torch.float32, got torch.float64"):  # autocast leaves it alone
            model(pixel_values=pixels.double())
