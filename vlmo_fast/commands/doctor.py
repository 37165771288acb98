"""`vlmo-fast doctor`: what is here, what each op runs on, how to get the rest."""

from __future__ import annotations

import argparse
import json

from vlmo_fast.commands import options
from vlmo_fast.doctor import examine, render


def configure(parser: argparse.ArgumentParser) -> None:
    """Describes the command."""
    parser.description = """\
Show what is installed, which implementation each op uses on each device and why, and the exact command for each missing
part. Nothing is changed. The exit status is 1 where torch is missing."""
    options.add_json(parser, "print JSON instead of tables")


def run(args: argparse.Namespace) -> int:
    """Prints the report."""
    report = examine()
    print(json.dumps(report, indent=2) if args.json else render(report))
    return 0 if report["torch"] else 1
