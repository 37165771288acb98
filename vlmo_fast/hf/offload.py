"""Weights that accelerate keeps on the CPU or the disk until they are needed (`device_map` with too little memory).

accelerate loads the weights of a module when that module is called. VLMo's blocks hand their experts' weights to one op
without calling them, so a block's must all be there when the block is called.
"""

from __future__ import annotations

from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from accelerate.utils import PrefixedDataset, set_module_tensor_to_device
from torch import nn

__all__ = ["load_parts_whole"]

WHOLE = ("MoMEBlock", "TextEmbeddings", "ImageEmbeddings")  # classes whose weights are loaded all at once
RESIDENT = (
    "modality_type_embeddings",
    "relative_position_bias",
    "norm",
)  # small parts that the backbone reads uncalled


def load_parts_whole(model: nn.Module) -> None:
    """Have the offloaded blocks and embeddings of a model load all their weights when they are called."""
    for name, module in list(model.named_modules()):
        hook = next((h for part in module.modules() if (h := _offloading(part)) is not None), None)
        if hook is None:
            continue
        if type(module).__name__ in WHOLE:
            remove_hook_from_submodules(module)
            weights = PrefixedDataset(hook.weights_map.dataset, f"{name}.")
            add_hook_to_module(
                module,
                AlignDevicesHook(
                    execution_device=hook.execution_device,
                    offload=True,
                    weights_map=weights,
                    offload_buffers=hook.offload_buffers,
                    place_submodules=True,
                    skip_keys=hook.skip_keys,
                ),
            )
        elif name.rpartition(".")[2] in RESIDENT:
            remove_hook_from_submodules(module)
            for part, _ in list(module.named_parameters()):
                set_module_tensor_to_device(module, part, hook.execution_device, value=hook.weights_map[part])


def _offloading(module: nn.Module) -> AlignDevicesHook | None:
    hook = getattr(module, "_hf_hook", None)
    return hook if isinstance(hook, AlignDevicesHook) and hook.offload else None
