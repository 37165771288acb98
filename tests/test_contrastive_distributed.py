"""The global batch on 2 and 4 processes (gloo): the same loss and gradients as the whole batch on one."""

import itertools

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_contrastive import differentiate, unlucky
from tolerances import check_draws
from torch import Tensor, multiprocessing, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from vlmo_fast import ops
from vlmo_fast.distributed import Ranks, average_gradients, fetch_samples, gather, pass_on
from vlmo_fast.ops import reference
from vlmo_fast.ops.pairs import contrastive
from vlmo_fast.training.gradcache import cached_backward

PAIRS, WIDTH = 6, 5  # on each rank


class DualEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.image, self.text = nn.Linear(4, WIDTH), nn.Linear(3, WIDTH)
        self.log_scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        embeds = (F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1))
        return *embeds, self.log_scale.exp()


def globally(size: int) -> dict[str, Tensor]:
    """The whole batch; ids meet across ranks, and within one."""
    torch.manual_seed(1)
    count = size * PAIRS
    return {
        "images": torch.randn(count, 4),
        "texts": torch.randn(count, 3),
        "ids": torch.arange(count) % (count - 3),
    }


def keywords_of(kind: str, ids: Tensor) -> dict[str, object]:
    return {} if kind == "pairs" else {"image_ids": ids, "text_ids": ids, "positives": kind}


def check_rank(rank: int, size: int) -> None:
    group = dist.group.WORLD
    assert group is not None
    check_losses(rank, size, group)
    check_embeddings(rank, size, group)
    check_halves(rank, size, group)
    check_ring(rank, size, group)
    check_samples(rank, size, group)
    check_gradcache(rank, size, group)
    check_refusals(rank, size, group)


def check_losses(
    rank: int, size: int, group: dist.ProcessGroup, kinds: tuple[str, ...] = ("pairs", "exclude", "average")
) -> None:
    """Under DDP: the parameters' gradients are those of one process, or 1/W of them for the release's encoders."""
    batch = globally(size)
    own = slice(rank * PAIRS, (rank + 1) * PAIRS)
    for kind, gradient in itertools.product(kinds, ("exact", "release")):
        alone = DualEncoder()
        positives = "average" if kind == "average" else "exclude"
        ids = (None, None) if kind == "pairs" else (batch["ids"], batch["ids"])
        wanted = reference.contrastive_loss(*alone(batch["images"], batch["texts"]), *ids, positives)
        wanted.backward()
        wrapped = DistributedDataParallel(DualEncoder(), process_group=group)
        loss = ops.contrastive_loss(
            *wrapped(batch["images"][own], batch["texts"][own]),
            **keywords_of(kind, batch["ids"][own]),
            process_group=group,
            gradient=gradient,
        )
        torch.testing.assert_close(loss, wanted)
        loss.backward()
        for (name, ours), theirs in zip(wrapped.module.named_parameters(), alone.parameters(), strict=True):
            factor = size if gradient == "release" and name != "log_scale" else 1
            torch.testing.assert_close(ours.grad * factor, theirs.grad, msg=f"{kind}, {gradient}: {name}")


