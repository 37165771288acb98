"""Declares what pyproject.toml cannot: compiled extensions.

The metadata is all in pyproject.toml. Installing never needs a compiler, so nothing is compiled unless asked for:

    python setup.py build_ext --inplace       in a checkout; the same as `vlmo-fast build`
    python setup.py build_ext bdist_wheel     a wheel for this platform that holds the CPU library, for any Python

Both need torch to be there already, that is no build isolation.
"""

import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent


class BuildExtensions(Command):
    """Compiles the libraries of csrc/ with ninja (vlmo_fast/build.py)."""

    description = "compile the C++ and CUDA libraries"
    user_options: ClassVar = [
        ("inplace", "i", "leave the libraries in the checkout"),
        ("names=", None, "cpu, cuda or both"),
    ]
    boolean_options: ClassVar = ["inplace"]

    def initialize_options(self) -> None:
        """Defaults."""
        self.inplace = False
        self.names = "cpu"

    def finalize_options(self) -> None:
        """A wheel that holds a library is for one platform."""
        if not self.inplace:
            self.distribution.has_ext_modules = lambda: True

    def run(self) -> None:
        """Builds, and copies the libraries beside the modules that a wheel is made of."""
        sys.path.insert(0, str(ROOT))
        from vlmo_fast.build import build

        for name in self.names.replace(",", " ").split():
            library = build(name)
            if not self.inplace:
                target = Path(self.get_finalized_command("build").build_lib, "vlmo_fast", "_lib", library.name)
                self.mkpath(str(target.parent))
                self.copy_file(str(library), str(target))


class AnyPython(bdist_wheel):
    """The libraries use torch's stable ABI and nothing of Python's: only the platform goes into the wheel's tag."""

    def get_tag(self) -> tuple[str, str, str]:
        """As setuptools has it, for any Python."""
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(cmdclass={"build_ext": BuildExtensions, "bdist_wheel": AnyPython})
