"""A contrastive step over a batch that no activation memory would hold (GradCache, arXiv:2101.06983).

The loss needs the embeddings of the whole batch, the encoders do not need one another's activations:

    1. encode chunk by chunk without a graph, remembering the random state of each chunk
    2. the loss of all embeddings, and its gradient with respect to them
    3. encode chunk by chunk again, in the same random state, and backpropagate that gradient

The gradients are those of one step over the whole batch, dropout and drop path included; the price is one more forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["cached_backward"]


def cached_backward(
    encoders: Sequence[Callable[..., Tensor]],
    inputs: Sequence[Any],
    loss: Callable[..., Tensor],
    *,
    chunk_size: int,
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> Tensor:
    """Compute the loss of the whole batch and add its gradients to the parameters', chunk by chunk.

        embeds = [encoder(batch) for encoder, batch in zip(encoders, inputs)]
        loss(*embeds).backward()

    Args:
        encoders: called with one chunk each: `encoder(tensor)`, `encoder(*tuple)` or `encoder(**dict)`; an embedding a
            row, (b, P). What changes in a forward pass besides random states (batch-norm statistics) changes twice.
        inputs: for each encoder a tensor, a tuple or a dictionary of tensors whose first dimension is the batch; other
            values go to every chunk as they are.
        loss: of the encoders' embeddings, (N, P) each, to 0-d; its own parameters (a logit scale) get their gradients
            too. With `process_group` in it, use no DDP wrapper but `distributed.average_gradients` afterwards.
        chunk_size: rows at a time.
        backward: how the loss is backpropagated, e.g. `lambda loss: scaler.scale(loss).backward()`.

    Returns:
        The 0-d loss, detached.

    Raises:
        ValueError: chunk_size is not positive, encoders and inputs differ in number, or rows of an input do.
    """
    if chunk_size < 1:
        raise ValueError(f"cached_backward: chunk_size must be at least 1, got {chunk_size}")
    if len(encoders) != len(inputs):
        raise ValueError(f"cached_backward: inputs must be one for each of {len(encoders)} encoders, got {len(inputs)}")
    chunks = [list(_chunks(batch, chunk_size)) for batch in inputs]
    states: list[list[_RandomState]] = []
    cached: list[Tensor] = []
    with torch.no_grad():
        for encoder, parts in zip(encoders, chunks, strict=True):
            states.append([])
            embeds = []
            for part in parts:
                states[-1].append(_RandomState(part))
                embeds.append(_call(encoder, part))
            cached.append(torch.cat(embeds))
    leaves = [embeds.requires_grad_() for embeds in cached]
    with torch.enable_grad():
        value = loss(*leaves)
        backward(value)
        for encoder, parts, of_encoder, leaf in zip(encoders, chunks, states, leaves, strict=True):
            if leaf.grad is None:
                continue  # the loss does not depend on it
            for part, state, gradient in zip(parts, of_encoder, leaf.grad.split(chunk_size), strict=True):
                with state.replayed():
                    torch.autograd.backward(_call(encoder, part), gradient)
    return value.detach()


class _RandomState:
    """The state of torch's generators as it is now: the CPU's, and those of the devices that a chunk lies on.

    And that of the current device, where an encoder may take a chunk that does not lie there yet.
    """

    def __init__(self, part: Any) -> None:
        devices = {tensor.device.index for tensor in _tensors(part) if tensor.is_cuda}
        if torch.cuda.is_initialized():
            devices.add(torch.cuda.current_device())
        self.devices = sorted(devices)
        self.cpu = torch.get_rng_state()
        self.cuda = [torch.cuda.get_rng_state(device) for device in self.devices]

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Within it, random numbers are those that followed; afterwards they go on as if nothing had been."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            for device, state in zip(self.devices, self.cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


def _tensors(batch: Any) -> list[Tensor]:
    values = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (tuple, list)) else [batch]
    return [value for value in values if isinstance(value, Tensor)]


def _chunks(batch: Any, size: int) -> Iterator[Any]:
    """Parts of `size` rows of a tensor, tuple or dictionary."""
    rows = {len(tensor) for tensor in _tensors(batch)}
    if len(rows) != 1 or 0 in rows:
        raise ValueError(f"cached_backward: inputs must hold tensors of one length, got lengths {sorted(rows)}")

    def cut(value: Any, start: int) -> Any:
        return value[start : start + size] if isinstance(value, Tensor) else value

    for start in range(0, rows.pop(), size):
        if isinstance(batch, dict):
            yield {name: cut(value, start) for name, value in batch.items()}
        elif isinstance(batch, (tuple, list)):
            yield tuple(cut(value, start) for value in batch)
        else:
            yield cut(batch, start)


def _call(encoder: Callable[..., Tensor], part: Any) -> Tensor:
    if isinstance(part, dict):
        return encoder(**part)
    return encoder(*part) if isinstance(part, tuple) else encoder(part)
