"""The table of implementations owns their code: what a row must have, who may ask for a name, and how to add one."""

import ast
import importlib.util
import re
import textwrap
from pathlib import Path

import pytest
import test_packed_attention as packed
import torch

import vlmo_fast
from vlmo_fast import ops
from vlmo_fast.ops import dispatch
from vlmo_fast.ops.dispatch import Row
from vlmo_fast.ops.ffn import FFNBackend
from vlmo_fast.ops.matmul import Library
from vlmo_fast.ops.packed import PackedAttentionBackend
from vlmo_fast.ops.padded import AttentionBackend
from vlmo_fast.ops.pairs.lse import LSEBackend

ROOT = Path(__file__).parents[1]
PACKAGE = Path(vlmo_fast.__file__).parent
CLASSES = {
    "attention": AttentionBackend,
    "packed_attention": PackedAttentionBackend,
    "mome_ffn": FFNBackend,
    "linear": Library,
    "contrastive_loss": LSEBackend,
    "contrastive_lse": LSEBackend,
}
EVERY_ROW = [(op, name) for op in dispatch.TABLE for name in ops.implementations(op)]


def accepts(problem):
    return True, "everywhere"


@pytest.mark.parametrize("code", [None, 3, "reference", "reference:", "nowhere:attention", "ffn.nowhere:BACKEND"])
def test_a_row_without_code_cannot_be_made(code):
    with pytest.raises(ValueError, match=r"^Row: 'x' has no code"):
        Row("x", code, accepts)
    with pytest.raises(TypeError):
        Row("x", accepts=accepts)


@pytest.mark.parametrize(("op", "name"), EVERY_ROW)
def test_each_row_loads_its_own_code(op, name):
    """An object of the op's class or a function, the same one at each call, and not another row's."""
    code = dispatch.load(op, name)
    assert isinstance(code, CLASSES.get(op, ())) or (callable(code) and not isinstance(code, type))
    assert dispatch.load(op, name) is code
    assert not any(dispatch.load(op, other) is code for other in ops.implementations(op) if other != name)


@pytest.mark.parametrize("op", dispatch.TABLE)
def test_a_name_without_a_row_raises(op):
    x, ids = torch.ones(2, 4), torch.tensor([[[0, 2, 0], [0, 0, 0]]], dtype=torch.int32)
    rows, one = torch.ones(2, 1, 4), torch.tensor(1.0)
    expert = ops.ExpertWeights(*(torch.ones(s) for s in ((4,), (4,), (8, 4), (8,), (4, 8), (4,))))
    call = {
        "attention": lambda name: ops.attention(*(torch.ones(1, 1, 2, 4),) * 3, backend=name),
        "packed_attention": lambda name: ops.packed_attention(rows, rows, rows, ids, max_length=2, backend=name),
        "mome_ffn": lambda name: ops.mome_ffn(x, [2], [expert], backend=name),
        "linear": lambda name: ops.linear(x, x, backend=name),
        "contrastive_loss": lambda name: ops.contrastive_loss(x, x, one, backend=name),
        "contrastive_lse": lambda name: ops.contrastive_lse(x, x, one, backend=name),
        "sample_hard_negatives": lambda name: ops.sample_hard_negatives(x, x, one, backend=name),
        "retrieval_ranks": lambda name: ops.retrieval_ranks(x, x, backend=name),
        "similarity_topk": lambda name: ops.similarity_topk(x, x, 1, backend=name),
    }[op]
    call("auto")
    with pytest.raises(ValueError, match=rf"^{op}: backend must be 'auto' or one of .*, got 'foo'$"):
        call("foo")
    with pytest.raises(ValueError, match=rf"^{op}: backend must be .*, got 'foo'$"):
        dispatch.load(op, "foo")


def test_the_ops_below_refuse_a_name_without_a_row():
    """Also where nobody asked the door: each row's code is found by its name, and there is no "else"."""
    x = torch.ones(2, 4)
    with pytest.raises(ValueError, match=r"^linear: backend must be .*, got 'foo'"):
        torch.ops.vlmo_fast.linear(x, x, None, "foo")
    with pytest.raises(ValueError, match=r"^contrastive_lse: backend must be .*, got 'foo'"):
        torch.ops.vlmo_fast.contrastive_lse(x, x, torch.tensor(1.0), None, None, None, 0, "foo")
    with pytest.raises(ValueError, match=r"^attention: backend must be .*, got 'foo'"):
        torch.ops.vlmo_fast.attention(*(torch.ones(1, 1, 2, 4),) * 3, None, None, 1.0, "foo")


