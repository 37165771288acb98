"""The demo's network, its batches and its training through `transformers.Trainer`.

One backbone serves three heads at once. A step sees captioned scenes (contrast), questions about pictures (answers) and
statements about two pictures (truth), each through the path that VLMo has for it; the losses are added.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import BertTokenizer, Trainer, TrainingArguments
from transformers.modeling_outputs import ModelOutput

from vlmo_fast.data import Captions, EasyVQA, SceneWorld, emoji_sprites, load_easy_vqa, tokenize
from vlmo_fast.data.scenes import ONE_IMAGE_STATEMENT_TYPES, STATEMENT_TYPES
from vlmo_fast.hf.configuration import VLMoConfig
from vlmo_fast.hf.modeling import (
    VLMoForImagesAndTextClassification,
    VLMoForImageTextRetrieval,
    VLMoForQuestionAnswering,
)

__all__ = ["DemoData", "DemoNetwork", "Recipe", "make_network", "train"]

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


@dataclass(frozen=True)
class Recipe:
    """Settings of the demo; all were chosen on validation splits (docs/log.md).

    Attributes:
        seed: of the network, the batches and the order of everything.
        num_steps: optimiser steps.
        num_contrast_steps: how many of the first steps see captions alone; the other objectives join then.
        num_first_captions: captioned scenes a step in that first stage, half of them in groups that differ in layout.
        num_captions: captioned scenes a step after that.
        num_questions: easy-VQA questions a step.
        num_scene_questions: questions about scenes of four objects a step; a multiple of 4.
        num_statements: statements about two scenes a step; a multiple of 8.
        muon_learning_rate: peak, for the matrices of the blocks.
        learning_rate: peak, for all other parameters (AdamW).
        weight_decay: on matrices and embeddings; none on biases, norms and scales.
        num_warmup_steps: of linear warm-up; the rate then stays until the second stage, and decays to 0 by a cosine.
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
    num_steps: int = 560
    num_contrast_steps: int = 100
    num_first_captions: int = 96
    num_captions: int = 96
    num_questions: int = 128
    num_scene_questions: int = 8
    num_statements: int = 32
    muon_learning_rate: float = 0.02
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    num_warmup_steps: int = 40
    hidden_size: int = 128
    num_hidden_layers: int = 3
    num_vl_layers: int = 1
    num_attention_heads: int = 4
    stem_patch_size: int = 4
    initializer_range: float = 0.06
    embedding_std: float = 0.5
    logit_scale: float = 40.0


