"""`vlmo-fast convert`: every kind in, folders and released files out, one message and no output where it fails."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoints import CLASSES, SMALL, Hostile, assert_same, small
from test_pretrained import assert_image_path, beit, bert, released
from transformers import AutoProcessor, BeitForImageClassification

import vlmo_fast
from vlmo_fast import VLMoConfig, VLMoProcessor, cli
from vlmo_fast.formats.loading import open_saved
from vlmo_fast.formats.official import IGNORED, official_state_dict

ROOT = Path(__file__).parents[1]
HEADS = ("--num-attention-heads", "2")


def run(capsys, *arguments: object) -> dict:
    assert cli.main(["convert", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refuse(capsys, *arguments: object) -> str:
    assert cli.main(["convert", *map(str, arguments)]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("vlmo-fast convert: ")
    assert "Traceback" not in shown.err
    return shown.err


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("kind", CLASSES)
def test_released_files_to_folders_and_back(kind, relative, tmp_path, capsys):
    """To the bit."""
    state = small(kind, relative)
    torch.save(state, tmp_path / "in.pt")
    report = run(capsys, tmp_path / "in.pt", tmp_path / "folder", *HEADS)
    assert report["model_class"] == CLASSES[kind]
    assert (report["fresh"], report["unused"], report["resized"]) == ([], [], [])
    model = getattr(vlmo_fast, CLASSES[kind]).from_pretrained(tmp_path / "folder")
    assert_same(official_state_dict(model), state)
    run(capsys, tmp_path / "folder", tmp_path / "back.pth")
    assert_same(torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"], state)


@pytest.mark.parametrize("wrapper", ["state_dict", "module", "model", None])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_released_files_as_they_come(zipped, wrapper, tmp_path, capsys):
    """Wrapped or flat, in both of torch's formats under a suffix that lies, with the three index buffers."""
    state = small("nlvr2")
    content = state | {name: torch.zeros(3, 3, dtype=torch.int64) for name in IGNORED}
    content = content if wrapper is None else {wrapper: content, "epoch": 3}
    torch.save(content, tmp_path / "in.safetensors", _use_new_zipfile_serialization=zipped)
    report = run(capsys, tmp_path / "in.safetensors", tmp_path / "out.pt", *HEADS)
    assert (report["fresh"], report["unused"], report["resized"]) == ([], [], [])
    assert_same(torch.load(tmp_path / "out.pt", weights_only=True)["state_dict"], state)


def test_task_and_sizes(tmp_path, capsys):
    torch.save(small(), tmp_path / "in.pt")
    out = tmp_path / "deep" / "er"
    options = (
        "--task",
        "vqa",
        "--image-size",
        "24",
        "--num-labels",
        "7",
        "--max-text-length",
        "4",
        "--dtype",
        "bfloat16",
    )
    report = run(capsys, tmp_path / "in.pt", out, *options)
    assert (report["image_size"], report["max_text_length"], report["dtype"]) == (24, 4, "bfloat16")
    assert "classifier.fc2.weight" in report["fresh"]
    assert "itm_score.fc.weight" in report["unused"]
    model = vlmo_fast.VLMoForQuestionAnswering.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    logits = model(torch.tensor([[1, 2]]), torch.randn(1, 3, 24, 24, dtype=torch.bfloat16)).logits
    assert logits.shape == (1, 7)
    again = run(capsys, out, tmp_path / "nlvr2.pt", "--task", "nlvr2", "--image-size", "12")
    assert again["source"] == "vqa"
    assert (again["task"], again["image_size"]) == ("nlvr2", 12)


def test_names_of_labels(tmp_path, capsys):
    """Kept with their number, dropped with another one."""
    names = {0: "cat", 1: "dog", 2: "boar"}
    config = vlmo_fast.VLMoConfig(**SMALL, num_labels=3, id2label=names, label2id={v: k for k, v in names.items()})
    vlmo_fast.VLMoForImageClassification(config).save_pretrained(tmp_path / "in")
    capsys.readouterr()
    run(capsys, tmp_path / "in", tmp_path / "same", "--image-size", 24)
    assert vlmo_fast.VLMoForImageClassification.from_pretrained(tmp_path / "same").config.id2label == names
    report = run(capsys, tmp_path / "in", tmp_path / "other", "--num-labels", 5)
    assert report["fresh"] == ["classifier.weight", "classifier.bias"]
    assert len(vlmo_fast.VLMoForImageClassification.from_pretrained(tmp_path / "other").config.id2label) == 5


