"""Kernels run interpreted where no GPU is, are built for three generations, and the tools see what they should."""

import os

import pytest
import torch
from triton_aot import Job, check_build, compile_ahead

MATMUL = Job(
    "triton_probe:matmul_kernel",
    {"a": "*bf16", "b": "*bf16", "c": "*bf16", "K": "i32"},
    {"BLOCK": 64},
    divisible=("K",),
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU here")
def test_kernels_run_in_the_interpreter() -> None:
    from triton_probe import matmul_kernel

    a, b, c = torch.randn(16, 32), torch.randn(32, 16), torch.empty(16, 16)
    matmul_kernel[(1,)](a, b, c, 32, BLOCK=16)
    torch.testing.assert_close(c, a @ b)
    assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_a_matmul_takes_the_tensor_cores_of_each_generation(capability: int) -> None:
    (build,) = compile_ahead(MATMUL, capability=capability)
    check_build(build)
    assert 16 <= build.registers <= 255
    assert build.shared >= 2 * 64 * 64 * 2


def test_spills_are_seen() -> None:
    job = Job("triton_probe:spilling_kernel", {"a": "*fp32", "c": "*fp32"}, {"BLOCK": 4096}, num_warps=1)
    (build,) = compile_ahead(job, capability=90)
    assert build.spills > 0
    with pytest.raises(AssertionError, match="local memory"):
        check_build(build, tensor_cores=False)


def test_an_argument_left_out_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"arguments that only one side has: \['K'\]"):
        compile_ahead(Job(MATMUL.kernel, {"a": "*bf16", "b": "*bf16", "c": "*bf16"}, {"BLOCK": 64}), capability=90)
