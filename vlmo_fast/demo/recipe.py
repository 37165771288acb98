"""The demo's network, its batches and its training through `transformers.Trainer`.

One backbone serves five heads. A step sees some of captioned scenes (contrast, masked words), pictures by themselves
(kinds), questions about pictures (answers) and statements about two pictures (truth), each through the path that VLMo
has for it; the losses are added.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import BertTokenizer, Trainer, TrainingArguments
from transformers.modeling_outputs import ModelOutput

from vlmo_fast.data.readers.easy_vqa import COLOURS, SHAPES, EasyVQA, load_easy_vqa
from vlmo_fast.data.synthetic.scenes import STATEMENT_TYPES, SceneWorld, emoji_sprites, tokenize
from vlmo_fast.hf.configuration import VLMoConfig
from vlmo_fast.hf.modeling import (
    VLMoForImageClassification,
    VLMoForImagesAndTextClassification,
    VLMoForImageTextRetrieval,
    VLMoForMaskedLM,
    VLMoForQuestionAnswering,
)
from vlmo_fast.hf.processing import VLMoImageProcessor, VLMoProcessor
from vlmo_fast.losses import IGNORE_INDEX

__all__ = ["DemoData", "DemoNetwork", "Recipe", "Stage", "make_network", "train"]

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Stage:
    """A stretch of training: how fast it learns, and what each step sees of every objective; 0 leaves one out.

    Attributes:
        num_steps: optimiser steps.
        muon_rate: factor on the learning rates of Muon.
        num_captions: captioned scenes for the contrast, half of them in groups that differ in layout.
        num_masked: captioned scenes of which one object's name is masked.
        num_kinds: pictures of easy-VQA to classify by colour and shape, without a text.
        num_questions: questions of easy-VQA.
        even_answers: draw them so that all questions, and of each question all answers, are equally frequent.
        num_scene_questions: questions about scenes of four objects; a multiple of 4.
        num_statements: statements about two scenes; a multiple of 8.
        statement_types: their types, in turn.
        negated_questions: share of the negated questions that are kept, with `even_answers`. Whether an answer turns on
            a picture is hidden as long as half of the questions turn it around.
        negated_statements: share of the negated statements that are kept.
    """

    num_steps: int
    muon_rate: float = 1.0
    num_captions: int = 0
    num_masked: int = 0
    num_kinds: int = 0
    num_questions: int = 0
    even_answers: bool = False
    num_scene_questions: int = 0
    num_statements: int = 0
    statement_types: tuple[str, ...] = STATEMENT_TYPES
    negated_questions: float = 1.0
    negated_statements: float = 1.0


ONE_ARRANGEMENT = ("left arrangement", "right arrangement")
ARRANGEMENTS = (*ONE_ARRANGEMENT, "arrangement", "arrangement")

STAGES = (
    # What the two encoders see and read, each by itself and word by word.
    Stage(190, num_captions=96, num_masked=48, num_kinds=32),
    # The same slowly: so the encoders agree on which object is where.
    Stage(120, muon_rate=0.25, num_captions=96, num_masked=48, num_kinds=32),
    # What one of two pictures shows; what both have in common; then the same turned around. No negated statement comes
    # before the plain ones are known: a few are enough for a network that answers those alone, and stays so.
    Stage(50, muon_rate=0.2, num_statements=96, statement_types=ONE_ARRANGEMENT, negated_statements=0.0),
    Stage(90, muon_rate=0.2, num_statements=96, statement_types=ARRANGEMENTS, negated_statements=0.0),
    Stage(110, muon_rate=0.2, num_statements=64, statement_types=ARRANGEMENTS),
    # Questions whose answers turn on the picture.
    Stage(
        230,
        muon_rate=0.3,
        num_captions=48,
        num_questions=96,
        even_answers=True,
        num_statements=16,
        statement_types=("arrangement",),
        negated_questions=0.0,
    ),
    # Everything, and questions as they come.
    Stage(
        280,
        muon_rate=0.25,
        num_captions=96,
        num_questions=92,
        num_scene_questions=12,
        num_statements=16,
        statement_types=("arrangement",),
    ),
)


@dataclass(frozen=True)
class Recipe:
    """Settings of the demo; all were chosen on validation splits (docs/log.md).

    Attributes:
        seed: of the network, the batches and the order of everything.
        stages: what is learned when.
        muon_learning_rate: for the matrices of the blocks.
        patch_learning_rate: for the projections of the patches (Muon).
        learning_rate: for all other parameters (AdamW).
        weight_decay: on matrices and embeddings; none on biases, norms and scales.
        num_warmup_steps: of linear warm-up.
        num_decay_steps: at the end, in which rates fall to 0 by a cosine.
        hidden_size: width; the network's other sizes follow.
        num_hidden_layers: blocks.
        num_vl_layers: top blocks with a vision-language expert.
        num_attention_heads: heads of a block.
        stem_patch_size: pixels; side of the patches of the first of two projections.
        initializer_range: standard deviation of matrices at the start.
        embedding_std: standard deviation of word and position embeddings at the start.
        logit_scale: of the contrastive loss at the start. A low one leaves the network where it knows which objects are
            there but not which is where (docs/log.md).
    """

    seed: int = 0
    stages: tuple[Stage, ...] = STAGES
    muon_learning_rate: float = 0.02
    patch_learning_rate: float = 0.05
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    num_warmup_steps: int = 40
    num_decay_steps: int = 250
    hidden_size: int = 96
    num_hidden_layers: int = 5
    num_vl_layers: int = 2
    num_attention_heads: int = 4
    stem_patch_size: int = 4
    initializer_range: float = 0.06
    embedding_std: float = 0.5
    logit_scale: float = 40.0

    @property
    def num_steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.num_steps for stage in self.stages)

    def shortened(self, num_steps: int) -> Recipe:
        """The same in so many steps: each stage, the warm-up and the decay in proportion."""
        share = num_steps / self.num_steps
        ends = [round(share * end) for end in accumulate(stage.num_steps for stage in self.stages)]
        lengths = [end - start for start, end in pairwise((0, *ends))]
        return dataclasses.replace(
            self,
            stages=tuple(
                dataclasses.replace(stage, num_steps=n) for stage, n in zip(self.stages, lengths, strict=True)
            ),
            num_warmup_steps=round(share * self.num_warmup_steps),
            num_decay_steps=round(share * self.num_decay_steps),
        )

    def settings(self) -> dict[str, Any]:
        """All of it for the report, each stage as a line of what it has."""
        values = {name: value for name, value in dataclasses.asdict(self).items() if name != "stages"}
        for n, stage in enumerate(self.stages, start=1):
            fields = [field for field in dataclasses.fields(stage) if getattr(stage, field.name) != field.default]
            values[f"stage {n}"] = "; ".join(f"{field.name} {_listed(getattr(stage, field.name))}" for field in fields)
        return values

    def rates(self, step: int) -> tuple[float, float]:
        """Factors on the peak learning rates of Muon and of AdamW at a step, counted from 0."""
        done = 0
        for stage in self.stages:
            done += stage.num_steps
            if step < done:
                break
        factor = min(1.0, (step + 1) / max(1, self.num_warmup_steps))
        left = (self.num_steps - step) / max(1, self.num_decay_steps)
        factor *= 0.5 * (1 - math.cos(math.pi * min(1.0, max(0.0, left))))
        return stage.muon_rate * factor, factor


def _listed(value: Any) -> str:
    return ", ".join(value) if isinstance(value, tuple) else str(value)


class DemoData:
    """Scenes, questions, tokenizer and answers, shared by training and evaluation.

    Attributes:
        world: the synthetic scenes.
        answers: what a question may be answered with, across both sources.
        easy_vqa: the third-party questions by split; loaded once.
        object_ids: the tokens that name an object of the scenes, (K,) int64.
        kinds: colour and shape of easy-VQA's training pictures, as `EasyVQA.kinds` has them.
    """

    def __init__(self) -> None:
        self.world = SceneWorld(emoji_sprites())
        self.easy_vqa: dict[str, EasyVQA] = {split: load_easy_vqa(split) for split in ("train", "validation", "test")}
        train = self.easy_vqa["train"]
        self.answers = sorted({*train.answers, *self.world.answers()})
        words = sorted({*self.world.vocabulary(), *(word for text in set(train.questions) for word in tokenize(text))})
        self.tokenizer = BertTokenizer(vocab={word: n for n, word in enumerate((*SPECIAL_TOKENS, *words))})
        self._answer_ids = {answer: n for n, answer in enumerate(self.answers)}
        self.object_ids = torch.tensor(self.tokenizer.convert_tokens_to_ids(list(self.world.sprites.names)))
        self.kinds = train.kinds
        self._of_known_kind = np.flatnonzero(self.kinds >= 0)
        by_question: dict[str, dict[str, list[int]]] = {}
        for n, (question, answer) in enumerate(zip(train.questions, train.answers, strict=True)):
            by_question.setdefault(question, {}).setdefault(answer, []).append(n)
        self._by_question = [[*by_answer.values()] for by_answer in by_question.values()]
        self._is_negated = np.array([not {"no", "not"}.isdisjoint(tokenize(question)) for question in by_question])

    def draw_pictures(self, stage: Stage, rng: np.random.Generator) -> npt.NDArray[np.int64]:
        """Which of easy-VQA's training pictures a step sorts, of those whose colour and shape the answers tell."""
        return rng.choice(self._of_known_kind, stage.num_kinds)

    def draw_questions(self, stage: Stage, rng: np.random.Generator) -> list[int]:
        """Which of easy-VQA's training questions a step asks."""
        if not stage.even_answers:
            return rng.integers(0, len(self.easy_vqa["train"].questions), stage.num_questions).tolist()
        share = np.where(self._is_negated, stage.negated_questions, 1.0)
        chosen = []
        for n in rng.choice(len(share), stage.num_questions, p=share / share.sum()):
            by_answer = self._by_question[n]
            chosen.append(int(rng.choice(by_answer[rng.integers(0, len(by_answer))])))
        return chosen

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (B, T), padded to the longest of these texts."""
        tokens = self.tokenizer(list(texts), padding=True, return_tensors="pt")
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}

    def processor(self, config: VLMoConfig) -> VLMoProcessor:
        """What makes inputs of other people's pictures and sentences, as `encode_images` and `encode_texts` do."""
        size = {"height": config.image_size, "width": config.image_size}
        images = VLMoImageProcessor(size=size, image_mean=(PIXEL_MEAN,) * 3, image_std=(PIXEL_STD,) * 3)
        tokenizer = BertTokenizer(
            vocab=self.tokenizer.get_vocab(),
            model_max_length=config.max_text_length,
            model_input_names=["input_ids", "attention_mask"],
        )
        return VLMoProcessor(images, tokenizer)

    def encode_answers(self, answers: Sequence[str]) -> Tensor:
        """Class of each answer, (B,) int64: its place in `answers`."""
        return torch.tensor([self._answer_ids[answer] for answer in answers])


