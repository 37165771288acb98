"""The task heads as transformers models: files, training, outputs, and starting one head from another's weights."""

import copy
import math
import re

import accelerate
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, Trainer, TrainingArguments
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_outputs import BaseModelOutputWithPooling

import vlmo_fast
from vlmo_fast import MoMEConfig, VLMoConfig
from vlmo_fast.ops import packed, padded

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_vl_layers": 1,
    "image_size": 24,
    "patch_size": 8,
    "vocab_size": 50,
    "max_text_length": 10,
    "text_relative_span": 12,
    "image_vocab_size": 13,
    "num_labels": 5,
    "initializer_range": 0.2,
}
HEADS = (
    "VLMoForPreTraining",
    "VLMoForMaskedLM",
    "VLMoForMaskedImageModeling",
    "VLMoForImageTextRetrieval",
    "VLMoForQuestionAnswering",
    "VLMoForImagesAndTextClassification",
    "VLMoForImageClassification",
)
heads = pytest.mark.parametrize("head", HEADS)
BATCH = 4


def build(head: str, seed: int = 0, **options):
    if head == "VLMoForImagesAndTextClassification":
        options.setdefault("num_image_types", 2)
    torch.manual_seed(seed)
    return getattr(vlmo_fast, head)(VLMoConfig(**{**SIZES, **options})).eval()


def sample(head: str, number: int) -> dict[str, torch.Tensor]:
    """One example of the head's task, without a batch axis, with its labels."""
    generator = torch.Generator().manual_seed(100 + number)
    ids = torch.randint(0, 50, (6,), generator=generator)
    mask = (torch.arange(6) < 3 + number % 4).long()
    pixels = torch.randn(3, 24, 24, generator=generator)
    patches = torch.rand(9, generator=generator) < 0.4
    labels = torch.where(torch.arange(6) == 1 + number % 2, ids, -100)
    return {
        "VLMoForPreTraining": {
            "input_ids": ids,
            "pixel_values": pixels,
            "attention_mask": mask,
            "input_ids_masked": torch.where(labels == -100, ids, 3),
            "mlm_labels": labels,
        },
        "VLMoForMaskedLM": {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels, "labels": labels},
        "VLMoForMaskedImageModeling": {
            "pixel_values": pixels,
            "bool_masked_pos": patches,
            "labels": torch.randint(0, 13, (9,), generator=generator),
        },
        "VLMoForImageTextRetrieval": {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask},
        "VLMoForQuestionAnswering": {
            "input_ids": ids,
            "pixel_values": pixels,
            "attention_mask": mask,
            "labels": torch.rand(5, generator=generator),
        },
        "VLMoForImagesAndTextClassification": {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": torch.tensor(number % 5),
            "pixel_values": torch.stack([pixels, -pixels]),
        },
        "VLMoForImageClassification": {"pixel_values": pixels, "labels": torch.tensor(number % 5)},
    }[head]


def batch(head: str, size: int = BATCH) -> dict[str, torch.Tensor]:
    samples = [sample(head, number) for number in range(size)]
    stacked: dict = {name: torch.stack([s[name] for s in samples]) for name in samples[0]}
    if head == "VLMoForImageTextRetrieval":
        stacked["return_loss"] = True
    if head == "VLMoForPreTraining":  # nothing drawn, so that two calls agree
        stacked["negative_image_ids"] = (torch.arange(size) + 1) % size
        stacked["negative_text_ids"] = (torch.arange(size) + 2) % size
    return stacked


def fields(output) -> dict[str, torch.Tensor]:
    return {name: value for name, value in output.items() if isinstance(value, torch.Tensor)}


def test_presets():
    """Those of the backbone, with any field overridden, of the preset too."""
    for name in ("base", "base_plus", "large"):
        assert VLMoConfig.from_preset(name).mome == MoMEConfig.from_preset(name)
    config = VLMoConfig.from_preset("large", hidden_size=512, num_attention_heads=8, num_labels=3)
    assert (config.hidden_size, config.num_hidden_layers, config.num_labels) == (512, 24, 3)
    assert config.intermediate_size == 2048
    with pytest.raises(ValueError, match=r"VLMoConfig\.from_preset: name must be one of .*'base_plus'.* got 'huge'"):
        VLMoConfig.from_preset("huge")


# Files


@heads
def test_save_and_load(head, tmp_path):
    """Weights, settings and outputs, to the bit."""
    model = build(head, num_image_types=2, drop_path_rate=0.2)
    model.save_pretrained(tmp_path)
    again = getattr(vlmo_fast, head).from_pretrained(tmp_path)
    assert not again.training
    assert again.config.mome == model.config.mome == again.backbone.config
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    before, after = fields(model(**batch(head))), fields(again(**batch(head)))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_frozen_parameters_stay_frozen(tmp_path):
    """Else the unused text positions of relative models decay, and DDP waits for their gradient."""
    model = build("VLMoForQuestionAnswering")
    model.save_pretrained(tmp_path)
    again = vlmo_fast.VLMoForQuestionAnswering.from_pretrained(tmp_path)
    ours, theirs = ({n for n, p in m.named_parameters() if not p.requires_grad} for m in (model, again))
    assert ours == theirs


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_load_in_another_dtype(dtype, argument, tmp_path):
    model = build("VLMoForQuestionAnswering")
    model.save_pretrained(tmp_path)
    again = vlmo_fast.VLMoForQuestionAnswering.from_pretrained(tmp_path, **{argument: dtype})
    assert {p.dtype for p in again.parameters()} == {dtype}
    inputs = batch("VLMoForQuestionAnswering")
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    assert again(**inputs).logits.dtype == dtype


