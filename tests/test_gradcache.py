"""The cached contrastive step: the gradients of the whole batch, whatever is random in the encoders."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmo_fast import MoMEConfig, MoMETransformer, ops
from vlmo_fast.training.gradcache import cached_backward

COUNT = 11
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_vl_layers": 1,
    "image_size": 32,
    "patch_size": 16,
    "vocab_size": 50,
    "max_text_length": 8,
}


class Encoders(nn.Module):
    """VLMo as a dual encoder, in training mode: drop path in the blocks, and dropout before the norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = MoMETransformer(MoMEConfig(**SMALL, drop_path_rate=0.3)).double().train()
        self.log_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def image(self, pixel_values: Tensor) -> Tensor:
        embeds = self.backbone(pixel_values=pixel_values, cls_only=True).image_embeds
        return F.normalize(F.dropout(embeds, 0.2), dim=-1)

    def text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        embeds = self.backbone(input_ids, attention_mask, cls_only=True).text_embeds
        return F.normalize(F.dropout(embeds, 0.2), dim=-1)

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        return ops.contrastive_loss(image, text, self.log_scale.exp())


def data() -> tuple[Tensor, dict[str, Tensor | None]]:
    torch.manual_seed(4)
    ids = torch.randint(0, 50, (COUNT, 8))
    return torch.randn(COUNT, 3, 32, 32, dtype=torch.float64), {
        "input_ids": ids,
        "attention_mask": (torch.arange(8) < torch.randint(2, 9, (COUNT, 1))).long(),
    }


def whole_step(model: Encoders, chunk_size: int) -> Tensor:
    """The same chunks with one graph over all of them."""
    images, texts = data()
    torch.manual_seed(7)
    embeds = [
        torch.cat([model.image(part) for part in images.split(chunk_size)]),
        torch.cat(
            [
                model.text(*parts)
                for parts in zip(
                    texts["input_ids"].split(chunk_size), texts["attention_mask"].split(chunk_size), strict=True
                )
            ]
        ),
    ]
    loss = model.loss(*embeds)
    loss.backward()
    return loss


@pytest.mark.parametrize("chunk_size", [4, 11, 100, 1])
def test_gradients_are_those_of_the_whole_batch(chunk_size: int) -> None:
    cached, whole = Encoders(), Encoders()
    images, texts = data()
    torch.manual_seed(7)
    loss = cached_backward([cached.image, cached.text], [images, texts], cached.loss, chunk_size=chunk_size)
    after = torch.get_rng_state()
    wanted = whole_step(whole, chunk_size)
    assert torch.equal(after, torch.get_rng_state())  # replaying left no trace
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-12, atol=0)
    assert not loss.requires_grad
    for (name, a), b in zip(cached.named_parameters(), whole.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


def test_a_batch_of_thousands() -> None:
    """2,048 pairs, 100 at a time, with dropout: the gradients of one step over all."""
    images, texts = torch.randn(2048, 12, dtype=torch.float64), torch.randn(2048, 10, dtype=torch.float64)
    weights = [torch.randn(size, 8, dtype=torch.float64) for size in (12, 10)]

    def leaves() -> tuple[Tensor, Tensor, Tensor]:
        image, text = (weight.clone().requires_grad_() for weight in weights)
        return image, text, torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def encode(x: Tensor, weight: Tensor) -> Tensor:
        return F.normalize(F.dropout(x @ weight, 0.1), dim=-1)

    image, text, log_scale = cached = leaves()
    torch.manual_seed(2)
    loss = cached_backward(
        [lambda x: encode(x, image), lambda x: encode(x, text)],
        [images, texts],
        lambda x, y: ops.contrastive_loss(x, y, log_scale.exp()),
        chunk_size=100,
    )
    whole = leaves()
    torch.manual_seed(2)
    embeds = [
        torch.cat([encode(part, weight) for part in batch.split(100)])
        for batch, weight in zip((images, texts), whole[:2], strict=True)
    ]
    wanted = ops.contrastive_loss(*embeds, whole[2].exp())
    wanted.backward()
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-13, atol=0)
    for a, b in zip(cached, whole, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-13)


