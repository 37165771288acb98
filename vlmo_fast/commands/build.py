"""`vlmo-fast build`: the C++ and CUDA libraries."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

from vlmo_fast import extensions
from vlmo_fast.build import BuildError, build, find_nvcc
from vlmo_fast.commands import options


def configure(parser: argparse.ArgumentParser) -> None:
    """Describes the command."""
    parser.description = """\
Compile the extensions against the torch that is installed, and print where they lie. What is up to date (same sources,
same release of torch) is left alone. No GPU is needed."""
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="cpu or cuda; without a name, cpu, and cuda if nvcc is here"
    )
    parser.add_argument(
        "--jobs", type=options.positive, help="compilations at a time (default: MAX_JOBS, or ninja's choice)"
    )
    parser.add_argument("--force", action="store_true", help="build even what is up to date")
    parser.add_argument("--optional", action="store_true", help="where it cannot be built, say so and succeed")
    options.add_json(parser, "print the libraries as a JSON object, name to path")


def run(args: argparse.Namespace) -> int:
    """Builds what is named; the exit status is 1 where that fails."""
    unknown = [name for name in args.names if name not in extensions.NAMES]
    if unknown:
        raise options.UsageError(f"NAME must be one of {', '.join(extensions.NAMES)}, got {unknown[0]}")
    names = args.names or [name for name in extensions.NAMES if name == "cpu" or find_nvcc()]
    built: dict[str, str] = {}
    status = 0
    try:
        for name in names:
            built[name] = str(build(name, jobs=args.jobs, force=args.force, report=_progress(name)))
            if not args.json:
                print(f"vlmo-fast build: {built[name]}")
    except BuildError as error:
        print(f"vlmo-fast build: {error}", file=sys.stderr)
        status = 0 if args.optional else 1
    if args.json:
        print(json.dumps(built, indent=2))
    return status


def _progress(name: str) -> Callable[[int, int], None]:
    """Says what is being compiled; on a terminal, how far it is, too."""

    def report(done: int, total: int) -> None:
        line = f"vlmo-fast build: compiling the {name} extension, {done} of {total} files"
        if sys.stderr.isatty():
            print(f"\r{line}", end="\n" if done == total else "", file=sys.stderr, flush=True)
        elif done == 0:
            print(f"vlmo-fast build: compiling the {name} extension, {total} files", file=sys.stderr, flush=True)

    return report