@heads
def test_meta_device(head):
    """Construction without memory; filled later, it is the model."""
    model = build(head)
    with torch.device("meta"):
        empty = build(head)
    assert all(x.is_meta for x in [*empty.parameters(), *empty.buffers()])
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    before, after = fields(model(**batch(head))), fields(empty(**batch(head)))
    assert all(torch.equal(before[name], after[name]) for name in before)


# One head from another's weights


def report_of(head: str, folder, **options):
    return getattr(vlmo_fast, head).from_pretrained(folder, output_loading_info=True, **options)


@pytest.mark.parametrize("kind", ["relative", "absolute"])
@pytest.mark.parametrize("head", [head for head in HEADS if head != "VLMoForImagesAndTextClassification"])
def test_start_from_pretraining(head, kind, tmp_path):
    """The backbone to the bit, also beside a tensor of its own that is new (mask token); the head freshly drawn."""
    source = build("VLMoForPreTraining", seed=1, position_embedding_type=kind)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(torch.randn_like(parameter))
    source.save_pretrained(tmp_path)
    model, info = report_of(head, tmp_path, num_labels=5)
    theirs = source.state_dict()
    fresh = {name for name in model.state_dict() if name not in theirs}
    assert set(info["missing_keys"]) == fresh
    for name, value in model.state_dict().items():
        if name in theirs:
            assert torch.equal(value, theirs[name]), name
            continue
        last = name.rpartition(".")[2]
        if last == "bias":
            assert (value == 0).all(), name
        elif "norm" in name:
            assert (value == 1).all(), name
        else:
            sigma = 0.2 / math.sqrt(2 * value.numel())
            assert value.std().item() == pytest.approx(0.2, abs=5 * sigma), name


@pytest.mark.parametrize("head", ["VLMoForImageTextRetrieval", "VLMoForPreTraining"])
@pytest.mark.parametrize("options", [{}, {"logit_scale_init_value": 1.5}])
def test_logit_scales_start_where_configured(head, options, tmp_path):
    build("VLMoForMaskedLM").save_pretrained(tmp_path)
    model, info = report_of(head, tmp_path, **options)
    scales = [name for name in info["missing_keys"] if name.endswith("logit_scale")]
    assert scales
    for name in scales:
        wanted = options.get("logit_scale_init_value", math.log(1 / 0.07))
        assert model.get_parameter(name).item() == pytest.approx(wanted, rel=1e-6)


def test_vision_language_stage_from_the_language_stage(tmp_path):
    """As released: a text-stage model holds no vl experts; they start fresh, all else is kept."""
    source = build("VLMoForMaskedLM", num_vl_layers=0)
    source.save_pretrained(tmp_path)
    model, info = report_of("VLMoForPreTraining", tmp_path, num_vl_layers=1)
    assert model.config.num_vl_layers == 1
    new = set(info["missing_keys"])
    assert {name for name in new if "experts" in name} == {n for n in model.state_dict() if ".experts.vl." in n}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in source.state_dict().items())
    assert model.backbone.blocks[2].experts["vl"].fc1.weight.std().item() == pytest.approx(0.2, rel=0.1)


# Training


class Samples(torch.utils.data.Dataset):
    def __init__(self, head: str, size: int) -> None:
        self.samples = [sample(head, number) for number in range(size)]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.samples[index]


