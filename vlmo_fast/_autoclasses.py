"""Makes transformers' Auto classes know VLMo's folders once both packages are imported, in whatever order.

Registering needs VLMo's classes, and those need torch: seconds that `import vlmo_fast` must not take. So transformers'
registries get a dictionary each that looks empty until somebody asks for VLMo, or for all there is; then `vlmo_fast.hf`
is imported, which registers. Registries that are not there yet are met when transformers imports them, by a finder that
goes away after the last of them.
"""

from __future__ import annotations

import sys
from _thread import get_ident
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["watch"]

MODEL_TYPE = "vlmo"
# Where a folder's files lead first, and the registry there.
REGISTRIES = {
    "transformers.models.auto.configuration_auto": "CONFIG_MAPPING",
    "transformers.models.auto.processing_auto": "PROCESSOR_MAPPING",
    "transformers.models.auto.image_processing_auto": "IMAGE_PROCESSOR_MAPPING",
    "transformers.models.auto.tokenization_auto": "TOKENIZER_MAPPING",
}


class _Registered(dict[Any, Any]):
    """What others registered, and on the first look for more, VLMo."""

    def __contains__(self, key: object) -> bool:
        if key == MODEL_TYPE:
            _register()
        return super().__contains__(key)

    def __iter__(self) -> Iterator[Any]:
        _register_if_possible()
        return super().__iter__()

    def keys(self) -> Any:
        _register_if_possible()
        return super().keys()

    def values(self) -> Any:
        _register_if_possible()
        return super().values()

    def items(self) -> Any:
        _register_if_possible()
        return super().items()


_registering: set[int] = set()  # threads, whose own import looks into the registries, too


def _register() -> None:
    """Import what registers; of several threads the others wait at the import."""
    if getattr(sys.modules.get("vlmo_fast.hf"), "IS_REGISTERED", False) or get_ident() in _registering:
        return
    _registering.add(get_ident())
    try:
        import vlmo_fast.hf  # noqa: F401
    finally:
        _registering.discard(get_ident())


def _register_if_possible() -> None:
    """For somebody who may want another model: an import that fails is told to those who want this one."""
    try:
        _register()
    except ImportError:
        return


class _Finder:
    """Meets the modules of `REGISTRIES` as they are imported."""

    def __init__(self, names: set[str]) -> None:
        self.names = names

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.names:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None and spec.loader is not None:
                self._watch_loader(name, spec.loader)
                return spec
        return None

    def _watch_loader(self, name: str, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _put(module, REGISTRIES[name])
            self.names.discard(name)
            if not self.names and self in sys.meta_path:
                sys.meta_path.remove(self)

        loader.exec_module = exec_module


def _put(module: ModuleType, registry: str) -> None:
    """Replace what others registered by a dictionary that holds the same. Without the attribute: leave it alone."""
    mapping = getattr(module, registry, None)
    content = getattr(mapping, "_extra_content", None)
    if type(content) is dict:
        mapping._extra_content = _Registered(content)  # type: ignore[union-attr]


def watch() -> None:
    """Meet the registries, those that are there at once."""
    missing = set()
    for name, registry in REGISTRIES.items():
        module = sys.modules.get(name)
        if module is None or not hasattr(module, registry):
            missing.add(name)
        else:
            _put(module, registry)
    if missing:
        sys.meta_path.insert(0, _Finder(missing))
