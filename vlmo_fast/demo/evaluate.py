"""Measures the demo's network on a test or validation split, beside guessers, oracles and a control without fusion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmo_fast.data.oracles import expected_recall
from vlmo_fast.data.readers.easy_vqa import EasyVQA, easy_vqa_baselines
from vlmo_fast.data.synthetic.scenes import (
    RELATIONS,
    Captions,
    Questions,
    Split,
    Statements,
    question_oracles,
    statement_oracles,
)
from vlmo_fast.demo.recipe import DemoData, DemoNetwork, encode_images
from vlmo_fast.demo.results import (
    CaptionExample,
    QuestionExample,
    QuestionResults,
    RetrievalExample,
    RetrievalResults,
    StatementExample,
    StatementResults,
)

__all__ = [
    "NoFusion",
    "evaluate_easy_vqa",
    "evaluate_retrieval",
    "evaluate_scene_questions",
    "evaluate_statements",
    "fit_no_fusion",
]

NUM_SCENE_QUESTIONS = 2400
NUM_STATEMENTS = 3200
BATCH_SIZE = 250

AnyQuestions = EasyVQA | Questions


def evaluate_retrieval(network: DemoNetwork, data: DemoData, split: Split) -> RetrievalResults:
    """Retrieve each scene of the gallery by its caption, and each caption by its scene."""
    gallery: Captions = data.world.gallery(split)
    images, texts = embed_images(network, gallery.images), embed_texts(network, data, gallery.captions)
    scores = texts @ images.t()  # (text, image)
    own = scores.diagonal()
    image_ranks, text_ranks = _ranks(scores, own), _ranks(scores.t(), own)
    twins = embed_texts(network, data, gallery.twins)
    num_scenes = len(gallery.captions)

    examples, caption_examples = [], []
    for n in np.random.Generator(np.random.PCG64(0)).choice(num_scenes, size=12, replace=False).tolist():
        best = scores[n].topk(5)
        found = best.indices.tolist()
        examples.append(
            RetrievalExample(
                caption=gallery.captions[n],
                images=[gallery.images[i] for i in found],
                scores=best.values.tolist(),
                captions=[gallery.captions[i] for i in found],
                right=found.index(n) if n in found else None,
                rank=int(image_ranks[n]),
            )
        )
        best = scores[:, n].topk(5)
        found = best.indices.tolist()
        caption_examples.append(
            CaptionExample(
                image=gallery.images[n],
                captions=[gallery.captions[i] for i in found],
                scores=best.values.tolist(),
                right=found.index(n) if n in found else None,
                rank=int(text_ranks[n]),
            )
        )
    return RetrievalResults(
        num_scenes=num_scenes,
        text_to_image=_recalls(image_ranks),
        image_to_text=_recalls(text_ranks),
        objects_oracle=expected_recall(gallery.meanings // len(RELATIONS)),
        chance=expected_recall(np.zeros(num_scenes, np.int64)),
        twin_accuracy=float((own > (twins * images).sum(dim=1)).float().mean()),
        examples=examples,
        caption_examples=caption_examples,
    )


def evaluate_easy_vqa(network: DemoNetwork, control: NoFusion, data: DemoData, split: Split) -> QuestionResults:
    """Answer easy-VQA's questions."""
    questions = data.easy_vqa[split]
    baselines = easy_vqa_baselines(data.easy_vqa["train"], questions)
    return _evaluate_questions(
        network,
        control,
        data,
        questions,
        {
            "question only, majority": {"all": baselines.question},
            "question and colour, oracle": {"all": baselines.colour},
            "question and shape, oracle": {"all": baselines.shape},
        },
    )


def evaluate_scene_questions(network: DemoNetwork, control: NoFusion, data: DemoData, split: Split) -> QuestionResults:
    """Answer questions about scenes of four objects, pairs of which were never seen together."""
    questions = data.world.questions(split, NUM_SCENE_QUESTIONS, rng=1)
    oracles = question_oracles(questions)
    return _evaluate_questions(
        network,
        control,
        data,
        questions,
        {
            "question only, oracle": {kind: oracle.question for kind, oracle in oracles.items()},
            "question and which objects, oracle": {
                kind: oracle.question_and_objects for kind, oracle in oracles.items()
            },
        },
    )


