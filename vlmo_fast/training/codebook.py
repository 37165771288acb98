"""Visual tokens, what masked image modelling predicts: from a k-means codebook of patches, or from a file.

BEiT (arXiv:2106.08254) predicts the codes of a discrete VAE that was trained on 250 million images. `PatchCodebook`
needs the images at hand alone; `PrecomputedTokens` takes codes of any origin.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from vlmo_fast.files import read_tensors, write_whole
from vlmo_fast.training.draws import item_keys, uniform

__all__ = ["PatchCodebook", "PrecomputedTokens", "VisualTokenizer"]

CHUNK_BYTES = 1 << 26  # of the distances that are held at a time


class VisualTokenizer(Protocol):
    """What gives each patch of an image its token."""

    @property
    def num_tokens(self) -> int:
        """Tokens are from 0 to this: a model's `image_vocab_size`, or less."""

    def encode(self, pixel_values: Tensor, items: Tensor) -> Tensor:
        """The tokens of images.

        Args:
            pixel_values: (B, C, H, W) float, as the model gets them.
            items: (B,) int64 numbers of the images in the data set.

        Returns:
            (B, patches) int64, row by row, on the device of `pixel_values`.
        """


class PatchCodebook:
    """The token of a patch is the nearest of K centroids, by the squared difference of its pixels.

    Args:
        centroids: (K, C * patch_size^2) float32; channels, then rows, then columns.
        patch_size: side of a patch, pixels.

    Raises:
        ValueError: shapes disagree.
    """

    def __init__(self, centroids: Tensor, patch_size: int) -> None:
        if centroids.ndim != 2 or not len(centroids) or patch_size < 1 or centroids.shape[1] % patch_size**2:
            got = tuple(centroids.shape)
            raise ValueError(f"PatchCodebook: centroids must be (K, channels * {patch_size}^2), got {got}")
        self.centroids, self.patch_size = centroids.float(), patch_size

    @property
    def num_tokens(self) -> int:
        """K."""
        return len(self.centroids)

    @classmethod
    def fit(
        cls,
        images: Iterable[Tensor],
        *,
        num_tokens: int,
        patch_size: int = 16,
        seed: int = 0,
        num_iterations: int = 25,
        max_patches: int = 100_000,
    ) -> PatchCodebook:
        """K-means by Lloyd's algorithm on patches of images.

        It starts from patches drawn in proportion to the squared distance from those drawn before: k-means++ (Arthur,
        Vassilvitskii, SODA 2007), K / 16 at a time, as costs no more than an iteration. A centroid that no patch is
        nearest to moves to the patch that is farthest from its own; so the mean squared distance never grows from one
        iteration to the next. If there are fewer different patches than tokens, some tokens are never used. On a CPU
        the result depends on the seed and on the images in their order, not on how they are batched.

        Args:
            images: batches (b, C, H, W) of `pixel_values`, without augmentation; gone through once.
            num_tokens: K.
            patch_size: side of a patch, pixels; divides H and W.
            seed: of the draw of patches.
            num_iterations: at most; fewer where no patch changes its centroid any more.
            max_patches: a sample of so many patches is kept, 4 C patch_size^2 bytes each, every patch as likely.

        Raises:
            ValueError: there are fewer patches than tokens, or shapes disagree.
        """
        patches = _sample(images, patch_size, seed, max_patches)
        if not 1 <= num_tokens <= len(patches):
            rule = f"be from 1 to the number of patches, {len(patches)}"
            raise ValueError(f"PatchCodebook.fit: num_tokens must {rule}, got {num_tokens}")
        middle = patches.mean(0)
        patches = patches - middle  # small numbers, of which the distances are more exact
        return cls(_lloyd(patches, _spread(patches, num_tokens, seed), num_iterations) + middle, patch_size)

    def encode(self, pixel_values: Tensor, items: Tensor | None = None) -> Tensor:
        """The tokens of images, (B, patches) int64; of equally near centroids the first. `items` are not looked at."""
        patches = _patches(pixel_values, self.patch_size)
        if patches.shape[2] != self.centroids.shape[1]:
            wanted = self.centroids.shape[1] // self.patch_size**2
            got = tuple(pixel_values.shape)
            raise ValueError(f"PatchCodebook.encode: pixel_values must have {wanted} channels, got {got}")
        centroids = self.centroids.to(pixel_values.device)
        middle = centroids.mean(0)
        tokens, _ = _nearest(patches.flatten(0, 1) - middle, centroids - middle)
        return tokens.view(patches.shape[:2])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a safetensors file."""
        _write(path, {"centroids": self.centroids, "patch_size": torch.tensor(self.patch_size)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PatchCodebook:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds something else.
        """
        tensors = _read(path, "PatchCodebook.load", ("centroids", "patch_size"))
        return cls(tensors["centroids"], int(tensors["patch_size"]))


