"""The command line: one word says what to do, the rest goes to that command's own parser."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

__all__ = ["COMMANDS", "main"]

# A row a command: its help. Its module, of the same name in `vlmo_fast.commands`, is imported when it is called.
COMMANDS = {
    "build": "compile the C++ and CUDA extensions against the torch that is installed",
    "convert": "make a folder for from_pretrained from a released VLMo or a BEiT, or back",
    "demo": "train a small model on this machine and write a report of what it learned",
    "embed": "embed images and texts into one file; nothing is encoded twice",
    "doctor": "show what is installed, what each op will run on, and how to get the rest",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's own) and returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    return _run(args.command, args.arguments)


def _run(name: str, argv: Sequence[str]) -> int:
    """One command; what is wrong with its input or with this machine becomes one message."""
    from vlmo_fast.commands.options import UsageError
    from vlmo_fast.requirements import MissingPackageError

    who = f"vlmo-fast {name}"
    parser = argparse.ArgumentParser(prog=who, formatter_class=argparse.RawDescriptionHelpFormatter)
    try:
        command = import_module(f"vlmo_fast.commands.{name}")
        command.configure(parser)
        return int(command.run(parser.parse_args(argv)) or 0)
    except UsageError as error:
        parser.error(str(error))
    except KeyboardInterrupt as stop:
        print(f"\n{who}: {'; '.join(['stopped', *map(str, stop.args)])}", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if (error.name or "vlmo_fast").startswith("vlmo_fast"):  # ours: a bug, not something to install
            raise
        hint = "" if isinstance(error, MissingPackageError) else "; `vlmo-fast doctor` says how to install it"
        message = f"{error}{hint}"
    except (ValueError, TypeError, OSError, ImportError) as error:
        message = str(error)
    # Errors of a library function begin with its name, which is often the command's.
    print(f"{who}: {message.removeprefix(f'{name}: ')}", file=sys.stderr)
    return 1


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {purpose}" for name, purpose in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="vlmo-fast",
        usage="%(prog)s [-h] [--version] COMMAND ...",
        description="VLMo, one vision-language model with modality experts.",
        epilog=f"commands:\n{commands}\n\n`%(prog)s COMMAND --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.add_argument(
        "command", metavar="COMMAND", nargs="?", choices=sorted(COMMANDS), help="one of the commands below"
    )
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="the command's own options")
    return parser


class _Version(argparse.Action):
    """Looks the version up only when asked."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import vlmo_fast

        print(f"vlmo_fast {vlmo_fast.__version__}")
        parser.exit()
