"""Life under torch's tools: whatever replaces, wraps, watches or patches a module of the network is called.

Each tool is compared with `plain`, image and text encoder written out with nothing but calls of the modules.
"""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from networks import PATHS, build, inputs, positions, run, shared, tensors, visible
from test_checkpoints import filled, load
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parameters_to_vector, parametrize, prune, vector_to_parameters, weight_norm

from vlmo_fast import MoMEConfig, MoMETransformer
from vlmo_fast.nn import ContrastiveLoss, ExpertFeedForward
from vlmo_fast.rows import plan_padded
from vlmo_fast.watch import is_plain


def plain(model: MoMETransformer, modality: str) -> torch.Tensor:
    """Embeddings of images or texts alone, (B, D), by calls of the modules."""
    ids, mask, pixels = inputs(dtype=next(model.parameters()).dtype)
    if modality == "image":
        x = model.image_embeddings(pixels, 3, None) + model.modality_type_embeddings(torch.tensor(1))
        biases, visible, expert = model.relative_position_bias(0, (3,)), torch.ones(x.shape[:2]).bool(), "vision"
    else:
        x = model.text_embeddings(ids) + model.modality_type_embeddings(torch.tensor(0))
        biases, visible, expert = model.relative_position_bias(ids.shape[1], ()), mask.bool(), "language"
    for layer, block in enumerate(model.blocks):
        attention = block.attention
        qkv = attention.qkv(block.attention_norm(x))
        qkv = qkv + torch.cat([attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias])
        q, k, v = qkv.unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, S, d) each
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + biases[layer]
        scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + block.attention_layer_scale * attention.dropout(attention.projection(attended))
        x = x + block.ffn_layer_scale * block.experts[expert](x)
    projection = model.image_projection if modality == "image" else model.text_projection
    return F.normalize(projection(model.norm(x)[:, 0]), dim=-1)


def ours(model: MoMETransformer, modality: str, **options: bool) -> torch.Tensor:
    output = run(model, modality, **options)
    return output.image_embeds if modality == "image" else output.text_embeds


def agree(model: MoMETransformer, cls_only: tuple[bool, ...] = (False, True)) -> None:
    """As `plain`, with and without the last layer's shortcut, which for texts drops the padding."""
    for modality in ("image", "text"):
        wanted = plain(model, modality)
        for shortcut in cls_only:
            torch.testing.assert_close(ours(model, modality, cls_only=shortcut), wanted, atol=1e-5, rtol=0)


class Lora(nn.Module):
    """A low-rank adapter as peft makes it: it has the layer's attributes, and a forward of its own."""

    def __init__(self, base_layer: nn.Linear, rank: int = 3) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.Linear(base_layer.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, base_layer.out_features, bias=False)
        nn.init.normal_(self.lora_B.weight, std=0.3)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))

    def merged(self) -> nn.Linear:
        with torch.no_grad():
            self.base_layer.weight += self.lora_B.weight @ self.lora_A.weight
        return self.base_layer


def test_the_network_written_out() -> None:
    agree(build())


