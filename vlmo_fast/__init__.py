"""vlmo_fast: VLMo, one vision-language model with modality experts, in readable PyTorch with fast kernels behind it.

Importing the package imports nothing else, not even torch: a public name is imported when it is first used. The names
are listed in `__init__.pyi`. The Hugging Face classes need the package transformers, all others torch alone.
"""

from importlib import import_module

from vlmo_fast import _autoclasses


def __getattr__(name: str) -> object:
    submodules, module_of = _public_names()
    value: object
    if name == "__all__":
        value = list(module_of)
    elif name == "__version__":
        value = _version()
    elif name in submodules:
        value = import_module(f"{__name__}.{name}")
    elif name in module_of:
        value = getattr(import_module(module_of[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    submodules, module_of = _public_names()
    return sorted({*globals(), *submodules, *module_of, "__all__", "__version__"})


def _public_names() -> tuple[list[str], dict[str, str]]:
    """The public submodules, and the module of each other public name, as `__init__.pyi` lists them."""
    import ast
    from pkgutil import get_data

    stub = get_data(__name__, "__init__.pyi")
    assert stub is not None
    imports = [node for node in ast.parse(stub).body if isinstance(node, ast.ImportFrom)]
    submodules = [alias.name for node in imports if node.module is None for alias in node.names]
    module_of = {alias.name: f"{__name__}.{node.module}" for node in imports if node.module for alias in node.names}
    return submodules, module_of


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vlmo_fast")
    except PackageNotFoundError:  # a checkout on the path, not installed
        return "0+unknown"


_autoclasses.watch()