class DemoData:
    """Scenes, questions, tokenizer and answers, shared by training and evaluation.

    Attributes:
        world: the synthetic scenes.
        answers: what a question may be answered with, across both sources.
        easy_vqa: the third-party questions by split; loaded once.
    """

    def __init__(self) -> None:
        self.world = SceneWorld(emoji_sprites())
        self.easy_vqa: dict[str, EasyVQA] = {split: load_easy_vqa(split) for split in ("train", "validation", "test")}
        train = self.easy_vqa["train"]
        self.answers = sorted({*train.answers, *self.world.answers()})
        words = sorted({*self.world.vocabulary(), *(word for text in set(train.questions) for word in tokenize(text))})
        self.tokenizer = BertTokenizer(vocab={word: n for n, word in enumerate((*SPECIAL_TOKENS, *words))})
        self._answer_ids = {answer: n for n, answer in enumerate(self.answers)}

    def encode_texts(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` (B, T), padded to the longest of these texts."""
        tokens = self.tokenizer(list(texts), padding=True, return_tensors="pt")
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}

    def encode_answers(self, answers: Sequence[str]) -> Tensor:
        """Class of each answer, (B,) int64: its place in `answers`."""
        return torch.tensor([self._answer_ids[answer] for answer in answers])


def encode_images(images: npt.NDArray[np.uint8]) -> Tensor:
    """(..., H, W, 3) uint8 -> (..., 3, H, W) float32 with mean and deviation 0.5, as the released recipe has it."""
    return torch.from_numpy(images).movedim(-1, -3).float().div_(127.5).sub_(1)


class StepBatches(IterableDataset[dict[str, Tensor]]):
    """One training step's inputs an item, without end: the keyword arguments of `DemoNetwork.forward`."""

    def __init__(self, data: DemoData, recipe: Recipe) -> None:
        self.data, self.recipe = data, recipe

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        data, recipe, world = self.data, self.recipe, self.data.world
        easy_vqa = data.easy_vqa["train"]
        rng = np.random.Generator(np.random.PCG64(recipe.seed))
        statement_types = (*STATEMENT_TYPES, *ONE_IMAGE_STATEMENT_TYPES)
        for _ in range(recipe.num_contrast_steps):
            yield self._encode_captions(world.captions("train", recipe.num_first_captions, rng=rng))
        while True:
            captions = world.captions("train", recipe.num_captions, rng=rng)
            asked = rng.integers(0, len(easy_vqa.questions), recipe.num_questions)
            scenes = world.questions("train", recipe.num_scene_questions, rng=rng)
            statements = world.statements("train", recipe.num_statements, rng=rng, types=statement_types)
            questions = [easy_vqa.questions[n] for n in asked] + scenes.questions
            pictures = [easy_vqa.images[easy_vqa.image_index[asked]], scenes.images[scenes.image_index]]
            answers = [easy_vqa.answers[n] for n in asked] + scenes.answers
            batch = self._encode_captions(captions)
            batch |= {f"question_{name}": ids for name, ids in data.encode_texts(questions).items()}
            batch["question_pixel_values"] = encode_images(np.concatenate(pictures))
            batch["question_labels"] = data.encode_answers(answers)
            batch |= {f"statement_{name}": ids for name, ids in data.encode_texts(statements.statements).items()}
            batch["statement_pixel_values"] = encode_images(statements.images[statements.image_index])
            batch["statement_labels"] = torch.from_numpy(statements.labels).long()
            yield batch

    def _encode_captions(self, captions: Captions) -> dict[str, Tensor]:
        texts = self.data.encode_texts(captions.captions)
        pixel_values = encode_images(captions.images)
        return {"caption_pixel_values": pixel_values, **{f"caption_{name}": ids for name, ids in texts.items()}}


@dataclass
class DemoOutput(ModelOutput):
    """Losses of one step: their sum, and each objective's, 0-d."""

    loss: Tensor | None = None
    contrast: Tensor | None = None
    answers: Tensor | None = None
    statements: Tensor | None = None


class DemoNetwork(nn.Module):
    """Three task heads on one backbone.

    Attributes:
        retrieval: dual encoder.
        answering: fusion encoder, one answer of many.
        judging: fusion encoder of two pictures and a statement, true or false.
    """

    def __init__(self, config: VLMoConfig) -> None:
        super().__init__()
        self.retrieval = VLMoForImageTextRetrieval(config)
        self.answering = VLMoForQuestionAnswering(config)
        true_or_false = copy.deepcopy(config)
        true_or_false.num_labels = 2
        self.judging = VLMoForImagesAndTextClassification(true_or_false)
        self.answering.backbone = self.judging.backbone = self.retrieval.backbone

    def forward(self, **inputs: Tensor) -> DemoOutput:
        """The losses of one step on an item of `StepBatches`."""

        def inputs_of(task: str) -> dict[str, Tensor]:
            return {name.removeprefix(f"{task}_"): x for name, x in inputs.items() if name.startswith(f"{task}_")}

        contrast = self.retrieval(**inputs_of("caption"), return_loss=True).loss
        if "question_labels" not in inputs:
            return DemoOutput(loss=contrast, contrast=contrast)
        questions = inputs_of("question")
        labels = questions.pop("labels")  # one true answer each, so cross-entropy in place of VQAv2's soft scores
        answers = nn.functional.cross_entropy(self.answering(**questions).logits, labels)
        statements = self.judging(**inputs_of("statement")).loss
        return DemoOutput(contrast + answers + statements, contrast, answers, statements)


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


class MuonAdamW(torch.optim.Optimizer):
    """Muon for the matrices of the blocks, AdamW for everything else, as one optimiser.

    Orthogonalised updates (Muon) reach in 400 steps what AdamW alone does not (docs/log.md).
    """

    def __init__(self, network: nn.Module, recipe: Recipe) -> None:
        named = {name: p for name, p in network.named_parameters() if p.requires_grad}
        matrices = {name for name, p in named.items() if ".blocks." in name and p.ndim == 2}
        others = [p for name, p in named.items() if name not in matrices]
        adamw_groups = [
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": recipe.weight_decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(
                [named[name] for name in sorted(matrices)],
                lr=recipe.muon_learning_rate,
                momentum=0.95,
                weight_decay=recipe.weight_decay,
            ),
            torch.optim.AdamW(adamw_groups, lr=recipe.learning_rate, betas=(0.9, 0.98)),
        )
        super().__init__([dict(group) for group in self._own_groups()], {})

    def _own_groups(self) -> list[dict[str, Any]]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of both, at the learning rates that a scheduler set here."""
        for own, scheduled in zip(self._own_groups(), self.param_groups, strict=True):
            own["lr"] = scheduled["lr"]
        for optimizer in self.optimizers:
            optimizer.step()


class DemoTrainer(Trainer):
    """`Trainer` that logs the loss of each objective beside their sum."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sums: dict[str, tuple[float, int]] = {}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The sum of the objectives, each kept for the log."""
        output: DemoOutput = model(**inputs)
        for name, value in output.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (total + float(value.detach()), count + 1)
        return (output.loss, output) if return_outputs else output.loss

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
    optimizer = MuonAdamW(network, recipe)

    def schedule(step: int) -> float:
        if step < recipe.num_warmup_steps:
            return (step + 1) / recipe.num_warmup_steps
        done = (step - recipe.num_contrast_steps) / max(1, recipe.num_steps - recipe.num_contrast_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, done))))

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
        seed=recipe.seed,
    )
    trainer = DemoTrainer(
        model=network,
        args=arguments,
        train_dataset=StepBatches(data, recipe),
        data_collator=lambda items: items[0],
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)),
    )
    trainer.train()
    kept = ("step", "learning_rate", *(field.name for field in dataclasses.fields(DemoOutput)))
    history = [
        {name: row[name] for name in kept if name in row} for row in trainer.state.log_history if "contrast" in row
    ]
    return network.eval(), history
