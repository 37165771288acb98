"""The C functions of the CPU library that are not ops: which instruction set its kernels use."""

import ctypes
from pathlib import Path

CAPABILITIES = ("baseline", "avx2", "avx512")


class CpuLibrary:
    """A library of `csrc/cpu`.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.vlmo_fast_cpu_capability.restype = ctypes.c_char_p
        self.library.vlmo_fast_cpu_use.restype = ctypes.c_bool

    @property
    def capability(self) -> str:
        """The instruction set in use."""
        return str(self.library.vlmo_fast_cpu_capability().decode())

    def use(self, name: str) -> bool:
        """Use one of `CAPABILITIES`; False where this CPU has it not."""
        return bool(self.library.vlmo_fast_cpu_use(name.encode()))