class PrecomputedTokens:
    """Tokens that were computed before, of images in any order.

    They are those of the image as a whole, so a model must see it without a crop or a mirror image.

    Args:
        items: (N,) int64, different numbers of images.
        tokens: (N, patches), any integer dtype, row by row.
        num_tokens: K, more than the greatest token.

    Raises:
        ValueError: shapes disagree, an item is there twice, or a token is out of range.
    """

    def __init__(self, items: Tensor, tokens: Tensor, num_tokens: int) -> None:
        if tokens.ndim != 2 or items.shape != tokens.shape[:1] or not tokens.numel():
            got = f"{tuple(items.shape)} and {tuple(tokens.shape)}"
            raise ValueError(f"PrecomputedTokens: items and tokens must be (N,) and (N, patches), got {got}")
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < num_tokens:
            got = f"{int(tokens.min())} to {int(tokens.max())}"
            raise ValueError(f"PrecomputedTokens: tokens must be in [0, num_tokens={num_tokens}), got {got}")
        self._items, order = items.long().sort()
        if bool((self._items[1:] == self._items[:-1]).any()):
            raise ValueError("PrecomputedTokens: items must be there once each, got some twice")
        self._tokens, self._num_tokens = tokens[order], num_tokens

    @property
    def num_tokens(self) -> int:
        """K."""
        return self._num_tokens

    def encode(self, pixel_values: Tensor, items: Tensor) -> Tensor:
        """The tokens of images, (B, patches) int64; of `pixel_values` only the device counts.

        Raises:
            ValueError: an item has no tokens.
        """
        wanted = items.to(self._items.device)
        place = torch.searchsorted(self._items, wanted).clamp(max=len(self._items) - 1)
        unknown = wanted[self._items[place] != wanted]
        if len(unknown):
            raise ValueError(f"PrecomputedTokens.encode: items must all have tokens, got {unknown[:8].tolist()}")
        return self._tokens[place].to(pixel_values.device, torch.int64)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as a safetensors file, in the dtype that they have."""
        tensors = {"items": self._items, "tokens": self._tokens, "num_tokens": torch.tensor(self._num_tokens)}
        _write(path, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PrecomputedTokens:
        """Read what `save`, or another program, wrote: `items`, `tokens` and `num_tokens`, as the class takes them.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds something else.
        """
        tensors = _read(path, "PrecomputedTokens.load", ("items", "tokens", "num_tokens"))
        return cls(tensors["items"], tensors["tokens"], int(tensors["num_tokens"]))


def _patches(pixel_values: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, patches, C * patch_size^2) float32, in the order of the model's image tokens."""
    if pixel_values.ndim != 4 or pixel_values.shape[2] % patch_size or pixel_values.shape[3] % patch_size:
        rule = f"be (B, C, H, W), H and W multiples of patch_size={patch_size}"
        raise ValueError(f"PatchCodebook: pixel_values must {rule}, got {tuple(pixel_values.shape)}")
    split = pixel_values.float().unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (B, C, h, P, w, P)
    return split.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _sample(images: Iterable[Tensor], patch_size: int, seed: int, max_patches: int) -> Tensor:
    """Patches in random order, (n, D): those with the least of one random number each, whatever batch they come in."""
    key = item_keys(seed, 0, [0], "codebook")
    kept: list[tuple[Tensor, Tensor]] = []
    count, num_kept, bound = 0, 0, 1.0

    def least() -> tuple[Tensor, Tensor]:
        numbers, patches = (torch.cat(parts) for parts in zip(*kept, strict=True))
        order = numbers.argsort(stable=True)[:max_patches]
        return numbers[order], patches[order.to(patches.device)]

    for batch in images:
        patches = _patches(batch, patch_size).flatten(0, 1)
        numbers = uniform(key, (len(patches),), start=count)[0]
        count += len(patches)
        chosen = numbers < bound
        kept.append((numbers[chosen], patches[chosen.to(patches.device)]))
        num_kept += int(chosen.sum())
        if num_kept > 2 * max_patches:
            kept = [least()]
            num_kept, bound = max_patches, float(kept[0][0][-1])
    if not count:
        raise ValueError("PatchCodebook.fit: images must hold at least one image, got none")
    return least()[1]


