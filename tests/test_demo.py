"""The demo from end to end in miniature: it trains, measures, saves and reports. What it learns is not asserted."""

import json

import pytest
import torch

import vlmo_fast
from vlmo_fast import demo
from vlmo_fast.demo.recipe import DemoData, MuonAdamW, Recipe, StepBatches, make_network

TINY = Recipe(
    num_steps=12,
    num_contrast_steps=2,
    num_first_captions=8,
    num_captions=8,
    num_questions=8,
    num_scene_questions=4,
    num_statements=16,
    num_warmup_steps=2,
    hidden_size=32,
    num_attention_heads=2,
)


@pytest.fixture(scope="module")
def data() -> DemoData:
    return DemoData()


def test_one_backbone_serves_all_heads(data):
    network = make_network(TINY, data)
    assert network.answering.backbone is network.retrieval.backbone is network.judging.backbone
    assert (network.answering.config.num_labels, network.judging.config.num_labels) == (len(data.answers), 2)


def test_batches_are_those_of_the_recipe(data):
    """Captions alone first, then all objectives; the same seed gives the same batches, another seed others."""
    stream = iter(StepBatches(data, TINY))
    batches = [next(stream) for _ in range(4)]
    assert ["question_labels" in batch for batch in batches] == [False, False, True, True]
    last = batches[-1]
    assert last["caption_pixel_values"].shape == (8, 3, 64, 64)
    assert last["question_pixel_values"].shape == (12, 3, 64, 64)
    assert last["statement_pixel_values"].shape == (16, 2, 3, 64, 64)
    assert -1 <= last["caption_pixel_values"].min() < -0.5 < 0.5 < last["caption_pixel_values"].max() <= 1
    again = iter(StepBatches(data, TINY))
    for batch in batches:
        for name, tensor in next(again).items():
            assert torch.equal(tensor, batch[name]), name
    other = next(iter(StepBatches(data, Recipe(**{**TINY.__dict__, "seed": 1}))))
    assert not torch.equal(other["caption_input_ids"], batches[0]["caption_input_ids"])


def test_every_word_is_known(data):
    texts = [*data.world.captions("train", 200, rng=0).captions, *data.world.questions("test", 200, rng=0).questions]
    texts += [*data.world.statements("train", 200, rng=0).statements, *data.easy_vqa["test"].questions[:500]]
    ids = data.encode_texts(texts)["input_ids"]
    assert not (ids == data.tokenizer.unk_token_id).any()
    assert ids.shape[1] <= make_network(TINY, data).retrieval.config.max_text_length


def test_each_parameter_has_one_optimiser(data):
    """Muon takes the matrices of the blocks, AdamW the rest; only matrices and embeddings decay."""
    network = make_network(TINY, data)
    optimizer = MuonAdamW(network, TINY)
    names = {id(p): name for name, p in network.named_parameters() if p.requires_grad}
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    assert sorted(name for group in groups for name in group) == sorted(names.values())
    assert all(".blocks." in name and name.endswith(".weight") for name in groups[0])
    assert not any(".blocks." in name for name in groups[1])
    assert groups[2]
    assert optimizer.param_groups[2]["weight_decay"] == 0
    assert all(dict(network.named_parameters())[name].ndim < 2 for name in groups[2])


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
    assert any("embeddings" in name for name in moved)


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
    assert {"contrast", "answers", "statements"} <= set(results.history[-1])
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


def test_the_command_writes_results_and_report(monkeypatch, tmp_path, capsys, finished):
    """The command around the run: files, summary, and the recipe that the options ask for."""
    asked = []
    monkeypatch.setattr(demo, "run", lambda recipe, folder, split: asked.append((recipe, split)) or finished[0])
    assert demo.main(["--output", str(tmp_path), "--steps", "7", "--seed", "3", "--split", "validation"]) == 0
    assert [(recipe.num_steps, recipe.seed, split) for recipe, split in asked] == [(7, 3, "validation")]
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["retrieval"]["text_to_image"]["1"] == finished[0].retrieval.text_to_image[1]
    assert not [name for name in saved["retrieval"] if name.endswith("examples")]
    assert (tmp_path / "report.html").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "Retrieval among 320 scenes" in printed
    assert "control without fusion" in printed


def test_what_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(demo, "_missing", lambda: ["easy_vqa"])
    assert demo.main([]) == 1
    error = capsys.readouterr().err
    assert "easy_vqa" in error
    assert "pip install" in error


def test_refuses_no_steps(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--steps", "0"])
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err
