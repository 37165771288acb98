"""Visual tokens: k-means against its definition, and files; each test with the fault that it catches."""

from itertools import pairwise

import pytest
import torch
from scipy.stats import binomtest

from vlmo_fast.training.codebook import PatchCodebook, PrecomputedTokens, _lloyd

FALSE_ALARM = 1e-6  # were the seed drawn anew; with the seed fixed the test is not random


def images_of(count, size=8, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def patches_of(images, side):
    """(B, patches, D), cut out one by one."""
    rows = []
    for image in images:
        tops, lefts = range(0, image.shape[1], side), range(0, image.shape[2], side)
        rows.append(torch.stack([image[:, y : y + side, x : x + side].flatten() for y in tops for x in lefts]))
    return torch.stack(rows)


def mean_distance(codebook, images):
    patches = patches_of(images, codebook.patch_size)
    return (patches - codebook.centroids[codebook.encode(images)]).square().sum(-1).mean().item()


def test_tokens_are_the_nearest_centroids():
    """By brute force, on an image that is not square: catches rows for columns, channels last, the square left out."""
    images = torch.randn(5, 3, 8, 12)
    codebook = PatchCodebook(torch.randn(7, 48) * torch.linspace(0.1, 3, 7)[:, None], patch_size=4)
    distances = torch.cdist(patches_of(images, 4), codebook.centroids[None].expand(5, -1, -1))
    assert torch.equal(codebook.encode(images), distances.argmin(-1))
    assert codebook.encode(images).shape == (5, 6)
    assert codebook.num_tokens == 7


def test_patches_are_in_the_order_of_the_models_tokens():
    """A projection of the model to one patch's centroid finds that patch."""
    images = images_of(1)
    codebook = PatchCodebook(patches_of(images, 4)[0], patch_size=4)
    projection = torch.nn.functional.conv2d(images, codebook.centroids.view(-1, 3, 4, 4), stride=4)
    assert torch.equal(codebook.encode(images), torch.arange(4)[None])
    assert torch.equal(projection[0].flatten(1).argmax(0), torch.arange(4))


def test_each_iteration_comes_closer():
    """Lloyd's law, with centroids to revive: catches means over the wrong patches, and lost centroids."""
    images = torch.cat([images_of(30), torch.zeros(30, 3, 8, 8)])  # half of all patches are equal
    distances = [
        mean_distance(PatchCodebook.fit([images], num_tokens=24, patch_size=1, num_iterations=n), images)
        for n in range(12)
    ]
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(distances))
    assert distances[-1] < 0.95 * distances[0]


def test_a_fixed_point():
    """After convergence each centroid is the mean of its patches, and none is without."""
    images = torch.cat([images_of(30), torch.zeros(30, 3, 8, 8)])
    codebook = PatchCodebook.fit([images], num_tokens=24, patch_size=4, num_iterations=200)
    patches, tokens = patches_of(images, 4).flatten(0, 1), codebook.encode(images).flatten()
    assert len(tokens.unique()) == 24
    means = torch.stack([patches[tokens == n].mean(0) for n in range(24)])
    torch.testing.assert_close(codebook.centroids, means, rtol=0, atol=1e-5)


def test_unused_centroids_are_revived():
    """All start at the same patch: catches those without patches that stay where they were, or turn into NaN."""
    patches = torch.randn(200, 3) + 50
    centroids = _lloyd(patches, patches[:1].repeat(8, 1), num_iterations=50)
    tokens, distances = torch.cdist(patches, centroids).min(1)[::-1]
    assert len(tokens.unique()) == 8
    assert distances.square().mean() < 0.7 * patches.var(0).sum()


def test_as_many_tokens_as_patches():
    """The first centroids are all of them: catches a patch drawn twice where distances are all rounding."""
    images = torch.randn(30, 3, 4, 4) / 100 + torch.tensor([-1000.0, 1000.0]).repeat(15)[:, None, None, None]
    codebook = PatchCodebook.fit([images], num_tokens=30, patch_size=4, num_iterations=0)
    assert len(codebook.centroids.unique(dim=0)) == len(images.unique(dim=0)) == 30


def test_separate_clusters_are_found():
    """One centroid each, though nearly all patches are of one: catches first centroids drawn like patches."""
    middles = 10 * torch.randn(12, 48)
    labels = torch.arange(12).repeat_interleave(torch.tensor([200] + 11 * [4]))  # all but one are rare
    patches = middles[labels] + 0.01 * torch.randn(len(labels), 48)
    images = patches.view(-1, 3, 4, 4)
    codebook = PatchCodebook.fit([images], num_tokens=12, patch_size=4, num_iterations=50)
    tokens = codebook.encode(images).flatten()
    assert len({(token, label) for token, label in zip(tokens.tolist(), labels.tolist(), strict=True)}) == 12