def test_low_rank_adapters_train_and_merge() -> None:
    model = build()
    before = ours(model, "image")
    model.requires_grad_(False)
    for block in model.blocks:
        block.attention.qkv = Lora(block.attention.qkv)
        for expert in block.experts.values():
            expert.fc1 = Lora(expert.fc1)
    assert (ours(model, "image") - before).abs().max() > 1e-2
    agree(model)
    pair = run(model, "pair").pooler_output.sum() + run(model, "image_vl").vl_image_embeds.sum()
    (pair + ours(model, "image").sum() + ours(model, "text").square().sum()).backward()
    adapters = {name: p for name, p in model.named_parameters() if "lora" in name}
    assert len(adapters) == 2 * (4 + 2 * 2 + 2 * 3)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapters.values())
    adapted = [ours(model, modality).detach() for modality in ("image", "text")]
    for block in model.blocks:
        block.attention.qkv = block.attention.qkv.merged()
        for expert in block.experts.values():
            expert.fc1 = expert.fc1.merged()
    for modality, wanted in zip(("image", "text"), adapted, strict=True):
        torch.testing.assert_close(ours(model, modality), wanted, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_dynamic_quantization() -> None:
    model = build()
    quantized = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    assert type(quantized.blocks[0].attention.qkv) is not nn.Linear
    with torch.no_grad():
        agree(quantized, cls_only=(False,))  # activations share one scale: fewer rows have another
        for modality in ("image", "text"):
            for shortcut in (False, True):
                found = ours(quantized, modality, cls_only=shortcut)
                assert (found * ours(model, modality)).sum(1).min() > 0.95
                assert not torch.equal(found, ours(model, modality))


@pytest.mark.parametrize(
    "name", ["attention.qkv", "attention.projection", "experts.vision.fc1", "experts.language.fc2"]
)
def test_pruning_and_parametrizations(name: str) -> None:
    pruned = build()
    prune.l1_unstructured(pruned.blocks[1].get_submodule(name), "weight", amount=0.6)
    agree(pruned)
    modality = "text" if "language" in name else "image"
    assert (ours(pruned, modality) - ours(build(), modality)).abs().max() > 1e-3
    ours(pruned, modality).sum().backward()
    assert pruned.blocks[1].get_submodule(name).weight_orig.grad.abs().sum() > 0

    class Doubled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    doubled = build()
    parametrize.register_parametrization(doubled.blocks[1].get_submodule(name), "weight", Doubled())
    agree(doubled)
    assert (ours(doubled, modality) - ours(build(), modality)).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_by_a_hook() -> None:
    model = build()
    weight_norm(model.blocks[0].attention.qkv)
    with torch.no_grad():
        model.blocks[0].attention.qkv.weight_g.mul_(2)
    agree(model)


@pytest.mark.parametrize(
    "table", ["modality_type_embeddings", "text_embeddings.token_type_embeddings", "text_embeddings.word_embeddings"]
)
def test_embedding_tables(table: str) -> None:
    model = build()

    class Doubled(nn.Embedding):
        def forward(self, index: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(index)

    old = model.get_submodule(table)
    new = Doubled(*old.weight.shape, _weight=old.weight.detach())
    model.set_submodule(table, new)
    agree(model)
    assert (ours(model, "text") - ours(build(), "text")).abs().max() > 1e-3


def test_position_embeddings() -> None:
    model, calls = build("absolute"), []
    model.text_embeddings.position_embeddings.register_forward_hook(lambda *_: calls.append(1))
    seen = [ours(model, "text", cls_only=cls_only) for cls_only in (False, True)]
    assert len(calls) == 2
    for found in seen:
        torch.testing.assert_close(found, ours(build("absolute"), "text"), atol=1e-5, rtol=0)


PARTS = ("attention.qkv", "attention.projection", "experts.vision", "experts.vision.norm", "experts.vision.fc2")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", PARTS)
def test_every_kind_of_hook_is_called(name: str) -> None:
    kinds = {
        "forward": lambda module, note: module.register_forward_hook(lambda *_: note()),
        "before": lambda module, note: module.register_forward_pre_hook(lambda *_: note()),
        "with keywords": lambda module, note: module.register_forward_hook(lambda *_: note(), with_kwargs=True),
        "always": lambda module, note: module.register_forward_hook(lambda *_: note(), always_call=True),
        "backward": lambda module, note: module.register_full_backward_hook(lambda *_: note()),
        "before backward": lambda module, note: module.register_full_backward_pre_hook(lambda *_: note()),
        "legacy backward": lambda module, note: module.register_backward_hook(lambda *_: note()),
    }
    for kind, register in kinds.items():
        model, calls = build(), []
        register(model.blocks[2].get_submodule(name), lambda calls=calls: calls.append(1))
        ours(model, "image").sum().backward()
        assert len(calls) == 1, kind
        agree(model)


def test_global_hooks_see_every_linear_layer() -> None:
    model, seen = build(), set()
    handle = register_module_forward_hook(lambda module, *_: seen.add(module))
    try:
        ours(model, "image")
    finally:
        handle.remove()
    for block in model.blocks:
        assert {block.attention.qkv, block.experts["vision"].fc1, block.experts["vision"].norm} <= seen


def test_patched_classes_and_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    model, forward = build(), nn.Linear.forward
    model.blocks[0].experts["vision"].fc1.forward = lambda x: torch.zeros(*x.shape[:-1], 96)
    agree(model)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 1.5 * forward(self, x))
    agree(model)
    unpatched = ours(build(), "image")
    monkeypatch.undo()
    assert (ours(build(), "image") - unpatched).abs().max() > 1e-3


def test_a_patched_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below `forward`: the step of `nn.Module`'s call that runs the hooks, of one module, of a class, of all."""
    model = build()
    qkv = model.blocks[0].attention.qkv
    qkv._call_impl = lambda x: 2 * F.linear(x, qkv.weight)
    agree(model)
    call = nn.Module._call_impl
    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "_call_impl", lambda self, x: 1.5 * call(self, x))
        agree(build())
    seen = []
    monkeypatch.setattr(nn.Module, "_call_impl", lambda self, *a, **k: seen.append(self) or call(self, *a, **k))
    ours(model, "image")
    assert {model.blocks[1].attention.qkv, model.blocks[1].experts["vision"].fc1} <= set(seen)


