"""Data: scenes made here, and readers of data sets made elsewhere. Needs NumPy; Pillow to decode and render."""

from .oracles import expected_recall, majority_accuracy
from .readers.easy_vqa import EasyVQA, easy_vqa_baselines, load_easy_vqa
from .synthetic.scenes import (
    ATTRIBUTION,
    Captions,
    Questions,
    Scenes,
    SceneWorld,
    Sprites,
    Statements,
    emoji_sprites,
    question_oracles,
    shape_sprites,
    statement_oracles,
    tokenize,
)

__all__ = [
    "ATTRIBUTION",
    "Captions",
    "EasyVQA",
    "Questions",
    "SceneWorld",
    "Scenes",
    "Sprites",
    "Statements",
    "easy_vqa_baselines",
    "emoji_sprites",
    "expected_recall",
    "load_easy_vqa",
    "majority_accuracy",
    "question_oracles",
    "shape_sprites",
    "statement_oracles",
    "tokenize",
]