def check_embeddings(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """Float64 and a workspace: "exact" is W times the gradient of the loss, "release" the gradient itself."""
    torch.manual_seed(2)
    image, text = (F.normalize(torch.randn(size * PAIRS, WIDTH, dtype=torch.float64), dim=-1) for _ in range(2))
    scale = torch.tensor(7.0, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (image, text, scale)]
    wanted = torch.autograd.grad(reference.contrastive_loss(*leaves), leaves)
    own = slice(rank * PAIRS, (rank + 1) * PAIRS)
    for gradient, factor in (("exact", size), ("release", 1)):
        leaves = [x.clone().requires_grad_() for x in (image[own], text[own], scale)]
        loss = ops.contrastive_loss(*leaves, process_group=group, gradient=gradient, workspace_bytes=500)
        ours = list(torch.autograd.grad(loss, leaves))
        dist.all_reduce(ours[2])
        for a, b in zip(ours, (factor * wanted[0][own], factor * wanted[1][own], size * wanted[2]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    bad = image[own].clone()
    if rank == size - 1:
        bad[0, 0] = torch.nan
    assert ops.contrastive_loss(bad, text[own], scale, process_group=group).isnan()  # on every rank


def check_halves(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """What the ranks add to a gradient is added in float32: bounds as for one process."""
    torch.manual_seed(5)
    for dtype in (torch.bfloat16, torch.float16):
        image, text = (F.normalize(torch.randn(size * 20, 32), dim=-1).to(dtype) for _ in range(2))
        scale = torch.tensor(14.3)
        eager = differentiate(reference.contrastive_loss, image, text, scale)
        exact = differentiate(reference.contrastive_loss, *(x.double() for x in (image, text, scale)))
        own = slice(rank * 20, (rank + 1) * 20)
        loss = lambda x, y, s: ops.contrastive_loss(x, y, s, process_group=group, gradient="release")
        ours = differentiate(loss, image[own], text[own], scale)
        condition = 14.3
        check_draws("loss", [(ours[0], exact[0], unlucky(exact[0], eager[0]))], condition=condition)
        for what, place in (("d image", 1), ("d text", 2)):
            check_draws(what, [(ours[place], exact[place][own], eager[place][own])], condition=condition)


def check_ring(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """Everything about pairs once more, each rank's texts passing by; no rank ever holds those of all."""
    arriving = pass_on(torch.full((2,), rank), Ranks.of(group))
    assert arriving().tolist() == [(rank + 1) % size] * 2

    def gather_ids(tensor: Tensor, ranks: Ranks) -> Tensor:
        assert not tensor.is_floating_point(), "texts were gathered"
        return gather(tensor, ranks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrastive, "GATHERED_BYTES", 0)
        patch.setattr(contrastive, "gather", gather_ids)
        check_losses(rank, size, group, kinds=("pairs",))
        check_embeddings(rank, size, group)
        check_halves(rank, size, group)
        x = torch.randn(PAIRS, WIDTH)
        with pytest.raises(AssertionError, match="texts were gathered"):  # with ids they are, whatever they take
            ops.contrastive_loss(
                x,
                x,
                torch.tensor(1.0),
                image_ids=torch.arange(PAIRS),
                text_ids=torch.arange(PAIRS),
                process_group=group,
            )


def check_samples(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """Negatives come from all ranks, none is a positive, and what is fetched is the sample itself."""
    batch = globally(size)
    own = slice(rank * PAIRS, (rank + 1) * PAIRS)
    samples = torch.arange(size * PAIRS * 2).view(-1, 2)
    everywhere = torch.randperm(size * PAIRS)[: 3 + rank]  # another number on each rank
    assert torch.equal(fetch_samples(samples[own], everywhere, group), samples[everywhere])
    assert torch.equal(fetch_samples(batch["images"][own], everywhere[:0], group), batch["images"][:0])
    embeds = DualEncoder()(batch["images"], batch["texts"])
    image, text, scale = embeds[0][own], embeds[1][own], torch.tensor(2.0)
    ids = batch["ids"]
    seen = torch.zeros(2, size * PAIRS)
    for repeat in range(40):
        generator = torch.Generator().manual_seed(100 * rank + repeat)
        drawn = ops.sample_hard_negatives(image, text, scale, process_group=group, generator=generator)
        index = torch.arange(size * PAIRS)[own]
        for part, place in zip(drawn, (0, 1), strict=True):
            assert (part != index).all()
            seen[place] += torch.bincount(part, minlength=size * PAIRS)
        drawn = ops.sample_hard_negatives(
            image, text, scale, image_ids=ids[own], text_ids=ids[own], process_group=group, generator=generator
        )
        assert (ids[drawn.image_ids] != ids[own]).all()
        assert (ids[drawn.text_ids] != ids[own]).all()
    assert (seen > 0).float().mean() > 0.9
    # At an extreme scale the draw is the most similar other one of the whole batch.
    drawn = ops.sample_hard_negatives(image, text, torch.tensor(1e6), process_group=group)
    scores = (embeds[0] @ embeds[1].t()).fill_diagonal_(-2)
    assert torch.equal(drawn.text_ids, scores.argmax(1)[own])
    assert torch.equal(drawn.image_ids, scores.argmax(0)[own])


def check_gradcache(rank: int, size: int, group: dist.ProcessGroup) -> None:
    """Chunks on each rank, the global batch over all, and gradients averaged at the end."""
    batch = globally(size)
    own = slice(rank * PAIRS, (rank + 1) * PAIRS)
    alone, ours = DualEncoder(), DualEncoder()
    wanted = reference.contrastive_loss(*alone(batch["images"], batch["texts"]))
    wanted.backward()
    loss = cached_backward(
        [lambda x: F.normalize(ours.image(x), dim=-1), lambda x: F.normalize(ours.text(x), dim=-1)],
        [batch["images"][own], batch["texts"][own]],
        lambda x, y: ops.contrastive_loss(x, y, ours.log_scale.exp(), process_group=group),
        chunk_size=4,
    )
    average_gradients(ours.parameters(), group)
    torch.testing.assert_close(loss, wanted.detach())
    for a, b in zip(ours.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def check_refusals(rank: int, size: int, group: dist.ProcessGroup) -> None:
    x, scale = torch.randn(3 + (rank == 0), 4), torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"must have one size on all ranks, got \[\[4, 4, 4\], \[3, 4, 3\]"):
        ops.contrastive_loss(x, x, scale, process_group=group)
    with pytest.raises(NotImplementedError, match="the reference computes the batch of one process"):
        ops.contrastive_loss(x, x, scale, process_group=group, backend="eager")
    with pytest.raises(
        ValueError, match=rf"^fetch_samples: indices must be in \[0, {3 * size}\), got \[0, {3 * size}\]"
    ):
        fetch_samples(x[:3], torch.tensor([0, 3 * size]), group)
    ids = torch.full((3,), rank)
    texts = torch.full((3,), 0)  # the other ranks' images have no text
    assert ops.contrastive_loss(x[:3], x[:3], scale, image_ids=ids, text_ids=texts, process_group=group).isnan()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.usefixtures("cpu_extension")
@pytest.mark.parametrize("size", [2, 4])
def test_global_batch(size: int) -> None:
    run_ranks(check_rank, size)


def fail_on_the_last(rank: int, size: int) -> None:
    assert rank < size - 1, "what rank 1 says"


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
def test_a_failure_on_one_rank_fails() -> None:
    with pytest.raises(multiprocessing.ProcessRaisedException, match="what rank 1 says"):
        run_ranks(fail_on_the_last, 2)


def test_gradient_is_refused_by_name() -> None:
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="gradient must be 'exact' or 'release', got 'mean'"):
        ops.contrastive_loss(x, x, torch.tensor(1.0), gradient="mean")