OTHER_NAMES = ("build.py", "doctor.py", "extensions.py")  # of libraries of csrc/, and of packages


def test_nobody_else_compares_names():
    """Only the table knows what a name stands for; devices, which share some names, are compared by `.type`."""
    names, found = {name for _, name in EVERY_ROW}, []
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.relative_to(PACKAGE) == Path("ops/dispatch.py") or path.name in OTHER_NAMES:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        of_packages = {
            inner
            for node in ast.walk(tree)
            if isinstance(node, ast.BoolOp) and "find_spec(" in ast.unparse(node)
            for inner in ast.walk(node)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Compare) or node in of_packages:
                continue
            sides = [node.left, *node.comparators]
            constants = {x.value for side in sides for x in ast.walk(side) if isinstance(x, ast.Constant)}
            of_device = any(re.search(r"\.type$|device", ast.unparse(side)) for side in sides)
            if names & constants and not (of_device and names & constants <= {"cpu", "cuda"}):
                found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}")
    assert not found, "\n".join(found)


# What CONTRIBUTING.md says is done as it is written there


def blocks(heading):
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition(f"\n## {heading}\n")[2]
    section = section.partition("\n## ")[0]
    return [
        textwrap.dedent(code) for code in re.findall(r"^ *```python\n(.*?)^ *```$", section, re.MULTILINE | re.DOTALL)
    ]


def imported(code, folder):
    path = folder / "module_of_contributing.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(code, module):
    """The rows of a block, their code being the module's own objects."""

    def row(name, address, *rest):
        return Row(name, getattr(module, address.partition(":")[2]), *rest)

    return eval(code, {**vars(dispatch), "Row": row})


@pytest.fixture
def padded_backend(tmp_path, monkeypatch):
    object_code, row_code = blocks("Add a backend")
    row = rows_of(row_code, imported(object_code, tmp_path))
    monkeypatch.setitem(dispatch.TABLE, packed.OP, (*dispatch.TABLE[packed.OP], row))
    return row.name


@pytest.mark.parametrize("cls_only", [False, True], ids=["all", "cls"])
@pytest.mark.parametrize("lengths", packed.MIXES.values(), ids=packed.MIXES)
def test_a_new_backend_needs_one_object_and_one_row(padded_backend, lengths, cls_only):
    """It is then known to all, and held to what the others are held to."""
    assert padded_backend in ops.implementations("packed_attention")
    assert padded_backend in {choice.implementation for choice in ops.explain("packed_attention")}
    for bias in (True, False):
        problem = packed.problem(lengths, cls_only=cls_only, gap=2, bias=bias)
        packed.check_float64(*problem, cls_only, padded_backend)


def test_a_new_backend_under_torchs_tools(padded_backend):
    packed.test_opcheck(padded_backend, cls_only=False)
    packed.test_compiles_whole(padded_backend)
    packed.test_export(padded_backend)
    packed.test_activation_checkpointing(padded_backend)
    packed.test_second_derivatives_are_refused(padded_backend)


def test_a_new_op(tmp_path, monkeypatch):
    op_code, rows_code = blocks("Add an op")
    module = imported(op_code, tmp_path)
    (op, rows), *_ = rows_of("{" + rows_code + "}", module).items()
    monkeypatch.setitem(dispatch.TABLE, op, rows)
    x = torch.randn(5, 3, dtype=torch.float64).requires_grad_()
    assert [choice.implementation for choice in ops.explain(op, ops.Problem("cpu", x.dtype))] == ["torch", "eager"]
    for name in ops.implementations(op):
        torch.testing.assert_close(module.unit_rows(x, backend=name), x / x.square().sum(1, keepdim=True).sqrt())
        assert torch.autograd.gradcheck(lambda x, name=name: module.unit_rows(x, backend=name), x)
        compiled = torch.compile(module.unit_rows, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, backend=name), module.unit_rows(x, backend=name))
    torch.library.opcheck(torch.ops.vlmo_fast.unit_rows, (x, "torch"))
    (first,) = torch.autograd.grad(module.unit_rows(x).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match='unit_rows: double backward needs backend="eager"'):
        first.sum().backward()
    with pytest.raises(ValueError, match="unit_rows: backend must be"):
        module.unit_rows(x, backend="foo")
