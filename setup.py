"""Declares what pyproject.toml cannot: compiled extensions.

The metadata is all in pyproject.toml. Installing never needs a compiler: an extension of `csrc/` that is declared here
must be optional, and build with `--no-build-isolation` against the torch that is already there.
"""

from setuptools import setup

setup()
