"""The public operations: values and gradients against float64, the dispatch table, and every refusal."""

import math
from dataclasses import replace

import fake_xformers
import pytest
import torch

from vlmo_fast import ops
from vlmo_fast.ops import dispatch, padded
from vlmo_fast.ops.padded import fused

# Relative Frobenius error against float64 on the same, already rounded inputs. In half precision the softmax weights
# and the output are rounded, half an eps each. In float32 the scores round too: a score of size s moves its weight by
# s * eps, and the scores here reach 8.
CAPS = {
    dtype: factor * torch.finfo(dtype).eps
    for dtype, factor in ((torch.float32, 8), (torch.bfloat16, 1), (torch.float16, 1))
}


def brute_force(query, key, value, bias, key_mask, scale):
    """Float64, one score at a time from the definition; no softmax of torch's."""
    query, key, value = (x.double() for x in (query, key, value))
    batch, heads, num_queries, width = query.shape
    rows = []
    for b in range(batch):
        for h in range(heads):
            for i in range(num_queries):
                weights = []
                for j in range(key.shape[2]):
                    score = (query[b, h, i] * key[b, h, j]).sum() * scale
                    if bias is not None:
                        score = score + bias[h, i, j].double()
                    real = key_mask is None or bool(key_mask[b, j])
                    weights.append(score.exp() if real else score * 0)
                total = sum(weights)
                rows.append(sum(weight / total * value[b, h, j] for j, weight in enumerate(weights)))
    return torch.stack(rows).view(batch, heads, num_queries, width)


def problem(*, bias: bool, mask: bool, num_queries: int = 4, num_keys: int = 5, dtype=torch.float64):
    """Two samples, three heads of size 6; the second sample has two keys."""
    query = torch.randn(2, 3, num_queries, 6, dtype=dtype).requires_grad_()
    key, value = (torch.randn(2, 3, num_keys, 6, dtype=dtype).requires_grad_() for _ in range(2))
    table = torch.randn(3, num_queries, num_keys, dtype=dtype).requires_grad_() if bias else None
    key_mask = torch.arange(num_keys) < torch.tensor([[num_keys], [2]]) if mask else None
    return query, key, value, table, key_mask


CASES = pytest.mark.parametrize(
    ("bias", "mask", "num_queries", "num_keys"),
    [
        (False, False, 4, 5),
        (True, False, 4, 5),
        (False, True, 4, 5),
        (True, True, 4, 5),
        (True, True, 5, 5),
        (True, True, 1, 3),  # one query: last-layer-for-[CLS]
    ],
)
# On any device and in any dtype, in torch alone.
TORCHS = [row.name for row in dispatch.TABLE["attention"] if row.accepts(ops.Problem("cpu", torch.float64))[0]]
BACKENDS = pytest.mark.parametrize("backend", [*TORCHS, "auto"])


def gradients(output, tensors):
    """Of a fixed random weighting of the output, the same numbers for every dtype."""
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(output.dtype)
    return torch.autograd.grad(output, [x for x in tensors if x is not None], probe)


@BACKENDS
@CASES
def test_attention_against_the_definition(backend, bias, mask, num_queries, num_keys):
    """Values and all gradients in float64: a few hundred roundings of 1e-16 on values of order 1."""
    query, key, value, table, key_mask = problem(bias=bias, mask=mask, num_queries=num_queries, num_keys=num_keys)
    ours = ops.attention(query, key, value, table, key_mask, backend=backend)
    wanted = brute_force(query, key, value, table, key_mask, 6**-0.5)
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-13)
    inputs = (query, key, value, table)
    for actual, exact in zip(gradients(ours, inputs), gradients(wanted, inputs), strict=True):
        torch.testing.assert_close(actual, exact, rtol=0, atol=1e-12)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_attention_in_each_dtype(backend, dtype):
    query, key, value, table, key_mask = problem(bias=True, mask=True, dtype=dtype)
    inputs = (query, key, value, table)
    promoted = [x.detach().double().requires_grad_() for x in inputs]
    ours = ops.attention(*inputs, key_mask, backend=backend)
    wanted = brute_force(*promoted, key_mask, 6**-0.5)
    assert ours.dtype == dtype
    assert (ours.double() - wanted).norm() <= CAPS[dtype] * wanted.norm()
    assert ((ours.double() - wanted).norm(dim=-1) <= 2 * CAPS[dtype] * wanted.norm(dim=-1)).all()  # the worst row
    for actual, exact in zip(gradients(ours, inputs), gradients(wanted, promoted), strict=True):
        assert actual.dtype == dtype
        assert (actual.double() - exact).norm() <= CAPS[dtype] * exact.norm()