def trainer_of(model, head: str, folder, **options) -> Trainer:
    def collate(samples):
        stacked = {name: torch.stack([s[name] for s in samples]) for name in samples[0]}
        if head == "VLMoForImageTextRetrieval":
            stacked["return_loss"] = True
        return stacked

    arguments = {"per_device_train_batch_size": BATCH, "max_steps": 2, "logging_steps": 1, "learning_rate": 1e-3}
    arguments |= {"save_strategy": "no", "per_device_eval_batch_size": BATCH}
    return Trainer(
        model,
        TrainingArguments(
            str(folder),
            **{**arguments, **options},
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=Samples(head, 2 * BATCH),
        eval_dataset=Samples(head, BATCH),
        data_collator=collate,
    )


def train(model, head: str, folder, **options) -> list[float]:
    trainer = trainer_of(model, head, folder, **options)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@heads
def test_trainer(head, tmp_path):
    """Two steps: finite losses, and weights that moved, head and backbone alike."""
    model = build(head, drop_path_rate=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = train(model, head, tmp_path)
    assert len(losses) == 2
    assert all(math.isfinite(loss) and loss > 0 for loss in losses)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("backbone.blocks.0.attention") for name in moved)
    assert head == "VLMoForImageTextRetrieval" or any("head" in name or "classifier" in name for name in moved)


@heads
def test_trainer_evaluates(head, tmp_path):
    """The loss of the evaluation set; the contrastive one needs no labels, which Trainer wants to be told."""
    model = build(head)
    options = {"label_names": []} if head == "VLMoForImageTextRetrieval" else {}
    outputs = []
    model.register_forward_hook(lambda module, arguments, output: outputs.append(output))
    loss = trainer_of(model, head, tmp_path, **options).evaluate()["eval_loss"]
    assert loss == pytest.approx(outputs[0].loss.item(), rel=1e-6)
    if head != "VLMoForPreTraining":  # which draws its negatives
        assert loss == pytest.approx(model(**batch(head)).loss.item(), rel=1e-5)


def test_trainer_predicts(tmp_path):
    head = "VLMoForQuestionAnswering"
    model = build(head)
    predictions = trainer_of(model, head, tmp_path).predict(Samples(head, 2 * BATCH)).predictions
    torch.testing.assert_close(torch.from_numpy(predictions), model(**batch(head, 2 * BATCH)).logits.detach())


def test_trainer_resumes(tmp_path):
    """Stopped after two steps of four, with stochastic depth: the weights of one go, to the bit."""
    head, options = "VLMoForQuestionAnswering", {"lr_scheduler_type": "constant", "save_strategy": "steps"}
    whole, halves = (build(head, drop_path_rate=0.3) for _ in range(2))
    train(whole, head, tmp_path / "whole", max_steps=4, **options)
    train(halves, head, tmp_path / "halves", max_steps=2, save_steps=2, **options)
    again = trainer_of(build(head, drop_path_rate=0.3), head, tmp_path / "halves", max_steps=4, **options)
    again.train(resume_from_checkpoint=True)
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), whole.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(halves.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("head", ["VLMoForQuestionAnswering", "VLMoForImageClassification"])
def test_gradient_accumulation(head, tmp_path):
    """Two half batches give the step of the whole batch: plain SGD, one step, the same weights after it."""
    options = {"optim": "sgd", "max_steps": 1, "max_grad_norm": 0, "lr_scheduler_type": "constant"}
    whole, halves = build(head), build(head)
    train(whole, head, tmp_path / "a", per_device_train_batch_size=4, **options)
    train(halves, head, tmp_path / "b", per_device_train_batch_size=2, gradient_accumulation_steps=2, **options)
    start = dict(build(head).named_parameters())
    for (name, a), (_, b) in zip(whole.named_parameters(), halves.named_parameters(), strict=True):
        step = (a - start[name]).norm()
        assert (a - b).norm() <= 1e-3 * step + 1e-7, name


def backward(model, head: str) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    model(**batch(head)).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@heads
def test_gradient_checkpointing_enable(head):
    """transformers' own switch, on and off: the same gradients to the bit, with each block run twice in between."""
    model = build(head, drop_path_rate=0.3).train()
    plain, calls = backward(model, head), []
    model.backbone.blocks[1].register_forward_pre_hook(lambda *_: calls.append(1))
    backward(model, head)
    once = len(calls)
    for enable, factor in ((True, 2), (False, 1)):
        calls.clear()
        if enable:
            model.gradient_checkpointing_enable()
        else:
            model.gradient_checkpointing_disable()
        assert model.is_gradient_checkpointing == enable
        gradients = backward(model, head)
        assert len(calls) == factor * once
        assert all(torch.equal(plain[name], gradients[name]) for name in plain)


@pytest.mark.parametrize("head", ["VLMoForPreTraining", "VLMoForImageTextRetrieval"])
def test_shards(head, tmp_path):
    """Safetensors in pieces; the unused text positions, a buffer, travel too."""
    model = build(head)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = getattr(vlmo_fast, head).from_pretrained(tmp_path)
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in again.state_dict().items())


def test_device_map(tmp_path):
    """accelerate's placement gives the same numbers, and never divides a block."""
    model = build("VLMoForQuestionAnswering")
    model.save_pretrained(tmp_path / "model")
    inputs = batch("VLMoForQuestionAnswering")
    load = vlmo_fast.VLMoForQuestionAnswering.from_pretrained
    mapped = load(tmp_path / "model", device_map="auto")
    assert torch.equal(mapped(**inputs).logits, model(**inputs).logits)
    limits = {0: 40_000, 1: 40_000, "cpu": 10**9}
    placed = accelerate.infer_auto_device_map(model, limits, list(model._no_split_modules))
    assert len(set(placed.values())) > 1
    assert not [name for name in placed if ".blocks." in name and name.count(".") > 2]


@pytest.mark.parametrize("head", ["VLMoForQuestionAnswering", "VLMoForImageTextRetrieval"])
@pytest.mark.parametrize("disk", ["blocks", "texts", "all but texts"])
def test_weights_on_the_disk(head, disk, tmp_path):
    """Loaded when they are needed, twice the same; nothing of them stays, but what the backbone reads by itself."""
    model = build(head)
    with torch.no_grad():  # relative positions begin at zero
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "model")
    inputs = batch(head)
    placed = dict.fromkeys(f"backbone.{name}" for name, _ in model.backbone.named_children())
    placed |= dict.fromkeys([name for name, _ in model.named_children() if name != "backbone"])
    placed |= dict.fromkeys([name for name, x in model.named_parameters() if not x.ndim])
    for name in placed:
        is_text = name == "backbone.text_embeddings"
        on_disk = {"blocks": "blocks" in name, "texts": is_text, "all but texts": not is_text and name != "logit_scale"}
        placed[name] = "disk" if on_disk[disk] else "cpu"
    split = getattr(vlmo_fast, head).from_pretrained(
        tmp_path / "model", device_map=placed, offload_folder=str(tmp_path / "disk")
    )
    wanted = fields(model(**inputs))
    for _ in range(2):
        actual = fields(split(**inputs))
        for name in wanted:
            torch.testing.assert_close(actual[name], wanted[name])  # weights without gradient may take another kernel
        offloaded = split.backbone.text_embeddings if disk == "texts" else split.backbone.blocks
        assert all(p.is_meta for p in offloaded.parameters())
    assert not split.backbone.modality_type_embeddings.weight.is_meta