# Of the scenes' backgrounds and easy-VQA's alike: patches of background come to about 0, and what is drawn stands out.
PIXEL_MEAN, PIXEL_STD = 0.88, 0.25


def encode_images(images: npt.NDArray[np.uint8]) -> Tensor:
    """(..., H, W, 3) uint8 -> (..., 3, H, W) float32, centred on a pale background."""
    return torch.from_numpy(images).movedim(-1, -3).float().div_(255).sub_(PIXEL_MEAN).div_(PIXEL_STD)


class StepBatches(IterableDataset[dict[str, Tensor]]):
    """One training step's inputs an item, stage after stage: the keyword arguments of `DemoNetwork.forward`."""

    def __init__(self, data: DemoData, recipe: Recipe) -> None:
        self.data, self.recipe = data, recipe

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        rng = np.random.Generator(np.random.PCG64(self.recipe.seed))
        for stage in self.recipe.stages:
            for _ in range(stage.num_steps):
                yield self._batch(stage, rng)

    def _batch(self, stage: Stage, rng: np.random.Generator) -> dict[str, Tensor]:
        data, world, easy_vqa = self.data, self.data.world, self.data.easy_vqa["train"]
        batch: dict[str, Tensor] = {}
        if stage.num_captions:
            captions = world.captions("train", stage.num_captions, rng=rng)
            batch |= self._encode("caption", captions.captions, captions.images)
        if stage.num_masked:
            captions = world.captions("train", stage.num_masked, rng=rng, hard_fraction=0)
            batch |= self._encode("masked", captions.captions, captions.images)
            batch |= self._mask(batch["masked_input_ids"], rng)
        if stage.num_kinds:
            shown = data.draw_pictures(stage, rng)
            batch["kind_pixel_values"] = encode_images(easy_vqa.images[shown])
            batch["kind_labels"] = torch.from_numpy(data.kinds[shown])
        asked: list[tuple[list[str], npt.NDArray[np.uint8], list[str]]] = []  # questions, pictures, answers
        if stage.num_questions:
            chosen = data.draw_questions(stage, rng)
            pictures = easy_vqa.images[easy_vqa.image_index[chosen]]
            asked.append(([easy_vqa.questions[n] for n in chosen], pictures, [easy_vqa.answers[n] for n in chosen]))
        if stage.num_scene_questions:
            about = world.questions("train", stage.num_scene_questions, rng=rng)
            asked.append((about.questions, about.images[about.image_index], about.answers))
        if asked:
            questions, images, answers = zip(*asked, strict=True)
            batch |= self._encode("question", [*chain(*questions)], np.concatenate(images))
            batch["question_labels"] = data.encode_answers([*chain(*answers)])
        if stage.num_statements:
            told = world.statements("train", stage.num_statements, rng=rng, types=stage.statement_types)
            is_negated = np.arange(stage.num_statements) % 8 >= 4  # the second wording of each block
            kept = np.flatnonzero(~is_negated | (rng.random(stage.num_statements) < stage.negated_statements))
            pictures = told.images[told.image_index[kept]]
            batch |= self._encode("statement", [told.statements[n] for n in kept], pictures)
            batch["statement_labels"] = torch.from_numpy(told.labels[kept]).long()
        return batch

    def _encode(self, task: str, texts: Sequence[str], images: npt.NDArray[np.uint8]) -> dict[str, Tensor]:
        tokens = self.data.encode_texts(texts)
        return {f"{task}_pixel_values": encode_images(images), **{f"{task}_{name}": x for name, x in tokens.items()}}

    def _mask(self, input_ids: Tensor, rng: np.random.Generator) -> dict[str, Tensor]:
        """Hide one object's name of each caption."""
        scores = torch.from_numpy(rng.random(input_ids.shape))
        hidden = scores.masked_fill(~torch.isin(input_ids, self.data.object_ids), -1).argmax(dim=1, keepdim=True)
        is_hidden = torch.zeros_like(input_ids, dtype=torch.bool).scatter_(1, hidden, True)
        return {
            "masked_input_ids": input_ids.masked_fill(is_hidden, self.data.tokenizer.mask_token_id),
            "masked_labels": input_ids.masked_fill(~is_hidden, IGNORE_INDEX),
        }


