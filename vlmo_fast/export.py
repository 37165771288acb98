"""Encoders as files that run without this package: `torch.export` programs and AOTInductor packages.

A program takes any batch, and texts of any length up to the model's; image sizes are fixed. It holds the weights.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vlmo_fast import ops
from vlmo_fast.files import write_whole
from vlmo_fast.model import MoMETransformer
from vlmo_fast.ops import reference

__all__ = ["ENCODERS", "export_encoder", "package_encoder", "without_custom_ops"]


class _Image(nn.Module):
    def __init__(self, backbone: MoMETransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, pixel_values: Tensor) -> Tensor | None:
        output: Tensor | None = self.backbone(pixel_values=pixel_values, cls_only=True).image_embeds
        return output


class _Text(nn.Module):
    def __init__(self, backbone: MoMETransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor | None:
        output: Tensor | None = self.backbone(input_ids, attention_mask, cls_only=True).text_embeds
        return output


class _Pair(nn.Module):
    def __init__(self, backbone: MoMETransformer) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> Tensor | None:
        output: Tensor | None = self.backbone(input_ids, attention_mask, pixel_values, cls_only=True).pooler_output
        return output


ENCODERS: dict[str, type[nn.Module]] = {"image": _Image, "text": _Text, "pair": _Pair}


def export_encoder(model: nn.Module, encoder: str, *, max_batch_size: int = 4096) -> ExportedProgram:
    """One of a model's encoders as a whole graph, for any batch and any text length.

    Args:
        model: a `VLMoFor...` or a `MoMETransformer`; exported in eval mode, in its dtype and on its device.
        encoder: "image": pixel_values (B, C, H, W) -> image_embeds (B, D);
            "text": input_ids (B, T), attention_mask (B, T), both int64 -> text_embeds (B, D);
            "pair": input_ids, attention_mask, pixel_values -> pooler_output (B, D).
        max_batch_size: largest B that the program takes.

    Returns:
        The program; `.module()` runs it, `torch.export.save` writes it.

    Raises:
        ValueError: the encoder is unknown, or the model has not the head that gives its output.
    """
    if encoder not in ENCODERS:
        raise ValueError(f"export_encoder: encoder must be one of {sorted(ENCODERS)}, got {encoder!r}")
    backbone: Any = getattr(model, "backbone", model)
    if not isinstance(backbone, MoMETransformer):
        kind = type(model).__name__
        raise ValueError(f"export_encoder: model must be a MoMETransformer or hold one as .backbone, got {kind}")
    needed = {"image": backbone.image_projection, "text": backbone.text_projection, "pair": backbone.pooler}[encoder]
    if needed is None:
        raise ValueError(f"export_encoder: model must have the head of the {encoder} encoder, got one without")
    config, weight = backbone.config, backbone.norm.weight
    batch = Dim("batch", min=1, max=max_batch_size)
    length = Dim("length", min=2, max=config.max_text_length)
    size = (2, config.num_channels, config.image_size, config.image_size)
    examples = {
        "input_ids": torch.ones(2, min(5, config.max_text_length), dtype=torch.int64, device=weight.device),
        "attention_mask": torch.ones(2, min(5, config.max_text_length), dtype=torch.int64, device=weight.device),
        "pixel_values": torch.zeros(size, dtype=weight.dtype, device=weight.device),
    }
    names = {"image": ("pixel_values",), "text": ("input_ids", "attention_mask"), "pair": tuple(examples)}[encoder]
    was_training = backbone.training
    try:
        with torch.no_grad():
            # strict: the tracer follows len() and the like, which would fix the batch size.
            program = torch.export.export(
                ENCODERS[encoder](backbone.eval()),
                tuple(examples[name] for name in names),
                dynamic_shapes={
                    name: {0: batch} if name == "pixel_values" else {0: batch, 1: length} for name in names
                },
                strict=True,
            )
        return without_custom_ops(program)
    finally:
        backbone.train(was_training)


def without_custom_ops(program: ExportedProgram) -> ExportedProgram:
    """The same program in torch's own operators, by the ops' references: it then runs where this package is not."""

    def mome_ffn(x: Tensor, group_sizes: list[int], *arguments: Any) -> tuple[Tensor, list[Any]]:
        columns, (layer_scale, row_scale, eps, *_) = arguments[:6], arguments[6:]
        experts = [ops.ExpertWeights(*expert) for expert in zip(*columns, strict=True)]
        return reference.mome_ffn(
            x, group_sizes, experts, layer_scale, row_scale, eps
        ), []  # nothing for a backward pass

    def attention(*arguments: Any) -> tuple[Tensor, Tensor]:
        *given, _implementation = arguments
        result: Tensor = reference.attention(*given).transpose(1, 2).contiguous()  # it lies as the op's
        return result.transpose(1, 2), result.new_empty(0)

    return program.run_decompositions(
        {torch.ops.vlmo_fast.mome_ffn.default: mome_ffn, torch.ops.vlmo_fast.attention.default: attention}
    )


def package_encoder(
    model: nn.Module, encoder: str, path: str | os.PathLike[str], *, max_batch_size: int = 4096
) -> Path:
    """Compile one of a model's encoders ahead of time into an AOTInductor package; arguments as `export_encoder`.

    The package holds machine code and weights for the model's device; `torch._inductor.aoti_load_package(path)` gives a
    callable, in C++ `AOTIModelPackageLoader` does, and neither needs this package. On a CPU a C++ compiler is needed.

    Args:
        model: as for `export_encoder`.
        encoder: as for `export_encoder`.
        path: the file to write, ending in .pt2; it appears whole or not at all.
        max_batch_size: largest B that the program takes.

    Returns:
        The path.

    Raises:
        ValueError: as `export_encoder`, or the path has another suffix.
    """
    target = Path(path)
    if target.suffix != ".pt2":
        raise ValueError(f"package_encoder: path must end in .pt2, got {target}")
    program = export_encoder(model, encoder, max_batch_size=max_batch_size)

    def write(temporary: Path) -> None:
        named = temporary.with_suffix(".pt2")  # torch insists on the suffix
        with torch.no_grad():
            torch._inductor.aoti_compile_and_package(program, package_path=str(named))
        named.replace(temporary)

    write_whole(target, write)
    return target