def test_accelerate(tmp_path):
    """Accelerator.prepare and backward, two steps: the steps of plain torch."""
    models = []
    for accelerated in (False, True):
        model = build("VLMoForQuestionAnswering").train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if accelerated:
            accelerator = accelerate.Accelerator(cpu=True)
            model, optimizer = accelerator.prepare(model, optimizer)
        for _ in range(2):
            loss = model(**batch("VLMoForQuestionAnswering")).loss
            accelerator.backward(loss) if accelerated else loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(accelerator.unwrap_model(model) if accelerated else model)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


# Attention


@pytest.mark.parametrize("head", ["VLMoForQuestionAnswering", "VLMoModel"])
def test_attn_implementation_reaches_the_door(head, tmp_path, monkeypatch):
    """By argument, by loading, by the switch of a living model; auto where nothing was asked for."""
    model = build(head)
    model.save_pretrained(tmp_path)
    seen = []
    select = padded.select
    for module in (padded, packed):
        monkeypatch.setattr(
            module, "select", lambda op, problem, backend: seen.append(backend) or select(op, problem, backend)
        )

    def asked_for(model) -> set[str]:
        seen.clear()
        inputs = {name: x for name, x in batch("VLMoForImageTextRetrieval").items() if name != "return_loss"}
        model(**inputs)
        return set(seen)

    assert asked_for(model) == {"auto"}
    model_class = getattr(vlmo_fast, head)
    for name in ("eager", "sdpa", "auto"):
        assert asked_for(model_class.from_pretrained(tmp_path, attn_implementation=name)) == {name}
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == name
        assert asked_for(model) == {name}
    again = type(model)(VLMoConfig(**SIZES, attn_implementation="sdpa"))
    assert asked_for(again) == {"sdpa"}
    with pytest.raises(NotImplementedError, match="xformers runs on CUDA devices, not on cpu"):
        asked_for(model_class.from_pretrained(tmp_path, attn_implementation="xformers"))
    for name in ("flash_attention_2", "flex_attention", "paged|eager", "nonsense"):
        with pytest.raises(ValueError, match=rf"attn_implementation must be one of .*'sdpa'.* got '{re.escape(name)}'"):
            model_class.from_pretrained(tmp_path, attn_implementation=name)
        with pytest.raises(ValueError, match="attn_implementation must be one of"):
            model.set_attn_implementation(name)
        assert asked_for(model) == {"auto"}
    monkeypatch.setattr("vlmo_fast.requirements.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=f"{head}: attn_implementation 'xformers': .* -m pip install .*xformers"):
        model_class.from_pretrained(tmp_path, attn_implementation="xformers")


class Registered:
    """An attention function as a stranger writes it, and what it was called with."""

    def __init__(self) -> None:
        self.calls: list[dict] = []

    def __deepcopy__(self, memo: dict) -> "Registered":
        return self  # as a plain function

    def __call__(self, module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        self.calls.append({"module": module, "shape": query.shape, "dropout": dropout, **kwargs})
        scores = scaling * query @ key.transpose(-2, -1)
        weights = (scores if attention_mask is None else scores + attention_mask).softmax(dim=-1)
        return (weights @ value).transpose(1, 2), weights


@pytest.fixture
def registered(monkeypatch):
    """In the interface for one test only."""
    monkeypatch.setattr(AttentionInterface, "_global_mapping", dict(AttentionInterface._global_mapping))
    function = Registered()
    AttentionInterface.register("mine", function)
    AttentionInterface.register("theirs", sdpa_attention_forward)
    return function


@pytest.mark.parametrize("kind", ["relative", "absolute"])
@heads
def test_registered_attention_functions(head, kind, registered):
    """A stranger's and transformers' own, in every head, padded and packed: the same losses, outputs and gradients."""
    model = build(head, position_embedding_type=kind).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    inputs = {
        name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in batch(head).items()
    }

    def results() -> list[torch.Tensor]:
        model.zero_grad(set_to_none=True)
        output = model(**inputs)
        output.loss.backward()
        return [*fields(output).values(), *(p.grad for p in model.parameters() if p.grad is not None)]

    wanted = results()
    for name in ("mine", "theirs"):
        model.set_attn_implementation(name)
        registered.calls.clear()
        actual = results()
        assert len(actual) == len(wanted)
        for ours, theirs in zip(actual, wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
        assert bool(registered.calls) == (name == "mine")


@pytest.mark.parametrize("cls_only", [False, True])
@pytest.mark.parametrize("kind", ["relative", "absolute"])
def test_registered_functions_on_every_path(kind, cls_only, registered):
    """Images, texts and pairs, with a mask and without, with the vision-language branch, padding tokens included."""
    model = build("VLMoModel", position_embedding_type=kind)
    with torch.no_grad():  # relative positions begin at zero
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    inputs = batch("VLMoForImageTextRetrieval")
    del inputs["return_loss"]
    for names in (["pixel_values"], ["input_ids"], ["input_ids", "attention_mask"], list(inputs)):
        given = {name: inputs[name] for name in names}
        given |= {"use_vl_branch": "pixel_values" not in names or len(names) == 1, "cls_only": cls_only}
        model.set_attn_implementation("eager")
        wanted = fields(model(**given))
        model.set_attn_implementation("mine")
        registered.calls.clear()
        actual = fields(model(**given))
        assert actual.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(actual[name], wanted[name])
        blocks = [block.attention for block in model.backbone.blocks]
        assert [call["module"] for call in registered.calls[:3]] == blocks
        assert {(call["dropout"], call["is_causal"]) for call in registered.calls} == {(0.0, False)}


def test_registered_functions_come_and_go(registered, tmp_path):
    """By loading and in copies; a function that is registered anew under its name; and off again."""
    model = build("VLMoForQuestionAnswering")
    model.save_pretrained(tmp_path)
    inputs = batch("VLMoForQuestionAnswering")
    loaded = vlmo_fast.VLMoForQuestionAnswering.from_pretrained(tmp_path, attn_implementation="mine")
    assert loaded.config._attn_implementation == "mine"
    other = copy.deepcopy(loaded)
    torch.testing.assert_close(other(**inputs).logits, model(**inputs).logits)
    assert len(registered.calls) == 3
    again = Registered()
    AttentionInterface.register("mine", again)
    other.set_attn_implementation("mine")
    other(**inputs)
    assert (len(registered.calls), len(again.calls)) == (3, 3)
    other.set_attn_implementation("sdpa")
    other(**inputs)
    assert (len(registered.calls), len(again.calls)) == (3, 3)
    loaded(**inputs)
    assert len(registered.calls) == 6
    loaded.save_pretrained(tmp_path)
    plain = vlmo_fast.VLMoForQuestionAnswering.from_pretrained(tmp_path)
    assert plain.config._attn_implementation == "auto"  # as in transformers, no property of the weights


# Outputs


@heads
def test_tuples(head):
    """return_dict=False, by argument or by configuration: the same values in the same order, the loss first."""
    model, inputs = build(head), batch(head)
    wanted = model(**inputs)
    outputs = [model(**inputs, return_dict=False)]
    model.config.return_dict = False
    outputs.append(model(**inputs))
    for output in outputs:
        assert isinstance(output, tuple)
        assert all(torch.equal(a, b) for a, b in zip(output, wanted.to_tuple(), strict=True))
        assert torch.equal(output[0], wanted.loss)


@heads
def test_without_labels_there_is_no_loss(head):
    if head == "VLMoForPreTraining":
        pytest.skip("its loss needs no labels")
    inputs = {name: x for name, x in batch(head).items() if name not in ("labels", "return_loss")}
    assert build(head)(**inputs).loss is None


@pytest.mark.parametrize("head", ["VLMoForPreTraining", "VLMoForImageTextRetrieval"])
def test_features(head):
    model, inputs = build(head), batch(head)
    image = model.get_image_features(inputs["pixel_values"], output_hidden_states=True)
    text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"], output_hidden_states=True)
    out = model(**inputs)
    for features, embeds, length in ((image, out.image_embeds, 10), (text, out.text_embeds, 6)):
        assert isinstance(features, BaseModelOutputWithPooling)
        assert features.last_hidden_state.shape == (BATCH, length, 24)
        assert len(features.hidden_states) == 4
        torch.testing.assert_close(features.pooler_output, embeds)  # forward computes [CLS] alone in the last layer
        torch.testing.assert_close(features.pooler_output.norm(dim=-1), torch.ones(BATCH))
    plain = model.get_image_features(inputs["pixel_values"])
    assert plain.hidden_states is None
    as_tuple = model.get_text_features(inputs["input_ids"], inputs["attention_mask"], return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[1], text.pooler_output)
    larger = model.get_image_features(torch.randn(1, 3, 40, 40), interpolate_pos_encoding=True)
    assert larger.last_hidden_state.shape == (1, 26, 24)


@pytest.mark.parametrize(
    "head", ["VLMoForMaskedLM", "VLMoForMaskedImageModeling", "VLMoForQuestionAnswering", "VLMoForImageClassification"]
)
def test_hidden_states(head):
    """Whole sequences in every layer, even where the answer needs only [CLS] of the last."""
    states = build(head)(**batch(head), output_hidden_states=True).hidden_states
    assert len(states) == 4
    assert len({state.shape for state in states}) == 1
    assert build(head)(**batch(head)).hidden_states is None


@pytest.mark.parametrize(
    "head",
    [
        "VLMoForImageTextRetrieval",
        "VLMoForQuestionAnswering",
        "VLMoForImagesAndTextClassification",
        "VLMoForImageClassification",
        "VLMoForPreTraining",
        "VLMoForMaskedLM",
    ],
)
def test_other_image_sizes(head):
    """The error for a wrong size recommends interpolate_pos_encoding=True, so every head must take it."""
    model, inputs = build(head), batch(head)
    inputs["pixel_values"] = F.pad(inputs["pixel_values"], (0, 16, 0, 16))
    with pytest.raises(ValueError, match="interpolate_pos_encoding=True accepts other sizes"):
        model(**inputs)
    assert model(**inputs, interpolate_pos_encoding=True).loss.isfinite()


def test_other_image_sizes_in_masked_image_modelling():
    model, inputs = build("VLMoForMaskedImageModeling"), batch("VLMoForMaskedImageModeling")
    masked, labels = torch.rand(BATCH, 25) < 0.4, torch.randint(0, 13, (BATCH, 25))
    larger = {
        "pixel_values": F.pad(inputs["pixel_values"], (0, 16, 0, 16)),
        "bool_masked_pos": masked,
        "labels": labels,
    }
    with pytest.raises(ValueError, match="interpolate_pos_encoding=True accepts other sizes"):
        model(**larger)
    out = model(**larger, interpolate_pos_encoding=True)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[masked], labels[masked]))


def test_the_plain_model_is_its_backbone():
    """Every argument reaches it."""
    model = build("VLMoModel", num_image_types=2)
    inputs = batch("VLMoForImageTextRetrieval")
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    larger = F.pad(inputs["pixel_values"], (0, 16, 0, 16))
    for arguments in (
        text | {"use_vl_branch": True, "output_hidden_states": True},
        text | {"pixel_values": inputs["pixel_values"], "image_type_ids": 2},
        {"pixel_values": larger, "interpolate_pos_encoding": True, "cls_only": True},
    ):
        wanted, actual = model.backbone(**arguments)._asdict(), model(**arguments)
        assert set(actual.keys()) == {name for name, value in wanted.items() if value is not None}
        for name, value in actual.items():
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=0)


