"""Options that several commands have, written once."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["UsageError", "add_device", "add_dtype", "add_json", "add_vocab", "dtype_of", "positive"]


class UsageError(Exception):
    """Options that do not go together: the usage is printed with the message."""


def positive(text: str) -> int:
    """The type of a number that must be 1 at least."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def add_device(parser: argparse._ActionsContainer) -> None:
    """`--device`, for `vlmo_fast.load`."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU where there is one)")


def add_dtype(parser: argparse._ActionsContainer, purpose: str, *, default: str | None = None) -> None:
    """`--dtype`; `dtype_of` reads it."""
    names = ("float32", "float16", "bfloat16")
    parser.add_argument("--dtype", choices=names, default=default, help=purpose)


def dtype_of(args: argparse.Namespace) -> torch.dtype | None:
    """What `--dtype` says."""
    import torch

    dtype: torch.dtype | None = getattr(torch, args.dtype) if args.dtype else None
    return dtype


def add_vocab(parser: argparse._ActionsContainer, purpose: str) -> None:
    """`--vocab`, for `vlmo_fast.load`."""
    parser.add_argument("--vocab", metavar="FILE", help=f"{purpose} ('bert': the released models')")


def add_json(parser: argparse._ActionsContainer, purpose: str = "report as JSON") -> None:
    """`--json`."""
    parser.add_argument("--json", action="store_true", help=purpose)
