"""vlmo_fast: VLMo, one vision-language model with modality experts, in readable PyTorch with fast kernels behind it.

Importing the package imports nothing else, not even torch: each name below is looked up in its module when first used.
The Hugging Face classes need the package transformers, all others torch alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vlmo_fast import _autoclasses

if TYPE_CHECKING:
    from vlmo_fast.config import MoMEConfig
    from vlmo_fast.formats.beit import load_beit
    from vlmo_fast.formats.bert import load_bert_embeddings
    from vlmo_fast.formats.official import load_official, save_official
    from vlmo_fast.hf.configuration import VLMoConfig
    from vlmo_fast.hf.modeling import (
        VLMoForImageClassification,
        VLMoForImagesAndTextClassification,
        VLMoForImageTextRetrieval,
        VLMoForMaskedImageModeling,
        VLMoForMaskedLM,
        VLMoForPreTraining,
        VLMoForQuestionAnswering,
        VLMoModel,
    )
    from vlmo_fast.hf.processing import VLMoImageProcessor, VLMoProcessor
    from vlmo_fast.model import MoMEOutput, MoMETransformer, PackedOutput
    from vlmo_fast.packing import PackedLayout, pack

    __version__: str

__all__ = [
    "MoMEConfig",
    "MoMETransformer",
    "MoMEOutput",
    "PackedLayout",
    "PackedOutput",
    "pack",
    "load_official",
    "save_official",
    "load_beit",
    "load_bert_embeddings",
    "VLMoConfig",
    "VLMoModel",
    "VLMoForPreTraining",
    "VLMoForMaskedLM",
    "VLMoForMaskedImageModeling",
    "VLMoForImageTextRetrieval",
    "VLMoForQuestionAnswering",
    "VLMoForImagesAndTextClassification",
    "VLMoForImageClassification",
    "VLMoImageProcessor",
    "VLMoProcessor",
]

_NAMES_OF_MODULE = {
    "vlmo_fast.config": ("MoMEConfig",),
    "vlmo_fast.model": ("MoMETransformer", "MoMEOutput", "PackedOutput"),
    "vlmo_fast.packing": ("PackedLayout", "pack"),
    "vlmo_fast.formats.official": ("load_official", "save_official"),
    "vlmo_fast.formats.beit": ("load_beit",),
    "vlmo_fast.formats.bert": ("load_bert_embeddings",),
    "vlmo_fast.hf.configuration": ("VLMoConfig",),
    "vlmo_fast.hf.processing": ("VLMoImageProcessor", "VLMoProcessor"),
    "vlmo_fast.hf.modeling": (
        "VLMoModel",
        "VLMoForPreTraining",
        "VLMoForMaskedLM",
        "VLMoForMaskedImageModeling",
        "VLMoForImageTextRetrieval",
        "VLMoForQuestionAnswering",
        "VLMoForImagesAndTextClassification",
        "VLMoForImageClassification",
    ),
}
_MODULE_OF = {name: module for module, names in _NAMES_OF_MODULE.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value: Any = _version()
    elif name in _MODULE_OF:
        value = getattr(import_module(_MODULE_OF[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vlmo_fast")
    except PackageNotFoundError:  # a checkout on the path, not installed
        return "0+unknown"


_autoclasses.watch()