def _spread(patches: Tensor, num_tokens: int, seed: int) -> Tensor:
    """First centroids (K, D): patches (n, D), drawn by k-means++ in rounds."""
    key = item_keys(seed, 0, [0], "first centroids")
    chosen = torch.zeros(1, dtype=torch.int64, device=patches.device)  # the patches are in random order
    distances = torch.full((len(patches),), torch.inf, device=patches.device)
    newest = chosen
    while len(chosen) < num_tokens:
        distances = distances.minimum(_nearest(patches, patches[newest])[1])
        # The first events of Poisson processes of these rates are a draw without replacement in proportion to them.
        draws = uniform(key.to(patches.device), distances.shape, start=len(chosen) * len(patches))[0]
        times = -torch.log1p(-draws) / distances.clamp(min=torch.finfo(torch.float32).tiny)
        times[chosen] = torch.inf
        newest = times.topk(min(num_tokens - len(chosen), max(1, num_tokens // 16)), largest=False).indices
        chosen = torch.cat([chosen, newest])
    return patches[chosen]


def _lloyd(patches: Tensor, centroids: Tensor, num_iterations: int) -> Tensor:
    """Better centroids (K, D) of patches (n, D)."""
    num_tokens = len(centroids)
    previous = None
    for _ in range(num_iterations):
        tokens, distances = _nearest(patches, centroids)
        counts = tokens.bincount(minlength=num_tokens)
        unused = (counts == 0).nonzero().flatten()
        if previous is not None and torch.equal(tokens, previous) and not len(unused):
            break
        sums = torch.zeros(centroids.shape, dtype=torch.float64, device=patches.device)
        for rows in torch.arange(len(patches), device=patches.device).split(_rows_at_a_time(patches.shape[1])):
            sums.index_add_(0, tokens[rows], patches[rows].double())
        centroids = (sums / counts.clamp(min=1)[:, None]).to(patches.dtype)
        centroids[unused] = patches[distances.topk(len(unused)).indices]
        previous = tokens
    return centroids


def _nearest(patches: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centroid of each patch, (n,) int64, and the squared distance to it, (n,)."""
    half_norms = centroids.square().sum(1) / 2
    tokens, distances = [], []
    for part in patches.split(_rows_at_a_time(len(centroids))):
        least = torch.addmm(half_norms, part, centroids.T, alpha=-1).min(1)
        tokens.append(least.indices)
        distances.append((2 * least.values + part.square().sum(1)).clamp(min=0))
    return torch.cat(tokens), torch.cat(distances)


def _rows_at_a_time(num_columns: int) -> int:
    return max(1, CHUNK_BYTES // (4 * num_columns))


def _write(path: str | os.PathLike[str], tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save_file

    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save: Callable[[Path], None] = lambda temporary: save_file(contiguous, temporary)
    write_whole(Path(path), save)


def _read(path: str | os.PathLike[str], who: str, names: tuple[str, ...]) -> dict[str, Tensor]:
    tensors = read_tensors(path, who)
    if set(tensors) != set(names):
        raise ValueError(f"{who}: {path} must hold {', '.join(names)}, got {', '.join(sorted(tensors)) or 'nothing'}")
    return tensors