@dataclass
class DemoOutput(ModelOutput):
    """Losses of one step: their sum, and that of each objective which the step has, 0-d."""

    loss: Tensor | None = None
    contrast: Tensor | None = None
    masked_words: Tensor | None = None
    kinds: Tensor | None = None
    answers: Tensor | None = None
    statements: Tensor | None = None


OBJECTIVES = {  # of the inputs whose names begin so
    "caption": "contrast",
    "masked": "masked_words",
    "kind": "kinds",
    "question": "answers",
    "statement": "statements",
}


class DemoNetwork(nn.Module):
    """Five task heads on one backbone.

    Attributes:
        retrieval: dual encoder.
        naming: fusion encoder, masked words.
        sorting: image encoder, colour and shape of easy-VQA's pictures.
        answering: fusion encoder, one answer of many.
        judging: fusion encoder of two pictures and a statement, true or false.
    """

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__()

        def with_labels(num_labels: int) -> VLMoConfig:
            other = copy.deepcopy(config)
            other.num_labels = num_labels
            return other

        self.retrieval = VLMoForImageTextRetrieval(config)
        self.naming = VLMoForMaskedLM(config)
        self.sorting = VLMoForImageClassification(with_labels(len(COLOURS) * len(SHAPES)))
        self.answering = VLMoForQuestionAnswering(config)
        self.judging = VLMoForImagesAndTextClassification(with_labels(2))
        for head in (self.naming, self.sorting, self.answering, self.judging):
            head.backbone = self.retrieval.backbone

    def forward(self, **inputs: Tensor) -> DemoOutput:
        """The losses of one step on an item of `StepBatches`."""
        tasks: dict[str, dict[str, Tensor]] = {}
        for name, x in inputs.items():
            task, _, argument = name.partition("_")
            tasks.setdefault(task, {})[argument] = x
        losses: dict[str, Tensor] = {}
        if "caption" in tasks:
            losses["contrast"] = self.retrieval(**tasks["caption"], return_loss=True).loss
        if "masked" in tasks:
            losses["masked_words"] = self.naming(**tasks["masked"]).loss
        if "kind" in tasks:
            losses["kinds"] = self.sorting(**tasks["kind"]).loss
        if "question" in tasks:
            questions = tasks["question"]
            labels = questions.pop("labels")  # one true answer each, so cross-entropy in place of VQAv2's soft scores
            losses["answers"] = nn.functional.cross_entropy(self.answering(**questions).logits, labels)
        if "statement" in tasks:
            losses["statements"] = self.judging(**tasks["statement"]).loss
        return DemoOutput(loss=torch.stack([*losses.values()]).sum(), **losses)