def test_a_forward_that_is_another_modules() -> None:
    """Weights tied by a bound method; the module's own, which tools leave behind, is none."""
    model = build()
    first, second = (block.experts["vision"].fc1 for block in model.blocks[:2])
    first.forward = second.forward
    agree(model)
    assert is_plain(second, nn.Linear)
    second.forward = second.forward
    assert is_plain(second, nn.Linear)
    assert not is_plain(first, nn.Linear)


@pytest.mark.parametrize("where", ["weight", "bias", "attribute"])
def test_tensor_subclasses_see_their_layer(where: str) -> None:
    """Quantised and sparse weights are such; torch's own may be, too."""

    class Weight(torch.Tensor):
        layers = 0

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.layers += function is F.linear
            with torch._C.DisableTorchFunctionSubclass():
                result = function(*args, **(kwargs or {}))
            return result.as_subclass(cls) if function is torch.Tensor.detach else result

    Weight.__module__ = "torch.sparse"
    model = build()
    layer = model.blocks[1].experts["vision"].fc1
    name = "bias" if where == "bias" else "weight"
    tensor = getattr(layer, name).detach().as_subclass(Weight)
    if where == "attribute":
        delattr(layer, name)
    setattr(layer, name, tensor if where == "attribute" else nn.Parameter(tensor))
    ours(model, "image")
    assert Weight.layers == 1


LAYERS = {
    "qkv with a bias": ("attention.qkv", lambda: nn.Linear(24, 72)),
    "projection without": ("attention.projection", lambda: nn.Linear(24, 24, bias=False)),
    "fc1 without": ("experts.vision.fc1", lambda: nn.Linear(24, 96, bias=False)),
    "norm without": ("experts.vision.norm", lambda: nn.LayerNorm(24, bias=False)),
    "norm of nothing": ("experts.language.norm", lambda: nn.LayerNorm(24, elementwise_affine=False)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_layers_of_the_same_class_with_other_parameters(case: str) -> None:
    model, (name, make) = build(), LAYERS[case]
    torch.manual_seed(5)
    model.blocks[1].set_submodule(name, make())
    agree(model)


def test_one_experts_width() -> None:
    """Pruned by whole neurons, as the other experts of its block are not."""
    model = build()
    expert, rows = model.blocks[0].experts["vision"], torch.arange(50)
    for layer, dim in ((expert.fc1, 0), (expert.fc2, 1)):
        layer.weight = nn.Parameter(layer.weight.detach().index_select(dim, rows))
    expert.fc1.bias = nn.Parameter(expert.fc1.bias.detach()[:50])
    agree(model)
    pair = run(model, "pair").last_hidden_state
    expert.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(pair, run(model, "pair").last_hidden_state, atol=1e-5, rtol=0)


def test_a_whole_expert_or_norm_is_replaced() -> None:
    model = build()
    model.blocks[1].experts["vision"] = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 24))
    model.blocks[3].experts["language"].norm = nn.Identity()
    model.blocks[0].attention.qkv = nn.Sequential(nn.Linear(24, 8), nn.Linear(8, 72))
    agree(model)