def test_retrieval_files_hold_no_matching_head(tmp_path, capsys):
    """The release's do not; a folder keeps it."""
    torch.save(small(), tmp_path / "in.pt")
    assert "itm_score.fc.weight" in run(capsys, tmp_path / "in.pt", tmp_path / "r.pt", "--task", "retrieval")["unused"]
    assert run(capsys, tmp_path / "in.pt", tmp_path / "r", "--task", "retrieval")["fresh"] == []


def test_beit_and_bert(tmp_path, capsys):
    """From the release's file, from a folder of transformers', and words from a BERT beside it."""
    source = beit("per layer", BeitForImageClassification, num_labels=3)
    torch.save({"model": released(source)}, tmp_path / "beit.pth")
    source.save_pretrained(tmp_path / "beit")
    bert(hidden_size=32, num_attention_heads=4, vocab_size=30522).save_pretrained(tmp_path / "bert")
    for name in ("beit.pth", "beit"):
        report = run(
            capsys, tmp_path / name, tmp_path / f"{name}-vlmo", "--bert", tmp_path / "bert", "--num-vl-layers", 1
        )
        assert (report["source"], report["task"]) == ("beit", "text")
        assert not [name for name in report["fresh"] if "word_embeddings" in name]
        model = vlmo_fast.VLMoForMaskedLM.from_pretrained(tmp_path / f"{name}-vlmo")
        if name == "beit":  # its epsilon is in the configuration
            assert_image_path(model, source.beit)


def test_a_processor_beside_the_model(tmp_path, capsys):
    torch.save(small(), tmp_path / "in.pt")
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ncat\n")
    run(capsys, tmp_path / "in.pt", tmp_path / "out", "--vocab", vocabulary)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer("cat dog")["input_ids"] == [2, 5, 1, 3]
    assert processor.tokenizer.model_max_length == 6
    assert processor.image_processor.size == {"height": 12, "width": 12}
    assert "a vocabulary needs a folder as OUT" in refuse(capsys, tmp_path / "in.pt", "x.pt", "--vocab", vocabulary)
    assert "vocabulary must be a file" in refuse(capsys, tmp_path / "in.pt", tmp_path / "new", "--vocab", tmp_path)
    vocabulary.write_text("\n".join(map(str, range(99))))
    assert "vocabulary must" in refuse(capsys, tmp_path / "in.pt", tmp_path / "new", "--vocab", vocabulary)
    assert not (tmp_path / "new").exists()


def test_fresh_tensors_follow_the_seed(tmp_path, capsys):
    torch.save(small(), tmp_path / "in.pt")
    files = []
    for number, seed in enumerate((1, 1, 2)):
        run(capsys, tmp_path / "in.pt", tmp_path / f"{number}.pt", "--task", "vqa", "--seed", seed)
        files.append(torch.load(tmp_path / f"{number}.pt")["state_dict"]["vqa_classifier.0.weight"])
    assert torch.equal(files[0], files[1])
    assert not torch.equal(files[0], files[2])


