"""`vlmo-fast demo`: the main job on real input, and a report of it."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlmo_fast import demo
from vlmo_fast.commands import options
from vlmo_fast.requirements import require


def configure(parser: argparse.ArgumentParser) -> None:
    """Describes the command."""
    parser.description = """\
Train one small VLMo on captioned scenes and easy-VQA (about four minutes on two CPU cores), then measure what the paper
promises of one network: retrieval as a dual encoder, answers as a fusion encoder."""
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="folder to write (demo-output)")
    parser.add_argument("--seed", type=int, default=0, help="seed of network and batches (0)")
    parser.add_argument(
        "--steps", type=options.positive, help="training steps, instead of the recipe's; fewer learn less"
    )
    parser.add_argument(
        "--split",
        choices=("test", "validation"),
        default="test",
        help="what to measure on; choices are made on validation",
    )


def run(args: argparse.Namespace) -> None:
    """Trains, measures, writes the report, and prints the outcome."""
    require("demo", *demo.NEEDS, extra="demo")
    if args.output.exists() and not args.output.is_dir():
        raise NotADirectoryError(f"--output must be a folder, got the file {args.output}")
    args.output.mkdir(parents=True, exist_ok=True)

    from vlmo_fast.demo.recipe import Recipe
    from vlmo_fast.demo.report import write_report

    recipe = Recipe(seed=args.seed)
    if args.steps is not None:
        recipe = recipe.shortened(args.steps)
    results = demo.run(recipe, args.output, split=args.split)
    results.save(args.output / "results.json")
    report = args.output / "report.html"
    write_report(results, report)
    print(demo.summary(results))
    print(f"\nReport: {report.resolve()}")