@BACKENDS
def test_float32_bias_beside_half_precision(backend):
    """The model's table may stay in float32 (autocast, mixed precision)."""
    query, key, value, _, key_mask = problem(bias=False, mask=True, dtype=torch.bfloat16)
    table = torch.randn(3, 4, 5, requires_grad=True)
    ours = ops.attention(query, key, value, table, key_mask, backend=backend)
    wanted = brute_force(query, key, value, table, key_mask, 6**-0.5)
    assert ours.dtype == torch.bfloat16
    # sdpa rounds the bias as well: of size up to 3, it moves the weights by another 3 half eps at most
    assert (ours.double() - wanted).norm() <= 2.5 * CAPS[torch.bfloat16] * wanted.norm()
    (gradient,) = torch.autograd.grad(ours.float().sum(), table)
    assert gradient.dtype == torch.float32


@BACKENDS
def test_scale(backend):
    query, key, value, table, key_mask = problem(bias=True, mask=True)
    ours = ops.attention(query, key, value, table, key_mask, scale=0.7, backend=backend)
    torch.testing.assert_close(ours, brute_force(query, key, value, table, key_mask, 0.7), rtol=0, atol=1e-13)


@BACKENDS
def test_masked_keys_have_no_influence(backend):
    """To the bit, even where the masked keys hold huge values; and they get zero gradients."""
    query, key, value, table, key_mask = problem(bias=True, mask=True)
    other_key, other_value = (
        torch.where(key_mask[:, None, :, None], x, 1e3).detach().requires_grad_() for x in (key, value)
    )
    ours = ops.attention(query, key, value, table, key_mask, backend=backend)
    other = ops.attention(query, other_key, other_value, table, key_mask, backend=backend)
    assert torch.equal(ours, other)
    for gradient in torch.autograd.grad(other.sum(), (other_key, other_value)):
        assert torch.equal(gradient[1, :, 2:], torch.zeros_like(gradient[1, :, 2:]))


@BACKENDS
def test_scores_are_not_rounded_to_half_precision(backend):
    """Scores of about 300 that differ by 1: rounded to bfloat16 (spacing 2 there) the two weights would be equal."""
    query = torch.tensor([16.0, 1.0], dtype=torch.bfloat16).view(1, 1, 1, 2)
    key = torch.tensor([[19.0, 0.0], [19.0, 1.0]], dtype=torch.bfloat16).view(1, 1, 2, 2)
    value = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.bfloat16).view(1, 1, 2, 2)
    ours = ops.attention(query, key, value, scale=1.0, backend=backend)
    wanted = torch.tensor([1 / (1 + math.e), math.e / (1 + math.e)])
    torch.testing.assert_close(ours.flatten().float(), wanted, rtol=2**-7, atol=0)  # two roundings


@BACKENDS
def test_non_contiguous_inputs(backend):
    *tensors, key_mask = problem(bias=True, mask=True)
    query, key, value, table = (x.detach() for x in tensors)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key, value)]
    assert not strided[0].is_contiguous()
    wide = table.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(
        ops.attention(*strided, wide, key_mask, backend=backend),
        ops.attention(query, key, value, table, key_mask, backend=backend),
    )


@pytest.mark.parametrize("backend", TORCHS)
def test_attention_gradcheck(backend):
    query, key, value, table, key_mask = problem(bias=True, mask=True, num_queries=2, num_keys=3)

    def run(*tensors):
        return ops.attention(*tensors, key_mask, backend=backend)

    assert torch.autograd.gradcheck(run, (query, key, value, table))


