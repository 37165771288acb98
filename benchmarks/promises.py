"""What the project promises of its speed and memory, measured or not: the report shows all of it.

A benchmark names a promise by its key (`group.promise(..., key="captions")`); the report joins what was measured.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["PROMISES", "Promise"]


class Promise(NamedTuple):
    """One promise.

    Attributes:
        key: what benchmarks name it by.
        device: "cpu" (two cores, float32) or "cuda" (one H200, bfloat16).
        what: the problem and what is compared, for readers.
        bound: for readers, e.g. ">= 3.1 x".
    """

    key: str
    device: str
    what: str
    bound: str


PROMISES = (
    Promise("captions", "cpu", "64 captions, embedding: against the release's pass", "≥ 3.1 × as fast"),
    Promise("pairs", "cpu", "8 pairs, pooled output: against the release's pass", "≥ 1.2 × as fast"),
    Promise("images", "cpu", "8 images, embedding: against the release's pass", "≥ 1.1 × as fast"),
    Promise("step", "cpu", "pre-training step (contrast, words, matching): against the release's", "≥ 1.5 × as fast"),
    Promise("ffn", "cpu", "experts of base, 2,048 tokens, forward: time of the bare matmuls", "≤ 1.06 ×"),
    Promise("ffn-loop", "cpu", "experts, every size: against the eager loop over modalities", "never slower"),
    Promise(
        "attention", "cpu", "attention, every kind of sequence: against eager on padded tensors", "≥ 1.2 × as fast"
    ),
    Promise("contrast", "cpu", "contrast, N = 8,192, D = 768, forward + backward: against eager", "≥ 1.1 × as fast"),
    Promise("contrast-memory", "cpu", "the same: extra peak memory", "≤ 1/8 of eager's"),
    Promise("contrast-workspace", "cpu", "the same, similarities kept: against eager", "≥ 1.35 × as fast"),
    Promise("contrast-65536", "cpu", "contrast, N = 65,536: memory beyond inputs and gradients", "< 1 GB"),
    Promise("import", "cpu", "`import vlmo_fast`: time of `import torch`", "≤ 0.1 ×"),
    Promise("gpu-ffn", "cuda", "experts of base, 32 k tokens, forward: time of the two bare GEMMs", "≤ 1.10 ×"),
    Promise("gpu-ffn-backward", "cuda", "the same, forward + backward: time of the six bare GEMMs", "≤ 1.15 ×"),
    Promise("gpu-ffn-eager-base", "cuda", "the same: against eager, base", "≥ 1.25 × as fast"),
    Promise("gpu-ffn-eager-large", "cuda", "the same: against eager, large", "≥ 1.15 × as fast"),
    Promise("gpu-ffn-autocast-base", "cuda", "the same: against eager under autocast, base", "≥ 1.4 × as fast"),
    Promise("gpu-ffn-autocast-large", "cuda", "the same: against eager under autocast, large", "≥ 1.3 × as fast"),
    Promise("gpu-ffn-compile-base", "cuda", "the same: against torch.compile, base", "≥ 1.15 × as fast"),
    Promise("gpu-ffn-compile-large", "cuda", "the same: against torch.compile, large", "≥ 1.1 × as fast"),
    Promise("gpu-ffn-memory", "cuda", "the same: saved activations", "≤ 45 % of eager's"),
    Promise("gpu-one-pair", "cuda", "experts, one pair, captured: against eager", "≥ 4 × as fast"),
    Promise("gpu-one-pair-compile", "cuda", "the same: against torch.compile, reduce-overhead", "≥ 1.5 × as fast"),
    Promise("gpu-attention", "cuda", "attention, base, batch 256, with bias gradient: against eager", "≥ 3 × as fast"),
    Promise(
        "gpu-attention-best", "cuda", "the same: against the best of SDPA, FlexAttention, xformers", "≥ 1.5 × as fast"
    ),
    Promise("gpu-contrast-rate", "cuda", "contrast, N ≥ 32 k, 8 N² D operations: of the matmul rate", "≥ 75 %"),
    Promise("gpu-contrast-chunked", "cuda", "the same: against chunked matmuls", "≥ 1.2 × as fast"),
    Promise("gpu-contrast-eager", "cuda", "the same: against eager, where it fits", "≥ 2.3 × as fast"),
    Promise("gpu-contrast-infcl", "cuda", "the same: against Inf-CL", "≥ 4 × as fast"),
    Promise("gpu-contrast-262144", "cuda", "contrast, N = 262,144: memory beyond inputs and gradients", "< 4 GB"),
)
