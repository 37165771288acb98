"""Builds Triton kernels ahead of time, for GPUs that this machine need not have, and tells what came out.

    job = Job("vlmo_fast.kernels.ffn:_kernel", {"x": "*bf16", "rows": "i32"}, {"BLOCK_M": 128}, num_warps=8)
    (build,) = compile_ahead(job, capability=90)
    assert build.spills == 0 and build.count("HGMMA") > 0

The compiler runs in a process of its own, without Triton's interpreter, which the tests switch on (conftest.py).
Triton's package carries ptxas, cuobjdump and nvdisasm; its cache makes the second build of a kernel free.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# Shared memory that one block may have, bytes: CUDA C++ Programming Guide, "Compute Capabilities".
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
TENSOR_CORE_SASS = {
    80: "HMMA",
    89: "HMMA",
    90: "HGMMA",
    100: "UTCHMMA",
    120: "HMMA",
}  # half-precision (and TF32) products of each generation
TENSOR_CORE_PTX = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma", 120: "mma.sync"}


@dataclass(frozen=True)
class Job:
    """One build.

    Attributes:
        kernel: "module:name" of a `triton.jit` function.
        signature: type of each argument that is no constexpr, "*bf16", "i32", "fp32", ...; in any order.
        constexprs: values of the others.
        divisible: integer arguments that are multiples of 16; pointers always are.
        unaligned: pointers that are not.
        num_warps: warps of a block.
        num_stages: depth of the software pipeline.
        max_registers: of a thread; None leaves it to ptxas, which may spill to fit more blocks.
    """

    kernel: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    divisible: tuple[str, ...] = ()
    unaligned: tuple[str, ...] = ()
    num_warps: int = 4
    num_stages: int = 3
    max_registers: int | None = None


@dataclass(frozen=True)
class Build:
    """What the compiler made of a job.

    Attributes:
        capability: 80, 89, 90, 100 or 120.
        registers: of a thread.
        stack: bytes of a thread.
        local: bytes of local memory of a thread.
        shared: bytes of shared memory of a block, static and dynamic.
        spills: instructions that load or store local memory (LDL, STL).
        ptx: Triton's output.
        sass: machine code as text.
    """

    capability: int
    registers: int
    stack: int
    local: int
    shared: int
    spills: int
    ptx: str
    sass: str

    @property
    def serialized(self) -> bool:
        """Whether each WGMMA is waited for before the next is issued, which ptxas reports to Triton's log alone."""
        return 0 < self.count("HGMMA") <= self.count(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0")

    @property
    def overtaken(self) -> bool:
        """Whether some path leads from a read of tensor memory to a product into it without a barrier.

        One warp issues the product; without a barrier the others may not have read yet.
        """
        lines = self.ptx.splitlines()
        labels = {label[1]: at for at, line in enumerate(lines) if (label := re.match(r"(\$L\w+):", line))}
        reached: set[int] = set()
        ahead = [at for at, line in enumerate(lines) if "tcgen05.ld" in line]
        while ahead:
            at = ahead.pop()
            branch = re.match(r"\s*(@\S+\s+)?(?:bra(?:\.uni)?\s+(\$L\w+)|ret);", lines[at])
            following = [labels[branch[2]]] if branch and branch[2] else []
            if not branch or branch[1]:
                following.append(at + 1)
            for line in following:
                if line < len(lines) and line not in reached and "bar.sync" not in lines[line]:
                    reached.add(line)
                    ahead.append(line)
        return any("tcgen05.mma" in lines[line] for line in reached)

    def count(self, instruction: str) -> int:
        """How many machine instructions start with `instruction`."""
        return len(re.findall(rf"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?{instruction}\b", self.sass, re.MULTILINE))


def compile_ahead(*jobs: Job, capability: int) -> list[Build]:
    """Compile `jobs` for one capability, in one process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[1]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "tests")])
    with tempfile.TemporaryDirectory() as folder:
        request, answer = Path(folder, "jobs.json"), Path(folder, "builds.json")
        request.write_text(json.dumps({"capability": capability, "jobs": [asdict(job) for job in jobs]}))
        command = [sys.executable, __file__, str(request), str(answer)]
        run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"building for sm_{capability} failed:\n{run.stdout[-4000:]}{run.stderr[-8000:]}")
        return [Build(**build) for build in json.loads(answer.read_text())]


def check_build(build: Build, *, tensor_cores: bool = True) -> None:
    """What every kernel here must keep: no spills, no local memory, shared memory that fits, tensor cores in use.

    Nor may a product overtake a read of tensor memory.
    """
    assert build.spills == 0, f"{build.spills} instructions on local memory"
    assert build.stack == 0, f"{build.stack} bytes of stack"
    assert build.local == 0, f"{build.local} bytes of local memory"
    assert build.shared <= SHARED_LIMIT[build.capability], f"{build.shared} bytes of shared memory"
    assert build.registers <= 255
    assert not build.overtaken, "a product into tensor memory that other warps may still read"
    if tensor_cores:
        assert TENSOR_CORE_PTX[build.capability] in build.ptx
        assert build.count(TENSOR_CORE_SASS[build.capability]) > 0


def _main(request: Path, answer: Path) -> None:
    """The other process: compile, then read what Triton's own copies of NVIDIA's tools say."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    content = json.loads(request.read_text())
    capability = content["capability"]
    builds = []
    for job in content["jobs"]:
        module, _, name = job["kernel"].partition(":")
        kernel = getattr(importlib.import_module(module), name)
        while not isinstance(kernel, triton.runtime.JITFunction):  # an autotuner or a heuristic around it
            kernel = kernel.fn
        types, constexprs = job["signature"], job["constexprs"]
        wrong = set(kernel.arg_names) ^ (set(types) | set(constexprs))
        assert not wrong, f"{name}: arguments that only one side has: {sorted(wrong)}"
        signature = {arg: "constexpr" if arg in constexprs else types[arg] for arg in kernel.arg_names}
        aligned = [
            index
            for index, arg in enumerate(kernel.arg_names)
            if (signature[arg].startswith("*") and arg not in job["unaligned"]) or arg in job["divisible"]
        ]
        source = ASTSource(
            kernel,
            signature=signature,
            constexprs=constexprs,
            attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
        )
        options = {"num_warps": job["num_warps"], "num_stages": job["num_stages"], "maxnreg": job["max_registers"]}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        builds.append(_examine(compiled, capability))
    answer.write_text(json.dumps(builds))


def _examine(compiled: Any, capability: int) -> dict[str, Any]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])

        def tool(path: str, *options: str) -> str:
            return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout

        usage = tool(knobs.nvidia.cuobjdump.path, "--dump-resource-usage")
        sass = tool(knobs.nvidia.nvdisasm.path, "-c")
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    build = Build(
        capability=capability,
        registers=numbers["REG"],
        stack=numbers["STACK"],
        local=numbers["LOCAL"],
        shared=max(numbers["SHARED"], compiled.metadata.shared),
        spills=0,
        ptx=compiled.asm["ptx"],
        sass=sass,
    )
    return asdict(build) | {"spills": build.count("LDL") + build.count("STL")}


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
