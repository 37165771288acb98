"""What the demo found: plain data, written as JSON and shown by `vlmo_fast.demo.report`."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "CaptionExample",
    "DemoResults",
    "QuestionExample",
    "QuestionResults",
    "RetrievalExample",
    "RetrievalResults",
    "StatementExample",
    "StatementResults",
]

Image = npt.NDArray[np.uint8]  # (H, W, 3)


@dataclass(frozen=True)
class RetrievalExample:
    """A caption and the pictures that the dual encoder found for it.

    Attributes:
        caption: the query.
        images: the best matches, best first.
        scores: their cosine similarities.
        captions: the canonical captions of these pictures.
        right: which of them is the right one; None where it is not among them.
        rank: rank of the right one, from 1.
    """

    caption: str
    images: list[Image]
    scores: list[float]
    captions: list[str]
    right: int | None
    rank: int


@dataclass(frozen=True)
class CaptionExample:
    """A picture and the captions that the dual encoder found for it; fields as in `RetrievalExample`."""

    image: Image
    captions: list[str]
    scores: list[float]
    right: int | None
    rank: int


@dataclass(frozen=True)
class QuestionExample:
    """A question, the answer given and the true one; `probability` is the model's for the answer given."""

    image: Image
    question: str
    answer: str
    given: str
    probability: float
    type: str


@dataclass(frozen=True)
class StatementExample:
    """A statement about two pictures, whether it is true, and what the model says; `probability` that it is true."""

    left: Image
    right: Image
    statement: str
    label: bool
    given: bool
    probability: float
    type: str


@dataclass(frozen=True)
class RetrievalResults:
    """Dual-encoder retrieval in the test gallery; recalls are {k: share in [0, 1]}.

    Attributes:
        num_scenes: size of the gallery; each scene has one caption.
        text_to_image: recall at k of the picture, given the caption.
        image_to_text: recall at k of the caption, given the picture.
        objects_oracle: expected recall at k of one who knows which two objects are there, but not where.
        chance: recall at k of a guess.
        twin_accuracy: how often the right caption scores higher than the one with the two objects exchanged.
        examples: for the report, pictures by caption.
        caption_examples: for the report, captions by picture.
    """

    num_scenes: int
    text_to_image: dict[int, float]
    image_to_text: dict[int, float]
    objects_oracle: dict[int, float]
    chance: dict[int, float]
    twin_accuracy: float
    examples: list[RetrievalExample]
    caption_examples: list[CaptionExample]


@dataclass(frozen=True)
class QuestionResults:
    """Fusion-encoder answers on a test split; accuracies are {type: share in [0, 1]} with the type "all".

    Attributes:
        num_questions: how many by type, and "all".
        accuracy: of the fusion encoder.
        no_fusion: of the control, which sees the unimodal embeddings of picture and question alone.
        baselines: {name: {type: accuracy}} of guessers and oracles that see less than the picture and the question.
        examples: for the report, right and wrong ones.
    """

    num_questions: dict[str, int]
    accuracy: dict[str, float]
    no_fusion: dict[str, float]
    baselines: dict[str, dict[str, float]]
    examples: list[QuestionExample]


@dataclass(frozen=True)
class StatementResults:
    """Truth of statements about two pictures on a test split; fields as in `QuestionResults`."""

    num_statements: dict[str, int]
    accuracy: dict[str, float]
    baselines: dict[str, float]
    examples: list[StatementExample]


@dataclass(frozen=True)
class DemoResults:
    """All that one run of the demo found.

    Attributes:
        recipe: settings of the run by name, the seed among them.
        machine: facts such as processor, cores, versions, by name.
        num_parameters: trainable parameters of the network.
        training_seconds: wall clock of the training.
        total_seconds: wall clock of the whole demo, report not counted.
        history: one row a logged step: "step", "learning_rate", and the loss of each objective by name.
        retrieval: captions and scenes.
        easy_vqa: third-party questions.
        scene_questions: questions about scenes of four objects.
        statements: statements about two scenes.
        backends: (op, device, dtype, implementation, reason) of each op.
        attribution: credits of the data shown.
    """

    recipe: dict[str, Any]
    machine: dict[str, str]
    num_parameters: int
    training_seconds: float
    total_seconds: float
    history: list[dict[str, float]]
    retrieval: RetrievalResults
    easy_vqa: QuestionResults
    scene_questions: QuestionResults
    statements: StatementResults
    backends: list[tuple[str, ...]]
    attribution: list[str]

    def save(self, path: Path) -> None:
        """Write everything but the examples' pictures as JSON."""

        def without_examples(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: without_examples(item) for key, item in value.items() if not str(key).endswith("examples")}
            return value

        path.write_text(json.dumps(without_examples(dataclasses.asdict(self)), indent=2) + "\n", encoding="utf-8")
