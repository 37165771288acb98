"""A block of the network: attention that the modalities share, then a feed-forward expert for each group of tokens.

    H' = Attention(LN(H)) + H
    H  = MoME-FFN(LN(H')) + H'         (VLMo, arXiv:2111.02358, section 3)

Shape suffixes: B sequences, N rows, M output rows, R rows of the bias, D width, d width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmo_fast import ops
from vlmo_fast.config import EXPERTS, MODALITIES, MoMEConfig
from vlmo_fast.rows import Groups, Rows
from vlmo_fast.watch import is_plain, watched_from_now_on

__all__ = ["Attention", "Expert", "MoMEBlock", "join", "mix_experts"]


class MoMEBlock(nn.Module):
    """Shared attention, then one feed-forward expert per token group; both residual, pre-norm, scaled per channel."""

    def __init__(self, config: MoMEConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        # Stochastic depth grows linearly over the layers.
        self.drop_path_rate = config.drop_path_rate * layer / max(config.num_hidden_layers - 1, 1)
        self.backends = {"mome_ffn": "auto"}
        self.attention_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.attention = Attention(config)
        names = EXPERTS if layer >= config.first_vl_layer else MODALITIES
        self.experts = nn.ModuleDict({name: Expert(config) for name in names})
        self.attention_layer_scale: nn.Parameter | None = None
        self.ffn_layer_scale: nn.Parameter | None = None
        if config.layer_scale_init_value is not None:
            self.attention_layer_scale = nn.Parameter(torch.empty(width))
            self.ffn_layer_scale = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, rows: Rows, groups: Groups, bias: Tensor | None = None) -> Tensor:
        """One block.

        Args:
            x: (N, D).
            rows: which row is which token, and which of them are put out.
            groups: expert and number of output rows of each group, in order.
            bias: (heads, R, R) or None.

        Returns:
            (M, D), the output rows.
        """
        attended = self.attention(self.attention_norm(x), rows, bias)
        x = rows.keep(x) + _scaled(attended, self.attention_layer_scale, self._row_scale(x, rows, num_draws=1))
        row_scale = self._row_scale(x, rows, num_draws=1 if groups == rows.fusion_groups else 2)
        experts = [self.experts[name] for name, _ in groups]
        sizes = [size for _, size in groups]
        return mix_experts(x, sizes, experts, self.ffn_layer_scale, row_scale, self.backends["mome_ffn"])

    def _row_scale(self, x: Tensor, rows: Rows, num_draws: int) -> Tensor | None:
        """Stochastic depth: (M,), 0 for rows whose residual branch is dropped, else 1 / (1 - rate).

        Drawn once for each sequence, or (`num_draws` = 2) once for its text and once for its image, as in the release,
        where the experts of a pair drop theirs apart.
        """
        if not self.training or not self.drop_path_rate:
            return None
        keep = torch.empty(rows.num_sequences, num_draws, dtype=x.dtype, device=x.device)
        keep = keep.bernoulli_(1 - self.drop_path_rate).div_(1 - self.drop_path_rate)
        return rows.per_segment(keep.expand(-1, 2))


class Attention(nn.Module):
    """Multi-head self-attention with query and value biases, shared by all modalities."""

    def __init__(self, config: MoMEConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.backends = {"attention": "auto", "packed_attention": "auto"}
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.v_bias = nn.Parameter(torch.zeros(config.hidden_size))
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor, rows: Rows, bias: Tensor | None = None) -> Tensor:
        """Attend within sequences, from the output rows to all: (N, D) -> (M, D)."""
        query, key, value = self._project(x, rows)
        attended = rows.attend(query, key, value, bias, self.backends).flatten(1)
        output = self.projection
        plain = is_plain(output, nn.Linear)
        return self.dropout(ops.linear(attended, output.weight, output.bias) if plain else output(attended))

    def _project(self, x: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of the output rows, (M, heads, d), keys and values of all, (N, heads, d)."""
        no_bias = torch.zeros_like(self.v_bias)  # keys have none
        if not is_plain(self.qkv, nn.Linear) or self.qkv.bias is not None:  # a replacement may have one
            qkv = self.qkv(x) + torch.cat([self.q_bias, no_bias, self.v_bias])
            query, key, value = qkv.unflatten(1, (3, self.num_heads, -1)).unbind(1)
            return rows.keep(query), key, value
        weight = self.qkv.weight
        if rows.keeps_all:
            qkv = ops.linear(x, weight, torch.cat([self.q_bias, no_bias, self.v_bias]))
            query, key, value = qkv.unflatten(1, (3, self.num_heads, -1)).unbind(1)
            return query, key, value
        width = len(no_bias)
        query = ops.linear(rows.keep(x), weight[:width], self.q_bias).unflatten(1, (self.num_heads, -1))
        key_value = ops.linear(x, weight[width:], torch.cat([no_bias, self.v_bias]))
        key, value = key_value.unflatten(1, (2, self.num_heads, -1)).unbind(1)
        return query, key, value


