"""VLMo's parts as plain modules, for other people's models.

They are the network's own modules and ops behind arguments that a stranger's model has: no `MoMEConfig`, tokens as
(B, S, D).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from vlmo_fast import ops
from vlmo_fast.block import Attention, Expert, MoMEBlock, mix_experts
from vlmo_fast.config import EXPERTS, MoMEConfig
from vlmo_fast.positions import LayerBiases, RelativePositionBias
from vlmo_fast.rows import PaddedRows

__all__ = ["ContrastiveLoss", "ExpertBlock", "ExpertFeedForward", "RelativeAttention", "RelativePositionBias"]


class ExpertFeedForward(nn.Module):
    """A feed-forward branch with modality experts, residual and all: x + scale * fc2(gelu(fc1(LN(x)))).

    Each group of tokens takes the norm and the layers of its own expert; one op computes them all
    (`vlmo_fast.ops.mome_ffn`).

    Args:
        width: D of a token.
        experts: names of the experts.
        intermediate_size: inner width of an expert; None means 4 D.
        layer_scale_init_value: initial value of the branch's scale per channel, shared by the experts; None for none.
        eps: epsilon of the norms.

    Example:
        >>> ffn = ExpertFeedForward(64, ("language", "vision"))
        >>> ffn(torch.randn(2, 15, 64), (("language", 6), ("vision", 9))).shape
        torch.Size([2, 15, 64])
    """

    def __init__(
        self,
        width: int,
        experts: Sequence[str] = EXPERTS,
        *,
        intermediate_size: int | None = None,
        layer_scale_init_value: float | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        config = MoMEConfig(
            hidden_size=width, num_attention_heads=1, intermediate_size=intermediate_size, layer_norm_eps=eps
        )
        self.experts = nn.ModuleDict({name: Expert(config) for name in experts})
        self.layer_scale: nn.Parameter | None = None
        if layer_scale_init_value is not None:
            self.layer_scale = nn.Parameter(torch.full((width,), layer_scale_init_value))
        self.experts.apply(_initialise)

    @classmethod
    def from_dense(
        cls, norm: nn.LayerNorm, fc1: nn.Linear, fc2: nn.Linear, experts: Sequence[str] = EXPERTS
    ) -> ExpertFeedForward:
        """Experts that all begin as one trained network: a model upgraded so computes what it did before.

        Args:
            norm: the layer norm in front of the network, over D.
            fc1: its first layer, (F, D); an exact (erf) GELU must follow it.
            fc2: its second layer, (D, F).
            experts: names of the experts.
        """
        width, inner = fc1.in_features, fc1.out_features
        if (fc2.in_features, fc2.out_features) != (inner, width) or norm.normalized_shape != (width,):
            raise ValueError(
                "ExpertFeedForward: norm, fc1 and fc2 must be over D, D to F and F to D, got "
                f"{norm.normalized_shape}, {width} to {inner} and {fc2.in_features} to {fc2.out_features}"
            )
        module = cls(width, experts, intermediate_size=inner, eps=norm.eps)
        for expert in module.experts.values():
            assert isinstance(expert, Expert)
            for ours, theirs in ((expert.norm, norm), (expert.fc1, fc1), (expert.fc2, fc2)):
                ours.load_state_dict(theirs.state_dict())
        return module.to(fc1.weight)

    def forward(self, x: Tensor, groups: Sequence[tuple[str, int]], row_scale: Tensor | None = None) -> Tensor:
        """The branch and what it is added to.

        Args:
            x: (..., S, D).
            groups: expert and number of tokens of each group, along S and in its order.
            row_scale: (..., S) factor of the branch of each token (stochastic depth), or None.

        Returns:
            (..., S, D).

        Raises:
            ValueError: the groups' tokens do not add up to S, or an expert is unknown.
        """
        for name, _ in groups:
            if name not in self.experts:
                known = sorted(self.experts)
                raise ValueError(f"ExpertFeedForward: groups must name experts among {known}, got {name!r}")
        counts = [count for _, count in groups]
        if sum(counts) != x.shape[-2]:
            raise ValueError(f"ExpertFeedForward: groups must add up to the {x.shape[-2]} tokens of x, got {counts}")
        parts = x.split(counts, dim=-2)
        rows = torch.cat([part.reshape(-1, x.shape[-1]) for part in parts])  # (N, D), each group's rows adjacent
        scales = None
        if row_scale is not None:
            scales = torch.cat([part.reshape(-1) for part in row_scale.split(counts, dim=-1)])
        sizes = [part.numel() // x.shape[-1] for part in parts]
        rows = mix_experts(rows, sizes, [self.experts[name] for name, _ in groups], self.layer_scale, scales)
        return torch.cat([part.view(like.shape) for part, like in zip(rows.split(sizes), parts, strict=True)], dim=-2)


class RelativeAttention(nn.Module):
    """Multi-head self-attention with a learned bias per head and distance, for images, texts, or both joined.

    An image's tokens are [CLS] and then its patches, row by row; a text's first token is its own [CLS]; in a joint
    sequence the text comes first. The bias is BEiT's for images (arXiv:2106.08254) and VLMo's for texts and across.

    Args:
        width: D of a token.
        num_heads: attention heads; divides D.
        window_size: patches along one side of the image.
        text_span: longest text, tokens.

    Example:
        >>> attention = RelativeAttention(64, 4, window_size=3)
        >>> attention(torch.randn(2, 10, 64)).shape
        torch.Size([2, 10, 64])
    """

    def __init__(self, width: int, num_heads: int, *, window_size: int, text_span: int = 196) -> None:
        super().__init__()
        self.attention = Attention(MoMEConfig(hidden_size=width, num_attention_heads=num_heads))
        self.bias = RelativePositionBias(1, num_heads, window_size, text_span)
        self.attention.apply(_initialise)

    def forward(self, x: Tensor, num_text_tokens: int = 0, key_mask: Tensor | None = None) -> Tensor:
        """Attend from every token to all of its sequence.

        Args:
            x: (B, S, D).
            num_text_tokens: tokens of the text in front; S of them are a text alone, 0 an image alone.
            key_mask: (B, S) bool, False for padding, or None.

        Returns:
            (B, S, D).

        Raises:
            ValueError: the tokens are neither a text, nor an image of the window, nor both, or the text is too long.
        """
        biases = _biases("RelativeAttention", self.bias, x, num_text_tokens)
        rows = PaddedRows(len(x), 0, x.shape[1], key_mask)  # attention does not ask which tokens are which
        output: Tensor = self.attention(x.flatten(0, 1), rows, biases[0])
        return output.view(x.shape)


class ExpertBlock(nn.Module):
    """VLMo's block: attention that the modalities share, then the feed-forward network of each token's modality.

    Both are residual, pre-norm and, where asked for, scaled per channel. Tokens are those of `RelativeAttention`: an
    image's go through the vision expert, a text's through the language expert.

    Args:
        width: D of a token.
        num_heads: attention heads; divides D.
        window_size: patches along one side of the image.
        text_span: longest text, tokens.
        fuses: whether all tokens of a joint sequence go through one vision-language expert, as in VLMo's top layers.
        intermediate_size: inner width of an expert; None means 4 D.
        layer_scale_init_value: initial value of both branches' scales per channel; None for none.
        drop_path_rate: how often training leaves a branch out (stochastic depth).
        eps: epsilon of the norms.

    Example:
        >>> block = ExpertBlock(64, 4, window_size=3, fuses=True)
        >>> block(torch.randn(2, 5 + 10, 64), num_text_tokens=5).shape
        torch.Size([2, 15, 64])
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        window_size: int,
        text_span: int = 196,
        fuses: bool = False,
        intermediate_size: int | None = None,
        layer_scale_init_value: float | None = None,
        drop_path_rate: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        config = MoMEConfig(
            hidden_size=width,
            num_attention_heads=num_heads,
            intermediate_size=intermediate_size,
            num_vl_layers=int(fuses),
            layer_scale_init_value=layer_scale_init_value,
            drop_path_rate=drop_path_rate,
            layer_norm_eps=eps,
        )
        self.block = MoMEBlock(config, layer=config.num_hidden_layers - 1)  # the last drops at the whole rate
        self.bias = RelativePositionBias(1, num_heads, window_size, text_span)
        self.fuses = fuses
        self.block.apply(_initialise)
        if layer_scale_init_value is not None:
            assert self.block.attention_layer_scale is not None and self.block.ffn_layer_scale is not None
            nn.init.constant_(self.block.attention_layer_scale, layer_scale_init_value)
            nn.init.constant_(self.block.ffn_layer_scale, layer_scale_init_value)

    def forward(self, x: Tensor, num_text_tokens: int = 0, key_mask: Tensor | None = None) -> Tensor:
        """One block; arguments, result and errors as those of `RelativeAttention.forward`."""
        biases = _biases("ExpertBlock", self.bias, x, num_text_tokens)
        rows = PaddedRows(len(x), num_text_tokens, x.shape[1] - num_text_tokens, key_mask)
        is_pair = bool(rows.num_text and rows.num_image)
        groups = rows.fusion_groups if self.fuses and is_pair else rows.modality_groups
        text, image = x.split([rows.num_text, rows.num_image], dim=1)
        rows_of_all = torch.cat([text.flatten(0, 1), image.flatten(0, 1)])  # (N, D)
        return rows.padded(self.block(rows_of_all, rows, groups, biases[0]))


