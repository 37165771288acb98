"""What the compiler made of an op's kernels, and the limits that follow, with no GPU.

    python -m benchmarks.profile                      the ops it knows
    python -m benchmarks.profile mome_ffn [--capability 90 100] [--flops 790e12] [--bandwidth 4.3e12] [--json]

For each kernel, built for real sizes (Triton's: jobs of the kernel's own tests; CUDA's: `vlmo-fast build cuda`):
registers, shared memory, spills, the blocks and warps of one multiprocessor that these allow, the mix of the machine
instructions as they stand in the code (not as often as they run), and the roofline: the operations and the bytes of a
real problem over the two ceilings. Those default to what torch reached on an H200: 790 TFLOP/s of 8192^3 bfloat16
matmul, 4.3 TB/s of copy.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmo_fast import extensions

ROOT = Path(__file__).resolve().parents[1]

# Of one multiprocessor: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
REGISTERS, WARPS, BLOCKS = 65536, 64, 32
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
RESERVED_SHARED = 1024  # of each block, by the system
REGISTER_UNIT = 256  # registers are handed to a warp in this many

CLASSES = {  # of machine instructions, the first that fits
    "tensor cores": r"HGMMA|HMMA|UTC\w*MMA|QGMMA|IGMMA|IMMA|DMMA",
    "exp, rsqrt and the like": r"MUFU",
    "float arithmetic": r"FFMA|FADD|FMUL|FSEL|FMNMX|FSETP|FSET|HFMA2|HADD2|HMUL2|HMNMX2|DFMA|DADD|DMUL|FCHK|FSWZADD",
    "conversions": r"F2F|F2FP|F2I|I2F|I2FP|HADD2\.F32|PRMT",
    "global memory": r"LDG|LDGSTS|STG|UTMALDG|UTMASTG|UTMAREDG|UBLKCP|RED|ATOM|ATOMG|REDG|LDGDEPBAR|UTMAPF",
    "shared memory": r"LDS|STS|LDSM|STSM|ATOMS|LDT|STT|LDTM|STTM|UTCCP|ARRIVES",
    "local memory": r"LDL|STL",
    "shuffles and votes": r"SHFL|VOTE|VOTEU|MATCH|REDUX",
    "waiting": r"BAR|SYNCS|DEPBAR|WARPSYNC|WARPGROUP|WARPGROUPSET|MEMBAR|FENCE|NANOSLEEP|ERRBAR|CCTL|ELECT|UCGABAR_ARV",
    "control": r"BRA|EXIT|BSSY|BSYNC|BREAK|CALL|RET|JMP|BRX|NOP|PLOP3|UPLOP3|ISETP|UISETP|P2R|R2P|BMOV",
    "integers and moves": r"\w+",
}


@dataclass(frozen=True)
class Demand:
    """What a kernel's problem needs: operations and bytes, and the problem in words."""

    problem: str
    flop: float
    bytes: float


@dataclass(frozen=True)
class Kernel:
    """What the compiler made of one kernel.

    Attributes:
        name: of the function.
        num_warps: of a block.
        registers: of a thread.
        shared: bytes of a block.
        spills: instructions on local memory.
        sass: machine code as text.
    """

    name: str
    num_warps: int
    registers: int
    shared: int
    spills: int
    sass: str


class ProfileError(Exception):
    """There is nothing to read; the message says what to do."""


@dataclass(frozen=True)
class Profile:
    """One kernel on one capability.

    Attributes:
        kernel: its name.
        capability: 80, 90 or 100.
        num_warps: of a block.
        registers: of a thread.
        shared: bytes of a block.
        spills: instructions on local memory.
        blocks: that one multiprocessor can hold at once.
        bound_by: what allows no more.
        occupancy: warps at once, of those that a multiprocessor can hold.
        mix: share of each class of instructions, as they stand in the code.
        instructions: how many there are.
        problem: of the roofline, in words.
        compute_seconds: its operations over the ceiling.
        memory_seconds: its bytes over the ceiling.
    """

    kernel: str
    capability: int
    num_warps: int
    registers: int
    shared: int
    spills: int
    blocks: int
    bound_by: str
    occupancy: float
    mix: dict[str, float]
    instructions: int
    problem: str
    compute_seconds: float
    memory_seconds: float