def test_more_tokens_than_different_patches():
    images = torch.zeros(4, 3, 8, 8)
    images[0] = 1
    codebook = PatchCodebook.fit([images], num_tokens=5, patch_size=4)
    assert torch.isfinite(codebook.centroids).all()
    assert mean_distance(codebook, images) < 1e-12


@pytest.mark.parametrize("max_patches", [40, 1000], ids=["sampled", "all kept"])
def test_batching_changes_nothing(max_patches):
    """To the bit, across compressions of the sample: catches an order or a draw that follows the batches."""
    images = images_of(60)  # 240 patches, compressed when more than 80 are kept
    whole, parts = (
        PatchCodebook.fit(batches, num_tokens=8, patch_size=4, max_patches=max_patches)
        for batches in ([images], images.split(7))
    )
    assert torch.equal(whole.centroids, parts.centroids)
    other = PatchCodebook.fit([images], num_tokens=8, patch_size=4, max_patches=max_patches, seed=1)
    assert not torch.equal(whole.centroids, other.centroids)


def test_every_patch_is_as_likely_in_the_sample():
    """The first and the last tenth of 400, over 50 seeds: catches a sample of the beginning.

    Without iterations the centroids are the sample itself; each patch tells its number.
    """
    images = torch.arange(400.0).view(400, 1, 1, 1)
    early = late = 0
    for seed in range(50):
        codebook = PatchCodebook.fit(
            images.split(10), num_tokens=20, patch_size=1, seed=seed, num_iterations=0, max_patches=20
        )
        numbers = codebook.centroids.round().flatten()
        assert len(numbers.unique()) == 20
        early, late = early + int((numbers < 40).sum()), late + int((numbers >= 360).sum())
    for count in (early, late):
        assert binomtest(count, 1000, 0.1).pvalue > FALSE_ALARM


def test_a_codebook_comes_back_from_its_file(tmp_path):
    codebook = PatchCodebook.fit([images_of(9)], num_tokens=4, patch_size=4)
    codebook.save(tmp_path / "codebook.safetensors")
    loaded = PatchCodebook.load(tmp_path / "codebook.safetensors")
    assert torch.equal(loaded.centroids, codebook.centroids)
    assert loaded.patch_size == 4


def test_precomputed_tokens(tmp_path):
    """By the item's number, whatever the order; kept small in the file."""
    tokens = PrecomputedTokens(torch.tensor([7, 2, 11]), torch.tensor([[1, 2], [3, 4], [5, 6]]).short(), num_tokens=9)
    tokens.save(tmp_path / "tokens.safetensors")
    for source in (tokens, PrecomputedTokens.load(tmp_path / "tokens.safetensors")):
        encoded = source.encode(images_of(4), torch.tensor([2, 11, 2, 7]))
        assert encoded.dtype == torch.int64
        assert encoded.tolist() == [[3, 4], [5, 6], [3, 4], [1, 2]]
        assert source.num_tokens == 9
        for unknown in (1, 8, 12):
            with pytest.raises(ValueError, match=rf"items must all have tokens, got \[{unknown}\]"):
                source.encode(images_of(2), torch.tensor([7, unknown]))


def test_what_is_refused(tmp_path):
    images, items = images_of(2), torch.tensor([1, 2])
    codebook = PatchCodebook.fit([images], num_tokens=2, patch_size=4)
    for call, message in (
        (lambda: PatchCodebook(torch.zeros(3, 50), 4), "centroids must be"),
        (lambda: PatchCodebook.fit([images], num_tokens=9, patch_size=4), "from 1 to the number of patches, 8, got 9"),
        (lambda: PatchCodebook.fit([], num_tokens=1), "at least one image"),
        (lambda: PatchCodebook.fit([images], num_tokens=1, patch_size=3), "multiples of patch_size=3"),
        (lambda: codebook.encode(images[:, :2]), "must have 3 channels"),
        (lambda: PrecomputedTokens(items, torch.zeros(3, 4).long(), 2), r"must be \(N,\) and \(N, patches\)"),
        (lambda: PrecomputedTokens(items, torch.full((2, 4), 2), 2), r"in \[0, num_tokens=2\), got 2 to 2"),
        (lambda: PrecomputedTokens(items[:1].expand(2), torch.zeros(2, 4).long(), 2), "once each"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    codebook.save(tmp_path / "codebook.safetensors")
    with pytest.raises(ValueError, match="must hold items, tokens, num_tokens, got centroids, patch_size"):
        PrecomputedTokens.load(tmp_path / "codebook.safetensors")
