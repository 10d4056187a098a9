"""compat.install puts functrans in the place of torch.func, and takes it out; PyTorch's private names answer for us."""

from __future__ import annotations

import ast
import inspect
import pickle
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._C import _functorch as core  # what clients import

import functrans
from functrans import compat
from functrans.errors import CallTypeError, CallValueError, MixedTransformsError

NAMES = sorted(torch.func.__all__)
ORIGINALS = {name: getattr(torch.func, name) for name in NAMES}
x = torch.tensor([1.0, 2.0, 3.0])
#: torch.func's derivative of it is zero, functrans' is not: tells who answers.
telling = lambda end: torch.linspace(0, end, 3).sum()
at = torch.tensor(2.0)


@pytest.fixture
def installed() -> Iterator[compat.Installation]:
    with compat.install() as installation:
        yield installation


def module(name: str, code: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    made = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, made)
    exec(code, made.__dict__)  # noqa: S102 - our own
    return made


# in and out


@pytest.mark.parametrize("name", NAMES)
def test_every_function_is_replaced_and_comes_back(name):
    with compat.install():
        replaced = getattr(torch.func, name)
        assert replaced.__code__ is getattr(functrans, name).__code__
        assert inspect.signature(replaced) == inspect.signature(getattr(functrans, name))
        assert replaced.__doc__ == getattr(functrans, name).__doc__
        assert pickle.loads(pickle.dumps(replaced)) is replaced
        own = sys.modules[ORIGINALS[name].__code__.co_filename.partition("site-packages/")[2][:-3].replace("/", ".")]
        assert getattr(own, name) is replaced, "the module that defines it is one that others import it from"
    assert getattr(torch.func, name) is ORIGINALS[name] is getattr(own, name)


def test_torch_vmap(installed):
    assert torch.vmap is torch.func.vmap is not functrans.vmap
    installed.uninstall()
    assert torch.vmap is ORIGINALS["vmap"]


IMPORTS = """
import torch, functrans
import torch.func as tf
from torch.func import grad, vmap as batched
from functrans import grad as ours

def both(f, x):
    return grad(f)(x), tf.grad(f)(x), torch.func.grad(f)(x)
"""


@pytest.mark.parametrize("when", ["before", "while"])
def test_modules_imported_in_either_order(when, monkeypatch):
    if when == "before":
        client = module("client", IMPORTS, monkeypatch)
        assert client.both(telling, at) == (0, 0, 0)
    with compat.install():
        if when == "while":
            client = module("client", IMPORTS, monkeypatch)
        assert client.both(telling, at) == (1.5, 1.5, 1.5)
        assert client.batched is torch.vmap and client.ours is functrans.grad
    assert client.both(telling, at) == (0, 0, 0)
    assert client.grad is ORIGINALS["grad"] and client.batched is ORIGINALS["vmap"]
    assert client.ours is functrans.grad, "what a program imports from functrans stays"


def test_installations_count():
    first, second = compat.install(), compat.install()
    first.uninstall()
    first.uninstall()
    assert torch.func.grad is not ORIGINALS["grad"], "the second is there yet, whose turn it is not"
    second.uninstall()
    assert torch.func.grad is ORIGINALS["grad"]


def test_an_exception_takes_it_out():
    with pytest.raises(ZeroDivisionError), compat.install():
        torch.func.grad(lambda x: 1 / 0)(at)
    assert torch.func.grad is ORIGINALS["grad"]


def test_what_somebody_else_put_in_place_meanwhile_stays(monkeypatch):
    with compat.install():
        monkeypatch.setattr(torch.func, "hessian", len)
    assert torch.func.hessian is len


