"""The modality experts: one op for the whole residual branch, against eager, compiled and grouped forms.

The yardstick is the bare matmuls of the same shapes: no norm, bias, activation, scale or residual; two a group in the
forward pass, six with the backward one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import Bench, Work
from vlmo_fast import MoMEConfig, ops
from vlmo_fast.ops import reference
from vlmo_fast.serving import Captured

EPS = 1e-6
PAIR = (13, 197)  # text and image tokens of one pair
MODES = ("forward", "forward+backward")
# What weighs changes along the way: reading the weights (one text), starting the work (one pair), the products.
CPU_TOKENS = {"base": (13, 210, 512, 2048), "base_plus": (13, 512), "large": (13, 512)}


def cases() -> list[Any]:
    """Sizes, tokens and modes, each with the profiles that run it; the promised ones come first on a GPU."""
    found = []
    for size in ("base", "large", "base_plus"):
        for tokens in (13, 210, 512, 2048, 8192, 32768, 65536):
            for mode in MODES:
                names = {"cpu": 0 if size == "base" else 1} if tokens in CPU_TOKENS[size] else {}
                names |= {"quick": 0} if (size, tokens, mode) == ("base", 210, "forward") else {}
                priority = 1 if tokens == 32768 and size != "base_plus" else 4 if tokens in (210, 32768) else 7
                found.append(pytest.param(size, tokens, mode, marks=pytest.mark.profile(**names, gpu=priority)))
    return found


@pytest.mark.parametrize(("size", "tokens", "mode"), cases())
def bench_ffn(bench: Bench, size: str, tokens: int, mode: str) -> None:
    """Rows of pairs below the fusion layers, 13 text and 197 image tokens each, texts first; or one text."""
    if bench.device.type == "cpu" and tokens > 2048:
        pytest.skip("takes too long on a CPU")
    config = MoMEConfig.from_preset(size)
    width, hidden = config.hidden_size, config.intermediate_size
    assert hidden is not None
    text_rows = tokens * PAIR[0] // sum(PAIR)
    sizes = (text_rows, tokens - text_rows) if text_rows else (tokens,)
    on_gpu = bench.device.type == "cuda"

    def inputs(seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
            return (mean + std * torch.randn(*shape, generator=generator)).to(bench.device, bench.dtype)

        experts = [
            ops.ExpertWeights(
                draw(width, mean=1.0, std=0.1),
                draw(width, std=0.1),
                draw(hidden, width, std=width**-0.5),
                draw(hidden, std=0.1),
                draw(width, hidden, std=hidden**-0.5),
                draw(width, std=0.1),
            )
            for _ in sizes
        ]
        scale = None if config.layer_scale_init_value is None else draw(width, mean=0.1, std=0.01)
        return {"x": draw(tokens, width), "experts": experts, "scale": scale}

    def ours(x: Tensor, experts: Sequence[ops.ExpertWeights], scale: Tensor | None) -> Tensor:
        return ops.mome_ffn(x, sizes, experts, scale, eps=EPS, backend="triton" if on_gpu else "auto")

    def eager(x: Tensor, experts: Sequence[ops.ExpertWeights], scale: Tensor | None) -> Tensor:
        return reference.mome_ffn(x, sizes, experts, scale, None, EPS)

    backward = mode == "forward+backward"
    weights = len(sizes) * 2 * width * hidden
    number = 2 if on_gpu else 4
    group = bench.group(
        "ffn",
        "experts",
        inputs,
        oracle=eager,
        eager=eager,
        work=Work(
            tokens,
            "tokens",
            flop=(12 if backward else 4) * width * hidden * tokens,
            bytes=number * (2.5 * (2 * tokens * width) + 3 * weights if backward else 2 * tokens * width + weights),
        ),
        axes={"size": size, "tokens": tokens},
        x="tokens",
        gradients=("x", "experts", *(["scale"] if config.layer_scale_init_value is not None else []))
        if backward
        else (),
    )
    group.ours("ours", ours)
    if on_gpu:
        group.ours("ours, torch's operators", lambda x, experts, scale: ops.mome_ffn(x, sizes, experts, scale, eps=EPS))
    group.peer("eager", eager)
    group.peer("loop of linears", lambda **inputs: _loop(sizes, **inputs))
    everything = bench.settings.profile == "all"  # compiling takes longer than measuring
    if on_gpu or (size, tokens) == ("base", 2048):
        if on_gpu or everything or not backward:
            group.peer("torch.compile", lambda: torch.compile(eager), make=True, slow_start=True)
        if everything or (on_gpu and tokens == 32768):
            tuned = lambda: torch.compile(eager, mode="max-autotune-no-cudagraphs")
            group.peer("torch.compile, max-autotune", tuned, make=True, slow_start=True)
    if on_gpu:
        group.peer("eager, autocast", lambda **inputs: _autocast(eager, **inputs))
    if on_gpu and tokens == sum(PAIR) and not backward:
        group.ours("ours, captured", lambda: _captured(ours), make=True)
        reduced = lambda: torch.compile(eager, mode="reduce-overhead")
        group.peer("torch.compile, reduce-overhead", reduced, make=True, slow_start=True)
        if size == "base":
            group.promise("ours, captured", "eager", at_least=4.0, key="gpu-one-pair")
            against = "torch.compile, reduce-overhead"
            group.promise("ours, captured", against, at_least=1.5, key="gpu-one-pair-compile")
    refusals = (NotImplementedError, RuntimeError)
    group.peer(
        "grouped_mm, weights stacked",
        lambda **inputs: _grouped_mm(sizes, **inputs),
        layout=lambda x, experts, scale: {"x": x, "experts": _stacked(experts), "scale": scale},
        oracle=lambda x, experts, scale: eager(x, [ops.ExpertWeights(*e) for e in zip(*experts, strict=True)], scale),
        may_refuse=refusals,
    )
    group.yardstick("bare matmuls", lambda **inputs: _bare_matmuls(sizes, backward, **inputs))
    if not on_gpu:
        group.promise("ours", "eager", at_least=1.0, key="ffn-loop")
        if (size, tokens, backward) == ("base", 2048, False):
            group.promise("ours", "bare matmuls", at_most=1.06, key="ffn")
    elif tokens == 32768 and size in ("base", "large"):
        base = size == "base"
        if base:
            bound = (1.15, "gpu-ffn-backward") if backward else (1.10, "gpu-ffn")
            group.promise("ours", "bare matmuls", at_most=bound[0], key=bound[1])
        if backward:
            group.promise("ours", "eager", at_least=1.25 if base else 1.15, key=f"gpu-ffn-eager-{size}")
            group.promise("ours", "eager, autocast", at_least=1.4 if base else 1.3, key=f"gpu-ffn-autocast-{size}")
            group.promise("ours", "torch.compile", at_least=1.15 if base else 1.1, key=f"gpu-ffn-compile-{size}")
    group.run()


def _loop(sizes: Sequence[int], x: Tensor, experts: Sequence[ops.ExpertWeights], scale: Tensor | None) -> Tensor:
    """Linear layers in a loop over the experts as one writes it by hand: whole residual branches, joined once."""
    parts = []
    for part, expert in zip(x.split(list(sizes)), experts, strict=True):
        normed = F.layer_norm(part, part.shape[-1:], expert.norm_weight, expert.norm_bias, EPS)
        hidden = F.gelu(F.linear(normed, expert.fc1_weight, expert.fc1_bias))
        branch = F.linear(hidden, expert.fc2_weight, expert.fc2_bias)
        parts.append(part + branch if scale is None else torch.addcmul(part, branch, scale))
    return torch.cat(parts)


class _Layer(nn.Module):
    """One layer's experts as a module."""

    def __init__(
        self, function: Callable[..., Tensor], experts: Sequence[ops.ExpertWeights], scale: Tensor | None
    ) -> None:
        super().__init__()
        self.function, self.scale = function, scale
        self.experts = [ops.ExpertWeights(*(nn.Parameter(weight) for weight in expert)) for expert in experts]
        self.parameters_of_all = nn.ParameterList(weight for expert in self.experts for weight in expert)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x=x, experts=self.experts, scale=self.scale)


