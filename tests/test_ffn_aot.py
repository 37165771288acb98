"""The experts' kernels built ahead of time for three generations of GPUs, at the tiles of real sizes."""

import pytest
from triton_aot import Build, Job, check_build, compile_ahead

from vlmo_fast.kernels.ffn import tiles_for

DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
BOUNDS = dict.fromkeys(("start0", "size0", "start1", "size1", "start2", "size2"), "i32")


def job(
    name: str, capability: int, rows: int, width: int = 768, dtype: str = "bf16", num_groups: int = 2, **options: bool
) -> Job:
    """A product kernel as its launcher calls it; widths and hidden widths are multiples of 16, or not."""
    kernel = name.split("_")[1]
    columns = 4 * width if kernel in ("fc1", "dgrad2") else width
    tiles = tiles_for(kernel, capability, DTYPES[dtype], rows, columns)._asdict()
    num_warps, num_stages, _ = tiles.pop("num_warps"), tiles.pop("num_stages"), tiles.pop("residents")
    use_tma = capability >= 90
    m, n, k = tiles["BLOCK_M"], tiles["BLOCK_N"], tiles["BLOCK_K"]
    b_block = (k, n) if "bwd" in name else (n, k)
    three = lambda stem, kind: {f"{stem}{group}_ptr": kind for group in range(3)}
    descriptor = lambda block: f"tensordesc<{dtype}[{block[0]}, {block[1]}]>"
    blocks = {"a_ptr": (m, k)} | three("b", b_block)
    operands = {name: descriptor(block) if use_tma else f"*{dtype}" for name, block in blocks.items()}
    half, single = f"*{dtype}", "*fp32"
    sizes = {"num_rows": "i32", "F": "i32", "D": "i32"}
    own = {
        "fwd_fc1": three("fc1_bias", half) | {"z_ptr": half, "h_ptr": half},
        "fwd_fc2": three("fc2_bias", half)
        | dict.fromkeys(("x_ptr", "layer_scale_ptr", "row_scale_ptr", "out_ptr"), half)
        | {"x_stride": "i32"},
        "bwd_dgrad2": three("shift", single)
        | three("slope", single)
        | dict.fromkeys(("z_ptr", "row_scale_ptr", "d_z_ptr", "h_ptr"), half)
        | dict.fromkeys(("row_sums_ptr", "column_sums_ptr"), single),
        "bwd_dgrad1": three("norm_weight", half)
        | dict.fromkeys(("x_ptr", "grad_ptr", "row_scale_ptr", "d_x_ptr"), half)
        | dict.fromkeys(("statistics_ptr", "row_sums_ptr", "column_sums_ptr"), single)
        | dict.fromkeys(("x_stride", "num_sums", "num_row_tiles"), "i32"),
    }[name]
    defaults = {
        "fwd_fc1": {"SAVE": True},
        "fwd_fc2": {"HAS_LAYER_SCALE": True, "HAS_ROW_SCALE": True},
        "bwd_dgrad2": {"WRITE_H": True, "HAS_ROW_SCALE": True},
        "bwd_dgrad1": {"HAS_ROW_SCALE": True},
    }[name]
    return Job(
        f"vlmo_fast.kernels.ffn:_mome_ffn_{name}_kernel",
        operands | own | BOUNDS | sizes,
        defaults | options | {"NUM_GROUPS": num_groups, "SWIZZLE": 8, "USE_TMA": use_tma, "PRECISION": "tf32"} | tiles,
        divisible=("F", "D") + (("x_stride",) if "x_stride" in own else ()),
        num_warps=num_warps,
        num_stages=num_stages,
    )


KERNELS = ["fwd_fc1", "fwd_fc2", "bwd_dgrad2", "bwd_dgrad1"]
NORM = Job(
    "vlmo_fast.kernels.ffn:_mome_ffn_norm_kernel",
    dict.fromkeys(("x_ptr", "normed_ptr"), "*bf16")
    | {f"norm_{name}{group}_ptr": "*bf16" for name in ("weight", "bias") for group in range(3)}
    | BOUNDS
    | {"statistics_ptr": "*fp32", "num_rows": "i32", "D": "i32", "x_stride": "i32", "eps": "fp32"},
    {"HAS_STATISTICS": False, "SAVE": True, "NUM_GROUPS": 2, "BLOCK_M": 4, "BLOCK_N": 1024},
    divisible=("D", "x_stride"),
)


def check(build: Build) -> None:
    check_build(build)
    if build.capability >= 90:
        assert build.count("UTMALDG") > 0  # operands come through the copy engine
    assert not build.serialized


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_training_sizes(capability: int) -> None:
    """Widths 768 and 1024 share a build: they are arguments, and the tiles are the same."""
    for width in (768, 1024):
        jobs = [job(name, capability, 32768, width) for name in KERNELS]
        assert jobs == [job(name, capability, 32768, 768) for name in KERNELS]
    *products, norm = compile_ahead(*jobs, NORM, capability=capability)
    for build in products:
        check(build)
    check_build(norm, tensor_cores=False)
    assert norm.count("LDG") > 0


def test_width_544() -> None:
    """2176 = 17 x 128 hidden channels, 544 = 4.25 x 128 of the model."""
    jobs = [job(name, 90, 32768, 544) for name in ("fwd_fc1", "fwd_fc2")]
    assert jobs[0].constexprs["BLOCK_N"] == 128
    for build in compile_ahead(*jobs, capability=90):
        check(build)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("case", ["one pair", "inference", "three groups", "fp16", "tf32"])
def test_other_builds(capability: int, case: str) -> None:
    rows = 210 if case == "one pair" else 32768
    dtype = {"fp16": "fp16", "tf32": "fp32"}.get(case, "bf16")
    groups = 3 if case == "three groups" else 1 if case == "one pair" else 2
    jobs = [job(name, capability, rows, dtype=dtype, num_groups=groups) for name in KERNELS]
    if case == "inference":
        jobs = [job("fwd_fc1", capability, rows, SAVE=False), job("fwd_fc2", capability, rows, HAS_ROW_SCALE=False)]
    for build in compile_ahead(*jobs, capability=capability):
        if case == "tf32" and capability == 100:
            check_build(build, tensor_cores=False)
            assert "tcgen05.mma" in build.ptx
        else:
            check(build)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [210, 32768])
@pytest.mark.parametrize("capability", [89, 120])
def test_gpus_with_less_shared_memory(capability: int, rows: int) -> None:
    """Ada and the workstation Blackwells: 99 KiB a block."""
    for build in compile_ahead(*(job(name, capability, rows) for name in KERNELS), capability=capability):
        check(build)