def test_one_experts_epsilon() -> None:
    model = build()
    model.blocks[0].experts["language"].norm.eps = 0.5
    pair = run(model, "pair").last_hidden_state
    model.blocks[0].experts["language"].register_forward_hook(lambda *_: None)
    torch.testing.assert_close(pair, run(model, "pair").last_hidden_state, atol=1e-5, rtol=0)


def test_dropout_left_on_in_evaluation() -> None:
    """Monte-Carlo dropout: somebody turns on the dropout modules alone."""
    model = build(hidden_dropout=0.5)
    assert torch.equal(ours(model, "image"), ours(model, "image"))
    for module in model.modules():
        if isinstance(module, nn.Dropout) and module is not model.text_embeddings.dropout:
            module.train()
    model.blocks[0].attention.dropout.eval()
    for block in model.blocks:
        block.attention.dropout.eval()
    assert not torch.equal(ours(model, "image"), ours(model, "image"))


def test_expert_feed_forward_calls_what_was_replaced() -> None:
    torch.manual_seed(0)
    module = ExpertFeedForward(8, layer_scale_init_value=0.5)
    x, groups = torch.randn(2, 5, 8), (("language", 2), ("vision", 3))
    before = module(x, groups)
    module.experts["vision"].fc1 = Lora(module.experts["vision"].fc1)
    after = module(x, groups)
    assert torch.allclose(after[:, :2], before[:, :2], atol=1e-6)
    parts = [expert(part) for expert, part in zip(module.experts.values(), x.split([2, 3], dim=1), strict=False)]
    torch.testing.assert_close(after, x + 0.5 * torch.cat(parts, dim=1), atol=1e-5, rtol=0)


def test_eight_threads_share_a_model() -> None:
    model = build()
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 50, (2, length), generator=generator) for length in range(1, 11)]
    with torch.no_grad():
        wanted = [model(ids).text_embeds for ids in texts]
    failures: list[BaseException] = []

    def work(start: int) -> None:
        try:
            with torch.no_grad():
                for step in range(60):
                    number = (start + step) % len(texts)
                    assert torch.equal(model(texts[number]).text_embeds, wanted[number])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_inference_mode_makes_and_runs_a_model() -> None:
    with torch.inference_mode():
        model = build()
        inside = [ours(model, "image"), ours(model, "image"), ours(model, "text", cls_only=True)]
    with torch.no_grad():
        outside = [ours(model, "image"), ours(model, "image"), ours(model, "text", cls_only=True)]
    for a, b in zip(inside, outside, strict=True):
        assert torch.equal(a, b)
    kept = build()
    with torch.inference_mode():
        ours(kept, "image")
    torch.testing.assert_close(ours(kept, "image"), inside[0], atol=1e-6, rtol=0)
    ours(kept, "image").sum().backward()


def test_inference_mode_loads_a_checkpoint() -> None:
    state, (ids, mask, _) = filled("pretrain", "tiny_rel"), inputs()
    ids = ids % 10
    outside = load(state, "tiny_rel").eval()
    with torch.inference_mode():
        inside = load(state, "tiny_rel").eval()
        for cls_only in (False, True):
            found, wanted = (m.backbone(ids, mask, cls_only=cls_only).text_embeds for m in (inside, outside))
            assert torch.equal(found, wanted)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_traced_with_padding() -> None:
    """The shortcut that looks at the mask is off while a tracer records: it would keep the traced batch's lengths."""
    model = build().requires_grad_(False)

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.model(ids, mask, cls_only=True).text_embeds

    ids, mask, _ = inputs()
    traced = torch.jit.trace(First(), (ids, mask), check_trace=False)
    other = torch.ones_like(mask)
    other[0, 2:] = other[2, 5:] = 0
    torch.testing.assert_close(traced(ids, other), model(ids, other, cls_only=True).text_embeds, atol=1e-5, rtol=0)