@heads
def test_misspelt_arguments_are_refused(head):
    with pytest.raises(TypeError):
        build(head)(**batch(head), atention_mask=None)


# Each head's own rules


def test_pretraining_refuses():
    model, inputs = build("VLMoForPreTraining"), batch("VLMoForPreTraining")
    at_padding = inputs["mlm_labels"].clone()
    at_padding[0, int(inputs["attention_mask"][0].sum())] = 7  # the first token that is none
    cases = [
        ({name: x[:1] for name, x in inputs.items()}, "input_ids must hold at least 2 pairs .* got 1"),
        ({**inputs, "mlm_labels": None}, "input_ids_masked and mlm_labels must come together, got one of them"),
        ({**inputs, "input_ids_masked": None}, "input_ids_masked and mlm_labels must come together"),
        ({**inputs, "negative_text_ids": None}, "negative_image_ids and negative_text_ids must come together"),
        ({**inputs, "negative_image_ids": None}, "negative_image_ids and negative_text_ids must come together"),
        ({**inputs, "mlm_labels": at_padding}, "mlm_labels must be -100 at padding, got something to predict there"),
        ({**inputs, "attention_mask": inputs["attention_mask"] * 0}, r"attention_mask must keep \[CLS\] and have its"),
        ({**inputs, "attention_mask": inputs["attention_mask"].flip(1)}, r"attention_mask must keep \[CLS\] and have"),
        ({**inputs, "attention_mask": inputs["attention_mask"][:, 1:]}, r"attention_mask must be \(4, 6\) like"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=f"^VLMoForPreTraining: {message}"):
            model(**arguments)


def test_pretraining_without_masked_text():
    model, inputs = build("VLMoForPreTraining"), batch("VLMoForPreTraining")
    out = model(**{**inputs, "input_ids_masked": None, "mlm_labels": None})
    assert out.mlm_loss is None
    assert out.mlm_logits is None
    torch.testing.assert_close(out.loss, out.itc_loss + out.itm_loss)
    full = model(**inputs)
    torch.testing.assert_close(full.loss, full.itc_loss + full.itm_loss + 0.25 * full.mlm_loss)
    model.config.mlm_loss_weight = 2.0
    torch.testing.assert_close(model(**inputs).loss, full.itc_loss + full.itm_loss + 2 * full.mlm_loss)


def test_pretraining_draws_its_negatives():
    """In range, never the own match, other draws from other states of the generator, and used in the matching pass."""
    model, inputs = build("VLMoForPreTraining"), batch("VLMoForPreTraining")
    del inputs["negative_image_ids"], inputs["negative_text_ids"]
    seen = set()
    for seed in range(8):
        torch.manual_seed(seed)
        out = model(**inputs)
        for ids in (out.negative_image_ids, out.negative_text_ids):
            assert ids.shape == (BATCH,)
            assert ((ids >= 0) & (ids < BATCH) & (ids != torch.arange(BATCH))).all()
        seen.add((*out.negative_image_ids.tolist(), *out.negative_text_ids.tolist()))
        given = {"negative_image_ids": out.negative_image_ids, "negative_text_ids": out.negative_text_ids}
        assert torch.equal(model(**inputs, **given).itm_logits, out.itm_logits)
    assert len(seen) > 1


def test_matching_pairs_by_hand():
    """Row by row: pairs, then texts with negative images, then negative texts with images, each with its own mask."""
    model, inputs = build("VLMoForPreTraining"), batch("VLMoForPreTraining")
    out = model(**inputs)
    ids, mask, pixels = (inputs[name] for name in ("input_ids", "attention_mask", "pixel_values"))
    own = list(range(BATCH))
    texts = own + own + inputs["negative_text_ids"].tolist()
    images = own + inputs["negative_image_ids"].tolist() + own
    for row, (t, i) in enumerate(zip(texts, images, strict=True)):
        pooled = model.backbone(ids[t : t + 1], mask[t : t + 1], pixels[i : i + 1]).pooler_output
        torch.testing.assert_close(model.itm_head(pooled)[0], out.itm_logits[row])
    labels = torch.tensor([1] * BATCH + [0] * 2 * BATCH)
    torch.testing.assert_close(out.itm_loss, F.cross_entropy(out.itm_logits, labels))


def test_contrastive_and_masked_language_losses_by_hand():
    """Each branch with its own learned scale, which only shows once the two differ; masked ids with the texts' mask."""
    model, inputs = build("VLMoForPreTraining"), batch("VLMoForPreTraining")
    with torch.no_grad():
        model.vl_logit_scale.fill_(0.5)
    out, each = model(**inputs), torch.arange(BATCH)
    branches = []
    for log_scale, image, text in (
        (model.logit_scale, out.image_embeds, out.text_embeds),
        (model.vl_logit_scale, out.vl_image_embeds, out.vl_text_embeds),
    ):
        scores = log_scale.exp() * image @ text.t()
        branches.append((F.cross_entropy(scores, each) + F.cross_entropy(scores.t(), each)) / 2)
    torch.testing.assert_close(out.itc_loss, sum(branches) / 2)
    fused = model.backbone(inputs["input_ids_masked"], inputs["attention_mask"], inputs["pixel_values"])
    predicted = inputs["mlm_labels"] != -100
    torch.testing.assert_close(out.mlm_logits, model.mlm_head(fused.last_hidden_state[:, :6][predicted]))
    torch.testing.assert_close(out.mlm_loss, F.cross_entropy(out.mlm_logits, inputs["mlm_labels"][predicted]))


def test_pretraining_without_vl_layers():
    """The contrastive loss is then the plain branch's alone."""
    model, inputs = build("VLMoForPreTraining", num_vl_layers=0), batch("VLMoForPreTraining")
    out = model(**inputs)
    assert out.vl_image_embeds is None
    scores = model.logit_scale.exp() * out.image_embeds @ out.text_embeds.t()
    each = torch.arange(BATCH)
    wanted = (F.cross_entropy(scores, each) + F.cross_entropy(scores.t(), each)) / 2
    torch.testing.assert_close(out.itc_loss, wanted)


def test_every_parameter_of_pretraining_is_trained():
    """What a distributed run waits for; the text positions of relative models are frozen instead."""
    for kind in ("relative", "absolute"):
        model = build("VLMoForPreTraining", position_embedding_type=kind).train()
        gradients = backward(model, "VLMoForPreTraining")
        assert set(gradients) == {name for name, p in model.named_parameters() if p.requires_grad}


def test_masked_image_modelling_counts_masked_patches_only():
    model, inputs = build("VLMoForMaskedImageModeling"), batch("VLMoForMaskedImageModeling")
    masked, labels = inputs["bool_masked_pos"], inputs["labels"].clone()
    out = model(**inputs)
    assert out.logits.shape == (BATCH, 9, 13)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[masked], labels[masked]))
    other = torch.where(masked, labels, (labels + 1) % 13)
    assert torch.equal(model(**{**inputs, "labels": other}).loss, out.loss)
    assert torch.equal(inputs["labels"], labels)  # and the caller's labels are left alone
    none = {**inputs, "bool_masked_pos": torch.zeros_like(masked)}
    assert model(**none).loss.item() == 0


