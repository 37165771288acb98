"""Declares what pyproject.toml cannot: compiled extensions.

The metadata is all in pyproject.toml. Installing never needs a compiler:

    pip install .                             a wheel of Python and sources; `vlmo-fast build` compiles them later
    pip install --no-build-isolation .        the same, and at once the CPU library where torch, ninja and g++ are;
                                              the wheel is then one for this platform, for any Python
    python setup.py build_ext --inplace       in a checkout; the same as `vlmo-fast build`

An editable install compiles nothing.
"""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build as build_command

ROOT = Path(__file__).resolve().parent


def can_compile() -> bool:
    """Whether torch, ninja and a C++ compiler are here. Under build isolation torch is not."""
    tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    return find_spec("torch") is not None and shutil.which("ninja", path=tools) is not None and compiler is not None


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

    def get_source_files(self) -> list[str]:
        """None: they travel as package data."""
        return []

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


class Build(build_command):
    """Compiles the CPU library for a wheel where that is possible; a failure costs the library, not the install."""

    sub_commands: ClassVar = [command for command in build_command.sub_commands if command[0] != "build_ext"]

    def run(self) -> None:
        """The library, then all else. Editable installs run the sub-commands alone."""
        if can_compile():
            try:
                self.run_command("build_ext")
            except Exception as error:  # whatever a compiler does
                self.warn(f"the CPU library was not built, `vlmo-fast build cpu` tries again: {error}")
                self.distribution.has_ext_modules = lambda: False
                self.get_finalized_command("bdist_wheel").root_is_pure = True
        super().run()


class AnyPython(bdist_wheel):
    """The libraries use torch's stable ABI and nothing of Python's: only the platform goes into the wheel's tag."""

    def finalize_options(self) -> None:
        """A wheel that will hold a library is for one platform."""
        if can_compile():
            self.distribution.has_ext_modules = lambda: True
        super().finalize_options()

    def get_tag(self) -> tuple[str, str, str]:
        """As setuptools has it, for any Python."""
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(cmdclass={"build": Build, "build_ext": BuildExtensions, "bdist_wheel": AnyPython})
