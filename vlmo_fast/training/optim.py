"""Optimisers by name: the recipe's AdamW, or Muon for the matrices of the blocks and AdamW for the rest.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) steps by the momentum's nearest semi-orthogonal
matrix, approximately:

    M <- mu M + (1 - mu) G
    O  = newton_schulz(mu M + (1 - mu) G)              all singular values near 1
    W <- (1 - lr * weight_decay) W - lr * scale * O    scale: see `MuonAdamW`

Both go with any scheduler of the learning rate, which multiplies the rates of all parameter groups: the recipe's is
`transformers.get_scheduler("linear", optimizer, num_warmup_steps=..., num_training_steps=...)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MuonAdamW", "make_optimizer", "orthogonalize", "parameter_groups"]

BETAS = (0.9, 0.98)  # of the recipe
HEADS = ("classifier",)  # modules that `head_multiplier` is for: those of fine-tuned tasks
NOT_DECAYED = ("cls_token", "mask_token", "token_type_embeddings", "modality_type_embeddings", "relative_position_bias")
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic that lifts small singular values fastest (Jordan et al.)
SCALES: dict[str, Callable[[int, int], float]] = {
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
}


def parameter_groups(
    model: nn.Module, *, learning_rate: float, weight_decay: float = 0.01, head_multiplier: float = 1.0
) -> list[dict[str, Any]]:
    """The trainable parameters in groups, as the recipe has them.

    Matrices, filters, word embeddings and absolute positions decay. Biases, norms, layer scales and logit scales, which
    have less than two axes, do not; nor do single learned tokens, type embeddings and the table of relative position
    biases. (The release, whose exclusions miss some names, also decays the norms of experts and heads, layer scales,
    tokens, types and logit scales.) The heads of tasks learn faster by `head_multiplier`.

    Args:
        model: a `VLMoFor...`, or any module with like names; freeze first what shall not be trained.
        learning_rate: of all but the heads.
        weight_decay: of the decayed ones.
        head_multiplier: on the learning rate of the modules named `classifier` (the recipe's for VQAv2: 20).

    Returns:
        At most four groups with "name", "params", "lr" and "weight_decay": "matrices", "vectors", "head matrices" and
        "head vectors", without the empty ones.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    groups: dict[str, dict[str, Any]] = {
        f"{prefix}{kind}": {"params": [], "lr": learning_rate * multiplier, "weight_decay": decay}
        for prefix, multiplier in (("", 1.0), ("head ", head_multiplier))
        for kind, decay in (("matrices", weight_decay), ("vectors", 0.0))
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_decayed = parameter.ndim >= 2 and not set(NOT_DECAYED) & set(name.split("."))
            prefix = "head " if set(HEADS) & set(name.split(".")) else ""
            groups[prefix + ("matrices" if is_decayed else "vectors")]["params"].append(parameter)
    filled = [{"name": name, **group} for name, group in groups.items() if group["params"]]
    if not filled:
        raise ValueError("parameter_groups: model must have parameters that require a gradient, got none")
    return filled


def make_optimizer(
    model: nn.Module,
    name: str = "adamw",
    *,
    learning_rate: float,
    weight_decay: float = 0.01,
    head_multiplier: float = 1.0,
    betas: tuple[float, float] = BETAS,
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """The optimiser of a name over `parameter_groups(model, ...)`.

    Args:
        model: shard it and freeze what shall not be trained first.
        name: "adamw", fused where all parameters are floating and on a CPU or CUDA; or "muon", which takes the
            two-dimensional weights below a module list named `blocks` by Muon, scaled so that AdamW's learning rate and
            weight decay fit them (arXiv:2502.16982), and all others by AdamW.
        learning_rate: of all but the heads.
        weight_decay: of matrices, filters, word embeddings and absolute positions.
        head_multiplier: on the learning rate of task heads.
        betas: of AdamW.
        eps: of AdamW.

    Returns:
        A `torch.optim.AdamW` or a `MuonAdamW`; for `transformers.Trainer(optimizers=(optimizer, schedule))`, too.

    Raises:
        ValueError: another name, no parameters, or no matrices for Muon.
    """
    groups = parameter_groups(
        model, learning_rate=learning_rate, weight_decay=weight_decay, head_multiplier=head_multiplier
    )
    if name == "adamw":
        fused = _can_fuse(parameter for group in groups for parameter in group["params"])
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=fused)
    if name != "muon":
        raise ValueError(f"make_optimizer: name must be 'adamw' or 'muon', got {name!r}")
    in_blocks = {
        id(parameter)
        for path, parameter in model.named_parameters()
        if parameter.ndim == 2 and "blocks" in path.split(".")
    }
    divided = []
    for group in groups:
        by_muon = [parameter for parameter in group["params"] if id(parameter) in in_blocks]
        others = [parameter for parameter in group["params"] if id(parameter) not in in_blocks]
        if by_muon:
            divided.append({**group, "name": f"{group['name']} of blocks", "params": by_muon, "algorithm": "muon"})
        if others:
            divided.append({**group, "params": others, "algorithm": "adamw"})
    if not any(group["algorithm"] == "muon" for group in divided):
        raise ValueError("make_optimizer: name 'muon' needs trainable matrices below `blocks`; the model has none")
    return MuonAdamW(divided, lr=learning_rate, betas=betas, eps=eps)


def _can_fuse(parameters: Iterable[Tensor]) -> bool:
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for some parameter groups, AdamW for the others, as one optimiser with one state.

    The groups of Muon hold matrices, or filters (out, ...) that are stepped as matrices (out, the rest). A matrix of
    queries, keys and values joined is one matrix; one that FSDP2 shards is orthogonalised as a whole, by all processes.

    Args:
        params: parameter groups, each with "algorithm", "muon" or "adamw".
        lr: learning rate of the groups that name none.
        weight_decay: likewise, times the learning rate.
        betas: of AdamW.
        eps: of AdamW.
        momentum: mu of Muon.
        num_steps: of the Newton-Schulz iteration.
        scale: of Muon's steps, by the shape of the matrix: "match_rms_adamw" is 0.2 sqrt(max(rows, columns)), so that
            they are as large as AdamW's (arXiv:2502.16982); "original" is sqrt(max(1, rows / columns)), for a learning
            rate of its own, about 0.02.
        executor: threads among which Muon's groups and AdamW are shared, each to the same bits; None steps in turn.

    Raises:
        ValueError: a group names no algorithm or an unknown scale, or Muon gets a vector.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        weight_decay: float = 0.01,
        betas: tuple[float, float] = BETAS,
        eps: float = 1e-8,
        momentum: float = 0.95,
        num_steps: int = 5,
        scale: str = "match_rms_adamw",
        executor: Executor | None = None,
    ) -> None:
        self._executor = executor
        defaults = {"momentum": momentum, "num_steps": num_steps, "scale": scale}
        groups = [dict(group) for group in params]
        self._adamw = torch.optim.AdamW([nn.Parameter(torch.empty(0))], lr=lr, betas=betas, eps=eps)
        super().__init__(groups, {**self._adamw.defaults, "weight_decay": weight_decay, **defaults})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; it must name its algorithm."""
        algorithm = param_group.get("algorithm")
        if algorithm not in ("muon", "adamw"):
            raise ValueError(f"MuonAdamW: algorithm of a group must be 'muon' or 'adamw', got {algorithm!r}")
        super().add_param_group(param_group)
        added = self.param_groups[-1]
        if added["scale"] not in SCALES:
            raise ValueError(f"MuonAdamW: scale must be one of {', '.join(SCALES)}, got {added['scale']!r}")
        if algorithm == "adamw":
            added["fused"] = _can_fuse(added["params"])
        elif any(parameter.ndim < 2 for parameter in added["params"]):
            raise ValueError("MuonAdamW: parameters of Muon must have two axes or more, got a vector or a number")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step at the learning rates that the groups have now; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        of_adamw, of_muon = (
            [group for group in self.param_groups if group["algorithm"] == name] for name in ("adamw", "muon")
        )
        # Ours to schedule, save and load: after a load they are other objects, so AdamW is handed them for each step.
        self._adamw.param_groups, self._adamw.state = of_adamw, self.state
        tasks: list[Callable[[], object]] = [self._adamw.step] if of_adamw else []
        tasks += [partial(self._step_by_muon, group) for group in of_muon]
        for _ in (map if self._executor is None else self._executor.map)(lambda task: task(), tasks):
            pass
        return loss

    @torch.no_grad()
    def _step_by_muon(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
            matrix = parameter.grad.lerp(momentum, group["momentum"]).flatten(1)
            direction = orthogonalize(matrix, num_steps=group["num_steps"]).view_as(parameter)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(direction, alpha=-group["lr"] * SCALES[group["scale"]](*matrix.shape))


def orthogonalize(matrix: Tensor, *, num_steps: int = 5, dtype: torch.dtype | None = None) -> Tensor:
    """About U V^T of a matrix U S V^T, by Newton-Schulz iterations.

        X <- a X + b (X X^T) X + c (X X^T)^2 X,   X = matrix / max(|matrix|, 1e-7) at first

    The coefficients trade exactness for speed: after five steps singular values above 1/300 of the norm lie between
    0.68 and 1.21; smaller ones grow by up to 3.44 a step.

    Args:
        matrix: (M, N), any float dtype.
        num_steps: of the iteration.
        dtype: to compute in; None is bfloat16 where the device has it in hardware, float32 elsewhere: on CPUs, where it
            would be emulated or slower, and on GPUs before sm_80.

    Returns:
        (M, N) in the matrix's dtype; 0 for 0.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(_dtype_for(matrix.device) if dtype is None else dtype)
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = x.T if is_tall else x
    x = x / torch.linalg.vector_norm(x).clamp(min=1e-7)
    for _ in range(num_steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if is_tall else x).to(matrix.dtype)


def _dtype_for(device: torch.device) -> torch.dtype:
    is_native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if is_native else torch.float32