def occupancy(capability: int, registers: int, shared: int, num_warps: int) -> tuple[int, str]:
    """Blocks that one multiprocessor can hold, and what allows no more.

    Args:
        capability: 80, 90 or 100.
        registers: of a thread.
        shared: bytes of a block.
        num_warps: of a block.
    """
    of_a_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    limits = {
        "registers": REGISTERS // (of_a_warp * num_warps),
        "shared memory": SHARED[capability] // (shared + RESERVED_SHARED),
        "warps": WARPS // num_warps,
        "blocks": BLOCKS,
    }
    bound = min(limits, key=lambda name: limits[name])
    return limits[bound], bound


def instruction_mix(sass: str) -> tuple[dict[str, float], int]:
    """Share of each class among the instructions of a disassembly, and their number."""
    names = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ +)?([A-Z][A-Z0-9_]*)", sass, re.MULTILINE)
    counts = dict.fromkeys(CLASSES, 0)
    for name in names:
        if name != "NOP":
            counts[next(kind for kind, pattern in CLASSES.items() if re.fullmatch(pattern, name))] += 1
    total = sum(counts.values())
    return {kind: count / max(total, 1) for kind, count in counts.items() if count}, total


def profile(op: str, capability: int, flops: float, bandwidth: float) -> list[Profile]:
    """Build the kernels of an op for one capability and describe them."""
    profiles = []
    for kernel, demand in OPS[op](capability):
        blocks, bound = occupancy(capability, kernel.registers, kernel.shared, kernel.num_warps)
        mix, total = instruction_mix(kernel.sass)
        profiles.append(
            Profile(
                kernel=kernel.name,
                capability=capability,
                num_warps=kernel.num_warps,
                registers=kernel.registers,
                shared=kernel.shared,
                spills=kernel.spills,
                blocks=blocks,
                bound_by=bound,
                occupancy=blocks * kernel.num_warps / WARPS,
                mix=mix,
                instructions=total,
                problem=demand.problem,
                compute_seconds=demand.flop / flops,
                memory_seconds=demand.bytes / bandwidth,
            )
        )
    return profiles


def from_triton(entries: Sequence[tuple[Any, Demand]], capability: int) -> list[tuple[Kernel, Demand]]:
    """Build the jobs of `tests/triton_aot.py`."""
    from triton_aot import compile_ahead

    builds = compile_ahead(*(job for job, _ in entries), capability=capability)
    found = []
    for (job, demand), build in zip(entries, builds, strict=True):
        name = job.kernel.partition(":")[2].strip("_").removesuffix("_kernel")
        kernel = Kernel(name, job.num_warps, build.registers, build.shared, build.spills, build.sass)
        found.append((kernel, demand))
    return found


