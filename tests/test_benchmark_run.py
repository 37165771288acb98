"""The options of `pytest benchmarks`: what is gone on with, and what ends the process."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import conftest


def config(path, resume=True):
    return SimpleNamespace(option=SimpleNamespace(results=path, resume=resume, profile=None))


def test_what_stands_in_the_file_is_left_out_however_it_ended(tmp_path):
    path = tmp_path / "run.json"
    assert conftest.measured(config(path)) == set()
    path.write_text(json.dumps({"groups": [{"benchmark": "a"}, {"benchmark": "b", "failure": "did not end"}]}))
    assert conftest.measured(config(path)) == {"a", "b"}
    assert conftest.measured(config(path, resume=False)) == set()


def test_resume_needs_a_file():
    with pytest.raises(pytest.UsageError, match="--resume needs --results FILE"):
        conftest.pytest_configure(config(None))


def test_a_lost_gpu_ends_the_process_with_a_status_of_its_own(monkeypatch):
    def lost(device=None):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")

    conftest.leave(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    conftest.leave(torch.device("cpu"))
    with pytest.raises(pytest.exit.Exception, match="no longer answers: CUDA error: an illegal memory access") as ended:
        conftest.leave(torch.device("cuda"))
    assert ended.value.returncode == conftest.DEVICE_LOST