@pytest.mark.gpu
@pytest.mark.parametrize("chunks_on", ["cpu", "cuda"])
def test_random_state_of_a_gpu(chunks_on: str) -> None:
    """Dropout on the GPU, whether chunks lie there or the encoder takes them there."""
    weight = torch.randn(6, 6, device="cuda")
    inputs = [torch.randn(40, 6, device=chunks_on) for _ in range(2)]
    scale = torch.tensor(5.0, device="cuda")
    gradients = []
    for cached in (True, False):
        leaf = weight.clone().requires_grad_()
        encoder = lambda x, w=leaf: F.normalize(F.dropout(x.cuda() @ w, 0.3), dim=-1)
        loss = lambda x, y: ops.contrastive_loss(x, y, scale)
        torch.cuda.manual_seed(3)
        if cached:
            cached_backward([encoder, encoder], inputs, loss, chunk_size=7)
        else:
            loss(*(torch.cat([encoder(part) for part in batch.split(7)]) for batch in inputs)).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_the_random_state_matters() -> None:
    """What would happen without replaying: other masks in the second pass, other gradients."""
    model = Encoders()
    images, _ = data()
    torch.manual_seed(7)
    first = model.image(images)
    assert not torch.allclose(first, model.image(images))


def test_no_graph_of_the_whole_batch() -> None:
    """Only chunks are ever encoded, each twice, and with a graph only the second time."""
    seen = []

    def encoder(x: Tensor, name: str = "text") -> Tensor:
        seen.append((name, len(x), torch.is_grad_enabled()))
        return F.normalize(x * weight, dim=-1)

    weight = torch.ones(6, requires_grad=True)
    inputs = [(torch.randn(5, 6), "image"), torch.randn(5, 6)]
    cached_backward(
        [encoder, encoder], inputs, lambda x, y: ops.contrastive_loss(x, y, torch.tensor(5.0)), chunk_size=2
    )
    sizes = [(name, size) for name in ("image", "text") for size in (2, 2, 1)]
    assert seen == [(*part, False) for part in sizes] + [(*part, True) for part in sizes]
    assert weight.grad is not None


def test_scaled_backward_and_accumulation() -> None:
    """Twice with a factor: the gradients of a gradient scaler, added up."""
    results = []
    for factor, repeats in ((1.0, 1), (8.0, 2)):
        weight = torch.linspace(0.5, 1.5, 6).requires_grad_()
        torch.manual_seed(1)
        inputs = [torch.randn(5, 6), torch.randn(5, 6)]
        for _ in range(repeats):
            cached_backward(
                [lambda x, w=weight: F.normalize(x * w, dim=-1)] * 2,
                inputs,
                lambda x, y: ops.contrastive_loss(x, y, torch.tensor(5.0)),
                chunk_size=2,
                backward=lambda loss, f=factor: (loss * f).backward(),
            )
        results.append(weight.grad)
    torch.testing.assert_close(results[1], 16 * results[0])


def test_refusals() -> None:
    loss = lambda *x: x[0].sum()
    for message, arguments, size in (
        ("chunk_size must be at least 1, got 0", ([abs], [torch.ones(2, 3)]), 0),
        ("inputs must be one for each of 2 encoders, got 1", ([abs, abs], [torch.ones(2, 3)]), 1),
        (r"inputs must hold tensors of one length, got lengths \[2, 3\]", ([max], [(torch.ones(2), torch.ones(3))]), 1),
        (r"inputs must hold tensors of one length, got lengths \[0\]", ([abs], [torch.ones(0, 3)]), 1),
    ):
        with pytest.raises(ValueError, match=f"^cached_backward: {message}"):
            cached_backward(*arguments, loss, chunk_size=size)
