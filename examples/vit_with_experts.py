"""A stranger's ViT learns to read: modality experts and relative positions put into a model that knows nothing of them.

`TinyViT` is an ordinary vision transformer. `with_experts` turns it into a dual encoder in place: each feed-forward
network becomes one expert for patches and one for words, both beginning as the trained network, and attention gains a
relative-position bias that begins at zero. On images the upgraded model computes exactly what it did before. One block
of VLMo's own on top, with a vision-language expert, makes it a fusion encoder too.

    python examples/vit_with_experts.py    # trains it for some ten seconds to match pictures with words
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmo_fast.nn import ContrastiveLoss, ExpertBlock, ExpertFeedForward, RelativeAttention

WIDTH, HEADS, DEPTH, WINDOW, PATCH, WORDS = 32, 4, 2, 4, 4, 12


class Block(nn.Module):
    """A block as many a ViT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.fc1, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) to the same."""
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class TinyViT(nn.Module):
    """Patches, [CLS], positions, blocks, norm."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + WINDOW**2, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)

    def tokens(self, pixels: Tensor) -> Tensor:
        """(B, 3, 16, 16) to [CLS] and patches, (B, S, D)."""
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.positions
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, 16, 16) to the [CLS] of each image, (B, D)."""
        return self.norm(self.tokens(pixels)[:, 0])


class BlockWithExperts(nn.Module):
    """The same block, its attention with relative positions, its network with an expert for each modality."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.norm1 = block.norm1
        self.attn = RelativeAttention(WIDTH, HEADS, window_size=WINDOW, text_span=WORDS)
        with torch.no_grad():  # the trained projections; a bias of the keys changes no softmax, so there is none here
            inner, (query, _, value) = self.attn.attention, block.attn.in_proj_bias.chunk(3)
            inner.qkv.weight.copy_(block.attn.in_proj_weight)
            inner.q_bias.copy_(query)
            inner.v_bias.copy_(value)
            inner.projection.load_state_dict(block.attn.out_proj.state_dict())
        self.ffn = ExpertFeedForward.from_dense(block.norm2, block.fc1, block.fc2, ("vision", "language"))

    def forward(self, x: Tensor, modality: str = "vision") -> Tensor:
        """(B, S, D), all of one modality, to the same."""
        x = x + self.attn(self.norm1(x), num_text_tokens=x.shape[1] if modality == "language" else 0)
        return self.ffn(x, ((modality, x.shape[1]),))


class Reader(nn.Module):
    """The upgraded ViT: images as before, and texts through the language experts."""

    def __init__(self, vit: TinyViT, num_words: int) -> None:
        super().__init__()
        vit.blocks = nn.ModuleList(BlockWithExperts(block) for block in vit.blocks)
        self.vit = vit
        self.words = nn.Embedding(num_words, WIDTH)
        self.fusion = ExpertBlock(WIDTH, HEADS, window_size=WINDOW, text_span=WORDS, fuses=True)
        self.head = nn.Linear(WIDTH, 2)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, 16, 16) to unit-norm embeddings, (B, D)."""
        return F.normalize(self.vit(pixels), dim=-1)

    def encode_texts(self, ids: Tensor) -> Tensor:
        """(B, T), the first id that of [CLS], to unit-norm embeddings, (B, D)."""
        return F.normalize(self.vit.norm(self._text_tokens(ids)[:, 0]), dim=-1)

    def match(self, pixels: Tensor, ids: Tensor) -> Tensor:
        """Whether texts say what is in their images, (B, 2) logits, from both read together."""
        pair = torch.cat([self._text_tokens(ids), self.vit.tokens(pixels)], dim=1)
        return self.head(self.vit.norm(self.fusion(pair, num_text_tokens=ids.shape[1])[:, 0]))

    def _text_tokens(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        for block in self.vit.blocks:
            x = block(x, "language")
        return x


def with_experts(vit: TinyViT, num_words: int) -> Reader:
    """Upgrade a ViT, in place."""
    return Reader(vit, num_words)


def sample(batch: int) -> tuple[Tensor, Tensor]:
    """Pictures with one bright quarter and one dark one, and the words that say which: (B, 3, 16, 16), (B, 3)."""
    bright, shift = torch.randint(0, 4, (batch,)), torch.randint(1, 4, (batch,))
    dark = (bright + shift) % 4
    pixels = 0.1 * torch.randn(batch, 3, 16, 16)
    for quarter, value in ((bright, 1.0), (dark, -1.0)):
        rows, columns = quarter // 2 * 8, quarter % 2 * 8
        for index in range(batch):
            pixels[index, :, rows[index] : rows[index] + 8, columns[index] : columns[index] + 8] += value
    return pixels, torch.stack([torch.zeros(batch, dtype=torch.int64), 1 + bright, 5 + dark], dim=1)


def train(
    model: Reader, steps: int = 120, batch: int = 48, report: Callable[[int, float], None] = lambda step, loss: None
) -> tuple[float, float]:
    """Match pictures with words, apart and together; `report` is told each step and its loss.

    Returns:
        Of the last steps' batches how many pictures find their caption among the twelve there are, and how many pairs,
        half of which match, are told right.
    """
    loss_of = ContrastiveLoss()
    optimizer = torch.optim.AdamW([*model.parameters(), *loss_of.parameters()], lr=3e-3)
    found, told = [], []
    for step in range(steps):
        pixels, ids = sample(batch)
        images, texts = model.encode_images(pixels), model.encode_texts(ids)
        content = ids[:, 1] * 16 + ids[:, 2]  # equal captions are no negatives
        shift = torch.randint(0, 2, (batch,)) * torch.randint(1, batch, (batch,))
        others = (torch.arange(batch) + shift) % batch  # half of the pictures beside another's caption
        logits, same = model.match(pixels, ids[others]), (content[others] == content).long()
        loss = loss_of(images, texts, image_ids=content, text_ids=content) + F.cross_entropy(logits, same)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        report(step + 1, loss.item())
        if step >= steps - 5:
            best = (images @ texts.t()).argmax(dim=1)
            found.append((content[best] == content).float().mean())
            told.append((logits.argmax(dim=1) == same).float().mean())
    return torch.stack(found).mean().item(), torch.stack(told).mean().item()


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more gain nothing on tensors this small
    found, told = train(
        with_experts(TinyViT(), 9),
        report=lambda step, loss: None if step % 20 else print(f"step {step} of 120, loss {loss:.2f}", flush=True),
    )
    print(f"right caption: {found:.1%} (chance 8.3%); pairs told right: {told:.1%} (chance about 50%)")
