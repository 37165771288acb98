"""Tests on several processes, which talk through gloo."""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing


def run_ranks(check: Callable[[int, int], None], size: int) -> None:
    """`check(rank, size)` on `size` processes of one thread, in a process group; a failure of one fails."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_run_rank, (size, str(Path(folder, "rendezvous")), check), nprocs=size)


def _run_rank(rank: int, size: int, rendezvous: str, check: Callable[[int, int], None]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(rendezvous, size), rank=rank, world_size=size)
    check(rank, size)  # if it fails, this process is the first to go, and what it says is what is reported
    dist.barrier()
    # Without the interpreter's end. Torch's caches keep the group, so gloo's threads are still there; one that frees a
    # tensor then asks for Python's lock, is stopped within a destructor, and the process aborts ("terminate called
    # without an active exception"): seen in one of five runs of four processes, torch 2.13.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