def test_attention_compiles_whole():
    query, key, value, table, key_mask = problem(bias=True, mask=True)
    for backend in (*TORCHS, "auto"):
        compiled = torch.compile(ops.attention, fullgraph=True, backend="eager")
        torch.testing.assert_close(
            compiled(query, key, value, table, key_mask, backend=backend),
            ops.attention(query, key, value, table, key_mask, backend=backend),
            rtol=0,
            atol=0,
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": (3, 4, 6)}, ValueError, r"must be \(B, heads, S, d\) .* got \(3, 4, 6\), \(2, 3, 5, 6\)"),
        ({"key": (2, 3, 5)}, ValueError, r"must be \(B, heads, S, d\)"),
        ({"value": (2, 3, 4, 6)}, ValueError, r"with key and value alike.*\(2, 3, 5, 6\) and \(2, 3, 4, 6\)"),
        ({"query": (1, 3, 4, 6)}, ValueError, r"must be \(B, heads, S, d\)"),
        ({"query": (2, 2, 4, 6)}, ValueError, r"must be \(B, heads, S, d\)"),
        ({"query": (2, 3, 4, 8)}, ValueError, r"key must have the query's head size 8, got 6"),
        ({"bias": (3, 5, 4)}, ValueError, r"bias must be \(heads, S_q, S_k\) = \(3, 4, 5\), got \(3, 5, 4\)"),
        ({"bias": (1, 4, 5)}, ValueError, r"bias must be .* got \(1, 4, 5\)"),
        ({"key_mask": (2, 4)}, ValueError, r"key_mask must be \(B, S_k\) = \(2, 5\), got \(2, 4\)"),
    ],
)
def test_attention_refuses_shapes(change, error, message):
    shapes = {"query": (2, 3, 4, 6), "key": (2, 3, 5, 6), "value": (2, 3, 5, 6), "bias": (3, 4, 5), "key_mask": (2, 5)}
    tensors = {name: torch.ones(shape) for name, shape in {**shapes, **change}.items()}
    tensors["key_mask"] = tensors["key_mask"].bool()
    for backend in ("auto", *TORCHS):
        with pytest.raises(error, match=f"^attention: .*{message}"):
            ops.attention(**tensors, backend=backend)


def test_attention_refuses_dtypes():
    tensor = torch.ones(1, 1, 2, 4)
    for triple in ((tensor.double(), tensor, tensor), (tensor, tensor, tensor.half()), (tensor.long(),) * 3):
        with pytest.raises(TypeError, match="query, key and value must share one float dtype, got torch"):
            ops.attention(*triple)
    with pytest.raises(TypeError, match=r"key_mask must be bool, got torch\.int64"):
        ops.attention(tensor, tensor, tensor, key_mask=torch.ones(1, 2, dtype=torch.int64))


# The contrastive loss


def normalised(*shape: int, dtype=torch.float64):
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def contrastive(image, text, scale):
    """Float64, from the definition: mean over rows and over columns of -log softmax at the diagonal."""
    scores = [[float(scale) * float(i.double() @ t.double()) for t in text] for i in image]
    columns = [list(column) for column in zip(*scores, strict=True)]

    def direction(rows):
        total = 0.0
        for k, row in enumerate(rows):
            top = max(row)
            total += top + math.log(sum(math.exp(value - top) for value in row)) - row[k]
        return total / len(rows)

    return (direction(scores) + direction(columns)) / 2


@pytest.mark.parametrize("scale", [0.0, 1.0, 1 / 0.07, 100.0, 1e4])
@pytest.mark.parametrize("pairs", [1, 2, 7])
def test_contrastive_loss(pairs, scale):
    image, text = normalised(pairs, 5), normalised(pairs, 5)
    loss = ops.contrastive_loss(image, text, torch.tensor(scale, dtype=torch.float64))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(contrastive(image, text, scale), rel=1e-12, abs=1e-13 * max(scale, 1))
    if pairs == 1:
        assert loss.item() == 0
    if scale == 0:
        assert loss.item() == pytest.approx(math.log(pairs), abs=1e-15)


def test_contrastive_loss_laws():
    """Exchanging the modalities, or permuting the pairs, changes nothing but rounding."""
    image, text, scale = normalised(9, 5), normalised(9, 5), torch.tensor(14.0, dtype=torch.float64)
    loss = ops.contrastive_loss(image, text, scale)
    order = torch.randperm(9)
    torch.testing.assert_close(ops.contrastive_loss(text, image, scale), loss, rtol=1e-14, atol=0)
    torch.testing.assert_close(ops.contrastive_loss(image[order], text[order], scale), loss, rtol=1e-14, atol=0)
    assert ops.contrastive_loss(image, text[order], scale) != loss


def test_contrastive_loss_is_not_symmetric_in_one_direction_only():
    """Two texts near one image: rows and columns differ, and the loss is the mean of both."""
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    text = torch.tensor([[1.0, 0.0], [0.8, 0.6]], dtype=torch.float64)
    rows = (math.log(1 + math.exp(-0.2)) + math.log(1 + math.exp(-0.6))) / 2
    columns = (math.log(1 + math.exp(-1.0)) + math.log(1 + math.exp(0.2))) / 2
    loss = ops.contrastive_loss(image, text, torch.tensor(1.0, dtype=torch.float64))
    assert rows != pytest.approx(columns, rel=1e-2)
    assert loss.item() == pytest.approx((rows + columns) / 2, rel=1e-14)


