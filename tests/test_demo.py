"""The demo from end to end in miniature: it trains, measures, saves and reports. What it learns is not asserted."""

import dataclasses
import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainingArguments

import vlmo_fast
from vlmo_fast import cli, demo, requirements
from vlmo_fast.data.synthetic.scenes import ONE_IMAGE_STATEMENT_TYPES, STATEMENT_TYPES
from vlmo_fast.demo.recipe import (
    DemoData,
    DemoTrainer,
    Muon,
    MuonAdamW,
    Recipe,
    Stage,
    StepBatches,
    encode_images,
    halves,
    make_network,
    orthogonalize,
    train,
    two_threads,
)
from vlmo_fast.losses import IGNORE_INDEX

TINY = Recipe(
    stages=(
        Stage(2, num_captions=8, num_masked=4, num_kinds=4),
        Stage(
            4,
            muon_rate=0.5,
            num_questions=8,
            even_answers=True,
            num_statements=16,
            negated_questions=0.5,
            negated_statements=0.0,
        ),
        Stage(6, num_captions=8, num_questions=8, num_scene_questions=4, num_statements=16),
    ),
    num_warmup_steps=2,
    num_decay_steps=4,
    hidden_size=32,
    num_hidden_layers=3,
    num_vl_layers=1,
    num_attention_heads=2,
)


@pytest.fixture(scope="module")
def data() -> DemoData:
    return DemoData()


def test_one_backbone_serves_all_heads(data):
    network = make_network(TINY, data)
    heads = (network.retrieval, network.naming, network.sorting, network.answering, network.judging)
    assert len({id(head.backbone) for head in heads}) == 1
    assert [head.config.num_labels for head in heads[2:]] == [24, len(data.answers), 2]


def test_batches_are_those_of_the_recipe(data):
    """Stage after stage; the same seed gives the same batches, another seed others."""
    batches = list(StepBatches(data, TINY))
    assert len(batches) == TINY.num_steps == 12
    tasks = [sorted({name.split("_")[0] for name in batch}) for batch in batches]
    assert tasks[:2] == [["caption", "kind", "masked"]] * 2
    assert tasks[2:6] == [["question", "statement"]] * 4
    assert tasks[6:] == [["caption", "question", "statement"]] * 6
    first, second, last = batches[0], batches[2], batches[-1]
    assert first["caption_pixel_values"].shape == (8, 3, 64, 64)
    assert second["question_pixel_values"].shape == (8, 3, 64, 64)
    assert second["statement_pixel_values"].shape == (8, 2, 3, 64, 64)  # those of the first wording
    assert last["question_pixel_values"].shape == (12, 3, 64, 64)
    assert last["statement_pixel_values"].shape == (16, 2, 3, 64, 64)
    background = first["caption_pixel_values"].median()
    assert abs(background) < 0.7
    for batch, again in zip(batches, StepBatches(data, TINY), strict=True):
        assert batch.keys() == again.keys()
        for name, tensor in batch.items():
            assert torch.equal(tensor, again[name]), name
    other = next(iter(StepBatches(data, dataclasses.replace(TINY, seed=1))))
    assert not torch.equal(other["caption_input_ids"], first["caption_input_ids"])


def test_one_name_of_each_caption_is_masked(data):
    stage = Stage(1, num_masked=64)
    batch = next(iter(StepBatches(data, Recipe(stages=(stage,)))))
    ids, labels = batch["masked_input_ids"], batch["masked_labels"]
    is_hidden = ids == data.tokenizer.mask_token_id
    assert (is_hidden.sum(dim=1) == 1).all()
    assert ((labels != IGNORE_INDEX) == is_hidden).all()
    names = data.tokenizer.convert_ids_to_tokens(labels[is_hidden].tolist())
    assert set(names) <= set(data.world.sprites.names)
    assert set(is_hidden.int().argmax(dim=1).tolist()) == {2, 5, 6}  # the first object's name, or the second's
    shown = data.tokenizer.batch_decode(torch.where(is_hidden, labels, ids), skip_special_tokens=True)
    assert all(re.fullmatch(r"an? \w+ (left of|above) an? \w+", caption) for caption in shown)