def make_network(recipe: Recipe, data: DemoData) -> DemoNetwork:
    """The untrained network of a recipe, seeded."""
    torch.manual_seed(recipe.seed)
    config = VLMoConfig(
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.num_hidden_layers,
        num_vl_layers=recipe.num_vl_layers,
        num_attention_heads=recipe.num_attention_heads,
        image_size=data.world.image_size,
        vocab_size=len(data.tokenizer),
        max_text_length=24,
        num_image_types=2,
        stem_patch_size=recipe.stem_patch_size,
        position_embedding_type="absolute",
        layer_scale_init_value=None,
        initializer_range=recipe.initializer_range,
        logit_scale_init_value=math.log(recipe.logit_scale),
        has_itm_head=False,
        num_labels=len(data.answers),
    )
    network = DemoNetwork(config)
    backbone = network.retrieval.backbone
    text, image = backbone.text_embeddings, backbone.image_embeddings
    assert image.position_embeddings is not None
    for codes in (text.word_embeddings.weight, text.position_embeddings.weight, image.position_embeddings):
        nn.init.normal_(codes, std=recipe.embedding_std)
    for projection in (image.stem, image.projection):
        assert projection is not None
        projection.reset_parameters()  # scaled by fan-in, else the patches drown the position codes
    return network


