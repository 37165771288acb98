"""Optimisers by name: groups, Muon's step against its formula, and life with schedulers and Trainer."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import CAPS
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler

from vlmo_fast.hf.configuration import VLMoConfig
from vlmo_fast.hf.modeling import VLMoForMaskedImageModeling, VLMoForPreTraining, VLMoForQuestionAnswering
from vlmo_fast.training.optim import MuonAdamW, make_optimizer, orthogonalize, parameter_groups

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_vl_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "vocab_size": 30,
    "image_vocab_size": 8,
    "num_labels": 3,
}


def model_of(kind, **options):
    return kind(VLMoConfig(**SIZES, **options))


class Tower(nn.Module):
    """Two blocks' matrices, one wide, one tall, with biases and a head."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 4), nn.Linear(4, 6)])
        self.classifier = nn.Linear(6, 3)

    def forward(self, x, labels):
        for block in self.blocks:
            x = block(x).tanh()
        logits = self.classifier(x)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def train(model, optimizer, num_steps, start=0, schedule=None):
    for n in range(start, start + num_steps):
        generator = torch.Generator().manual_seed(n)
        x, labels = torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)
        model(x, labels)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        if schedule is not None:
            schedule.step()


# Groups


@pytest.mark.parametrize("positions", ["relative", "absolute"])
@pytest.mark.parametrize("kind", [VLMoForPreTraining, VLMoForMaskedImageModeling, VLMoForQuestionAnswering])
def test_what_decays(kind, positions):
    """All parameters once; decay for weights of matrices, filters, words and positions alone, written out by name."""
    model = model_of(kind, position_embedding_type=positions)
    groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.01)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    decayed = {names[id(parameter)] for group in groups if group["weight_decay"] for parameter in group["params"]}
    assert {group["weight_decay"] for group in groups} == {0.0, 0.01}
    undecayed_ends = ("bias", "norm.weight", "layer_scale", "logit_scale", "cls_token", "mask_token", "table")
    undecayed_ends += ("token_type_embeddings.weight", "modality_type_embeddings.weight")
    assert decayed == {name for name in grouped if not name.endswith(undecayed_ends)}
    assert "backbone.text_embeddings.word_embeddings.weight" in decayed
    if positions == "absolute":
        assert "backbone.image_embeddings.position_embeddings" in decayed


def test_heads_learn_faster():
    """Those of tasks alone, biases and norms included: catches a multiplier on all, or on matrices only."""
    model = model_of(VLMoForQuestionAnswering)
    groups = parameter_groups(model, learning_rate=3e-5, head_multiplier=20)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(6e-4 if name.startswith("classifier.") else 3e-5)
    assert [group["name"] for group in groups] == ["matrices", "vectors", "head matrices", "head vectors"]


def test_frozen_parameters_are_left_out():
    model = Tower().requires_grad_(False)
    with pytest.raises(ValueError, match="require a gradient"):
        parameter_groups(model, learning_rate=1e-3)
    model.blocks[0].weight.requires_grad = True
    (group,) = parameter_groups(model, learning_rate=1e-3)
    assert group["params"] == [model.blocks[0].weight]


def test_adamw_is_the_recipes():
    optimizer = make_optimizer(Tower(), learning_rate=2e-4)
    assert type(optimizer) is torch.optim.AdamW
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["fused"]) == ((0.9, 0.98), 1e-8, True)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0] * 2
    with pytest.raises(ValueError, match="'adamw' or 'muon', got 'sgd'"):
        make_optimizer(Tower(), "sgd", learning_rate=1e-3)


def test_muon_takes_the_matrices_of_blocks():
    """Catches embeddings, heads and projections under Muon, which orthogonal steps do not suit."""
    model = model_of(VLMoForPreTraining)
    optimizer = make_optimizer(model, "muon", learning_rate=1e-3)
    by_muon = [id(p) for group in optimizer.param_groups if group["algorithm"] == "muon" for p in group["params"]]
    matrices = ("qkv.weight", "projection.weight", "fc1.weight", "fc2.weight")
    wanted = [id(p) for name, p in model.named_parameters() if ".blocks." in name and name.endswith(matrices)]
    assert sorted(by_muon) == sorted(wanted)
    assert len(by_muon) == 2 * 2 + 2 * 5  # qkv and projection; fc1 and fc2 of two and of three experts
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    with pytest.raises(ValueError, match="matrices below `blocks`"):
        make_optimizer(nn.Linear(2, 2), "muon", learning_rate=1e-3)