def test_even_answers(data):
    """Yes and no come equally often then, for each question, and negated questions as seldom as the stage asks."""
    train = data.easy_vqa["train"]
    stage = Stage(1, num_questions=4000, even_answers=True, negated_questions=0.1)
    chosen = data.draw_questions(stage, np.random.default_rng(0))
    asked = [(train.questions[n], train.answers[n]) for n in chosen]
    closed = [(question, answer) for question, answer in asked if answer in ("yes", "no")]
    assert np.mean([answer == "yes" for _, answer in closed]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([answer == "yes" for question, answer in closed if "red" in question]) == pytest.approx(0.5, abs=0.1)
    assert np.mean([" no" in question for question, _ in closed]) == pytest.approx(0.1 / 1.1, abs=0.02)
    as_they_come = data.draw_questions(dataclasses.replace(stage, even_answers=False), np.random.default_rng(0))
    assert np.mean([" no" in train.questions[n] for n in as_they_come]) > 0.3
    assert len(set(as_they_come)) > 3000


def test_sorted_pictures_are_of_known_kind(data):
    batch = next(iter(StepBatches(data, Recipe(stages=(Stage(1, num_kinds=200),)))))
    assert batch["kind_labels"].min() >= 0
    assert len(batch["kind_labels"].unique()) == 24


def test_rates(data):
    """Warm-up from the first step, a stage's own factor, a cosine to 0 at the end."""
    rates = [TINY.rates(step) for step in range(12)]
    assert rates[:3] == [(0.5, 0.5), (1.0, 1.0), (0.5, 1.0)]
    assert rates[6:9] == [(1.0, 1.0)] * 3
    assert rates[10] == pytest.approx((0.5, 0.5))
    assert [muon for muon, _ in rates[8:]] == sorted((muon for muon, _ in rates[8:]), reverse=True)
    assert 0 < rates[11][0] < 0.2


def test_settings_are_told_in_words():
    settings = TINY.settings()
    assert settings["hidden_size"] == 32
    assert settings["stage 1"] == "num_steps 2; num_captions 8; num_masked 4; num_kinds 4"
    assert settings["stage 3"].endswith("; num_statements 16")
    assert Recipe().settings()["stage 5"].endswith(", right arrangement, arrangement, arrangement")
    assert "stages" not in settings


@pytest.mark.parametrize("num_steps", [1, 6, 12, 100])
def test_a_shortened_recipe_has_as_many_steps_as_asked_for(num_steps):
    short = TINY.shortened(num_steps)
    assert short.num_steps == num_steps
    assert dataclasses.replace(short, stages=TINY.stages, num_warmup_steps=2, num_decay_steps=4) == TINY
    if num_steps == 6:
        assert [stage.num_steps for stage in short.stages] == [1, 2, 3]
        assert (short.num_warmup_steps, short.num_decay_steps) == (1, 2)


def test_every_word_is_known(data):
    texts = [*data.world.captions("train", 200, rng=0).captions, *data.world.questions("test", 200, rng=0).questions]
    types = (*STATEMENT_TYPES, *ONE_IMAGE_STATEMENT_TYPES)
    texts += [
        *data.world.statements("train", 560, rng=0, types=types).statements,
        *data.easy_vqa["test"].questions[:500],
    ]
    ids = data.encode_texts(texts)["input_ids"]
    assert not (ids == data.tokenizer.unk_token_id).any()
    assert ids.shape[1] <= make_network(TINY, data).retrieval.config.max_text_length


@pytest.mark.parametrize("step", [0, 2, 6])
def test_halves_hold_each_row_once(data, step):
    """About as many pictures in each, all captions together, shares that are those of the rows."""
    batch = list(StepBatches(data, TINY))[step]
    parts = halves(batch)
    assert len(parts) == 2
    for name, x in batch.items():
        pieces = [part.inputs[name] for part in parts if name in part.inputs]
        assert torch.equal(torch.cat(pieces), x)
        assert len(pieces) == 1 or not name.startswith("caption")
    totals = {}
    for part in parts:
        for name, share in part.shares.items():
            totals[name] = totals.get(name, 0) + share
    assert totals == {name: pytest.approx(1) for name in totals}
    pictures = [sum(x.shape[:-3].numel() for name, x in part.inputs.items() if "pixel" in name) for part in parts]
    assert abs(pictures[0] - pictures[1]) <= 2


def test_halves_learn_what_the_whole_step_does(data, tmp_path):
    """A step on two threads gives the loss, and every gradient, of all its inputs at once."""
    network = make_network(TINY, data).double()
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
    with two_threads() as threads:
        trainer = DemoTrainer(model=network, args=arguments, threads=threads)
        for batch in list(StepBatches(data, TINY))[::3]:
            batch = {name: x.double() if x.is_floating_point() else x for name, x in batch.items()}
            whole = network(**batch).loss
            expected = torch.autograd.grad(whole, [*parameters.values()], allow_unused=True, materialize_grads=True)
            network.zero_grad()
            torch.testing.assert_close(trainer.training_step(network, batch), whole.detach())
            for (name, p), gradient in zip(parameters.items(), expected, strict=True):
                found = torch.zeros_like(p) if p.grad is None else p.grad
                torch.testing.assert_close(found, gradient, msg=name)


def test_the_trainer_sees_whole_batches(data, tmp_path, monkeypatch):
    """All rows of every objective, though objectives differ in how many they have."""
    seen = []

    def record(self, model, inputs, *args, **kwargs):
        seen.append({name: x.clone() for name, x in inputs.items()})
        return torch.zeros(())

    monkeypatch.setattr(DemoTrainer, "training_step", record)
    monkeypatch.setattr(MuonAdamW, "step", lambda self, closure=None: None)
    train(TINY, data, tmp_path)
    expected = list(StepBatches(data, TINY))
    assert len(seen) == len(expected)
    for found, batch in zip(seen, expected, strict=True):
        assert found.keys() == batch.keys()
        assert all(torch.equal(found[name].cpu(), x) for name, x in batch.items())


def test_a_step_of_captions_alone_stays_whole(data):
    batch = next(iter(StepBatches(data, Recipe(stages=(Stage(1, num_captions=8),)))))
    (part,) = halves(batch)
    assert part.inputs.keys() == batch.keys()
    assert part.shares == {"contrast": 1}


def test_two_threads_leave_settings_as_they_were():
    """Torch's threads and Python's switch interval, also after an error."""
    before = torch.get_num_threads(), sys.getswitchinterval()

    def fail() -> None:
        with two_threads() as threads:
            assert list(threads.map(abs, [-1, 2])) == [1, 2]
            assert torch.get_num_threads() == max(1, before[0] // 2)
            assert threads.submit(torch.get_num_threads).result() == max(1, before[0] // 2)
            assert sys.getswitchinterval() == pytest.approx(2e-5, rel=0.1)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert (torch.get_num_threads(), sys.getswitchinterval()) == before


def test_each_parameter_has_one_optimiser(data):
    """Muon takes the matrices of the blocks and the patch projections, AdamW the rest; vectors do not decay."""
    network = make_network(TINY, data)
    optimizer = MuonAdamW(network, TINY)
    names = {id(p): name for name, p in network.named_parameters() if p.requires_grad}
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    assert sorted(name for group in groups for name in group) == sorted(names.values())
    assert all(".blocks." in name and name.endswith(".weight") for name in (*groups[0], *groups[1]))
    assert [name.split(".")[-2] for name in groups[2]] == ["projection", "stem"]
    assert not any(".blocks." in name for name in groups[3])
    assert groups[4]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.05, 0.05, 0.05, 0.05, 0.0]
    assert all(dict(network.named_parameters())[name].ndim < 2 for name in groups[4])


def test_threads_that_share_the_optimiser_give_the_same_bits(data):
    batch = next(iter(StepBatches(data, TINY)))
    with two_threads() as threads:
        networks = [make_network(TINY, data) for _ in range(2)]
        for network, shared in zip(networks, (None, threads), strict=True):
            optimizer = MuonAdamW(network, TINY, shared)
            for _ in range(2):
                network.zero_grad()
                network(**batch).loss.backward()
                optimizer.step()
    alone, together = networks
    for (name, p), other in zip(alone.named_parameters(), together.parameters(), strict=True):
        assert torch.equal(p, other), name
    untrained = dict(make_network(TINY, data).named_parameters())
    assert not all(torch.equal(p, untrained[name]) for name, p in alone.named_parameters())


@pytest.mark.parametrize("shape", [(96, 96), (384, 96), (96, 384), (2, 1)], ids=str)
def test_updates_are_orthogonal_and_in_float32(shape):
    """U p(S) V^T with the iteration's polynomial p, computed from float64's singular values; p of them is about 1."""
    matrix = torch.randn(shape)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    start = s.clone()
    for _ in range(5):
        s = 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    found = orthogonalize(matrix)
    assert found.dtype == torch.float32
    exact = u * s @ v
    assert (found - exact).norm() < 2e-5 * exact.norm()  # bfloat16 has 1e-2
    assert s[start > 0.02].min() > 0.65 and s.max() < 1.25


def test_muon_moves_as_torchs_does(monkeypatch):
    """Momentum, decay and rate over three steps: to bfloat16's rounding, and to float32's once torch's has it, too."""
    start, gradients = torch.randn(48, 24), torch.randn(3, 48, 24)

    def moved(make):
        p = torch.nn.Parameter(start.clone())
        optimizer = make([p], lr=0.1, weight_decay=0.5)
        for gradient in gradients:
            p.grad = gradient.clone()
            optimizer.step()
        return p.detach()

    torch.testing.assert_close(moved(Muon), moved(torch.optim.Muon), rtol=0, atol=0.01)
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", lambda matrix, *_: orthogonalize(matrix))
    torch.testing.assert_close(moved(Muon), moved(torch.optim.Muon), rtol=0, atol=1e-6)


def test_patch_projections_move_as_matrices_do(data):
    """By Muon's step of the flattened filters."""
    network = make_network(TINY, data)
    weight = network.retrieval.backbone.image_embeddings.projection.weight
    before = weight.detach().clone()
    optimizer = MuonAdamW(network, TINY)
    network(**next(iter(StepBatches(data, TINY)))).loss.backward()
    matrix = torch.nn.Parameter(before.flatten(1).clone())
    matrix.grad = weight.grad.flatten(1).clone()
    Muon([matrix], lr=TINY.patch_learning_rate, weight_decay=TINY.weight_decay).step()
    optimizer.step()
    assert not torch.equal(weight, before)
    assert torch.equal(weight, matrix.detach().view_as(weight))


def test_scheduled_learning_rates_reach_both_optimisers(data):
    """Also after a round trip of the state, which accelerate makes and which replaces the groups."""
    network = make_network(TINY, data)
    optimizer = MuonAdamW(network, TINY)
    optimizer.load_state_dict(optimizer.state_dict())
    network(**next(iter(StepBatches(data, TINY)))).loss.backward()
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for rate in (0.0, 1e-3):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        moved = {name for name, p in network.named_parameters() if not torch.equal(p, before[name])}
        assert bool(moved) == bool(rate)
    assert any(".blocks." in name for name in moved)
    assert any("word_embeddings" in name for name in moved)
    assert any("image_embeddings.projection" in name for name in moved)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return demo.run(TINY, folder, split="validation"), folder


def test_the_run_measures_everything(finished):
    results, _ = finished
    assert results.retrieval.num_scenes == 320
    assert results.retrieval.objects_oracle[1] == pytest.approx(0.25)
    assert results.retrieval.chance[1] == pytest.approx(1 / 320)
    for examples in (results.retrieval.examples, results.retrieval.caption_examples):
        assert len(examples) == 12
        for example in examples:
            assert len(example.captions) == len(example.scores) == 5
            assert example.right is not None or example.rank > 5
            assert example.scores == sorted(example.scores, reverse=True)
    for part in (results.retrieval.text_to_image, results.retrieval.image_to_text):
        assert 0 <= part[1] <= part[5] <= part[10] <= 1
    for questions in (results.easy_vqa, results.scene_questions):
        assert set(questions.accuracy) == set(questions.no_fusion) == set(questions.num_questions)
        assert questions.examples
    assert set(results.statements.baselines.values()) == {0.5}
    assert results.history[-1]["step"] <= TINY.num_steps
    objectives = {"contrast", "masked_words", "kinds", "answers", "statements"}
    assert objectives <= {name for row in results.history for name in row}
    assert results.training_seconds < results.total_seconds


def test_the_run_is_reproducible(finished, tmp_path):
    """The same seed gives the same figures, to the last digit."""
    again = demo.run(TINY, tmp_path, split="validation")
    first = finished[0]
    assert again.history == first.history
    assert again.retrieval.text_to_image == first.retrieval.text_to_image
    assert again.easy_vqa.accuracy == first.easy_vqa.accuracy
    assert again.easy_vqa.no_fusion == first.easy_vqa.no_fusion
    assert again.statements.accuracy == first.statements.accuracy


def test_the_saved_heads_load(finished):
    _, folder = finished
    model = vlmo_fast.VLMoForImageTextRetrieval.from_pretrained(folder / "retrieval")
    assert model.config.hidden_size == TINY.hidden_size
    vlmo_fast.VLMoForQuestionAnswering.from_pretrained(folder / "answering")


def test_the_saved_folders_are_like_all_others(finished, data, tmp_path, capsys):
    """With their processor, which reads pictures and questions as training did, and nothing of other heads."""
    _, folder = finished
    question, picture = data.easy_vqa["test"].questions[0], np.ascontiguousarray(data.easy_vqa["test"].images[0])
    for name in ("retrieval", "answering"):
        model, processor = vlmo_fast.load(folder / name)
        inputs = processor(images=Image.fromarray(picture), text=question, return_tensors="pt")
        wanted = {**data.encode_texts([question]), "pixel_values": encode_images(picture[None])}
        for key, tensor in wanted.items():
            torch.testing.assert_close(inputs[key], tensor)
        assert model(**inputs) is not None
        assert cli.main(["convert", str(folder / name), str(tmp_path / name)]) == 0
    assert model.config.id2label[3] == data.answers[3]
    (tmp_path / "texts.txt").write_text(f"{question}\n")
    options = ("--texts", tmp_path / "texts.txt", "--store", tmp_path / "store")
    assert cli.main(["embed", str(folder / "retrieval"), str(tmp_path / "out.npy"), *map(str, options)]) == 0
    assert np.load(tmp_path / "out.npy").shape == (1, TINY.hidden_size)
    capsys.readouterr()


def test_the_command_writes_results_and_report(monkeypatch, tmp_path, capsys, finished):
    """The command around the run: files, summary, and the recipe that the options ask for."""
    asked = []
    monkeypatch.setattr(demo, "run", lambda recipe, folder, split: asked.append((recipe, split)) or finished[0])
    assert cli.main(["demo", "--output", str(tmp_path), "--steps", "7", "--seed", "3", "--split", "validation"]) == 0
    assert [(recipe.num_steps, recipe.seed, split) for recipe, split in asked] == [(7, 3, "validation")]
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["retrieval"]["text_to_image"]["1"] == finished[0].retrieval.text_to_image[1]
    assert not [name for name in saved["retrieval"] if name.endswith("examples")]
    assert (tmp_path / "report.html").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "Retrieval among 320 scenes" in printed
    assert "control without fusion" in printed


def test_what_is_missing_is_named(monkeypatch, capsys):
    find_spec = requirements.find_spec
    monkeypatch.setattr(requirements, "find_spec", lambda name: None if name == "easy_vqa" else find_spec(name))
    assert cli.main(["demo"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("vlmo-fast demo: the package easy-vqa must be installed, got none; to install it: ")
    assert "pip install" in error


def test_output_is_a_folder(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--output", str(tmp_path / "file")]) == 1
    wanted = f"vlmo-fast demo: --output must be a folder, got the file {tmp_path / 'file'}\n"
    assert capsys.readouterr().err == wanted


def test_refuses_no_steps(capsys):
    with pytest.raises(SystemExit):
        cli.main(["demo", "--steps", "0"])
    assert "--steps: must be at least 1, got 0" in capsys.readouterr().err
