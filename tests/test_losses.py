"""VLMo's objectives against their formulas in float64, and the law of hard negatives."""

import math

import pytest
import torch
from scipy.stats import chisquare
from torch.nn import functional as F

from vlmo_fast import losses


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    norm = math.log(sum(math.exp(value - top) for value in row)) + top
    return [value - norm for value in row]


# Masked tokens


def test_masked_token_loss():
    """Mean over the labelled positions, however they lie in the batch."""
    logits = torch.randn(2, 3, 5, dtype=torch.float64)
    labels = torch.tensor([[-100, 4, -100], [0, -100, 2]])
    wanted = -sum(log_softmax(logits[i, j].tolist())[int(labels[i, j])] for i, j in ((0, 1), (1, 0), (1, 2))) / 3
    loss = losses.masked_token_loss(logits, labels)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(wanted, rel=1e-14)  # a handful of float64 operations
    assert losses.masked_token_loss(logits[0], labels[0]).item() == pytest.approx(
        -log_softmax(logits[0, 1].tolist())[4], rel=1e-14
    )


def test_masked_token_loss_is_torchs_mean():
    logits, labels = torch.randn(7, 11), torch.randint(0, 11, (7,))
    labels[2] = -100
    torch.testing.assert_close(losses.masked_token_loss(logits, labels), F.cross_entropy(logits, labels))


def test_no_label_gives_zero_not_nan():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    loss = losses.masked_token_loss(logits, torch.full((2, 3), -100))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_unlabelled_positions_get_no_gradient():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    labels = torch.tensor([[-100, 4, -100], [0, -100, 2]])
    losses.masked_token_loss(logits, labels).backward()
    assert torch.equal(logits.grad.abs().sum(-1) > 0, labels != -100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_float32(dtype):
    """The same bits as promoting first; the gradient comes back in the logits' dtype."""
    logits = torch.randn(4, 6, 50).to(dtype).requires_grad_()
    labels, scores = torch.randint(0, 50, (4, 6)), torch.rand(4, 50)
    for loss, wanted in (
        (losses.masked_token_loss(logits, labels), losses.masked_token_loss(logits.float(), labels)),
        (losses.answer_loss(logits[:, 0], scores), losses.answer_loss(logits[:, 0].float(), scores)),
    ):
        assert loss.dtype == torch.float32
        assert torch.equal(loss, wanted)
        (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert gradient.dtype == dtype


def test_masked_token_gradients():
    labels = torch.tensor([[-100, 4, -100], [0, -100, 2]])
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: losses.masked_token_loss(x, labels), logits)


# Answers


def test_answer_loss():
    """Binary cross-entropy with soft scores, summed over answers, averaged over questions (mean * answers)."""
    logits = torch.randn(3, 4, dtype=torch.float64)
    scores = torch.tensor([[1.0, 0.3, 0, 0], [0, 0, 0, 0], [0, 0.6, 0.6, 1.0]], dtype=torch.float64)
    wanted = 0.0
    for row, targets in zip(logits.tolist(), scores.tolist(), strict=True):
        for x, y in zip(row, targets, strict=True):
            p = 1 / (1 + math.exp(-x))
            wanted -= (y * math.log(p) + (1 - y) * math.log(1 - p)) / 3
    assert losses.answer_loss(logits, scores).item() == pytest.approx(wanted, rel=1e-13)


def test_answer_loss_takes_extreme_logits():
    """log(1 - sigmoid(1000)) underflows; the loss must not."""
    logits = torch.tensor([[1000.0, -1000.0]])
    assert losses.answer_loss(logits, torch.tensor([[0.0, 0.0]])).item() == 1000
    assert losses.answer_loss(logits, torch.tensor([[1.0, 0.0]])).item() == 0


def test_answer_loss_mixed_dtypes_and_gradients():
    logits = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert losses.answer_loss(logits, torch.rand(3, 4)).dtype == torch.float64
    scores = torch.rand(3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: losses.answer_loss(x, scores), logits)


# Matching


def test_matching_labels():
    assert losses.matching_labels(3).tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0]
    assert losses.matching_labels(1).dtype == torch.int64


