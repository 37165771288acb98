"""`vlmo_fast.load`: model and processor from whatever folder or file, and what is wrong is said before it is read."""

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from test_checkpoints import SMALL, assert_same, small
from test_pretrained import beit, bert, released
from transformers import BeitForImageClassification

import vlmo_fast
from vlmo_fast import VLMoConfig, VLMoImageProcessor, VLMoProcessor
from vlmo_fast.formats import loading
from vlmo_fast.formats.official import official_state_dict

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat")


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(WORDS))
    return path


def test_released_files(tmp_path, vocabulary):
    """Pictures need no vocabulary; texts take the one that is given."""
    state = small("irtr")
    torch.save(state, tmp_path / "zip.bin")
    save_file(state, tmp_path / "safe.pt")
    vlmo_fast.save_official(vlmo_fast.load_official(state), tmp_path / "ours.ckpt")
    for name in ("zip.bin", "safe.pt", "ours.ckpt"):
        model, processor = vlmo_fast.load(tmp_path / name)
        assert type(model) is vlmo_fast.VLMoForImageTextRetrieval
        assert_same(official_state_dict(model), state)
        assert isinstance(processor, VLMoImageProcessor)
        pixels = processor(images=Image.new("RGB", (30, 20)), return_tensors="pt")["pixel_values"]
        assert model.get_image_features(pixels).pooler_output.shape == (1, model.config.hidden_size)
        loaded = vlmo_fast.load(tmp_path / name, vocab=vocabulary, dtype=torch.bfloat16, device="cpu")
        assert loaded.model.dtype == loaded.model.config.dtype == torch.bfloat16
        assert loaded.processor(text="cat")["input_ids"] == [2, 5, 3]


def test_folders_with_and_without_a_processor(tmp_path, vocabulary):
    config = VLMoConfig(**{**SMALL, "vocab_size": 9})
    model = vlmo_fast.VLMoForQuestionAnswering(config).eval()
    model.save_pretrained(tmp_path / "folder")
    assert not loading.has_vocabulary(tmp_path / "folder")
    assert isinstance(vlmo_fast.load(tmp_path / "folder").processor, VLMoImageProcessor)
    processor = VLMoProcessor.from_vocabulary(vocabulary, config)
    processor.image_processor.image_mean = (0.1, 0.2, 0.3)
    processor.image_processor.save_pretrained(tmp_path / "folder")
    images_alone = vlmo_fast.load(tmp_path / "folder").processor
    assert tuple(images_alone.image_mean) == (0.1, 0.2, 0.3)
    processor.tokenizer.save_pretrained(tmp_path / "folder")
    assert loading.has_vocabulary(tmp_path / "folder")
    loaded = vlmo_fast.load(tmp_path / "folder", image_size=24)
    assert_same(loaded.model.state_dict(), vlmo_fast.load(tmp_path / "folder", image_size=24).model.state_dict())
    assert loaded.processor.image_processor.size == {"height": 24, "width": 24}
    assert tuple(loaded.processor.image_processor.image_mean) == (0.1, 0.2, 0.3)
    assert loaded.processor(text="cat dog")["input_ids"] == [2, 5, 1, 3]
    again = vlmo_fast.load(tmp_path / "folder", task="retrieval").model
    assert type(again) is vlmo_fast.VLMoForImageTextRetrieval


def test_beits(tmp_path):
    source = beit("shared", BeitForImageClassification, num_labels=3)
    torch.save(released(source), tmp_path / "beit.pth")
    source.save_pretrained(tmp_path / "beit")
    for name in ("beit.pth", "beit"):
        assert type(vlmo_fast.load(tmp_path / name).model) is vlmo_fast.VLMoForMaskedLM
        model = vlmo_fast.load(tmp_path / name, task="classification", num_labels=4, image_size=16).model
        assert (type(model), model.config.image_size) == (vlmo_fast.VLMoForImageClassification, 16)


def test_what_can_be_checked_is_checked_before_reading(tmp_path, vocabulary, monkeypatch):
    path = tmp_path / "in.pt"
    torch.save(small(), path)
    monkeypatch.setattr(loading, "open_any", lambda *_, **__: pytest.fail("read"))
    for device in ("banana", "cuda:99", "cpu:x"):
        with pytest.raises(ValueError, match=f"load: device must be one that torch can use here, got '{device}'") as e:
            vlmo_fast.load(path, device=device)
        assert "\n" not in str(e.value)
    with pytest.raises(FileNotFoundError, match="load: path must be a folder or a checkpoint file"):
        vlmo_fast.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="load: vocab must be a file or 'bert'"):
        vlmo_fast.load(path, vocab=tmp_path / "none.txt")


def test_what_is_refused(tmp_path, vocabulary):
    bert().save_pretrained(tmp_path / "bert")
    torch.save({"a": torch.ones(2)}, tmp_path / "foreign.pt")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("{}")
    state = small()
    state["pooler.dense.bias"] = torch.full_like(state["pooler.dense.bias"], -1e5)
    torch.save(state, tmp_path / "large.pt")
    cases = [
        ("bert", {}, "a folder with a model of type 'bert'"),
        ("foreign.pt", {}, r"must hold a VLMo or a BEiT, got .* with 1 tensors such as \['a'\]"),
        ("odd", {}, "must be a configuration with a model_type"),
        ("large.pt", {"dtype": torch.float16}, "load: dtype must hold .*(?s:.*)backbone.pooler.bias"),
        ("large.pt", {"image_size": 13}, "image_size must be"),
        ("large.pt", {"vocab": vocabulary, "task": "captioning"}, "task must be one of"),
    ]
    for name, options, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            vlmo_fast.load(tmp_path / name, **options)
        assert re.match(r"load|MoMEConfig", str(caught.value))
