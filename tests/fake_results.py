"""A made-up outcome of the demo, with pictures that the package really draws, for the tests of the report."""

import math

import numpy as np

from vlmo_fast.data.synthetic.scenes import ATTRIBUTION, Captions, Questions, SceneWorld, Statements, shape_sprites
from vlmo_fast.demo.results import (
    CaptionExample,
    DemoResults,
    QuestionExample,
    QuestionResults,
    RetrievalExample,
    RetrievalResults,
    StatementExample,
    StatementResults,
)

EASY_TYPES = ("yes/no", "colour", "shape")


def fake_results(world: SceneWorld | None = None) -> DemoResults:
    """Results as a run of some minutes could leave them; plain shapes unless a world is given."""
    world = world or SceneWorld(shape_sprites(16), num_test_pairs=40, num_validation_pairs=16)
    rng = np.random.default_rng(0)
    return DemoResults(
        recipe={
            "seed": 0,
            "steps": 3000,
            "batch_size": 128,
            "learning_rate": 1e-3,
            "weight_decay": 0.05,
            "hidden_size": 192,
            "objectives": ("image_text_contrast", "image_text_matching"),
            "compile": False,
        },
        machine={
            "processor": "Imaginary Xeon 9000 @ 3.10GHz",
            "cores": "16",
            "device": "cpu",
            "python": "3.11.9",
            "torch": "2.12.0+cpu",
            "platform": "Linux-6.1.0-28-amd64-x86_64-with-glibc2.36",
        },
        num_parameters=6_612_345,
        training_seconds=552.4,
        total_seconds=618.9,
        history=fake_history(rng),
        retrieval=fake_retrieval(world.gallery("test"), rng),
        easy_vqa=QuestionResults(
            num_questions={"yes/no": 7136, "colour": 1317, "shape": 1220, "all": 9673},
            accuracy={"yes/no": 0.991, "colour": 0.987, "shape": 0.962, "all": 0.987},
            no_fusion={"yes/no": 0.988, "colour": 0.993, "shape": 0.967, "all": 0.986},
            baselines={
                "question only": {"yes/no": 0.846, "colour": 0.128, "shape": 0.341, "all": 0.671},
                "question and colour": {"yes/no": 0.872, "colour": 1.0, "shape": 0.352, "all": 0.846},
                "question and shape": {"yes/no": 0.946, "colour": 0.134, "shape": 1.0, "all": 0.820},
            },
            examples=fake_questions(world.questions("test", 16, rng=5), rng, EASY_TYPES),
        ),
        scene_questions=QuestionResults(
            num_questions={"neighbour": 1200, "relation": 1200, "presence": 1200, "all": 3600},
            accuracy={"neighbour": 0.861, "relation": 0.913, "presence": 0.988, "all": 0.921},
            no_fusion={"neighbour": 0.442, "relation": 0.557, "presence": 0.951, "all": 0.650},
            baselines={
                "question only": {"neighbour": 0.296, "relation": 0.5, "presence": 0.5, "all": 0.432},
                "picture only": {"neighbour": 0.5, "relation": 0.5, "presence": 0.5, "all": 0.5},
                "question and objects, not places": {
                    "neighbour": 0.5,
                    "relation": 0.5,
                    "presence": 1.0,
                    "all": 0.666,
                },
            },
            examples=fake_questions(world.questions("test", 32, rng=3), rng),
        ),
        statements=fake_statements(world.statements("test", 32, rng=4), rng),
        backends=[
            (
                "attention",
                "cpu",
                "float32",
                "eager",
                "the reference; on a CPU the faster one (docs/log.md)",
            ),
            ("attention", "cuda", "bfloat16", "sdpa", "torch's fused attention; no S x S scores in device memory"),
            ("contrastive_loss", "cpu", "float32", "eager", "the reference: stores the N x N logits"),
        ],
        attribution=[
            ATTRIBUTION,
            "easy-VQA by Victor Zhou (https://github.com/vzhou842/easy-VQA). License: MIT",
        ],
    )