def test_values_are_not_looked_at_under_a_transform() -> None:
    """`vmap` and `make_fx` would stop at the look."""
    model = build().requires_grad_(False)
    for op in ("attention", "mome_ffn"):
        model.set_backend(op, "eager")
    ids, mask, _ = inputs()

    def encode(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return model(ids, mask, cls_only=True).text_embeds

    mapped = torch.func.vmap(lambda ids, mask: encode(ids[None], mask[None])[0])
    with torch.no_grad():  # where biases are kept
        torch.testing.assert_close(mapped(ids, mask), encode(ids, mask), atol=1e-5, rtol=0)
    other = torch.ones_like(mask)
    other[0, 2:] = 0
    graph = make_fx(encode)(ids, mask)
    torch.testing.assert_close(graph(ids, other), encode(ids, other), atol=1e-5, rtol=0)


@pytest.mark.parametrize("options", [{}, {"cls_only": True}])
def test_compiled_whole_where_nobody_watches(options: dict[str, bool]) -> None:
    model = build().requires_grad_(False)
    compiled = torch.compile(
        lambda pixels: model(pixel_values=pixels, **options).image_embeds, fullgraph=True, backend="aot_eager"
    )
    pixels = inputs()[2]
    torch.testing.assert_close(compiled(pixels), model(pixel_values=pixels).image_embeds, atol=1e-5, rtol=0)


def test_a_bounded_scale_can_come_back() -> None:
    """Beyond its bound it is set back, and its gradient never vanishes."""
    loss = ContrastiveLoss(max_logit_scale=100)
    images = F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    with torch.no_grad():
        loss.logit_scale.fill_(7.0)
    value = loss(images, images.flip(0))
    assert loss.logit_scale.exp().item() == pytest.approx(100)
    value.backward()
    assert loss.logit_scale.grad.item() > 0  # wrong pairs: a smaller scale is better
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.01)
    optimizer.step()
    assert loss.logit_scale.exp() < 100


# Biases kept in evaluation


def biases_of(model, num_text=6):
    with torch.no_grad():
        return model._biases(plan_padded(1, num_text, (3,), None, cls_only=False))


def test_biases_are_kept_in_evaluation():
    """The very same tensors for the same shape, of a few shapes, and the numbers of a model that keeps nothing."""
    model = build().eval()
    first = biases_of(model)
    assert biases_of(model) is first
    for num_text in range(1, 5):
        biases_of(model, num_text)
    assert biases_of(model, 4) is biases_of(model, 4)
    assert biases_of(model) is not first  # four other shapes came since
    assert copy.deepcopy(model)._kept_biases._kept is None
    assert pickle.loads(pickle.dumps(model))._kept_biases._kept is None
    for path in PATHS:
        with torch.no_grad():
            kept = [tensors(run(model, path)) for _ in range(2)]
        for a, b, c in zip(*kept, tensors(run(model, path)), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c.detach())


CHANGES = {
    "in place": lambda table, other: table.detach().mul_(2),
    "data assigned": lambda table, other: setattr(table, "data", other.data),
    "data in place": lambda table, other: table.data.mul_(2),
    "data copied": lambda table, other: table.data.copy_(other.data),
    "through NumPy": lambda table, other: np.multiply(table.detach().numpy(), 2, out=table.detach().numpy()),
    "one row": lambda table, other: table.data[0].add_(1),
}


@pytest.mark.parametrize("change", [*CHANGES, "loaded", "assigned", "from a vector", "moved"])
def test_no_change_of_the_table_goes_unseen(change):
    """A teacher in evaluation mode is updated in any of these ways; nobody calls `eval` again."""
    model, other = build().eval(), build(seed=1)
    before = biases_of(model)[0].clone()
    table = model.relative_position_bias.table
    if change in CHANGES:
        CHANGES[change](table, other.relative_position_bias.table)
    elif change in ("loaded", "assigned"):
        model.load_state_dict(other.state_dict(), assign=change == "assigned")
    elif change == "from a vector":
        vector_to_parameters(parameters_to_vector(other.parameters()), model.parameters())
    else:
        model.double()
    after = biases_of(model)[0]
    fresh = model.relative_position_bias(6, (3,))[0]
    assert torch.equal(after, fresh)
    assert after.dtype != before.dtype or not torch.equal(after, before)