# Muon


@settings(deadline=None, max_examples=50)
@given(rows=st.integers(1, 40), columns=st.integers(1, 40), exponent=st.integers(-2, 12), seed=st.integers(0, 99))
def test_singular_values_become_one(rows, columns, exponent, seed):
    """And the singular vectors stay, at any size and scale: catches a transposition forgotten, a wrong coefficient.

    The iteration acts on each singular value by itself: the polynomial, five times, of its share of the norm.
    """
    matrix = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    shares = s / s.norm()
    for _ in range(5):
        shares = 3.4445 * shares - 4.7750 * shares**3 + 2.0315 * shares**5
    found = orthogonalize(matrix * 10.0**exponent, dtype=torch.float64)
    torch.testing.assert_close(found, u * shares @ vt, rtol=0, atol=1e-10)
    assert shares[s > s.norm() / 300].min() > 0.68 and shares.max() < 1.21


def test_a_cpu_computes_in_float32():
    """Within float32's cap of float64: catches bfloat16, which is off by a thousandth and more."""
    matrix = torch.randn(48, 32)
    exact = orthogonalize(matrix.double(), dtype=torch.float64)
    found = orthogonalize(matrix)
    assert found.dtype == torch.float32
    assert (found - exact).norm() / exact.norm() < CAPS[torch.float32]
    assert (orthogonalize(matrix, dtype=torch.bfloat16) - exact).norm() / exact.norm() > 1e-3
    assert orthogonalize(matrix.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(orthogonalize(torch.zeros(3, 2)), torch.zeros(3, 2))


@pytest.mark.parametrize(("scale", "factor"), [("match_rms_adamw", 0.2 * math.sqrt(6)), ("original", math.sqrt(6 / 4))])
def test_three_steps_by_the_formula(scale, factor):
    """Momentum, Nesterov's look ahead, decay by the unscaled rate: catches each left out or in another order."""
    weight = nn.Parameter(torch.randn(6, 4))
    wanted, momentum = weight.detach().clone(), torch.zeros(6, 4)
    group = {"params": [weight], "algorithm": "muon", "scale": scale}
    optimizer = MuonAdamW([group], lr=0.1, weight_decay=0.05)
    for _ in range(3):
        weight.grad = torch.randn(6, 4)
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * weight.grad
        step = orthogonalize(0.95 * momentum + 0.05 * weight.grad)
        wanted = (1 - 0.1 * 0.05) * wanted - 0.1 * factor * step
        torch.testing.assert_close(weight.detach(), wanted)


def test_it_is_torchs_muon_but_for_bfloat16():
    """Up to that dtype's rounding, which torch's has."""
    ours, theirs = (nn.Parameter(torch.eye(12, 8)) for _ in range(2))
    optimizers = (
        MuonAdamW([{"params": [ours], "algorithm": "muon"}], lr=0.01, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=0.01, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(4):
        ours.grad = theirs.grad = torch.randn(12, 8)
        for optimizer in optimizers:
            optimizer.step()
    moved = (theirs - torch.eye(12, 8)).norm()
    assert (ours - theirs).norm() / moved < 8 * torch.finfo(torch.bfloat16).eps


def test_steps_are_as_large_as_adamws():
    """Root mean square about 0.2 of the learning rate, whatever the shape: so one learning rate serves both."""
    for shape in ((8, 8), (64, 16), (16, 64)):
        weight = nn.Parameter(torch.zeros(shape))
        optimizer = MuonAdamW([{"params": [weight], "algorithm": "muon"}], lr=1e-3)
        weight.grad = torch.randn(shape)
        optimizer.step()
        assert 0.14e-3 < weight.square().mean().sqrt() < 0.25e-3


def test_filters_are_matrices():
    """(out, the rest): to the bit what the flat matrix gets."""
    filters, flat = nn.Parameter(torch.randn(5, 3, 2, 2)), nn.Parameter(torch.empty(5, 12))
    flat.data = filters.detach().clone().flatten(1)
    for parameter in (filters, flat):
        optimizer = MuonAdamW([{"params": [parameter], "algorithm": "muon"}], lr=0.1)
        torch.manual_seed(0)
        parameter.grad = torch.randn(5, 12).view_as(parameter)
        optimizer.step()
    assert torch.equal(filters.flatten(1), flat)


def test_the_rest_is_torchs_adamw():
    """To the bit, with options of the group: catches a state or an option that does not arrive."""
    ours, theirs = (nn.Linear(4, 4) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizer = MuonAdamW([{"params": [*ours.parameters()], "algorithm": "adamw", "weight_decay": 0.3}], lr=0.01)
    other = torch.optim.AdamW(theirs.parameters(), lr=0.01, weight_decay=0.3, betas=(0.9, 0.98), fused=True)
    for _ in range(3):
        for layer, its in ((ours, optimizer), (theirs, other)):
            layer(torch.ones(2, 4)).square().sum().backward()
            its.step()
            its.zero_grad()
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_state_comes_back(name, tmp_path):
    """To the bit, through a file: catches a momentum, a step count or a rate that starts anew."""
    model = Tower()
    optimizer = make_optimizer(model, name, learning_rate=0.01, head_multiplier=3)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=2, num_training_steps=9)
    train(model, optimizer, 4, schedule=schedule)
    torch.save([model.state_dict(), optimizer.state_dict(), schedule.state_dict()], tmp_path / "state.pt")
    train(model, optimizer, 4, start=4, schedule=schedule)

    resumed = Tower()
    again = make_optimizer(resumed, name, learning_rate=0.5)
    schedule = get_scheduler("linear", again, num_warmup_steps=2, num_training_steps=9)
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    for part, state in zip((resumed, again, schedule), states, strict=True):
        part.load_state_dict(state)
    train(resumed, again, 4, start=4, schedule=schedule)
    for one, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("schedule_name", ["linear", "cosine"])
def test_a_scheduler_moves_all_rates(schedule_name):
    """Warm-up, then decay to zero, each group from its own peak; nothing moves at rate zero."""
    model = Tower()
    optimizer = make_optimizer(model, "muon", learning_rate=0.01, head_multiplier=20)
    schedule = get_scheduler(schedule_name, optimizer, num_warmup_steps=4, num_training_steps=12)
    peaks = [group["initial_lr"] for group in optimizer.param_groups]
    assert set(peaks) == {0.01, 0.2}
    before = copy.deepcopy(model.state_dict())
    train(model, optimizer, 1, schedule=schedule)  # the first step of a warm-up has rate 0
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    train(model, optimizer, 3, start=1, schedule=schedule)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(peaks)
    assert all(not torch.equal(before[name], x) for name, x in model.state_dict().items())
    train(model, optimizer, 8, start=4, schedule=schedule)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.0] * len(peaks), abs=1e-12)


def test_threads_step_to_the_same_bits():
    alone, shared = Tower(), Tower()
    shared.load_state_dict(alone.state_dict())
    with ThreadPoolExecutor(2) as executor:
        for model, threads in ((alone, None), (shared, executor)):
            groups = [
                {"params": [model.blocks[0].weight], "algorithm": "muon"},
                {"params": [model.blocks[1].weight], "algorithm": "muon"},
                {"params": [*model.classifier.parameters()], "algorithm": "adamw"},
            ]
            train(model, MuonAdamW(groups, lr=0.01, executor=threads), 5)
    assert all(torch.equal(x, y) for x, y in zip(alone.parameters(), shared.parameters(), strict=True))


def test_trainer_takes_it(tmp_path):
    """And resumes it from a checkpoint to the same weights."""
    items = [{"x": torch.randn(6), "labels": torch.tensor(n % 3)} for n in range(16)]

    def run(folder, steps, resume=None):
        torch.manual_seed(0)
        model = Tower()
        optimizer = make_optimizer(model, "muon", learning_rate=0.01)
        schedule = get_scheduler("linear", optimizer, num_warmup_steps=1, num_training_steps=4)
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=4,
            save_steps=2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=items, optimizers=(optimizer, schedule))
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "parts", 2)
    resumed = run(tmp_path / "parts", 4, resume=str(tmp_path / "parts" / "checkpoint-2"))
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_is_refused():
    weight, bias = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
    for group, message in (
        ({"params": [weight]}, "'muon' or 'adamw', got None"),
        ({"params": [weight], "algorithm": "sgd"}, "'muon' or 'adamw', got 'sgd'"),
        ({"params": [bias], "algorithm": "muon"}, "two axes or more"),
        ({"params": [weight], "algorithm": "muon", "scale": "none"}, "scale must be one of match_rms_adamw, original"),
    ):
        with pytest.raises(ValueError, match=message):
            MuonAdamW([group], lr=0.1)