def test_a_process_is_as_before():
    """All attributes of all modules, in a process that nothing else has touched."""
    script = """
import sys, functorch, torch, torch._functorch.deprecated, functrans
from functrans import compat

def state():
    return {
        (name, key): id(value)
        for name, module in list(sys.modules.items()) if type(getattr(module, "__dict__", None)) is dict
        for key, value in list(vars(module).items()) if callable(value)
    }

before = state()
with compat.install():
    inside = state()
    import torch._dynamo, torch.nn.attention.flex_attention  # which PyTorch imports late
    assert torch.equal(torch.func.vmap(torch.sin)(torch.ones(2)), torch.ones(2).sin())
changed = {key for key in before if inside[key] != before[key]}
assert {name.partition(".")[0] for name, _ in changed} == {"torch"}, changed
assert ("torch", "vmap") in changed and ("torch._C._functorch", "is_batchedtensor") in changed
after = state()
assert {key for key in changed if after[key] != before[key]} == set()
ours = {id(new) for _, new in compat.PAIRS + functrans.api.private_names.PAIRS}
assert {key for key, value in after.items() if value in ours and not key[0].startswith("functrans")} == set()
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_functorch_package_comes_along(installed):
    import functorch

    assert functorch.grad(telling)(at) == 1.5
    assert torch.equal(functorch.vmap(functorch.grad(torch.sin))(x), x.cos())


# what is out of reach, and what is not to be touched


def test_a_function_in_a_closure_is_out_of_reach(installed):
    """It is PyTorch's still, and right by itself; inside of it ours refuses to run."""
    held = [ORIGINALS["vmap"]]
    assert torch.equal(held[0](torch.sin)(x), x.sin())
    with pytest.raises(MixedTransformsError):
        held[0](torch.func.grad(torch.sin))(x)
    assert torch.equal(torch.func.vmap(lambda a: held[0](torch.sin)(a * x))(x), torch.outer(x, x).sin())


def test_code_that_enters_levels_of_pytorch_is_told_so(installed):
    level = core._vmap_increment_nesting(3, "error")
    try:
        batched = core._add_batch_dim(x, 0, level)
        assert core.is_batchedtensor(batched) and core.maybe_current_level() == level
        assert torch.equal(core._remove_batch_dim(batched.sin(), level, 3, 0), x.sin())
        with pytest.raises(MixedTransformsError, match=r"inside a transform of torch\.func"):
            torch.func.grad(torch.sin)(batched)
    finally:
        core._vmap_decrement_nesting()


def test_functrans_does_not_use_what_it_replaces():
    """But for functional_call, which it holds by name, and nothing of a transform is in."""
    package = Path(functrans.__file__).parent
    used = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("torch.func.", "torch.vmap")):
                used.add((path.name, ast.unparse(node)))
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("torch.func", "functorch")):
                used.update((path.name, alias.name) for alias in node.names)
    assert used == {("modules.py", "functional_call"), ("compat.py", "torch.func.__all__")}


def test_modules_and_ensembles(installed):
    layers = [torch.nn.Linear(3, 2) for _ in range(4)]
    parameters, buffers = torch.func.stack_module_state(layers)
    call = lambda p, b: torch.func.functional_call(layers[0], (p, b), (x,))
    torch.testing.assert_close(torch.vmap(call)(parameters, buffers), torch.stack([layer(x) for layer in layers]))