def test_masked_language_modelling_on_texts_and_pairs():
    model, inputs = build("VLMoForMaskedLM"), batch("VLMoForMaskedLM")
    pair = model(**inputs)
    text = model(**{**inputs, "pixel_values": None})
    assert pair.logits.shape == text.logits.shape == (BATCH, 6, 50)
    assert not torch.equal(pair.logits, text.logits)
    labelled = inputs["labels"] != -100
    for out in (pair, text):
        torch.testing.assert_close(out.loss, F.cross_entropy(out.logits[labelled], inputs["labels"][labelled]))


def test_the_decoder_is_not_tied():
    """The released decoder is a tensor of its own, in memory and after loading."""
    for head in ("VLMoForMaskedLM", "VLMoForPreTraining"):
        model = build(head)
        words = model.get_input_embeddings().weight
        assert model.mlm_head.decoder.weight.data_ptr() != words.data_ptr()
        model.tie_weights()
        assert model.mlm_head.decoder.weight.data_ptr() != words.data_ptr()
        assert model.get_input_embeddings() is model.backbone.text_embeddings.word_embeddings


@pytest.mark.parametrize("head", ["VLMoForMaskedLM", "VLMoForQuestionAnswering"])
def test_more_tokens(head, tmp_path):
    """The old rows stay, new ids can be used, and the larger model saves and loads."""
    model, inputs = build(head), batch(head)
    before = model(**inputs).logits
    model.resize_token_embeddings(60)
    inputs["input_ids"][0, 1] = 55
    after = model(**inputs).logits
    torch.testing.assert_close(after[1:, ..., : before.shape[-1]], before[1:])
    model.save_pretrained(tmp_path)
    again = getattr(vlmo_fast, head).from_pretrained(tmp_path)
    assert torch.equal(again(**inputs).logits, after)