class ContrastiveLoss(nn.Module):
    """The image-text contrastive loss with its learned scale, in linear memory (`vlmo_fast.ops.contrastive_loss`).

    Args:
        logit_scale_init_value: logarithm of the scale at the start (CLIP's and VLMo's: log(1 / 0.07)).
        max_logit_scale: bound of the scale, to which the parameter is set back where it lies beyond; None for none, as
            in VLMo (CLIP's is 100).
    """

    def __init__(
        self, logit_scale_init_value: float = math.log(1 / 0.07), max_logit_scale: float | None = None
    ) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(float(logit_scale_init_value)))
        self.max_logit_scale = max_logit_scale

    def forward(
        self,
        image_embeds: Tensor,
        text_embeds: Tensor,
        image_ids: Tensor | None = None,
        text_ids: Tensor | None = None,
        process_group: ProcessGroup | None = None,
    ) -> Tensor:
        """0-d loss in nats of unit-norm embeddings (N, P) and (M, P); other arguments as those of the op."""
        if self.max_logit_scale is not None:
            with torch.no_grad():  # the parameter itself, so that its gradient never vanishes and it can come back
                self.logit_scale.clamp_(max=math.log(self.max_logit_scale))
        scale = self.logit_scale.exp()
        return ops.contrastive_loss(
            image_embeds, text_embeds, scale, image_ids=image_ids, text_ids=text_ids, process_group=process_group
        )


def _biases(who: str, bias: RelativePositionBias, x: Tensor, num_text_tokens: int) -> LayerBiases:
    """The biases of a sequence (B, S, D) whose first tokens are a text's, once its lengths are checked."""
    num_tokens, window = x.shape[1], bias.window_size
    if num_tokens - num_text_tokens not in (0, 1 + window**2):
        raise ValueError(
            f"{who}: x must have {num_text_tokens} text tokens and 0 or {1 + window**2} of an image, "
            f"got {num_tokens} in all"
        )
    if num_text_tokens > bias.text_span:
        raise ValueError(f"{who}: num_text_tokens must be at most text_span={bias.text_span}, got {num_text_tokens}")
    biases: LayerBiases = bias(num_text_tokens, (window,) if num_tokens > num_text_tokens else ())
    return biases


def _initialise(module: nn.Module) -> None:
    """Linear layers as VLMo's: normal with a standard deviation of 0.02, no bias."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=MoMEConfig.initializer_range)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