def embeddings(pairs: int, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    image, text = torch.randn(2, pairs, width, dtype=torch.float64).unbind()
    return F.normalize(image, dim=-1), F.normalize(text, dim=-1)


def test_probabilities_against_the_formula():
    """Softmax over all but the own match; images of each text first."""
    image, text = embeddings(5)
    scale = torch.tensor(3.0, dtype=torch.float64)
    of_texts, of_images = losses.hard_negative_probabilities(image, text, scale)
    for probabilities, rows, columns in ((of_texts, text, image), (of_images, image, text)):
        for i in range(5):
            weights = [0.0 if j == i else math.exp(3 * float(rows[i] @ columns[j])) for j in range(5)]
            wanted = torch.tensor(weights, dtype=torch.float64) / sum(weights)
            torch.testing.assert_close(probabilities[i], wanted, rtol=1e-13, atol=0)
        assert torch.equal(probabilities.diagonal(), torch.zeros(5, dtype=torch.float64))


def test_probabilities_of_swapped_modalities():
    image, text = embeddings(4)
    scale = torch.tensor(7.0, dtype=torch.float64)
    ours, swapped = (losses.hard_negative_probabilities(*pair, scale) for pair in ((image, text), (text, image)))
    torch.testing.assert_close(ours, swapped[::-1], rtol=1e-13, atol=1e-16)


def test_probabilities_are_those_of_float32_under_autocast():
    """Scores rounded to bfloat16 would move a weight by some percent at the released scale."""
    image, text = (x.float() for x in embeddings(5))
    scale = torch.tensor(1 / 0.07)
    wanted = losses.hard_negative_probabilities(image, text, scale)
    with torch.autocast("cpu", torch.bfloat16):
        ours = losses.hard_negative_probabilities(image, text, scale)
    assert all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))


def test_draws_follow_the_probabilities():
    """Chi-square over 4,000 seeded draws for each of 2 x 6 rows.

    With a fixed seed nothing is random here; p > 1e-4 in each of 12 tests is what a right sampler gives in 99.9 %
    of all seeds, while a sampler of other probabilities (uniform, exchanged modalities) is off by hundreds of decades.
    """
    image, text = embeddings(6)
    scale = torch.tensor(2.0)
    of_texts, of_images = losses.hard_negative_probabilities(image.float(), text.float(), scale)
    counts = torch.zeros(2, 6, 6)
    generator = torch.Generator().manual_seed(0)
    repeats, each = 4000, torch.arange(6)
    for _ in range(repeats):
        drawn = losses.sample_hard_negatives(image, text, scale, generator=generator)
        counts[0, each, drawn.image_ids] += 1
        counts[1, each, drawn.text_ids] += 1
    for seen, probabilities in zip(counts, (of_texts, of_images), strict=True):
        for i in range(6):
            others = each != i
            assert seen[i, i] == 0
            expected = probabilities[i, others].double()
            p_value = chisquare(seen[i, others].double().numpy(), (expected / expected.sum() * repeats).numpy()).pvalue
            assert p_value > 1e-4


@pytest.mark.parametrize("scale", [0.0, 1 / 0.07, 1e4, 1e30])
def test_never_the_own_match(scale):
    """Whatever the scale: at 1e4 the own match has all of the plain softmax's mass, and the others underflow to 0."""
    image, _ = embeddings(5)
    text = image.clone()
    each = torch.arange(5)
    for _ in range(20):
        drawn = losses.sample_hard_negatives(image, text, torch.tensor(scale))
        for ids in drawn:
            assert ids.dtype == torch.int64
            assert ids.shape == (5,)
            assert (ids != each).all()
            assert ((ids >= 0) & (ids < 5)).all()


def test_two_pairs_take_each_other():
    image, text = embeddings(2)
    drawn = losses.sample_hard_negatives(image, text, torch.tensor(14.0))
    assert drawn.image_ids.tolist() == drawn.text_ids.tolist() == [1, 0]


def test_hardest_negative_at_extreme_scale():
    """The softmax becomes an argmax over the others; a text's image comes from its own row, not from a column."""
    image, text = embeddings(6)
    similarities = (text @ image.t()).fill_diagonal_(-2)
    drawn = losses.sample_hard_negatives(image, text, torch.tensor(1e6))
    assert torch.equal(drawn.image_ids, similarities.argmax(1))
    assert torch.equal(drawn.text_ids, similarities.argmax(0))


def test_draws_are_seeded_and_without_gradient():
    image, text = (x.requires_grad_() for x in embeddings(8))
    scale = torch.tensor(1.0, requires_grad=True)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.cat(losses.sample_hard_negatives(image, text, scale, generator=generator))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert not draw(1).requires_grad
    state = torch.get_rng_state()
    draw(3)
    assert torch.equal(state, torch.get_rng_state())  # its own generator, not torch's


def test_half_precision_embeddings_are_drawn_in_float32():
    image, text = embeddings(6)
    image, text = image.bfloat16(), text.bfloat16()

    def draw(*arguments):
        return losses.sample_hard_negatives(*arguments, generator=torch.Generator().manual_seed(5))

    low = draw(image, text, torch.tensor(10.0, dtype=torch.bfloat16))
    high = draw(image.float(), text.float(), torch.tensor(10.0))
    assert all(torch.equal(a, b) for a, b in zip(low, high, strict=True))


@pytest.mark.parametrize(("images", "texts"), [(1, 1), (0, 0), (3, 2), (2, 3)])
def test_needs_another_pair(images, texts):
    for function in (losses.hard_negative_probabilities, losses.sample_hard_negatives):
        with pytest.raises(ValueError, match=rf"at least 2 pairs, got {images} images and {texts} texts"):
            function(torch.ones(images, 4), torch.ones(texts, 4), torch.tensor(1.0))
