"""The Triton kernels of packed attention: interpreted against the reference, and what the compiler makes of them."""

import numpy as np
import pytest
import torch
from test_packed_attention import check_rounding, leave_keys_out, pack, problem, run, with_large_bias
from triton_aot import Job, check_build, compile_ahead

from vlmo_fast import ops
from vlmo_fast.kernels import attention as kernels

GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch):
    """Triton's interpreter keeps bfloat16 as 16-bit integers, multiplies those, and rounds to bfloat16 downwards."""
    if GPU:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    multiply, convert = interpreter.InterpreterBuilder.create_dot, interpreter._convert_float

    def widened(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return multiply(self, widened(a), widened(b), *rest)

    def convert_float(data, source, target, rounding_mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, rounding_mode)
        rounded = torch.from_numpy(np.ascontiguousarray(data)).to(torch.bfloat16).view(torch.int16)
        return rounded.numpy().view(np.uint16)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(interpreter, "_convert_float", convert_float)


def compare(make, cls_only=False, condition=1.0, dtype=None):
    """Values and gradients of the kernels against the oracle, within the bounds of `tolerances`."""
    check_rounding(make, cls_only, "triton", condition, "cuda" if GPU else "cpu", dtype)


# Lengths around the tiles of 16 and 32 that short sequences get, in as few sequences as show them.
LENGTHS = [(15, 0), (3, 14), (0, 33), (0, 0), (16, 1), (17, 0)]


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize(
    ("dtype", "width", "bias", "cls_only"),
    [
        (torch.float32, 16, True, False),
        (torch.float16, 34, True, False),  # base_plus: masked inside the kernel
        (torch.bfloat16, 16, True, False),
        (torch.bfloat16, 34, False, True),
        (torch.float32, 16, True, True),
    ],
    ids=str,
)
def test_values_and_gradients(dtype, width, bias, cls_only):
    heads = 2 if dtype == torch.float32 else 1
    compare(
        lambda: problem(LENGTHS, heads=heads, width=width, dtype=dtype, bias=bias, cls_only=cls_only, gap=1),
        cls_only,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", [32, 64, 128])
def test_head_sizes(width, dtype):
    compare(lambda: problem([(5, 12), (7, 0)], heads=1, width=width, dtype=dtype))


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 0), (2, 0), (0, 1), (1, 1), (0, 2), (16, 0)],
        [(0, 196)],
        [(0, 197)],
        [(40, 197)],
        pytest.param([(40, 577)], marks=pytest.mark.slow),
        pytest.param([(40, 901)], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_real_lengths(lengths):
    """Up to 480 px, at the tiles that a GPU gets."""
    compare(lambda: problem(lengths, heads=1, width=64, dtype=torch.float16))


def test_large_bias():
    """Scores of hundreds: the softmax is nearly one key's, and exp of a score would overflow."""
    compare(lambda: with_large_bias(problem([(12, 9), (5, 0)], heads=1, width=16, dtype=torch.float32)), condition=1e4)


def test_keys_that_the_bias_leaves_out():
    """Among them all of a query's first tile."""

    def make():
        drawn = problem([(12, 9), (5, 0)], heads=1, width=16, dtype=torch.float32)
        leave_keys_out(drawn[0][3])
        return drawn

    compare(make)


def test_a_bias_wider_than_the_rows():
    """As under autocast: products in half precision, the bias and its gradient in float32."""

    def make():
        drawn = problem([(5, 12), (7, 0)], heads=1, width=16, dtype=torch.float16)
        drawn[0][3] = drawn[0][3].detach().float().requires_grad_()
        return drawn

    compare(make, dtype=torch.float16)


@pytest.mark.slow
@pytest.mark.timeout(900)  # a program of the interpreter takes 20 ms
def test_a_thousand_sequences():
    generator = torch.Generator().manual_seed(3)
    lengths = [tuple(torch.randint(0, 5, (2,), generator=generator).tolist()) for _ in range(1000)]
    compare(lambda: problem(lengths, heads=1, width=16, dtype=torch.float32))


@pytest.mark.usefixtures("nan_filled_empty")
@pytest.mark.parametrize("cls_only", [False, True], ids=["all", "cls"])
def test_bias_gradient_in_chunks(cls_only, monkeypatch):
    """Partial sums of two sequences each, some of which have no token in a tile."""
    monkeypatch.setattr(kernels, "_chunk", lambda *_: 2)
    lengths = [(2, 0), (1, 0), (0, 3), (2, 0), (1, 2)]
    compare(lambda: problem(lengths, heads=2, width=16, dtype=torch.float32, cls_only=cls_only), cls_only)


def test_few_chunks_of_many_sequences():
    """At least 16 sequences a chunk, about a thousand programs, and all sequences covered."""
    for sequences in (1, 15, 17, 256, 1000, 100_000):
        for programs in (1, 96, 5000):
            chunk = kernels._chunk(sequences, programs)
            assert chunk & (chunk - 1) == 0
            assert 1 <= chunk <= 1024
            assert chunk >= 16 or chunk >= sequences


def test_a_bias_with_padded_rows_is_not_copied():
    """Rows of 45 numbers at multiples of 8 can be read 16 bytes at a time; where they lie otherwise they are copied."""
    padded = torch.zeros(2, 45, 48)[..., :45]
    assert kernels._aligned(padded, 8) == (padded, 8)
    for other in (torch.zeros(2, 45, 45), torch.zeros(2 * 45 * 48 - 3).as_strided((2, 45, 45), (45 * 48, 48, 1))):
        copy, alignment = kernels._aligned(other, 8)
        assert alignment == 8
        assert copy.stride() == (45 * 48, 48, 1)
        assert torch.equal(copy, other)
    assert kernels._aligned(torch.zeros(2, 45, 45), 1)[1] == 1
    assert kernels._aligned(torch.zeros(2 * 45 * 48 + 1)[1:].view(2, 45, 48), 8)[1] == 1  # starts between multiples


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_base(dtype):
    compare(lambda: problem([(12, 197), (40, 197), (9, 0), (0, 197), (9, 0)], heads=12, width=64, dtype=dtype))


@pytest.mark.gpu
def test_a_captured_graph_takes_other_lengths():
    """Without a table on the host: as many sequences and rows, of lengths that only the device knows."""
    tensors, segments, _ = problem(
        [(12, 20), (7, 0)], heads=2, width=64, dtype=torch.bfloat16, places=80, text_places=40
    )
    query, key, value, bias = (x.detach().cuda() for x in tensors)
    table = segments.cuda()

    def step():
        return ops.packed_attention(query, key, value, table, bias, max_length=40, backend="triton")

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    other, _ = pack([(9, 0), (11, 19)], text_places=40)
    for composition in (segments, other):
        table.copy_(composition)
        graph.replay()
        assert torch.equal(out, step())


@pytest.mark.gpu
def test_the_same_bits_twice():
    tensors, segments, longest = problem([(12, 40)] * 40, heads=2, width=64, dtype=torch.bfloat16)
    tensors = [x.detach().cuda().requires_grad_() for x in tensors]
    seed = torch.randn_like(tensors[0])
    first, second = (
        torch.autograd.grad(run(tensors, segments.cuda(), longest, backend="triton"), tensors, seed) for _ in range(2)
    )
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


# What the compiler makes of them

KERNELS = ("fwd", "bwd_dq", "bwd_dkv", "bwd_dbias")
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


def job(
    kind, capability, dtype=torch.bfloat16, width=64, *, bias=True, bias_dtype=None, cls_only=False, max_length=237
):
    """A kernel as the launchers call it, with a bias in padded rows, of the queries' dtype where none is given."""
    kernel = getattr(kernels, f"_packed_attention_{kind}_kernel")
    names = kernel.arg_names if hasattr(kernel, "arg_names") else list(kernel.signature.parameters)
    block = max(16, 1 << (width - 1).bit_length())
    options = kernels._tiles(max_length, width, dtype, capability // 10)[kind]
    warps, stages, registers = options.pop("num_warps"), options.pop("num_stages"), options.pop("maxnreg")
    options |= {"HEAD_DIM": width, "BLOCK_D": block, "CLS_ONLY": cls_only, "PRECISION": kernels._precision(dtype)}
    options |= {"ALIGN": 8} | ({"CHUNK": 64} if kind == "bwd_dbias" else {"HAS_BIAS": bias})
    if kind == "bwd_dq":
        options["EXACT"] = dtype == torch.float32
    types = dict.fromkeys(("stats_ptr", "delta_ptr", "d_bias_ptr"), "*fp32") | {"segments_ptr": "*i32", "scale": "fp32"}
    types["bias_ptr"] = f"*{TYPES[bias_dtype or dtype]}"
    signature = {}
    for name in names:
        if name not in options:
            default = f"*{TYPES[dtype]}" if name.endswith("_ptr") else "i32"
            signature[name] = types.get(name, default)
    strides = tuple(name for name in signature if name.endswith("_stride") and name not in kernels._COUNTS)
    return Job(
        f"vlmo_fast.kernels.attention:_packed_attention_{kind}_kernel",
        signature,
        options,
        divisible=strides if width % 16 == 0 else (),
        num_warps=warps,
        num_stages=stages,
        max_registers=registers,
    )


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_builds(capability):
    """Base, 224 px, bfloat16: tensor cores, no spills, 16-byte copies into shared memory, also of the bias."""
    for kind, build in zip(
        KERNELS, compile_ahead(*(job(kind, capability) for kind in KERNELS), capability=capability), strict=True
    ):
        check_build(build)
        if (kind, capability) == ("bwd_dbias", 100):  # not pipelined there, see `_tiles`
            assert "ld.global.v4.b32" in build.ptx
        else:
            assert "cp.async.cg.shared.global" in build.ptx, kind
        assert "ld.global.b16" not in build.ptx or kind == "bwd_dbias", kind  # that one loads its bias once


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("dtype", "width", "options"),
    [
        (torch.float32, 64, {}),
        (torch.float16, 34, {"bias": False}),
        (torch.bfloat16, 32, {}),
        (torch.bfloat16, 128, {}),
        (torch.bfloat16, 64, {"max_length": 16}),
    ],
    ids=str,
)
def test_all_builds(capability, dtype, width, options):
    """Other dtypes, heads and lengths; where a tile is too small for newer instructions, Ampere's products serve."""
    jobs = [job(kind, capability, dtype, width, **options) for kind in KERNELS]
    for build in compile_ahead(*jobs, capability=capability):
        check_build(build, tensor_cores=False)
        assert any(build.count(name) for name in ("HMMA", "HGMMA", "UTCHMMA"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "width", "options"),
    [
        (torch.float32, 34, {}),
        (torch.bfloat16, 16, {}),
        (torch.bfloat16, 34, {}),
        (torch.bfloat16, 64, {"cls_only": True}),
        (torch.bfloat16, 64, {"bias_dtype": torch.float32}),  # autocast
    ],
    ids=str,
)
def test_more_builds_for_hopper(dtype, width, options):
    for build in compile_ahead(*(job(kind, 90, dtype, width, **options) for kind in KERNELS), capability=90):
        check_build(build, tensor_cores=False)
        assert build.count("HMMA") + build.count("HGMMA") > 0
