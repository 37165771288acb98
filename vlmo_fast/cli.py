"""The command line: one word says what to do, the rest goes to that command's own parser."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple


class _Command(NamedTuple):
    """A module with `main(argv) -> int | None`, imported when the command is called and not before."""

    module: str
    help: str


_COMMANDS = {
    "build": _Command("vlmo_fast.build", "compile the C++ and CUDA extensions against the torch that is installed"),
    "convert": _Command(
        "vlmo_fast.convert", "make a folder for from_pretrained from a released VLMo or a BEiT, or back"
    ),
    "demo": _Command("vlmo_fast.demo", "train a small model on this machine and write a report of what it learned"),
    "embed": _Command("vlmo_fast.embed", "embed images and texts into one file, resumable"),
    "doctor": _Command("vlmo_fast.doctor", "show what is installed, what each op will run on, and how to get the rest"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's own) and returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        result = import_module(_COMMANDS[args.command].module).main(args.arguments)
    except KeyboardInterrupt:
        parser.exit(130, f"\nvlmo-fast {args.command}: stopped\n")
    except ModuleNotFoundError as error:
        if (error.name or "vlmo_fast").startswith("vlmo_fast"):  # ours: a bug, not something to install
            raise
        parser.exit(1, f"vlmo-fast {args.command}: {error}; `vlmo-fast doctor` says how to install it\n")
    return int(result or 0)


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, _COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {command.help}" for name, command in _COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="vlmo-fast",
        usage="%(prog)s [-h] [--version] COMMAND ...",
        description="VLMo, one vision-language model with modality experts.",
        epilog=f"commands:\n{commands}\n\n`%(prog)s COMMAND --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.add_argument("command", metavar="COMMAND", choices=sorted(_COMMANDS), help="one of the commands below")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="the command's own options")
    return parser


class _Version(argparse.Action):
    """Looks the version up only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import vlmo_fast

        print(f"vlmo_fast {vlmo_fast.__version__}")
        parser.exit()