def test_pytorch_uses_of_its_own(installed):
    from torch.nn.attention.flex_attention import create_mask

    mask = create_mask(lambda b, h, q, k: q >= k, 2, 3, 4, 4, device="cpu")
    assert torch.equal(mask, torch.tril(torch.ones(4, 4, dtype=torch.bool)).expand(2, 3, 4, 4))
    jacobian = torch.autograd.functional.jacobian(torch.sin, x, vectorize=True)
    torch.testing.assert_close(jacobian, x.cos().diag())
    doubles = torch.randn(3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(torch.sin, doubles, check_batched_grad=True, check_forward_ad=True)


COMPILED = """
import torch
from functrans import compat

core = torch._C._functorch
x = torch.randn(3, 2)
program = lambda x: torch.vmap(torch.func.grad(lambda x: x.sin().sum()))(x)
asking = lambda x: torch.vmap(lambda x: x + 1 if core.is_batchedtensor(x) else x)(x)
with compat.install():
    assert torch.equal(torch.compile(program, backend="eager", fullgraph=True)(x), x.cos())
    assert torch.equal(torch.compile(asking, backend="eager")(x), x + 1)
torch._dynamo.reset()
assert torch.equal(torch.compile(program, backend="eager", fullgraph=True)(x), x.cos())
asking = lambda x: x if core.is_batchedtensor(x) else x + 1
assert torch.equal(torch.compile(asking, backend="eager", fullgraph=True)(x), x + 1)
"""


def test_compiled_programs():
    """In a process of its own: once vmap has met a TensorDict, private names stay ours."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# the private names


def asked(tensor):
    return {
        "batched": core.is_batchedtensor(tensor),
        "tracked": core.is_gradtrackingtensor(tensor),
        "wrapped": core.is_functorch_wrapped_tensor(tensor),
        "level": core.maybe_get_level(tensor),
        "bdim": core.maybe_get_bdim(tensor),
    }


PLAIN = {"batched": False, "tracked": False, "wrapped": False, "level": -1, "bdim": -1}
rows = torch.arange(6.0).reshape(3, 2)


def inside(transformed, *args):
    """What is seen of the arguments inside of a transform."""
    found = []
    transformed(lambda *args: (found.append([asked(a) for a in args]), args[0].sum())[1])(*args)
    return found[0]


def test_questions_are_answered_for_our_wrappers(installed):
    assert asked(x) == PLAIN and core.maybe_current_level() is None
    batched = PLAIN | {"batched": True, "wrapped": True, "level": 1, "bdim": 1}
    assert inside(lambda f: torch.vmap(f, in_dims=(1, None)), rows, x) == [batched, PLAIN]
    tracked = PLAIN | {"tracked": True, "wrapped": True, "level": 1}
    assert inside(torch.func.grad, x, x) == [tracked, PLAIN]
    assert inside(lambda f: lambda x: torch.func.jvp(f, (x,), (x,)), x) == [tracked]
    assert inside(lambda f: torch.vmap(torch.func.grad(f)), x) == [tracked | {"level": 2}]
    both = inside(lambda f: lambda x: torch.vmap(lambda y: torch.func.grad(lambda z: f(y, z))(y))(x), x)
    assert both == [PLAIN | {"batched": True, "wrapped": True, "level": 1, "bdim": 0}, tracked | {"level": 2}]


def test_what_is_inside(installed):
    kept = []

    def f(row):
        kept.append(row)
        assert torch.equal(core.get_unwrapped(row), rows)
        view = row[:1]
        row.mul_(2)
        assert torch.equal(core.get_unwrapped(view), 2 * rows[:, :1])
        with pytest.raises(RuntimeError, match="No wrappers present"):
            core.get_unwrapped(x)
        assert core.maybe_current_level() == core.current_level() == 1
        assert not core.is_dead_tensor_wrapper(row)
        return row

    torch.vmap(f)(rows.clone())
    assert core.is_dead_tensor_wrapper(kept[0])


@pytest.mark.parametrize("place", [core, torch._functorch.vmap], ids=["torch._C._functorch", "torch._functorch.vmap"])
def test_a_batch_dimension_by_hand(place, installed):
    """A library holds tensors in a container of its own, and batches them itself."""

    def f(y):
        level = core.maybe_get_level(y)
        row = place._add_batch_dim(rows, -2, level)
        assert row.shape == (2,) and core.is_batchedtensor(row)
        back = place._remove_batch_dim(row * 2, level, 3, 1)
        assert torch.equal(back, 2 * rows.T)
        assert place._remove_batch_dim(torch.ones(2), int(level), 3, -1).shape == (2, 3)
        return row

    assert torch.equal(torch.vmap(f)(x), rows)
    inner = lambda y: torch.func.grad(lambda z: (f(y) * z).sum())(y)
    assert torch.equal(torch.vmap(inner)(x), rows.sum(1))


def test_a_batch_dimension_in_the_wrong_place(installed):
    levels = []

    def f(y):
        levels.append(core.maybe_current_level())
        return core._add_batch_dim(y, 0, levels[0]).sum()

    with pytest.raises(CallTypeError, match=r"got level 1, which is grad\(f\); expected the level of a vmap"):
        torch.func.grad(f)(x)
    levels.clear()
    torch.vmap(lambda y: (levels.append(core.maybe_current_level()), y)[1])(x)
    with pytest.raises(CallTypeError, match="which has ended; expected the level of a vmap that is running"):
        core._add_batch_dim(x, 0, levels[0])

    def twice(row):
        return core._add_batch_dim(row, 0, core.maybe_current_level())

    with pytest.raises(CallTypeError, match="got a tensor of vmap.* at level 1; expected one from outside"):
        torch.vmap(twice)(rows)

    def too_deep(y):
        return torch.func.grad(lambda z: core._remove_batch_dim(y * z, core.maybe_get_level(y), 3, 0).sum())(y)

    with pytest.raises(CallTypeError, match=r"_remove_batch_dim.* got a tensor of grad.* at level 2; expected"):
        torch.vmap(too_deep)(x)


# containers that batch themselves: tensordict's protocol, by a class of the smallest size


class Box:
    """Tensors by name with a common batch size, as a TensorDict has it."""

    def __init__(self, tensors, batch_size, locked=False):
        self.tensors, self.batch_size, self.is_locked = tensors, torch.Size(batch_size), locked
        for value in tensors.values():
            assert value.shape[: len(self.batch_size)] == self.batch_size

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.tensors[key]
        sizes = torch.empty(self.batch_size)[key].shape
        return Box({name: value[key] for name, value in self.tensors.items()}, sizes)

    def __setitem__(self, name, value):
        assert not self.is_locked and value.shape[: len(self.batch_size)] == self.batch_size
        self.tensors[name] = value

    @property
    def shape(self):
        return self.batch_size

    def dim(self):
        return len(self.batch_size)

    def clone(self, recurse=True):
        assert not recurse
        return Box(dict(self.tensors), self.batch_size)

    def lock_(self):
        self.is_locked = True
        return self

    def values(self, nested, leaves):
        return self.tensors.values()

    def apply(self, f):
        return Box({name: f(value) for name, value in self.tensors.items()}, self.batch_size, self.is_locked)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert function is torch.cat
        boxes, dim = args[0], (kwargs or {}).get("dim", 0)
        joined = {name: torch.cat([box[name] for box in boxes], dim) for name in boxes[0].tensors}
        sizes = list(boxes[0].batch_size)
        sizes[dim] = sum(box.batch_size[dim] for box in boxes)
        return Box(joined, sizes)

    def _add_batch_dim(self, *, in_dim, vmap_level):
        assert not self.is_locked, "a locked one would keep the result"
        sizes = [n for i, n in enumerate(self.batch_size) if i != in_dim]
        add = lambda value: core._add_batch_dim(value, in_dim, vmap_level)
        return Box({name: add(value) for name, value in self.tensors.items()}, sizes)

    def _maybe_remove_batch_dim(self, name, vmap_level, batch_size, out_dim):
        sizes = list(self.batch_size)
        sizes.insert(out_dim, batch_size)
        back = lambda value: torch._functorch.vmap._maybe_remove_batch_dim(name, value, vmap_level, batch_size, out_dim)
        return Box({key: back(value) for key, value in self.tensors.items()}, sizes)


class Node(Box):
    """The same, and a node of PyTorch's pytrees."""


torch.utils._pytree.register_pytree_node(
    Node, lambda box: (list(box.tensors.values()), (list(box.tensors), box.batch_size)), lambda values, context: None
)


def boxed(kind, *sizes, **tensors):
    box = kind(tensors, sizes)
    box.__class__ = kind
    return box


@pytest.fixture(params=["installed", "not installed"])
def vmap(request):
    if request.param == "not installed":
        yield functrans.vmap
    else:
        with compat.install():
            yield torch.vmap


@pytest.mark.parametrize("kind", [Box, Node])
class TestContainers:
    def test_batch_size_in_and_out(self, vmap, kind):
        a, b = torch.randn(3, 4, 2), torch.randn(3, 4)

        def f(box, factor):
            assert box.batch_size == (4,) and box["a"].shape == (4, 2)
            box["c"] = box["a"].prod(-1) * factor + box["b"]
            return box

        box = boxed(kind, 3, 4, a=a, b=b)
        out = vmap(f)(box, x)
        assert out.batch_size == (3, 4) and set(box.tensors) == {"a", "b"}
        torch.testing.assert_close(out["c"], a.prod(-1) * x[:, None] + b)
        out = vmap(f, out_dims=-1)(box, x)
        assert out.batch_size == (4, 3)
        torch.testing.assert_close(out["c"], (a.prod(-1) * x[:, None] + b).T)
        out = vmap(f, in_dims=(None, 0))(boxed(kind, 4, a=a[0], b=b[0]), x)
        torch.testing.assert_close(out["c"], a[0].prod(-1) * x[:, None] + b[0])
        assert torch.equal(out["a"], a[:1].expand(3, 4, 2))

    def test_nested_and_by_a_dict(self, vmap, kind):
        a = torch.randn(3, 4, 2)
        f = lambda tree: (tree["box"]["a"].sum(), tree["box"])
        total, box = vmap(vmap(f, ({"box": 0},), (0, 0)), ({"box": -1},), 1)({"box": boxed(kind, 3, 4, a=a)})
        torch.testing.assert_close(total, a.sum(-1))
        assert box.batch_size == (3, 4) and torch.equal(box["a"], a)

    def test_in_chunks(self, vmap, kind):
        a = torch.randn(5, 2)
        out, total = vmap(lambda box: (box, box["a"].sum()), chunk_size=2)(boxed(kind, 5, a=a))
        assert out.batch_size == (5,) and torch.equal(out["a"], a)
        torch.testing.assert_close(total, a.sum(-1))

    def test_writes_reach_the_caller(self, vmap, kind):
        box = boxed(kind, 3, a=torch.zeros(3, 2))
        out = vmap(lambda box, y: box["a"][0].add_(y))(box, x)
        assert torch.equal(out, x) and torch.equal(box["a"], torch.stack([x, torch.zeros(3)], 1))

    def test_one_that_is_made_inside(self, vmap, kind):
        out = vmap(lambda row: boxed(kind, 2, a=row))(rows)
        assert out.batch_size == (3, 2) and torch.equal(out["a"], rows)

    def test_a_view_that_was_written_through(self, vmap, kind):
        def f(box, y):
            row = box["a"] * 1
            out = boxed(kind, a=row[:1])
            row.add_(y)
            return out

        out = vmap(f)(boxed(kind, 3, a=torch.zeros(3, 2)), x)
        assert torch.equal(out["a"], x[:, None])

    def test_locked_ones(self, vmap, kind):
        box = boxed(kind, 3, a=rows).lock_()
        for _ in range(2):
            assert torch.equal(vmap(lambda box: box["a"] if box.is_locked else None)(box), rows)

    def test_without_a_batch(self, vmap, kind):
        box = boxed(kind, 3, a=rows)
        out = vmap(lambda box: boxed(kind, 3, a=x), out_dims=None)(box)
        assert torch.equal(out["a"], x)
        with pytest.raises(CallValueError, match="which differs between examples, with out_dim None"):
            vmap(lambda box: box, out_dims=None)(box)

    def test_mistakes(self, vmap, kind):
        box = boxed(kind, 3, a=rows)
        with pytest.raises(CallValueError, match=r"size 3 \(args\[0\] of shape \(3,\) with in_dim 0\) and size 2"):
            vmap(lambda box, y: y)(box, torch.ones(2))
        with pytest.raises(CallValueError, match=r"got in_dim 1 for args\[0\], which has 1 dimension"):
            vmap(lambda box: x, 1)(box)
        with pytest.raises(IndexError, match="out_dim 1 for output, which has 1 dimension with the batch"):
            vmap(lambda box: box, out_dims=1)(box)

    def test_compiled(self, vmap, kind):
        f = lambda box: vmap(lambda box: box["a"].cumsum(0))(box)
        torch.testing.assert_close(torch.compile(f, backend="eager")(boxed(kind, 3, a=rows)), rows.cumsum(1))
