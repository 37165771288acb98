"""Inference at small sizes, where launching kernels takes longer than running them: a CUDA graph for each shape.

    encode = MoMETransformer(config).cuda().eval().captured()           # or Captured(module), for any other
    encode(pixel_values=image).image_embeds                             # first call of a shape: captured; then replayed

One image, one text and one pair (197, 13 and 210 tokens of the base model) are a few hundred launches each; a graph
replays them with one.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

__all__ = ["Captured"]


class Captured:
    """A module in evaluation mode whose forward pass is recorded once for each shape of its inputs, and then replayed.

    The results are those of the module, without gradients, in memory of their own. A module on a CPU is just called.

    The graphs read the parameters where they lie: values changed in place (an optimiser, `load_state_dict`) are seen;
    after the parameters moved (`.to()`, `load_state_dict(assign=True)`), call `reset`. What the module decides from the
    *values* of its inputs on the host cannot be recorded; CUDA then refuses the capture with an error. Threads may
    share it, as long as they share a stream.

    Args:
        module: in evaluation mode, all parameters on one device.
        method: name of what is called, where that is not the module itself.
        max_graphs: shapes kept; the least recently used is evicted.
        num_warmups: calls before the capture, in which kernels are compiled and workspaces made.

    Example:
        >>> encode = Captured(torch.nn.Linear(2, 3).eval())
        >>> encode(input=torch.ones(1, 2)).shape
        torch.Size([1, 3])
    """

    def __init__(
        self, module: nn.Module, method: str = "__call__", *, max_graphs: int = 32, num_warmups: int = 3
    ) -> None:
        if max_graphs < 1 or num_warmups < 1:
            raise ValueError(
                f"Captured: max_graphs and num_warmups must be at least 1, got {max_graphs} and {num_warmups}"
            )
        self.module, self.method, self.max_graphs, self.num_warmups = module, method, max_graphs, num_warmups
        self._graphs: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._lock = Lock()

    @property
    def num_graphs(self) -> int:
        """Shapes that are recorded at present."""
        return len(self._graphs)

    def reset(self) -> None:
        """Forget all recordings: the parameters moved."""
        with self._lock:
            self._graphs.clear()

    def __call__(self, **inputs: Any) -> Any:
        """The module's result for these inputs.

        Args:
            **inputs: tensors on the module's device, and other hashable options of its forward pass. An object of the
                caller's, such as a `PackedLayout`, is one more shape each time that it is made anew: keep it.

        Raises:
            ValueError: the module is in training mode, or a tensor lies on another device.
            TypeError: an option is not hashable, or a sequence of tensors.
        """
        if self.module.training:
            raise ValueError("Captured: module must be in evaluation mode (call eval()), got training=True")
        device = next((parameter.device for parameter in self.module.parameters()), torch.device("cpu"))
        function = getattr(self.module, self.method)
        key = _key(inputs, device)
        if not self._records(device):
            with torch.no_grad():
                return function(**inputs)
        with self._lock, torch.no_grad(), torch.cuda.device(-1 if device.index is None else device.index):
            recording = self._graphs.pop(key, None) or _Recording(function, inputs, self.num_warmups)
            self._graphs[key] = recording  # the newest comes last
            if len(self._graphs) > self.max_graphs:
                self._graphs.popitem(last=False)
            return recording.replay(inputs)

    def _records(self, device: torch.device) -> bool:
        return device.type == "cuda"


class _Recording:
    """A forward pass on buffers of its own."""

    def __init__(self, function: Callable[..., Any], inputs: Mapping[str, Any], num_warmups: int) -> None:
        self.buffers = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(num_warmups):
                function(**self.buffers)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = function(**self.buffers)

    def replay(self, inputs: Mapping[str, Any]) -> Any:
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                self.buffers[name].copy_(value)
        self.graph.replay()
        return tree_map_only(Tensor, Tensor.clone, self.results)


def _key(inputs: Mapping[str, Any], device: torch.device) -> Hashable:
    """What one recording holds for."""
    parts: list[Hashable] = [device, torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)]
    for name, value in sorted(inputs.items()):
        if isinstance(value, Tensor):
            if value.device != device:
                raise ValueError(f"Captured: {name} must be on the module's device {device}, got {value.device}")
            parts.append((name, value.shape, value.dtype))
        elif _is_constant(value):
            parts.append((name, type(value), value))
        else:
            raise TypeError(f"Captured: {name} must be a tensor or hashable, got {type(value).__name__}")
    return tuple(parts)


def _is_constant(value: Any) -> bool:
    """Whether it is hashable and no sequence of tensors, whose numbers a recording would keep."""
    try:
        hash(value)
    except TypeError:
        return False
    return not any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))