def evaluate_statements(network: DemoNetwork, data: DemoData, split: Split) -> StatementResults:
    """Judge statements about two scenes."""
    statements: Statements = data.world.statements(split, NUM_STATEMENTS, rng=2)
    logits = []
    for rows in _batches(range(len(statements.statements))):
        texts = data.encode_texts([statements.statements[n] for n in rows])
        pictures = encode_images(statements.images[statements.image_index[rows]])
        with torch.inference_mode():
            logits.append(network.judging(**texts, pixel_values=pictures).logits)
    probabilities = torch.cat(logits).softmax(dim=1)[:, 1].numpy()
    given = probabilities > 0.5
    right = given == statements.labels
    oracles = statement_oracles(statements)
    return StatementResults(
        num_statements=_count(statements.types),
        accuracy=_mean_by(statements.types, right),
        baselines={
            "statement only, oracle": oracles.text,
            "statement and left picture, oracle": oracles.text_and_left,
            "statement and right picture, oracle": oracles.text_and_right,
        },
        examples=[
            StatementExample(
                left=statements.images[statements.image_index[n, 0]],
                right=statements.images[statements.image_index[n, 1]],
                statement=statements.statements[n],
                label=bool(statements.labels[n]),
                given=bool(given[n]),
                probability=float(probabilities[n]),
                type=statements.types[n],
            )
            for n in _examples(right, statements.types, num_right=6, num_wrong=2)
        ],
    )