def test_more_tokens_in_pretraining(tmp_path):
    model = build("VLMoForPreTraining")
    model.resize_token_embeddings(60)
    assert model.mlm_head.decoder.out_features == 60
    model.save_pretrained(tmp_path)
    vlmo_fast.VLMoForPreTraining.from_pretrained(tmp_path)


def test_retrieval():
    """All scores of 3 images and 5 texts; pairs by the matching head; and what cannot go together."""
    model, inputs = build("VLMoForImageTextRetrieval"), batch("VLMoForImageTextRetrieval", 5)
    inputs.pop("return_loss")
    images = inputs["pixel_values"][:3]
    out = model(**{**inputs, "pixel_values": images})
    assert out.logits_per_image.shape == (3, 5)
    assert torch.equal(out.logits_per_text, out.logits_per_image.t())
    assert out.loss is None
    torch.testing.assert_close(out.logits_per_image, out.image_embeds @ out.text_embeds.t() / 0.07)
    for row, length in enumerate(inputs["attention_mask"].sum(dim=1).tolist()):  # padding is not read
        alone = model.backbone(inputs["input_ids"][row : row + 1, :length])
        torch.testing.assert_close(out.text_embeds[row : row + 1], alone.text_embeds)
    labels = torch.tensor([1, 0, 1, 0, 0])
    pairs = model(**inputs, use_itm_head=True, labels=labels)
    assert pairs.itm_score.shape == (5, 2)
    assert pairs.logits_per_image is None
    torch.testing.assert_close(pairs.loss, F.cross_entropy(pairs.itm_score, labels))
    length = int(inputs["attention_mask"][1].sum())
    pooled = model.backbone(inputs["input_ids"][1:2, :length], pixel_values=inputs["pixel_values"][1:2]).pooler_output
    torch.testing.assert_close(pairs.itm_score[1:2], model.itm_head(pooled))
    assert model(**inputs, use_itm_head=True).loss is None
    with pytest.raises(ValueError, match="labels must come with use_itm_head=True"):
        model(**inputs, labels=labels)
    with pytest.raises(ValueError, match=r"use_itm_head must be False where config\.has_itm_head is, got True"):
        build("VLMoForImageTextRetrieval", has_itm_head=False)(**inputs, use_itm_head=True)
    with pytest.raises(ValueError, match="contrastive_loss: image_embeds and text_embeds must be"):
        model(**{**inputs, "pixel_values": images}, return_loss=True)