def from_library(capability: int) -> dict[str, tuple[int, int, str]]:
    """Of each kernel of the CUDA library with code for a capability: registers, spills, code."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        raise ProfileError("triton is missing; its package carries cuobjdump")
    if not extensions.is_built("cuda"):
        raise ProfileError(f"the cuda extension is not built; to build it: {extensions.build_command('cuda')}")
    tool = str(Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    target = f"sm_{capability}{'a' if capability == 90 else ''}"

    def dump(option: str) -> str:
        command = [tool, option, "--gpu-architecture", target, str(extensions.library("cuda"))]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = re.findall(r"Function (\w+):\s+REG:(\d+)", dump("--dump-resource-usage"))
    functions = re.split(r"^\s*Function : ", dump("--dump-sass"), flags=re.MULTILINE)[1:]
    code = dict(function.split("\n", 1) for function in functions)
    local = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ +)?(?:LDL|STL)\b", re.MULTILINE)
    return {name: (int(registers), len(local.findall(code[name])), code[name]) for name, registers in usage}


def contrastive_loss(capability: int) -> list[tuple[Kernel, Demand]]:
    """65,536 pairs, D = 768, bfloat16: the sums of all rows and columns; the gradients of a block of 8,192 rows."""
    # Of shared memory a launcher asks for its struct Shared: operands of four stages; for sm_90 barriers and sums too.
    chosen = {
        80: {"similarity_sums_sm80": (8, 64 * 1024), "similarity_gradient_sm80": (8, 64 * 1024)},
        90: {"similarity_sums_sm90": (12, 140352), "similarity_gradient_sm90": (12, 140352)},
    }.get(capability, {})
    pairs, width, rows, half = 65536, 768, 8192, 2
    demands = {
        "sums": Demand(f"{pairs:,} pairs", 2.0 * pairs**2 * width, 2.0 * half * pairs * width),
        "gradient": Demand(
            f"{rows:,} of {pairs:,} rows",
            2.0 * rows * pairs * width,
            half * float((rows + pairs) * width + rows * pairs),
        ),
    }
    found = []
    for mangled, (registers, spills, sass) in from_library(capability).items():
        for name, (warps, shared) in chosen.items():
            if f"_{name}_kernel" in mangled and "bfloat16" in mangled:
                kernel = Kernel(name, warps, registers, shared, spills, sass)
                found.append((kernel, demands[name.split("_")[1]]))
    return found


def mome_ffn(capability: int) -> list[tuple[Kernel, Demand]]:
    """Base, 32,768 tokens, bfloat16, two experts."""
    tests = importlib.import_module("test_ffn_aot")
    rows, width, hidden, half = 32768, 768, 3072, 2
    product, weights = 2.0 * rows * width * hidden, half * 2 * width * hidden
    narrow, wide = half * rows * width, half * rows * hidden
    traffic = {  # in, out
        "fwd_fc1": narrow + weights + 2 * wide,
        "fwd_fc2": wide + weights + 2 * narrow,
        "bwd_dgrad2": narrow + weights + 3 * wide,
        "bwd_dgrad1": wide + weights + 3 * narrow,
    }
    problem = f"base, {rows:,} tokens"
    entries = [(tests.job(k, capability, rows), Demand(problem, product, traffic[k])) for k in tests.KERNELS]
    entries.append((tests.NORM, Demand(problem, 8.0 * rows * width, 2.0 * narrow)))
    return from_triton(entries, capability)


def packed_attention(capability: int) -> list[tuple[Kernel, Demand]]:
    """Base, 256 pairs of 210 tokens, bfloat16, with a bias."""
    tests = importlib.import_module("test_packed_attention_kernels")
    sequences, length, width, heads, half = 256, 210, 768, 12, 2
    product, rows = 2.0 * sequences * length**2 * width, half * sequences * length * width
    bias = half * heads * length**2
    demands = {  # products of S x S x d, and row matrices in and out
        "fwd": (2, 4),
        "bwd_dq": (3, 6),
        "bwd_dkv": (4, 6),
        "bwd_dbias": (2, 4),
    }
    problem = f"base, {sequences} pairs of {length} tokens"
    entries = [
        (tests.job(kind, capability), Demand(problem, demands[kind][0] * product, demands[kind][1] * rows + bias))
        for kind in tests.KERNELS
    ]
    return from_triton(entries, capability)


OPS: dict[str, Callable[[int], list[tuple[Kernel, Demand]]]] = {
    "mome_ffn": mome_ffn,
    "packed_attention": packed_attention,
    "contrastive_loss": contrastive_loss,
}


def show(item: Profile) -> str:
    """A profile as lines of text."""
    floor = max(item.compute_seconds, item.memory_seconds)
    side = "arithmetic" if item.compute_seconds >= item.memory_seconds else "memory"
    mix = ", ".join(f"{kind} {share:.1%}" for kind, share in sorted(item.mix.items(), key=lambda pair: -pair[1]))
    return (
        f"{item.kernel}, sm_{item.capability}\n"
        f"  {item.registers} registers, {item.shared / 1024:.1f} KiB shared, {item.spills} spills, "
        f"{item.num_warps} warps; {item.blocks} blocks a multiprocessor ({item.bound_by}), "
        f"{item.occupancy:.0%} of its warps\n"
        f"  {item.instructions:,} instructions: {mix}\n"
        f"  {item.problem}: arithmetic {item.compute_seconds * 1e6:.0f} µs, memory {item.memory_seconds * 1e6:.0f} µs; "
        f"not below {floor * 1e6:.0f} µs ({side})"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile", description=__doc__.partition("\n")[0])
    parser.add_argument("op", nargs="?", help=f"one of {', '.join(OPS)}")
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90, 100], choices=sorted(SHARED))
    parser.add_argument("--flops", type=float, default=790e12, help="the matmul ceiling, FLOP/s (default: an H200's)")
    parser.add_argument(
        "--bandwidth", type=float, default=4.3e12, help="the copy ceiling, bytes/s (default: an H200's)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    if options.op is None:
        print("\n".join(OPS))
        return 0
    if options.op not in OPS:
        parser.error(f"op must be one of {', '.join(OPS)}, got {options.op}")
    sys.path.insert(0, str(ROOT / "tests"))
    try:
        found = [item for c in options.capability for item in profile(options.op, c, options.flops, options.bandwidth)]
    except ProfileError as error:
        print(f"benchmarks.profile: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps([asdict(item) for item in found], indent=1))
        return 0
    for item in found:
        print(show(item))
    for capability in sorted(set(options.capability) - {item.capability for item in found}):
        print(f"{options.op}: no code for sm_{capability}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
