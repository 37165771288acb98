"""Model and processor from any folder or file that a VLMo can come from; the content, not the suffix, decides.

a folder of ours      `save_pretrained`, `vlmo-fast convert`, the demo      -> `open_saved`
a released VLMo       a file of its release, or what `save_official` wrote  -> `open_official`
a BEiT                a file of its release, a file or folder of transformers'  -> `open_beit`
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vlmo_fast.files import read_tensors
from vlmo_fast.formats.beit import open_beit
from vlmo_fast.formats.conversion import TASKS, Conversion, cast, check_tensors, on_meta, retarget
from vlmo_fast.formats.official import open_official

if TYPE_CHECKING:
    from vlmo_fast.hf.configuration import VLMoConfig
    from vlmo_fast.hf.modeling import VLMoPreTrainedModel
    from vlmo_fast.hf.processing import VLMoImageProcessor, VLMoProcessor

__all__ = ["Loaded", "check_path", "has_vocabulary", "load", "open_any", "open_saved", "processor_of", "usable_device"]

_logger = logging.getLogger(__name__)

_VOCABULARIES = ("tokenizer.json", "vocab.txt")
_PROCESSORS = ("processor_config.json", "preprocessor_config.json")


class Loaded(NamedTuple):
    """A model, and what makes its inputs.

    Attributes:
        model: a `VLMoFor...` in eval mode.
        processor: of pictures and texts; of pictures alone where no vocabulary is known.
    """

    model: VLMoPreTrainedModel
    processor: VLMoProcessor | VLMoImageProcessor


def load(
    path: str | os.PathLike[str],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    vocab: str | os.PathLike[str] | None = None,
    task: str | None = None,
    **settings: Any,
) -> Loaded:
    """The model and the processor in a folder or file, of whatever kind.

    Args:
        path: a folder that `save_pretrained`, `vlmo-fast convert` or the demo wrote, a released VLMo, a BEiT (then what
            BEiT has not starts fresh, as in `load_beit`). Opening it runs no code that it may hold.
        device: where the model goes; None is the CPU.
        dtype: a float dtype; None is the checkpoint's own.
        vocab: a WordPiece vocabulary, one entry a line, or "bert" for that of the released models. Needed for texts
            where the path holds none.
        task: "pretrain", "retrieval", "vqa", "nlvr2", "text", "mim" or "classification"; None is the checkpoint's own,
            "text" for a BEiT.
        **settings: `image_size`, `num_attention_heads` and fields of `VLMoConfig`, as in `load_official`.

    Returns:
        `Loaded(model, processor)`.

    Raises:
        FileNotFoundError: there is no such file, folder or vocabulary.
        ValueError: a device that cannot be used here, no checkpoint of these kinds, a damaged one, a setting that it
            does not allow, numbers too large for the dtype, a vocabulary that does not fit.
        ImportError: transformers is not installed.
    """
    place = None if device is None else usable_device(device)
    check_path(path)
    if vocab not in (None, "bert") and not Path(vocab).is_file():
        raise FileNotFoundError(f"load: vocab must be a file or 'bert', got {vocab}")
    conversion = open_any(path, task=task, **settings)
    report = conversion.report
    if report.source != "beit" and (report.fresh or (task and report.unused)):
        _logger.warning("load: %s", report)
    model = conversion.build()
    processor = processor_of(path, model.config, vocab) or _image_processor(model.config)
    if dtype is not None:
        model = cast(model, dtype, "load")
    return Loaded(model if place is None else model.to(place), processor)


def open_any(
    path: str | os.PathLike[str],
    *,
    task: str | None = None,
    num_attention_heads: int | None = None,
    **settings: Any,
) -> Conversion:
    """Read, check and convert whatever `path` holds, with a report of every tensor; arguments as `load`."""
    folder = Path(path)
    heads = {} if num_attention_heads is None else {"num_attention_heads": num_attention_heads}
    kind = _model_type(folder)
    if kind == "vlmo":
        return open_saved(folder, task=task, **heads, **settings)
    if kind not in (None, "beit"):
        raise ValueError(f"load: path must hold a VLMo or a BEiT, got a folder with a model of type {kind!r}")
    source: Any = folder
    if kind is None:
        source = read_tensors(folder, "load")
        if any(name.startswith("transformer.") for name in source):
            return open_official(source, task=task, **heads, **settings)
        if not any(name.endswith(("patch_embed.proj.weight", "patch_embeddings.projection.weight")) for name in source):
            raise ValueError(
                f"load: path must hold a VLMo or a BEiT, got {path} with {len(source)} tensors such as "
                f"{list(source)[:3]}"
            )
    return open_beit(source, task=task or "text", **heads, **settings)


def _model_type(folder: Path) -> str | None:
    """What transformers' configuration says that a folder holds; None where there is none."""
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["model_type"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"load: {path} must be a configuration with a model_type, got {error!r}") from error