def test_contrastive_gradients():
    image, text = normalised(4, 3).requires_grad_(), normalised(4, 3).requires_grad_()
    scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.contrastive_loss, (image, text, scale))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_contrastive_loss_in_half_precision(dtype):
    """Scores of up to 100 have a spacing of 0.5 in bfloat16; a loss is a float32 number, as the docstrings say."""
    image = normalised(64, 32, dtype=torch.float32)
    text = torch.nn.functional.normalize(image + 0.3 * normalised(64, 32, dtype=torch.float32), dim=-1)
    image, text = image.to(dtype), text.to(dtype)
    loss = ops.contrastive_loss(image, text, torch.tensor(100.0))
    assert loss.dtype == torch.float32
    # float32 scores of size 100 are right to 100 * 2^-24; 64 + 64 of them are averaged
    assert loss.item() == pytest.approx(contrastive(image, text, 100.0), abs=1e-4)


@pytest.mark.parametrize(
    ("image", "text", "error", "message"),
    [
        (torch.ones(2, 3), torch.ones(3, 3), ValueError, r"be \(N, P\) alike .* got \(2, 3\) and \(3, 3\)"),
        (torch.ones(2, 3), torch.ones(2, 4), ValueError, r"got \(2, 3\) and \(2, 4\)"),
        (torch.ones(6), torch.ones(6), ValueError, r"got \(6,\) and \(6,\)"),
        (torch.ones(0, 3), torch.ones(0, 3), ValueError, r"N >= 1, got \(0, 3\) and \(0, 3\)"),
        (torch.ones(2, 3), torch.ones(2, 3, device="meta"), ValueError, r"on one device, got cpu and meta"),
        (torch.ones(2, 3), torch.ones(2, 3).double(), TypeError, r"got torch\.float32 and torch\.float64"),
        (torch.ones(2, 3).long(), torch.ones(2, 3).long(), TypeError, r"got torch\.int64 and torch\.int64"),
    ],
)
def test_contrastive_loss_refuses(image, text, error, message):
    with pytest.raises(error, match=f"^contrastive_loss: image_embeds and text_embeds must .*{message}"):
        ops.contrastive_loss(image, text, torch.tensor(1.0))


def test_contrastive_loss_refuses_a_scale_of_many():
    with pytest.raises(ValueError, match=r"logit_scale must be 0-d, got shape \(1,\)"):
        ops.contrastive_loss(torch.ones(2, 3), torch.ones(2, 3), torch.ones(1))


# The door


@pytest.mark.usefixtures("cpu_extension")
def test_automatic_choices(monkeypatch):
    """On a CPU the library in float32, else the reference; anywhere else torch's fused attention."""
    monkeypatch.setattr(dispatch, "_has_avx2", lambda: True)
    assert ops.select("attention", ops.Problem("cpu", torch.float32)) == "cpu"
    monkeypatch.setattr(dispatch, "_is_built", lambda name: False)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert ops.select("attention", ops.Problem("cpu", dtype)) == "eager"
        for device in ("cuda", "mps", "xpu"):
            assert ops.select("attention", ops.Problem(device, dtype)) == "sdpa"
    assert ops.select("contrastive_loss", ops.Problem("mps", torch.float32)) == "chunked"


def test_explicit_choices():
    for op in ("attention", "contrastive_loss"):
        for row in dispatch.TABLE[op]:
            if row.extension is None and row.accepts(ops.Problem("cpu", torch.float32))[0]:
                assert ops.select(op, ops.Problem("cpu", torch.float32), row.name) == row.name
    assert ops.implementations("attention") == ("cpu", "sdpa", "eager", "xformers")


def test_xformers_is_chosen_by_name_alone(monkeypatch):
    """By `attention`, and only where it can run; otherwise the refusal says why and what can."""
    monkeypatch.setattr(dispatch, "_is_built", lambda name: False)
    with pytest.raises(NotImplementedError, match=r"xformers runs on CUDA devices, not on cpu\); these can: \['sdpa'"):
        ops.select("attention", ops.Problem("cpu", torch.float32), "xformers")
    cuda = ops.Problem("cuda", torch.bfloat16)
    monkeypatch.setattr(dispatch, "find_spec", lambda name: name)
    assert ops.select("attention", cuda, "xformers") == "xformers"
    assert ops.select("attention", cuda) == "sdpa"
    for problem, why in (
        (replace(cuda, dtype=torch.float64), "takes float32, float16 and bfloat16"),
        (replace(cuda, capability=(10, 0)), r"up to compute capability 9.0, this device has \(10, 0\)"),
    ):
        with pytest.raises(NotImplementedError, match=why):
            ops.select("attention", problem, "xformers")
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    with pytest.raises(NotImplementedError, match="the package xformers is not installed"):
        ops.select("attention", cuda, "xformers")


