"""Muon under FSDP2 on two processes. Apart from test_optim.py, whose imports each process would repeat."""

import torch
from ranks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vlmo_fast.training.optim import make_optimizer


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(6, 4), nn.Linear(4, 6)])  # one wide, one tall
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x).tanh()
        return self.head(x)


def check_rank(rank, world):
    torch.manual_seed(0)  # the same model on both
    whole, sharded = Tower(), Tower()
    sharded.load_state_dict(whole.state_dict())
    for part in (*sharded.blocks, sharded):
        fully_shard(part, mesh=init_device_mesh("cpu", (world,)))
    for model in (whole, sharded):
        optimizer = make_optimizer(model, "muon", learning_rate=0.01)
        for n in range(3):  # the same inputs on both, so that the mean of the gradients is each one's
            model(torch.linspace(-1, n, 24).view(4, 6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(whole.parameters(), sharded.parameters(), strict=True):
        torch.testing.assert_close(other.full_tensor(), one)


def test_sharded_matrices_take_the_same_steps():
    """Catches a matrix orthogonalised shard by shard."""
    run_ranks(check_rank, 2)