def test_failures_leave_nothing(tmp_path, capsys, monkeypatch):
    """One message on stderr, status 1, and no half-written output, whatever is wrong."""
    state = small()
    torch.save(state, tmp_path / "good.pt")
    torch.save({**state, "pooler.dense.bias": state["pooler.dense.bias"] * torch.nan}, tmp_path / "nan.pt")
    torch.save({name: x for name, x in state.items() if "norm1" not in name}, tmp_path / "missing.pt")
    torch.save({"a": torch.ones(2)}, tmp_path / "foreign.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "good.pt").read_bytes()[:-2000])
    torch.save({**state, "payload": Hostile(tmp_path / "mark")}, tmp_path / "hostile.pt")
    bert().save_pretrained(tmp_path / "bert")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("[]")
    capsys.readouterr()
    before = sorted(tmp_path.rglob("*"))
    cases = {
        "nan.pt": "got NaN or infinity in 1 of .* tensors:\n  pooler.dense.bias",
        "missing.pt": "missing: transformer.blocks.0.norm1.weight",
        "foreign.pt": r"must hold a VLMo or a BEiT, got .* with 1 tensors such as \['a'\]",
        "cut.pt": "must be a readable torch checkpoint",
        "hostile.pt": "must be a readable torch checkpoint of tensors alone",
        "absent.pt": "must be a folder or a checkpoint file",
        "bert": "got a folder with a model of type 'bert'",
        "odd": "config.json must be a configuration",
    }
    for name, message in cases.items():
        for out in ("out", "out.pt"):
            assert re.search(message, refuse(capsys, tmp_path / name, tmp_path / out))
    good = tmp_path / "good.pt"
    for option, message in (
        (("--image-size", 13), "image_size must be"),
        (("--task", "classification"), "num_labels must be given"),
        (("--num-attention-heads", 3), "num_attention_heads must be the 2"),
        (("--bert", tmp_path / "absent"), "must be a checkpoint file"),
        (("--bert", good), "missing: word_embeddings.weight|shape of word_embeddings"),
    ):
        assert re.search(message, refuse(capsys, good, tmp_path / "out", *option))

    def fail(self, folder, **_):
        Path(folder).mkdir()
        (Path(folder) / "half").touch()
        raise OSError("the disk is full")

    monkeypatch.setattr(vlmo_fast.VLMoForPreTraining, "save_pretrained", fail)
    assert "the disk is full" in refuse(capsys, good, tmp_path / "out")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_there_stays_unless_told(tmp_path, capsys):
    torch.save(small(), tmp_path / "in.pt")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    (tmp_path / "out.pt").write_text("mine")
    for out in ("out", "out.pt"):
        assert "OUT must be new (or take --overwrite)" in refuse(capsys, tmp_path / "in.pt", tmp_path / out)
        run(capsys, tmp_path / "in.pt", tmp_path / out, "--overwrite")
    assert not (tmp_path / "out" / "mine.txt").exists()
    vlmo_fast.VLMoForPreTraining.from_pretrained(tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.pt", "out", "out.pt"]


@pytest.fixture
def dual(tmp_path, capsys):
    """A dual encoder with a processor that is not the default one, and a file of the user's."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "Cat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = VLMoConfig(**{**SMALL, "vocab_size": len(words)})
    folder = tmp_path / "small"
    vlmo_fast.VLMoForImageTextRetrieval(config).save_pretrained(folder)
    processor = VLMoProcessor.from_vocabulary(tmp_path / "vocab.txt", config)
    processor.image_processor.image_mean = (0.25, 0.5, 0.75)
    processor.save_pretrained(folder)
    (folder / "notes.md").write_text("mine")
    capsys.readouterr()
    return folder


@pytest.mark.parametrize("out", ["other", "small", "link"])
def test_tokenizer_and_processor_come_along(dual, out, tmp_path, capsys):
    """Into another folder and into IN itself, fitted to the sizes asked for; in place nothing else is lost."""
    (tmp_path / "link").symlink_to(dual)
    options = () if out == "other" else ("--overwrite",)
    report = run(capsys, dual, tmp_path / out, "--image-size", 24, "--max-text-length", 4, *options)
    assert report["has_vocabulary"]
    model, processor = vlmo_fast.load(tmp_path / out)
    assert model.config.image_size == 24
    assert tuple(processor.image_processor.image_mean) == (0.25, 0.5, 0.75)
    assert processor.image_processor.size == {"height": 24, "width": 24}
    assert processor(text="Cat cat cat cat")["input_ids"] == [2, 6, 5, 3]
    assert (tmp_path / out / "modules.json").is_file()
    assert (tmp_path / out / "notes.md").is_file() == (out != "other")
    assert (tmp_path / "link").is_symlink()
    assert len(list((tmp_path / out).glob("*.safetensors"))) == 1
    assert not list(tmp_path.glob(".*"))


def test_out_may_not_swallow_in(dual, capsys):
    message = "OUT must not be a folder that IN lies in"
    assert message in refuse(capsys, dual / "model.safetensors", dual, "--overwrite")
    assert message in refuse(capsys, dual, dual.parent, "--overwrite")
    assert (dual / "model.safetensors").is_file()
    (dual.parent / "there.pt").mkdir()
    assert "OUT must be a file to be replaced" in refuse(capsys, dual, dual.parent / "there.pt", "--overwrite")


def test_numbers_that_the_dtype_cannot_hold(tmp_path, capsys):
    """Refused by name before anything is written; bfloat16 is the way out."""
    state = small("irtr")
    state["pooler.dense.bias"] = torch.full_like(state["pooler.dense.bias"], 1e5)
    torch.save(state, tmp_path / "in.pt")
    for out in ("out", "out.pt"):
        message = refuse(capsys, tmp_path / "in.pt", tmp_path / out, "--dtype", "float16")
        assert "must hold numbers up to 1e+05, got float16" in message
        assert "bfloat16" in message
        assert message.endswith("\n  backbone.pooler.bias\n")
        assert not (tmp_path / out).exists()
    assert run(capsys, tmp_path / "in.pt", tmp_path / "out", "--dtype", "bfloat16")["dtype"] == "bfloat16"


@pytest.mark.skipif(os.name != "posix", reason="POSIX limits")
@pytest.mark.parametrize("out", ["out", "out.pt"])
def test_a_full_disk_is_one_message(out, tmp_path):
    """Files may grow to 20 kB here, as if the disk were full then."""
    torch.save(small(), tmp_path / "in.pt")
    code = f"""
import resource, sys
from vlmo_fast import cli
from vlmo_fast.formats import convert
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(cli.main(["convert", {str(tmp_path / "in.pt")!r}, {str(tmp_path / out)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("vlmo-fast"))
    assert line.startswith(f"vlmo-fast convert: {tmp_path / out} cannot be written: File too large")
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_outputs_are_as_readable_as_other_files(dual, tmp_path, capsys):
    """Folders and files, by the user's umask; safetensors' own files are the owner's alone."""
    before = os.umask(0o027)
    try:
        run(capsys, dual, tmp_path / "out")
        run(capsys, dual, tmp_path / "out.pt", "--task", "vqa")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {0o640} == {(tmp_path / "out.pt").stat().st_mode & 0o777}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_dry_run_and_text(tmp_path, capsys):
    torch.save(small(), tmp_path / "in.pt")
    assert cli.main(["convert", str(tmp_path / "in.pt"), "--dry-run", "--task", "vqa"]) == 0
    text = capsys.readouterr().out
    assert "VLMoForQuestionAnswering (vqa) from a pretrain checkpoint" in text
    assert "and 4 more (--verbose)" in text or "--verbose" in text
    assert "nothing written (--dry-run)" in text
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]
    with pytest.raises(SystemExit):
        cli.main(["convert", str(tmp_path / "in.pt")])
    assert "OUT is missing" in capsys.readouterr().err


def test_the_command_line(tmp_path):
    """As people call it; --help imports nothing heavy and shows examples."""
    torch.save(small("irtr"), tmp_path / "in.pt")
    command = [sys.executable, "-m", "vlmo_fast", "convert"]
    done = subprocess.run([*command, tmp_path / "in.pt", tmp_path / "out"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "VLMoForImageTextRetrieval (retrieval)" in done.stdout
    assert f"written to {tmp_path / 'out'}" in done.stdout
    shown = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0
    for word in ("--image-size", "--dry-run", "examples:", "BEiT", "legacy"):
        assert word in shown.stdout


def test_saved_folders_are_checked_too(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder must hold config\.json"):
        open_saved(tmp_path)
    bert().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must hold one of .* got KeyError\('BertModel'\)"):
        open_saved(tmp_path)


DAMAGE = {
    "missing: {name}": lambda state, name: {key: x for key, x in state.items() if key != name},
    "unexpected: stranger": lambda state, name: {"stranger" if key == name else key: x for key, x in state.items()},
    "shape of {name}: ": lambda state, name: {**state, name: state[name][None].clone()},
    "dtype of {name}: torch.int64": lambda state, name: {**state, name: state[name].long()},
    "NaN or infinity in 1 of": lambda state, name: {**state, name: torch.full_like(state[name], torch.nan)},
}


@pytest.mark.parametrize("problem", DAMAGE)
def test_every_damage_to_a_saved_folder_is_named(problem, tmp_path):
    """Each tensor dropped, renamed, reshaped, of integers, of NaN."""
    vlmo_fast.VLMoForImageTextRetrieval(vlmo_fast.VLMoConfig(**SMALL)).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert len(open_saved(tmp_path).tensors) == len(state)
    for name in state:
        save_file(DAMAGE[problem](state, name), tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=r"^open_saved: ") as caught:
            open_saved(tmp_path)
        assert problem.format(name=name) in str(caught.value)
        assert name in str(caught.value)


def test_a_truncated_folder_is_one_clear_error(tmp_path):
    vlmo_fast.VLMoForImageTextRetrieval(vlmo_fast.VLMoConfig(**SMALL)).save_pretrained(tmp_path)
    whole = (tmp_path / "model.safetensors").read_bytes()
    for offset in (0, 4, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        (tmp_path / "model.safetensors").write_bytes(whole[:offset])
        with pytest.raises(ValueError, match=r"^open_saved: .*model\.safetensors must be a readable"):
            open_saved(tmp_path)
