"""Small networks whose every path shows in the outputs, and inputs for them."""

from functools import cache

import pytest
import torch

from vlmo_fast import MoMEConfig, MoMEOutput, MoMETransformer

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_vl_layers": 2,
    "image_size": 24,
    "patch_size": 8,  # 3 x 3 patches: the fewest that the bicubic spline of another size takes
    "vocab_size": 50,
    "max_text_length": 10,
    "text_relative_span": 12,
    "initializer_range": 0.3,  # strong weights, so that every path shows in the outputs
}
POSITIONS = ("relative", "absolute")
positions = pytest.mark.parametrize("kind", POSITIONS)
FIELDS = MoMEOutput._fields
PATHS = ("image", "text", "image_vl", "text_vl", "pair")


def build(kind: str = "relative", seed: int = 0, **options):
    """A model whose every parameter is random, those that start at a constant included."""
    names = {"add_pooler", "add_projections", "add_vl_projections", "add_mask_token"}
    flags = {name: options.pop(name) for name in names & set(options)}
    scale = 0.5 if kind == "relative" else None
    sizes = {**SIZES, "position_embedding_type": kind, "layer_scale_init_value": scale, **options}
    torch.manual_seed(seed)
    model = MoMETransformer(MoMEConfig(**sizes), **flags).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@cache
def shared(kind: str = "relative"):
    """A model that tests only read."""
    return build(kind).requires_grad_(False)


def inputs(batch: int = 3, tokens: int = 6, size: int = 24, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (batch, tokens), generator=generator)
    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (batch, 1), generator=generator)
    mask[-1] = True
    pixels = torch.randn(batch, 3, size, size, generator=generator)
    return ids, mask.long(), pixels.to(dtype)


def run(model, path: str, ids=None, mask=None, pixels=None, **options) -> MoMEOutput:
    if ids is None:
        ids, mask, pixels = inputs(dtype=next(model.parameters()).dtype)
    vl = path.endswith("_vl")
    if path.startswith("image"):
        return model(pixel_values=pixels, use_vl_branch=vl, **options)
    if path.startswith("text"):
        return model(ids, mask, use_vl_branch=vl, **options)
    return model(ids, mask, pixels, **options)


def tensors(output: MoMEOutput) -> list[torch.Tensor]:
    return [x for field in output if field is not None for x in (field if isinstance(field, tuple) else (field,))]


def visible(output: MoMEOutput, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Everything an output says, but for the rows of padded tokens, as one vector."""
    parts = []
    for x in tensors(output):
        if mask is not None and x.ndim == 3:
            parts.append(x[:, : mask.shape[1]][mask.bool()].flatten())
            parts.append(x[:, mask.shape[1] :].flatten())
        else:
            parts.append(x.flatten())
    return torch.cat(parts)