def orthogonalize(matrix: Tensor) -> Tensor:
    """The polar factor U V^T of a matrix U S V^T, roughly: its singular values are drawn to 0.7 to 1.2, tiny ones less.

    Five steps of the quintic Newton-Schulz iteration of `torch.optim.Muon`. That takes bfloat16 everywhere, which a
    processor without instructions for it emulates, in twenty times the time of float32; and with them these small
    matrices gain nothing (docs/log.md). So on a CPU it is float32.
    """
    x = matrix.float() if matrix.device.type == "cpu" else matrix.bfloat16()
    x = x.t() if x.shape[0] > x.shape[1] else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.t() if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with momentum 0.95, but for `orthogonalize`."""

    def __init__(self, matrices: Sequence[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step: momentum, looked ahead along, orthogonalised."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                momentum = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p.grad))
                momentum.lerp_(p.grad, 1 - 0.95)
                update = orthogonalize(p.grad.lerp(momentum, 0.95))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * math.sqrt(max(1, p.shape[0] / p.shape[1])))


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the blocks and the projections of the patches, AdamW for the rest, as one optimiser.

    Orthogonalised updates (Muon) reach in 400 steps what AdamW alone does not (docs/log.md). They take a tenth of a
    step, so `threads` may share them; each matrix is updated by itself, to the same bits.
    """

    def __init__(self, network: nn.Module, recipe: Recipe, threads: Executor | None = None) -> None:
        named = {name: p for name, p in network.named_parameters() if p.requires_grad}
        matrices = [p for name, p in sorted(named.items()) if ".blocks." in name and p.ndim == 2]
        filters = [p for _, p in sorted(named.items()) if p.ndim == 4]
        others = [p for p in named.values() if not any(p is other for other in (*matrices, *filters))]
        self._threads = threads
        self._filters = [(p, nn.Parameter(p.detach().flatten(1))) for p in filters]  # Muon takes matrices alone
        flat_filters = [flat for _, flat in self._filters]
        adamw_groups = [
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": recipe.weight_decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (
            *(
                Muon(parameters, lr=rate, weight_decay=recipe.weight_decay)
                for parameters, rate in (
                    (matrices[::2], recipe.muon_learning_rate),
                    (matrices[1::2], recipe.muon_learning_rate),
                    (flat_filters, recipe.patch_learning_rate),
                )
            ),
            torch.optim.AdamW(adamw_groups, lr=recipe.learning_rate, betas=(0.9, 0.98)),
        )
        groups = [dict(group) for group in self._own_groups()]
        groups[2]["params"] = filters
        super().__init__(groups, {})

    def _own_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of all, at the learning rates that a scheduler set here."""
        for own, scheduled in zip(self._own_groups(), self.param_groups, strict=True):
            own["lr"] = scheduled["lr"]
        for filters, flat in self._filters:
            flat.data = filters.detach().flatten(1)  # of the same memory, also after a move to another device
            flat.grad = None if filters.grad is None else filters.grad.flatten(1)
        share = map if self._threads is None else self._threads.map
        for _ in share(lambda optimizer: optimizer.step(), self.optimizers):
            pass


class StepPart(NamedTuple):
    """A part of one step's inputs.

    Attributes:
        inputs: keyword arguments of `DemoNetwork.forward`.
        shares: of each objective that is in it, the share of its rows.
    """

    inputs: dict[str, Tensor]
    shares: dict[str, float]


def halves(inputs: dict[str, Tensor]) -> list[StepPart]:
    """A step's inputs in two parts of about as many pictures; one part where they cannot be divided.

    The contrast compares all captions with each other, so it comes first and stays whole; the rows of whatever lies
    across the middle are divided.
    """
    tasks: dict[str, dict[str, Tensor]] = {}
    for name, x in inputs.items():
        tasks.setdefault(name.partition("_")[0], {})[name] = x
    pictures = {task: tensors[f"{task}_pixel_values"].shape[:-3].numel() for task, tensors in tasks.items()}
    left = sum(pictures.values()) / 2  # pictures that the first part still wants
    parts = StepPart({}, {}), StepPart({}, {})
    for task, tensors in sorted(tasks.items(), key=lambda item: item[0] != "caption"):
        rows = len(tensors[f"{task}_pixel_values"])
        cut = round(rows * min(1.0, max(0.0, left / pictures[task])))
        if task == "caption":
            cut = rows
        for part, chosen in zip(parts, (slice(cut), slice(cut, rows)), strict=True):
            share = len(range(rows)[chosen]) / rows
            if share:
                part.inputs.update({name: x[chosen] for name, x in tensors.items()})
                part.shares[OBJECTIVES[task]] = share
        left -= pictures[task]
    return [part for part in parts if part.inputs]


@contextmanager
def two_threads() -> Iterator[Executor]:
    """Two threads that share torch's cores, for the two halves of a step.

    The demo's matrices are so small that a second core in each of them saves a tenth, and beside each other nearly half
    (docs/log.md). That takes threads that give way to each other at once: Python lets them wait for 5 ms.
    """
    num_cores, interval = torch.get_num_threads(), sys.getswitchinterval()
    share = max(1, num_cores // 2)
    torch.set_num_threads(share)
    sys.setswitchinterval(2e-5)
    try:
        with ThreadPoolExecutor(2, initializer=torch.set_num_threads, initargs=(share,)) as threads:  # MKL asks each
            yield threads
    finally:
        sys.setswitchinterval(interval)
        torch.set_num_threads(num_cores)


class DemoTrainer(Trainer):
    """`Trainer` that computes the halves of a step beside each other, and logs the loss of each objective."""

    def __init__(self, *args: Any, threads: Executor, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._threads = threads
        self._sums: dict[str, tuple[float, int]] = {}

    def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Gradients of the sum of the objectives; those of two halves add up in either order to the same bits."""
        model.train()
        step: dict[str, Tensor] = {}

        def learn(part: StepPart) -> dict[str, Tensor]:
            output = model(**part.inputs)
            losses = {name: share * output[name] for name, share in part.shares.items()}
            self.accelerator.backward(torch.stack([*losses.values()]).sum())
            return {name: loss.detach() for name, loss in losses.items()}

        for losses in self._threads.map(learn, halves(self._prepare_inputs(inputs))):
            for name, loss in losses.items():
                step[name] = step[name] + loss if name in step else loss
        for name, loss in step.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + float(loss), count + 1)
        return torch.stack([*step.values()]).sum()

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of each objective since the last log."""
        if "loss" in logs:
            logs |= {name: round(total / count, 4) for name, (total, count) in self._sums.items()}
            self._sums = {}
        super().log(logs, *args, **kwargs)


def train(recipe: Recipe, data: DemoData, output_dir: Path) -> tuple[DemoNetwork, list[dict[str, float]]]:
    """Train the network of a recipe.

    Args:
        recipe: settings.
        data: what to learn from.
        output_dir: where `Trainer` may write.

    Returns:
        The trained network in eval mode, and the logged losses: "step", "learning_rate", "loss", and each objective.
    """
    network = make_network(recipe, data)

    def muon_schedule(step: int) -> float:
        return recipe.rates(step)[0]

    def adamw_schedule(step: int) -> float:
        return recipe.rates(step)[1]

    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=recipe.num_steps,
        per_device_train_batch_size=1,  # an item is a whole step's batch
        max_grad_norm=1.0,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        accelerator_config={"dispatch_batches": False},  # else it cuts all of an item's tensors to the first one's rows
        seed=recipe.seed,
    )
    with two_threads() as threads:
        optimizer = MuonAdamW(network, recipe, threads)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [*3 * [muon_schedule], *2 * [adamw_schedule]])
        trainer = DemoTrainer(
            model=network,
            args=arguments,
            train_dataset=StepBatches(data, recipe),
            data_collator=lambda items: items[0],
            optimizers=(optimizer, schedule),
            threads=threads,
        )
        trainer.train()
    kept = ("step", "learning_rate", *(field.name for field in dataclasses.fields(DemoOutput)))
    history = [{name: row[name] for name in kept if name in row} for row in trainer.state.log_history if "loss" in row]
    return network.eval(), history