class NoFusion(nn.Module):
    """The control: answers from the dual encoder's two embeddings alone, (B, D) each, and their product.

    It sees what a search index would hold of the picture and of the question, and nothing of their interplay inside the
    network. The embeddings are frozen, and were never trained on questions; in return the head is wider than the fusion
    encoder's, and is fitted in several passes over all training questions, more than the network itself saw.
    """

    def __init__(self, hidden_size: int, num_answers: int) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Linear(3 * hidden_size, 512), nn.GELU(), nn.Linear(512, num_answers))
        self.scale = hidden_size**0.5  # unit-norm embeddings to unit variance

    def forward(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """(B, D) and (B, D) -> logits (B, num_answers)."""
        image, text = self.scale * image_embeds, self.scale * text_embeds
        logits: Tensor = self.head(torch.cat([image, text, image * text], dim=1))
        return logits


def fit_no_fusion(network: DemoNetwork, data: DemoData, *, num_scene_questions: int, num_epochs: int = 12) -> NoFusion:
    """Fit the control on frozen embeddings: of all easy-VQA training questions, and of so many about scenes."""
    torch.manual_seed(0)
    sources: list[AnyQuestions] = [
        data.easy_vqa["train"],
        data.world.questions("train", num_scene_questions, rng=3),
    ]
    pairs = [_embed_questions(network, data, questions) for questions in sources]
    images, texts = (torch.cat(part) for part in zip(*pairs, strict=True))
    labels = data.encode_answers([answer for questions in sources for answer in questions.answers])
    control = NoFusion(images.shape[1], len(data.answers))
    batch_size = 512
    optimizer = torch.optim.AdamW(control.parameters(), lr=2e-3, weight_decay=0.01)
    num_steps = num_epochs * (len(labels) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=num_steps)
    for _ in range(num_epochs):
        for rows in torch.randperm(len(labels)).split(batch_size)[: len(labels) // batch_size]:
            loss = F.cross_entropy(control(images[rows], texts[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return control.eval()


def embed_images(network: DemoNetwork, images: npt.NDArray[np.uint8]) -> Tensor:
    """Unit-norm embeddings (N, D) of pictures (N, H, W, 3)."""
    with torch.inference_mode():
        parts = [network.retrieval.get_image_features(encode_images(batch)) for batch in _batches(images)]
    return torch.cat([part.pooler_output for part in parts]).clone()


def embed_texts(network: DemoNetwork, data: DemoData, texts: Sequence[str]) -> Tensor:
    """Unit-norm embeddings (N, D) of N texts; each distinct text is encoded once."""
    distinct = sorted(set(texts))
    with torch.inference_mode():
        parts = [network.retrieval.get_text_features(**data.encode_texts(batch)) for batch in _batches(distinct)]
    row = {text: n for n, text in enumerate(distinct)}
    return torch.cat([part.pooler_output for part in parts])[[row[text] for text in texts]].clone()


def _embed_questions(network: DemoNetwork, data: DemoData, questions: AnyQuestions) -> tuple[Tensor, Tensor]:
    images = embed_images(network, questions.images)[torch.from_numpy(questions.image_index)]
    return images, embed_texts(network, data, questions.questions)


def _evaluate_questions(
    network: DemoNetwork,
    control: NoFusion,
    data: DemoData,
    questions: AnyQuestions,
    baselines: dict[str, dict[str, float]],
) -> QuestionResults:
    logits = []
    for rows in _batches(range(len(questions.questions))):
        texts = data.encode_texts([questions.questions[n] for n in rows])
        pictures = encode_images(questions.images[questions.image_index[rows]])
        with torch.inference_mode():
            logits.append(network.answering(**texts, pixel_values=pictures).logits)
    best = torch.cat(logits).softmax(dim=1).max(dim=1)
    with torch.inference_mode():
        control_best = control(*_embed_questions(network, data, questions)).argmax(dim=1)
    truth = data.encode_answers(questions.answers)
    right = (best.indices == truth).numpy()
    types = [str(kind) for kind in questions.types]
    return QuestionResults(
        num_questions=_count(types),
        accuracy=_mean_by(types, right),
        no_fusion=_mean_by(types, (control_best == truth).numpy()),
        baselines=baselines,
        examples=[
            QuestionExample(
                image=questions.images[questions.image_index[n]],
                question=questions.questions[n],
                answer=questions.answers[n],
                given=data.answers[int(best.indices[n])],
                probability=float(best.values[n]),
                type=types[n],
            )
            for n in _examples(right, types, num_right=8, num_wrong=4)
        ],
    )


def _examples(right: npt.NDArray[np.bool_], types: Sequence[str], *, num_right: int, num_wrong: int) -> list[int]:
    """Indices of right and wrong ones, drawn at random, the types taking turns."""
    order = np.random.Generator(np.random.PCG64(0)).permutation(len(right)).tolist()
    chosen = []
    for wanted, count in ((True, num_right), (False, num_wrong)):
        by_type = [[n for n in order if bool(right[n]) == wanted and types[n] == kind] for kind in sorted(set(types))]
        longest = max(map(len, by_type))
        turns = [queue[k] for k in range(longest) for queue in by_type if k < len(queue)]
        chosen += turns[:count]
    return chosen


def _ranks(scores: Tensor, own: Tensor) -> Tensor:
    """Rank of each row's own item, from 1; ties count against it."""
    return (scores >= own[:, None]).sum(dim=1)


def _recalls(ranks: Tensor) -> dict[int, float]:
    return {k: float((ranks <= k).float().mean()) for k in (1, 5, 10)}


def _count(types: Sequence[str]) -> dict[str, int]:
    return {"all": len(types), **{kind: list(types).count(kind) for kind in sorted(set(types))}}


def _mean_by(types: Sequence[str], right: npt.NDArray[np.bool_]) -> dict[str, float]:
    kinds = np.array(types)
    means = {kind: float(right[kinds == kind].mean()) for kind in sorted(set(types))}
    return {"all": float(right.mean()), **means}


def _batches(items: Sequence[Any] | npt.NDArray[np.uint8]) -> list[Any]:
    """Slices of at most `BATCH_SIZE` items, in order."""
    return [items[start : start + BATCH_SIZE] for start in range(0, len(items), BATCH_SIZE)]