def open_saved(
    folder: str | os.PathLike[str], *, task: str | None = None, image_size: int | None = None, **settings: Any
) -> Conversion:
    """Read and check a folder that `save_pretrained` of a `VLMoFor...` wrote; arguments as `load`.

    For another task or image size; `from_pretrained` is the plain way to the model that was saved.

    Raises:
        ValueError: no model of ours, or tensors are missing, unexpected, misshapen or not finite.
        FileNotFoundError: there is no such folder.
    """
    from vlmo_fast.hf.configuration import VLMoConfig

    path = Path(folder)
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"open_saved: folder must hold config.json, got {path}")
    classes = {model_class: task for task, model_class in TASKS.items()}
    try:
        (architecture,) = json.loads((path / "config.json").read_text(encoding="utf-8"))["architectures"]
        kind = classes[architecture]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"open_saved: folder must hold one of {sorted(classes)}, got {error!r}") from error
    own = VLMoConfig.from_pretrained(path)
    tensors = read_tensors(path, "open_saved")
    shapes = {name: x.shape for name, x in on_meta(kind, own).state_dict().items()}
    check_tensors(tensors, shapes, (), f"open_saved: the {kind}")
    state = {name: tensors.pop(name).detach().clone() for name in shapes}
    return retarget("open_saved", kind, state, {name: name for name in shapes}, own, task, image_size, settings)


def processor_of(
    path: str | os.PathLike[str], config: VLMoConfig, vocab: str | os.PathLike[str] | None = None
) -> VLMoProcessor | VLMoImageProcessor | None:
    """The processor that a folder of ours holds, fitted to a model that was made of it.

    Args:
        path: where the model came from.
        config: the model's; its image size and longest text become the processor's where they are not the folder's.
        vocab: a vocabulary to use instead of the folder's, as in `load`.

    Returns:
        A `VLMoProcessor` where a vocabulary is known, else a `VLMoImageProcessor` where the folder holds one, else
        None.
    """
    from transformers import AutoTokenizer

    from vlmo_fast.hf.configuration import VLMoConfig
    from vlmo_fast.hf.processing import VLMoImageProcessor, VLMoProcessor

    folder = Path(path)
    images = tokenizer = None
    if _model_type(folder) == "vlmo":
        own = VLMoConfig.from_pretrained(folder)
        if any((folder / name).is_file() for name in _PROCESSORS):
            images = VLMoImageProcessor.from_pretrained(folder)
            if own.image_size != config.image_size:
                images.size = _image_processor(config).size
        if vocab is None and has_vocabulary(folder):
            tokenizer = AutoTokenizer.from_pretrained(folder)
            if own.max_text_length != config.max_text_length:
                tokenizer.model_max_length = config.max_text_length
    if vocab is not None:
        tokenizer = VLMoProcessor.from_vocabulary(None if vocab == "bert" else vocab, config).tokenizer
    return images if tokenizer is None else VLMoProcessor(images or _image_processor(config), tokenizer)


def _image_processor(config: VLMoConfig) -> VLMoImageProcessor:
    from vlmo_fast.hf.processing import VLMoImageProcessor

    return VLMoImageProcessor(size={"height": config.image_size, "width": config.image_size})


def has_vocabulary(path: str | os.PathLike[str]) -> bool:
    """Whether it is a folder that holds a vocabulary beside its model, so that `load` needs no `vocab` for texts."""
    return any((Path(path) / name).is_file() for name in _VOCABULARIES)


def check_path(path: str | os.PathLike[str]) -> None:
    """Raise FileNotFoundError where nothing is there; nothing is read."""
    if not Path(path).exists():
        raise FileNotFoundError(f"load: path must be a folder or a checkpoint file, got {path}")


def usable_device(device: str | torch.device) -> torch.device:
    """A device that torch can use here.

    Raises:
        ValueError: it cannot; the message says why.
    """
    rule = f"load: device must be one that torch can use here, got {str(device)!r}"
    try:
        found = torch.device(device)
    except RuntimeError as error:  # which lists all that there are anywhere
        raise ValueError(f"{rule}; such are cpu, cuda, cuda:1, mps") from error
    try:
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # what torch raises, device by device
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{rule} ({reason})") from error
    return found