def test_question_answering_checks_its_labels():
    model, inputs = build("VLMoForQuestionAnswering"), batch("VLMoForQuestionAnswering")
    for labels in (torch.ones(BATCH, 4), torch.ones(BATCH), torch.ones(2, 5)):
        with pytest.raises(ValueError, match=r"labels must be \(B, num_labels\) = \(4, 5\), got"):
            model(**{**inputs, "labels": labels})
    out = model(**inputs)
    wanted = F.binary_cross_entropy_with_logits(out.logits, inputs["labels"], reduction="sum") / BATCH
    torch.testing.assert_close(out.loss, wanted)


def test_two_images_have_an_order():
    """Exchanging them changes the answer; two passes by hand, with type rows 1 and 2, give the same."""
    model, inputs = build("VLMoForImagesAndTextClassification"), batch("VLMoForImagesAndTextClassification")
    out = model(**inputs)
    exchanged = model(**{**inputs, "pixel_values": inputs["pixel_values"].flip(1)})
    assert (out.logits - exchanged.logits).abs().amax(1).min() > 1e-3
    pooled = [
        model.backbone(
            inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"][:, k], image_type_ids=k + 1
        ).pooler_output
        for k in (0, 1)
    ]
    torch.testing.assert_close(model.classifier(torch.cat(pooled, dim=1)), out.logits)
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, inputs["labels"]))
    unmasked = model(**{**inputs, "attention_mask": None})
    assert not torch.equal(unmasked.logits, out.logits)
    full = model(**{**inputs, "attention_mask": torch.ones_like(inputs["attention_mask"])})
    torch.testing.assert_close(unmasked.logits, full.logits)


def test_two_images_refuse():
    model, inputs = build("VLMoForImagesAndTextClassification"), batch("VLMoForImagesAndTextClassification")
    two = inputs["pixel_values"]
    for pixels in (two[:, 0], two[:, :1], two.repeat(1, 2, 1, 1, 1)):
        with pytest.raises(ValueError, match=r"pixel_values must be \(B, 2, C, H, W\), got"):
            model(**{**inputs, "pixel_values": pixels})
    with pytest.raises(ValueError, match=r"config\.num_image_types must be at least 2 .* got 1"):
        build("VLMoForImagesAndTextClassification", num_image_types=1)


def test_image_classification_reads_the_mean_of_the_patches():
    model, inputs = build("VLMoForImageClassification"), batch("VLMoForImageClassification")
    hidden = model.backbone(pixel_values=inputs["pixel_values"]).last_hidden_state
    out = model(**inputs)
    torch.testing.assert_close(out.logits, model.classifier(hidden[:, 1:].mean(1)))
    torch.testing.assert_close(out.loss, F.cross_entropy(out.logits, inputs["labels"]))


def test_heads_have_the_released_form():
    """Two-layer classifiers: Linear to 2 D, norm with torch's epsilon, GELU, Linear."""
    model = build("VLMoForQuestionAnswering")
    pooled = torch.randn(3, 24)
    c = model.classifier
    hidden = F.layer_norm(c.fc1(pooled), (48,), c.norm.weight, c.norm.bias, 1e-5)
    torch.testing.assert_close(c(pooled), c.fc2(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))))
    language = build("VLMoForMaskedLM").mlm_head
    assert language.norm.eps == 1e-12
    assert isinstance(language.decoder, nn.Linear)
    assert language.decoder.bias is not None