def fake_history(rng: np.random.Generator) -> list[dict[str, float]]:
    """Losses that fall, with noise; the contrastive one is logged at every step, the others at every second."""
    history = []
    for step in range(0, 3000, 10):
        decay = math.exp(-step / 700)
        row = {"step": float(step), "learning_rate": 1e-3 * min(1.0, step / 300, (3000 - step) / 2700)}
        row["image_text_contrast"] = 0.25 + 4.6 * decay + 0.12 * rng.random()
        if step % 20 == 0:
            row["image_text_matching"] = 0.08 + 0.6 * decay + 0.05 * rng.random()
            row["scene_questions"] = 0.3 + 2.6 * decay + 0.3 * rng.random()
            row["easy_vqa"] = 0.05 + 2.2 * decay**3 + 0.1 * rng.random()
            row["statements"] = 0.2 + 0.5 * decay + 0.1 * rng.random()
        history.append(row)
    return history


def fake_retrieval(gallery: Captions, rng: np.random.Generator) -> RetrievalResults:
    """Searches whose right picture comes first, third, not among the five, first again, and so on; so the captions."""
    examples, caption_examples = [], []
    for n, right in enumerate((0, 2, None, 0, 1, 0, 4)):
        query = 11 * n
        others = [query // 4 * 4 + k for k in range(4) if query // 4 * 4 + k != query]
        others += [int(k) for k in rng.integers(query // 4 * 4 + 4, len(gallery.captions), 2)]
        if right is not None:
            others.insert(right, query)
        examples.append(
            RetrievalExample(
                caption=gallery.captions[query],
                images=[gallery.images[k] for k in others[:5]],
                scores=[0.91 - 0.043 * place for place in range(5)],
                captions=[gallery.captions[k] for k in others[:5]],
                right=right,
                rank=17 if right is None else right + 1,
            )
        )
        caption_examples.append(
            CaptionExample(
                image=gallery.images[query],
                captions=[gallery.captions[k] for k in others[:5]],
                scores=[0.88 - 0.051 * place for place in range(5)],
                right=right,
                rank=23 if right is None else right + 1,
            )
        )
    return RetrievalResults(
        num_scenes=1000,
        text_to_image={1: 0.842, 5: 0.981, 10: 0.993},
        image_to_text={1: 0.835, 5: 0.979, 10: 0.992},
        objects_oracle={1: 0.25, 5: 1.0, 10: 1.0},
        chance={1: 0.001, 5: 0.005, 10: 0.01},
        twin_accuracy=0.953,
        examples=examples,
        caption_examples=caption_examples,
    )


def fake_questions(
    questions: Questions, rng: np.random.Generator, types: tuple[str, ...] | None = None
) -> list[QuestionExample]:
    """Every fourth answer is wrong."""
    return [
        QuestionExample(
            image=questions.images[questions.image_index[n]],
            question=question,
            answer=answer,
            given=answer if n % 4 else {"yes": "no", "no": "yes"}.get(answer, "umbrella"),
            probability=0.4 + 0.59 * float(rng.random()),
            type=types[n % len(types)] if types else kind,
        )
        for n, (question, answer, kind) in enumerate(
            zip(questions.questions, questions.answers, questions.types, strict=True)
        )
    ]


def fake_statements(statements: Statements, rng: np.random.Generator) -> StatementResults:
    """Every fifth verdict is wrong."""
    examples = []
    for n, (left, right) in enumerate(statements.image_index):
        label = bool(statements.labels[n])
        given = label ^ (n % 5 == 0)
        sure = 0.5 + 0.49 * float(rng.random())
        examples.append(
            StatementExample(
                left=statements.images[left],
                right=statements.images[right],
                statement=statements.statements[n],
                label=label,
                given=given,
                probability=sure if given else 1 - sure,
                type=statements.types[n],
            )
        )
    return StatementResults(
        num_statements={"presence": 800, "side": 800, "all": 1600},
        accuracy={"presence": 0.934, "side": 0.826, "all": 0.880},
        baselines={"statement only": 0.5, "left picture and statement": 0.503, "pictures only": 0.5},
        examples=examples,
    )