@pytest.mark.parametrize(("bias", "mask"), [(False, False), (False, True), (True, False), (True, True)])
def test_what_xformers_is_given(monkeypatch, bias, mask):
    """Heads of 6 and 5 keys, of which neither fits its kernels: values and gradients, where it takes what it gets."""
    fake_xformers.install(monkeypatch)
    tensors = problem(bias=bias, mask=mask)
    actual, wanted = fused.xformers(*tensors, 0.3), ops.attention(*tensors, scale=0.3, backend="eager")
    torch.testing.assert_close(actual, wanted)
    leaves = [x for x in tensors if x is not None and x.requires_grad]
    weight = torch.randn_like(wanted)
    for ours, theirs in zip(*(torch.autograd.grad(x, leaves, weight) for x in (actual, wanted)), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("num_keys", [5, 8])
def test_xformers_gets_rows_that_lie_apart_together(monkeypatch, num_keys):
    """A bias gathered as (S, S, heads) and permuted: padded as it lies, its keys would stay a stride apart."""
    fake_xformers.install(monkeypatch)
    query, key, value, _, _ = problem(bias=False, mask=False, num_keys=num_keys, dtype=torch.float32)
    bias = torch.randn(4, num_keys, 3).permute(2, 0, 1)
    actual = fused.xformers(query, key, value, bias, None, 0.3)
    torch.testing.assert_close(actual, ops.attention(query, key, value, bias, scale=0.3, backend="eager"))


@pytest.mark.parametrize(("bias", "given"), [(True, 40), (False, 34)])
def test_what_torchs_cuda_kernels_are_given(monkeypatch, bias, given):
    """Base_plus has heads of 34: beside a mask they take multiples of 8. A float32 bias gets the query's dtype."""
    seen = []

    def sdpa(query, key, value, attn_mask, scale):
        seen.extend([*(x.shape[-1] for x in (query, key, value)), None if attn_mask is None else attn_mask.dtype])
        return value.new_empty(query.shape)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", sdpa)
    query = torch.empty(2, 3, 5, 34, dtype=torch.bfloat16, device="meta")  # a device that is not the CPU
    table = torch.empty(3, 5, 5, device="meta") if bias else None
    assert ops.attention(query, query, query, table, backend="sdpa").shape == query.shape
    assert seen == [given] * 3 + [torch.bfloat16 if bias else None]


def test_a_gradient_of_the_bias_alone():
    """On CUDA torch's kernels crash at it (pytorch#148476) and xformers forgets it, so the reference computes it."""
    with_others, alone = (ops.Problem("cuda", torch.bfloat16, True, 64, only_bias_grad=only) for only in (False, True))
    assert (ops.select("attention", with_others), ops.select("attention", alone)) == ("sdpa", "eager")
    for name in ("sdpa", "xformers"):
        with pytest.raises(NotImplementedError, match=r"no gradient of the bias alone\); these can: \['eager'\]"):
            ops.select("attention", alone, name)
    on_cpu = ops.Problem("cpu", torch.float32, True, 64, only_bias_grad=True)
    assert ops.select("attention", on_cpu, "sdpa") == "sdpa"


def test_unknown_backend_names_the_known_ones():
    with pytest.raises(
        ValueError,
        match=r"^attention: backend must be 'auto' or one of \['cpu', 'sdpa', 'eager', 'xformers'\], got 'x'$",
    ):
        ops.attention(*(torch.ones(1, 1, 2, 4),) * 3, backend="x")
    with pytest.raises(
        ValueError, match=r"^contrastive_loss: backend must be 'auto' or one of \[.*'eager'\], got 'sdpa'$"
    ):
        ops.contrastive_loss(torch.ones(2, 3), torch.ones(2, 3), torch.tensor(1.0), backend="sdpa")


def test_the_op_runs_what_was_selected(monkeypatch):
    """`attention` runs the implementation by the name that `select` gave, whatever it is."""
    tensors = (torch.ones(1, 1, 2, 4),) * 3
    load = {"eager": lambda *_: "the reference", "sdpa": lambda *_: "sdpa"}.__getitem__
    monkeypatch.setattr(padded, "load", lambda op, name: load(name))
    assert ops.attention(*tensors, backend="eager") == "the reference"
    assert ops.attention(*tensors, backend="sdpa") == "sdpa"
    assert ops.attention(*(x.double() for x in tensors)) == "the reference"
    monkeypatch.setattr(padded, "select", lambda op, problem, backend: "sdpa")
    assert ops.attention(*tensors) == "sdpa"


def test_the_problem_describes_the_call(monkeypatch):
    seen = []
    monkeypatch.setattr(padded, "select", lambda op, problem, backend: seen.append((op, problem, backend)) or "eager")
    query = torch.ones(1, 1, 2, 4, requires_grad=True)
    plain = query.detach()
    ops.attention(plain, plain, plain)
    ops.attention(query, plain, plain, backend="sdpa")
    ops.attention(plain, plain, plain, torch.ones(1, 2, 2, requires_grad=True))
    with torch.no_grad():
        ops.attention(query, query, query)
    without, with_gradient = (ops.Problem("cpu", torch.float32, needs_grad=x, head_dim=4) for x in (False, True))
    assert seen == [
        ("attention", without, "auto"),
        ("attention", with_gradient, "sdpa"),
        ("attention", replace(with_gradient, only_bias_grad=True), "auto"),
        ("attention", without, "auto"),
    ]


@pytest.mark.parametrize("which", [1, 2], ids=["key", "value"])
def test_gradients_of_key_and_value_count(monkeypatch, which):
    seen = []
    monkeypatch.setattr(padded, "select", lambda op, problem, backend: seen.append(problem.needs_grad) or "eager")
    tensors = [torch.ones(1, 1, 2, 4, requires_grad=index == which) for index in range(3)]
    ops.attention(*tensors)
    assert seen == [True]


@pytest.fixture
def candidates(monkeypatch):
    """An op with one implementation that only takes float32 and one that takes no CUDA."""
    first = dispatch.Row("narrow", print, lambda p: (p.dtype == torch.float32, "float32 only"))
    second = dispatch.Row("wide", print, lambda p: (p.device != "cuda", "no CUDA here"))
    monkeypatch.setattr(dispatch, "TABLE", {"op": (first, second)})


@pytest.mark.usefixtures("candidates")
def test_what_cannot_run_is_skipped_or_refused():
    assert ops.select("op", ops.Problem("cpu", torch.float32)) == "narrow"
    assert ops.select("op", ops.Problem("cpu", torch.float16)) == "wide"
    with pytest.raises(
        NotImplementedError, match=r"^op: backend 'narrow' cannot run here \(float32 only\); .*\['wide'\]"
    ):
        ops.select("op", ops.Problem("cpu", torch.float16), "narrow")
    with pytest.raises(NotImplementedError, match=r"^op: no implementation takes Problem\(device='cuda'"):
        ops.select("op", ops.Problem("cuda", torch.float16))


def test_explain_is_the_door_as_a_table():
    """Every candidate once; the first rank is what `select` gives, and whoever has a rank or is by name can run."""
    choices = ops.explain()
    assert [(c.op, c.device, c.dtype, c.implementation) for c in choices if c.rank == 1] == [
        (op, device, dtype, ops.select(op, ops.Problem(device, getattr(torch, dtype))))
        for op in dispatch.TABLE
        for device in ("cpu", "cuda")
        for dtype in ("float32", "bfloat16")
    ]
    for op in dispatch.TABLE:
        for dtype in (torch.float32, torch.float64):
            problem = ops.Problem("cpu", dtype, False)
            candidates = ops.explain(op, problem)
            assert sorted(c.implementation for c in candidates) == sorted(ops.implementations(op))
            ranks = [c.rank for c in candidates if c.rank is not None]
            assert ranks == list(range(1, len(ranks) + 1))
            for choice in candidates:
                assert choice.reason
                if choice.reason.startswith("cannot run: "):
                    with pytest.raises((NotImplementedError, ImportError)):
                        ops.select(op, problem, choice.implementation)
                else:
                    assert ops.select(op, problem, choice.implementation) == choice.implementation
                    assert (choice.rank is None) == choice.reason.startswith("by name alone: ")
    with pytest.raises(ValueError, match=r"^explain: op must be one of \['attention', .*got 'softmax'$"):
        ops.explain("softmax")