def test_biases_too_large_to_gather_at_once_are_not_kept(monkeypatch):
    """They read a table that may be replaced by an equal one, and then change."""
    monkeypatch.setattr("vlmo_fast.positions.ALL_LAYERS_BYTES", 0)
    model = build().eval()
    module, kept = model.relative_position_bias, biases_of(model)
    first = kept[0].clone()
    old, module.table = module.table, nn.Parameter(module.table.detach().clone())
    old.data.mul_(2)
    assert torch.equal(biases_of(model)[0], first)


def test_no_biases_are_kept_for_training():
    model = build().train()
    assert biases_of(model) is not biases_of(model)
    run(model.eval(), "pair")
    assert model._kept_biases._kept is None  # with gradients
    biases_of(model)
    assert model._kept_biases._kept is not None


def test_watched_biases_are_gathered_by_a_call():
    model, calls = build().eval(), []
    biases_of(model)
    model.relative_position_bias.register_forward_hook(lambda *_: calls.append(1))
    biases_of(model)
    biases_of(model)
    assert len(calls) == 2


# Copies, no memory, whole graphs


def test_meta_device():
    """Sizes and paths without memory, then real weights in place."""
    with torch.device("meta"):
        model = MoMETransformer(MoMEConfig.from_preset("large"))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    ids = torch.zeros(2, 5, dtype=torch.int64, device="meta")
    pixels = torch.zeros(2, 3, 224, 224, device="meta")
    assert model(ids, torch.ones_like(ids), pixels).last_hidden_state.shape == (2, 202, 1024)
    assert model(pixel_values=pixels, use_vl_branch=True).vl_image_embeds.shape == (2, 1024)
    config = shared().config  # before the context, in which the shared model would be made on meta
    with torch.device("meta"):
        small = MoMETransformer(config).eval()
    small.load_state_dict(shared().state_dict(), assign=True)
    assert torch.equal(visible(run(small, "pair")), visible(run(shared(), "pair")))


def test_deepcopy_and_pickle():
    model = build("absolute")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for path in PATHS:
            assert torch.equal(visible(run(model, path)), visible(run(other, path)))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.norm.weight.zero_()
    assert not torch.equal(model.norm.weight, twin.norm.weight)


@positions
@pytest.mark.parametrize("path", PATHS)
def test_compiles_whole(kind, path):
    """One graph per path, no break, with the same ops; the traced eager code gives the same bits."""
    torch._dynamo.reset()
    model, targets = shared(kind), []

    def backend(graph, _):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    arguments = inputs()
    for a, b in zip(tensors(run(compiled, path, *arguments)), tensors(run(model, path, *arguments)), strict=True):
        assert torch.equal(a, b)
    calls = sum("mome_ffn" in target for target in targets)
    assert calls == (6 if path.endswith("_vl") else 4)  # one for each block that ran


def test_compiles_with_interpolation_and_gradients():
    torch._dynamo.reset()
    model = build()
    pixels = inputs(size=40)[2]
    torch.compile(model, fullgraph=True, backend="aot_eager")(
        pixel_values=pixels, interpolate_pos_encoding=True
    ).image_embeds.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.slow  # half a minute of compiling
def test_inductor(require_tool):
    """One generated kernel set, end to end; another summation order than eager's, so float32 tolerance."""
    require_tool("g++")
    torch._dynamo.reset()
    model = build(num_hidden_layers=2, num_vl_layers=1).requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True)
    arguments = inputs()
    ours, eager = (run(x, "pair", *arguments).pooler_output for x in (compiled, model))
    torch.testing.assert_close(ours, eager, rtol=1e-5, atol=1e-5)