def _captured(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A CUDA graph for each buffer's weights, captured at the first call."""
    graphs: dict[int, Captured] = {}

    def run(x: Tensor, experts: Sequence[ops.ExpertWeights], scale: Tensor | None) -> Tensor:
        key = experts[0].fc1_weight.data_ptr()
        if key not in graphs:
            graphs[key] = Captured(_Layer(function, experts, scale).eval())
        result: Tensor = graphs[key](x=x)
        return result

    return run


def _autocast(function: Callable[..., Tensor], x: Tensor, **inputs: Any) -> Tensor:
    """Eager with a float32 residual stream, as mixed-precision training runs it."""
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        return function(x=x.float(), **inputs).to(x.dtype)


def _stacked(experts: Sequence[ops.ExpertWeights]) -> ops.ExpertWeights:
    """The parameters of all experts as one tensor each, (G, ...)."""
    return ops.ExpertWeights(*(torch.stack(tensors) for tensors in zip(*experts, strict=True)))


def _grouped_mm(sizes: Sequence[int], x: Tensor, experts: ops.ExpertWeights, scale: Tensor | None) -> Tensor:
    """Both products of all experts in one call each; a bias is added after it."""
    ends = torch.tensor(sizes, device=x.device).cumsum(0).to(torch.int32)

    def rows(of_experts: Tensor) -> Tensor:
        return torch.cat([row.expand(size, -1) for row, size in zip(of_experts, sizes, strict=True)])

    norm_weights, norm_biases = experts.norm_weight.unbind(), experts.norm_bias.unbind()
    parts = zip(x.split(list(sizes)), norm_weights, norm_biases, strict=True)
    normed = torch.cat([F.layer_norm(part, part.shape[-1:], weight, bias, EPS) for part, weight, bias in parts])
    hidden = F.grouped_mm(normed, experts.fc1_weight.transpose(1, 2), offs=ends) + rows(experts.fc1_bias)
    out = F.grouped_mm(F.gelu(hidden), experts.fc2_weight.transpose(1, 2), offs=ends) + rows(experts.fc2_bias)
    return x + (out if scale is None else scale * out)


def _bare_matmuls(
    sizes: Sequence[int], backward: bool, x: Tensor, experts: Sequence[ops.ExpertWeights], scale: Tensor | None
) -> list[Tensor]:
    results = []
    for part, expert in zip(x.split(list(sizes)), experts, strict=True):
        first, second = expert.fc1_weight, expert.fc2_weight
        hidden = part @ first.t()
        out = hidden @ second.t()
        results.append(out)
        if backward:
            results += [hidden.t() @ out, out @ second, part.t() @ hidden, hidden @ first]
    return results