@watched_from_now_on
class Expert(nn.Module):
    """A modality expert: fc2(gelu(fc1(LN(x)))), with its own norm and the exact (erf) GELU."""

    def __init__(self, config: MoMEConfig) -> None:
        super().__init__()
        assert config.intermediate_size is not None
        self.norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """The expert's branch, without the residual, (..., D)."""
        return self.dropout(self.fc2(F.gelu(self.fc1(self.norm(x)))))

    def weights(self) -> ops.ExpertWeights:
        """The parameters, as `ops.mome_ffn` takes them."""
        return ops.ExpertWeights(
            self.norm.weight, self.norm.bias, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
        )


def mix_experts(
    x: Tensor,
    sizes: Sequence[int],
    experts: Sequence[nn.Module],
    layer_scale: Tensor | None,
    row_scale: Tensor | None,
    backend: str = "auto",
) -> Tensor:
    """The residual branch of the experts: one op where their parameters alone say what they compute, else their calls.

    Args:
        x: (M, D), rows in adjacent groups.
        sizes: rows of each group, in order.
        experts: the module of each group.
        layer_scale: (D,), or None.
        row_scale: (M,), or None.
        backend: of `ops.mome_ffn`.

    Returns:
        (M, D).
    """
    if all(map(_is_plain_expert, experts)):
        plain = [cast("Expert", expert) for expert in experts]
        weights, eps = [expert.weights() for expert in plain], plain[0].norm.eps
        if all(expert.norm.eps == eps for expert in plain) and _are_alike(weights):
            return ops.mome_ffn(x, sizes, weights, layer_scale, row_scale, eps=eps, backend=backend)
    branches = [expert(part) for expert, part in zip(experts, x.split(list(sizes)), strict=True)]
    return x + _scaled(join(branches), layer_scale, row_scale)


def _is_plain_expert(expert: nn.Module) -> bool:
    if not is_plain(expert, Expert):
        return False
    assert isinstance(expert, Expert)
    if not is_plain(expert.dropout, nn.Dropout) or (expert.dropout.training and expert.dropout.p):
        return False
    return is_plain(expert.norm, nn.LayerNorm) and is_plain(expert.fc1, nn.Linear) and is_plain(expert.fc2, nn.Linear)


def _are_alike(weights: Sequence[ops.ExpertWeights]) -> bool:
    """Whether none lacks a parameter (a replaced layer may have no bias) and all have one width (one may be pruned)."""
    complete = all(tensor is not None for expert in weights for tensor in expert)
    return complete and all(expert.fc1_weight.shape == weights[0].fc1_weight.shape for expert in weights)


def _scaled(branch: Tensor, layer_scale: Tensor | None, row_scale: Tensor | None) -> Tensor:
    branch = branch if layer_scale is None else layer_scale * branch
    return branch if row_scale is None else row_scale[:, None] * branch


def join(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all parts, one after the other; of a single part the tensor itself."""
    return parts[0] if len(parts) == 1 else torch.cat([*parts])
