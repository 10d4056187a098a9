"""DTensors, collectives and data-parallel modules inside transforms, on two processes.

Each case is a function of this file; ``ranks`` runs all of them in one pair of processes.
"""

from __future__ import annotations

import copy
import importlib
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from functrans import (
    functional_call,
    grad,
    grad_and_value,
    hessian,
    hvp,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    vjp,
    vmap,
)
from functrans.errors import InsideTransformError

dist = torch.distributed
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="PyTorch was built without torch.distributed")

CASES: dict[str, Callable[[Any], None]] = {}


def case(f: Callable[[Any], None]) -> Callable[[Any], None]:
    CASES[f.__name__] = f
    return f


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


W, X, V = some(4, 4), some(6, 4, seed=1), some(4, seed=2)


def placed(mesh: Any, x: Tensor, *where: Any) -> Any:
    return dist.tensor.distribute_tensor(x, mesh, list(where) or [dist.tensor.Shard(0)])


def by_hand(f: Callable[..., Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(f(leaf), leaf)[0]


def same(got: Any, expected: Tensor) -> None:
    """``got`` is a DTensor of the value expected."""
    assert isinstance(got, dist.tensor.DTensor)
    torch.testing.assert_close(got.full_tensor(), expected)


def loss(w: Any, x: Any) -> Any:
    return (torch.tanh(x @ w) ** 2).sum()


def wave(v: Any) -> Any:
    return (v.sin() * v).sum()


@case
def derivatives_of_a_dtensor(mesh: Any) -> None:
    w, x, v = (placed(mesh, t) for t in (W, X, V))
    jacobian, second = torch.autograd.functional.jacobian, torch.autograd.functional.hessian(wave, V)
    same(grad(loss)(w, x), by_hand(lambda w: loss(w, X), W))
    same(grad(lambda w: loss(w, x))(w), by_hand(lambda w: loss(w, X), W))
    same(grad_and_value(wave)(v)[1], wave(V))
    same(grad(lambda v: grad(wave)(v).sum())(v), second.sum(0))
    same(vjp(torch.sin, v)[1](v)[0], V * V.cos())
    same(jacrev(lambda v: torch.tanh(w @ v))(v), jacobian(lambda v: torch.tanh(W @ v), V))
    same(jacfwd(lambda v: v.sin() * v)(v), jacobian(lambda v: v.sin() * v, V))
    same(hessian(wave)(v), second)
    same(hvp(wave, (v,), (v,))[1][0], second @ V)
    same(jvp(lambda v: w @ v, (v,), (v,))[1], W @ V)
    same(jvp(grad(wave), (v,), (v,))[1], second @ V)
    same(linearize(torch.sin, v)[1](v), V * V.cos())
    same(vmap(lambda x: torch.tanh(x @ w))(x), torch.tanh(X @ W))
    each = torch.autograd.functional.jacobian(lambda w: torch.stack([loss(w, x) for x in X]), W)
    same(vmap(grad(loss), (None, 0))(w, x), each)
    same(grad(lambda w: vmap(lambda x: loss(w, x))(x).sum())(w), each.sum(0))
    same(grad(lambda x: x.log_softmax(1)[:, 0].sum())(x), by_hand(lambda x: x.log_softmax(1)[:, 0].sum(), X))
    same(grad(lambda v: (v.clone().mul_(2) ** 2).sum())(v), 8 * V)


@case
def placements_are_kept(mesh: Any) -> None:
    """As PyTorch's own autograd places what it computes; zeros, as what they are zeros for."""
    shard, v = dist.tensor.Shard(0), placed(mesh, V)
    found = [grad(wave)(v), vjp(torch.sin, v)[1](v)[0], *jvp(torch.sin, (v,), (v,)), linearize(torch.sin, v)[1](v)]
    found += [hessian(wave)(v), vjp(lambda a, b: a * 2, v, v)[1](v)[1], grad(lambda a, b: a.sum(), argnums=1)(v, v)]
    assert [g.placements for g in found] == [(shard,)] * len(found)
    for f in (wave, torch.sum, lambda v: (v.exp() @ v) * v.sum()):
        leaf = placed(mesh, V).requires_grad_()
        assert grad(f)(v).placements == torch.autograd.grad(f(leaf), leaf)[0].placements


@case
def methods_of_a_dtensor(mesh: Any) -> None:
    replicated, v, x = [dist.tensor.Replicate()], placed(mesh, V), placed(mesh, X)

    def cubes(v: Any) -> Any:
        assert v.device_mesh is mesh and not hasattr(v, "no_such_thing")
        return (v.redistribute(placements=replicated) ** 3).sum()

    same(grad(cubes)(v), 3 * V**2)
    same(hessian(cubes)(v), torch.diag(6 * V))
    value, tangent = jvp(lambda v: v.redistribute(placements=replicated).sin(), (v,), (v,))
    assert value.placements == tangent.placements == tuple(replicated)
    same(tangent, V * V.cos())
    whole = lambda v: (v.full_tensor() ** 3).sum()
    same(grad(whole)(v), 3 * V**2)
    assert grad(whole)(v).placements == v.placements
    same(jvp(grad(whole), (v,), (v,))[1], 6 * V**2)
    same(jacrev(lambda v: v.full_tensor() ** 3)(v), torch.diag(3 * V**2))
    torch.testing.assert_close(jvp(lambda v: v.full_tensor() ** 3, (v,), (v,))[1], 3 * V**3)
    local = grad(lambda v: (v.to_local() ** 2).sum())(v)
    same(local, 2 * V)
    torch.testing.assert_close(jvp(lambda v: v.to_local() ** 2, (v,), (v,))[1], 2 * v.to_local() ** 2)
    columns = placed(mesh, X, dist.tensor.Shard(1))  # the batch is whole on each rank: an example is sharded

    def of_example(x: Any) -> Any:
        assert x.placements == (dist.tensor.Shard(0),)
        return (x.full_tensor() ** 3).sum()

    torch.testing.assert_close(vmap(of_example)(columns), (X**3).sum(1))
    same(vmap(grad(of_example))(columns), 3 * X**2)
    same(vmap(grad(cubes))(x), 3 * X**2)
    for asks in (lambda x: x.to_local(), lambda x: x * len(x.placements)):
        with pytest.raises(InsideTransformError, match="a batch that is sharded along its dimension 0"):
            vmap(asks)(x)


@case
def collectives_of_a_batch(mesh: Any) -> None:
    fc = importlib.import_module("torch.distributed._functional_collectives")
    batches = [torch.arange(6.0).view(3, 2) + r for r in range(2)]
    rank, total = dist.get_rank(), sum(batches)
    b = batches[rank]
    for in_dim in (0, 1):
        given = b.movedim(0, in_dim).contiguous()
        run = lambda f: vmap(lambda r: f(r.contiguous()) * 1, in_dims=in_dim)(given)  # noqa: B023
        assert torch.equal(run(lambda r: fc.all_reduce(r, "sum", mesh)), total)
        assert torch.equal(run(lambda r: fc.all_gather_tensor(r, 0, mesh)), torch.cat(batches, 1))
        assert torch.equal(run(lambda r: fc.reduce_scatter_tensor(r, "sum", 0, mesh)), total[:, rank : rank + 1])
        swapped = torch.stack([other[:, rank] for other in batches], 1)
        assert torch.equal(run(lambda r: fc.all_to_all_single(r, None, None, mesh)), swapped)
        assert torch.equal(run(lambda r: fc.broadcast(r, 1, mesh)), batches[1])
    firsts = torch.stack([other[:, 0] for other in batches], 1)
    assert torch.equal(vmap(lambda s: fc.all_gather_tensor(s, 0, mesh) * 1)(b[:, 0]), firsts)
    # Every rank computes a loss, and the gradient is that of their sum, as the collectives' own autograd has it.
    assert torch.equal(grad(lambda b: (fc.all_reduce(b, "sum", mesh) ** 2).sum())(b), 4 * total)
    assert torch.equal(vmap(grad(lambda b: (fc.all_reduce(b, "sum", mesh) ** 2).sum()))(b), 4 * total)


@case
def collectives_in_place(mesh: Any) -> None:
    rank = dist.get_rank()
    x = torch.arange(3.0) + rank
    total = 2 * torch.arange(3.0) + 1

    def reduced(x: Tensor) -> Tensor:
        y = x * 2
        dist.all_reduce(y)
        return y

    assert torch.equal(vmap(reduced)(x), 2 * total)
    assert torch.equal(grad(lambda x: (reduced(x) ** 2).sum())(x), 16 * total)
    assert torch.equal(jvp(reduced, (x,), (x,))[1], 2 * total)
    assert torch.equal(grad(lambda x: x.sum() * reduced(x.detach()).sum())(x), (2 * total).sum().expand(3))

    def from_other(x: Tensor) -> Tensor:
        y = x * 2
        dist.broadcast(y, 1)
        return y

    assert torch.equal(vmap(from_other)(x), 2 * (torch.arange(3.0) + 1))

    def gathered(x: Tensor) -> Tensor:
        parts = [torch.zeros(3), torch.zeros(3)]
        dist.all_gather(parts, x * 2)
        return parts[0].sum()

    with pytest.raises(InsideTransformError, match="Use a functional collective"):
        grad(gathered)(x)
    dist.barrier()


@case
def data_parallel_modules(mesh: Any) -> None:
    plain = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    for p in plain.parameters():
        dist.broadcast(p.data, 0)
    parallel = nn.parallel.DistributedDataParallel(plain)
    expected = by_hand(lambda x: plain(x).sum(), X)
    torch.testing.assert_close(vmap(parallel)(X), plain(X))
    torch.testing.assert_close(vmap(grad(lambda x: parallel(x).sum()))(X), expected)
    torch.testing.assert_close(jvp(lambda x: parallel(x).sum(), (X,), (X,))[1], (expected * X).sum())


# Modules of fully_shard. The losses are another one on each process: what is differentiated is their mean.

NETWORK = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)).double()
with torch.no_grad():
    for seed, p in enumerate(NETWORK.parameters()):
        p.copy_(some(*p.shape, seed=seed))
PARAMETERS = {name: p.detach() for name, p in NETWORK.named_parameters()}
BATCHES = some(2, 6, 4, seed=9)


def fsdp() -> Any:
    return importlib.import_module("torch.distributed.fsdp")


def sharded(mesh: Any, *submodules: int, **options: Any) -> Any:
    """The network; ``submodules`` have hooks of their own."""
    module = copy.deepcopy(NETWORK)
    for i in submodules:
        fsdp().fully_shard(module[i], mesh=mesh, **options)
    return fsdp().fully_shard(module, mesh=mesh, **options)


def energy(module: Any) -> Callable[..., Any]:
    return lambda p, x: (functional_call(module, p, (x,)) ** 3).sum()


BY_INPUTS: dict[str, Callable[[Any, Tensor], Any]] = {
    "vmap": lambda f, x: vmap(f)(x),
    "grad": lambda f, x: grad(lambda x: (f(x) ** 2).sum())(x),
    "jvp": lambda f, x: jvp(f, (x,), (x.cos(),)),
    "vmap of grad": lambda f, x: vmap(grad(lambda x: (f(x) ** 2).sum()))(x),
    "vmap of hessian": lambda f, x: vmap(hessian(lambda x: (f(x) ** 2).sum()))(x),
    "grad of vmap": lambda f, x: grad(lambda x: (vmap(f)(x) ** 2).sum())(x),
    "vjp": lambda f, x: vjp(f, x)[1](x[:, :3].cos())[0],
    "linearize": lambda f, x: linearize(f, x)[1](x.sin()),
}
BY_PARAMETERS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, p, x: grad(f)(p, x),
    "vmap of grad": lambda f, p, x: vmap(grad(f), (None, 0))(p, x),
    "jvp of grad": lambda f, p, x: jvp(lambda p: grad(f)(p, x), (p,), (p,))[1],
    "grad of jvp": lambda f, p, x: grad(lambda p: jvp(lambda p: f(p, x), (p,), (p,))[1])(p),
    "grad of vmap": lambda f, p, x: grad(lambda p: (vmap(f, (None, 0))(p, x) ** 2).sum())(p),
}


@case
def sharded_modules_by_their_inputs(mesh: Any) -> None:
    x = BATCHES[dist.get_rank()]
    for submodules in ((), (0, 2)):
        module = sharded(mesh, *submodules)
        for called_before in (False, True):  # a root keeps its parameters gathered from one call to the next
            for transform in BY_INPUTS.values():
                torch.testing.assert_close(transform(module, x), transform(NETWORK, x))
            if not called_before:
                assert all(isinstance(p, dist.tensor.DTensor) for p in module.parameters())
                module(x)


@case
def sharded_modules_by_their_parameters(mesh: Any) -> None:
    for module in (sharded(mesh), sharded(mesh, 0, 2)):
        params = dict(module.named_parameters())
        for transform in BY_PARAMETERS.values():
            got = transform(energy(module), params, BATCHES[dist.get_rank()])
            found = [transform(energy(NETWORK), PARAMETERS, x) for x in BATCHES]
            for name, p in params.items():
                same(got[name], (found[0][name] + found[1][name]) / 2)
                where = p.placements[0].dim + got[name].dim() - p.dim()
                assert got[name].placements == (dist.tensor.Shard(where),)
        whole = {name: p.full_tensor() for name, p in params.items()}  # given as they were, they are not sharded
        own = grad(energy(module))(whole, X)
        torch.testing.assert_close(own, grad(energy(NETWORK))(PARAMETERS, X))


@case
def sharded_modules_in_front_of_a_backward_pass(mesh: Any) -> None:
    """PyTorch's autograd at the base has the gradients that FSDP2 has, before and after."""
    x = BATCHES[dist.get_rank()]
    for factor in (None, 5.0):
        module, by_fsdp = sharded(mesh, 0), sharded(mesh, 0)
        for m in (module, by_fsdp) if factor else ():
            m.set_gradient_divide_factor(factor), m[0].set_gradient_divide_factor(factor)
        (by_fsdp(x) ** 3).sum().backward()
        for run in (vmap(module), module, vmap(module)):
            (run(x) ** 3).sum().backward()
            for p, expected in zip(module.parameters(), by_fsdp.parameters(), strict=True):
                same(p.grad, expected.grad.full_tensor())
                assert p.grad.placements == p.placements
            module.zero_grad()


@case
def sharded_modules_of_every_kind(mesh: Any) -> None:
    x = BATCHES[dist.get_rank()]
    init = importlib.import_module("torch.distributed.device_mesh").init_device_mesh
    for sizes in ((1, 2), (2, 1)):  # replicated, and sharded
        module = sharded(init("cpu", sizes, mesh_dim_names=("replicas", "shards")))
        params = dict(module.named_parameters())
        got, found = grad(energy(module))(params, x), [grad(energy(NETWORK))(PARAMETERS, x) for x in BATCHES]
        for name, p in params.items():
            same(got[name], (found[0][name] + found[1][name]) / 2)
            assert got[name].placements == p.placements
    single = fsdp().MixedPrecisionPolicy(param_dtype=torch.float32)
    module = sharded(mesh, mp_policy=single)
    torch.testing.assert_close(vmap(module)(x), module(x), atol=1e-6, rtol=1e-5)
    assert vmap(module)(x).dtype is torch.float32
    module = copy.deepcopy(NETWORK)
    module[2].weight = nn.Parameter(some(3, 7, seed=5))
    fsdp().fully_shard([module[0], module[2]], mesh=mesh)  # one group
    fsdp().fully_shard(module, mesh=mesh)
    module(x)
    plain = copy.deepcopy(NETWORK)
    plain[2].weight = nn.Parameter(some(3, 7, seed=5))
    torch.testing.assert_close(vmap(grad(lambda x: module(x).sum()))(x), by_hand(lambda x: plain(x).sum(), x))
    torch.testing.assert_close(module(x), plain(x))
    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    for layer in (tied[0], tied[2]):
        layer.weight, layer.bias = tied[0].weight, nn.Parameter(V)
    tied[0].weight.data.copy_(W)
    expected = by_hand(lambda x: tied(x).sum(), x)
    fsdp().fully_shard(tied, mesh=mesh)
    torch.testing.assert_close(vmap(grad(lambda x: tied(x).sum()))(x), expected)
    by_halves = sharded(mesh, shard_placement_fn=lambda p: dist.tensor.Shard(p.dim() - 1) if p.shape[-1] == 4 else None)
    assert by_halves[0].weight.placements == (dist.tensor.Shard(1),)
    torch.testing.assert_close(vmap(by_halves)(x), NETWORK(x))


@case
def sharded_modules_that_fail(mesh: Any) -> None:
    """What a call was lent is given back, and the next call is right."""
    x = BATCHES[dist.get_rank()]
    module = sharded(mesh, 0, 2)
    params = list(module.parameters())
    handle = module[1].register_forward_hook(lambda *args: 1 / 0)
    for transform in BY_INPUTS.values():
        with pytest.raises(ZeroDivisionError):
            transform(module, x)
        assert all(p is q for p, q in zip(module.parameters(), params, strict=True))
    handle.remove()
    torch.testing.assert_close(vmap(module)(x), NETWORK(x))
    torch.testing.assert_close(module(x), NETWORK(x))
    module = sharded(mesh)
    module.head = lambda x, divisor: module[0].weight @ x * (1 / divisor)
    fsdp().register_fsdp_forward_method(module, "head")
    with pytest.raises(ZeroDivisionError):
        vmap(module.head, (0, None))(x, 0)
    torch.testing.assert_close(vmap(module.head, (0, None))(x, 2), x @ NETWORK[0].weight.T / 2)


@case
def sharded_modules_that_are_refused(mesh: Any) -> None:
    init = importlib.import_module("torch.distributed.device_mesh").init_device_mesh
    both = init("cpu", (1, 2), mesh_dim_names=("data", "columns"))
    parallel = importlib.import_module("torch.distributed.tensor.parallel")
    module = parallel.parallelize_module(copy.deepcopy(NETWORK), both["columns"], {"0": parallel.ColwiseParallel()})
    fsdp().fully_shard(module, mesh=both["data"])
    offloaded = sharded(mesh, offload_policy=fsdp().CPUOffloadPolicy(pin_memory=False))
    flat = fsdp().FullyShardedDataParallel(copy.deepcopy(NETWORK), device_id=torch.device("cpu"))
    for refused, why in (
        (module, "with parameters that were DTensors before"),
        (offloaded, "whose parameters are offloaded to the CPU"),
        (flat, "calling a FullyShardedDataParallel module"),
    ):
        for transform in BY_INPUTS.values():
            with pytest.raises(InsideTransformError, match=why + r".*functional_call of the module as it was"):
                transform(refused, X)


def run_cases(rank: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=timedelta(seconds=20))
    importlib.import_module("torch.distributed.tensor")
    mesh = importlib.import_module("torch.distributed.device_mesh").init_device_mesh("cpu", (2,))
    for name, f in CASES.items():
        try:
            f(mesh)
            outcome = ""
        except Exception:  # noqa: BLE001 - handed back
            outcome = traceback.format_exc()
        Path(folder, f"{name}.{rank}").write_text(outcome)
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks() -> dict[str, list[str]]:
    """What went wrong in each case, on each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run_cases, (port, folder), nprocs=2)
        return {name: [Path(folder, f"{name}.{rank}").read_text() for rank in range(2)] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_on_two_processes(name: str, ranks: dict[str, list[str]]) -> None:
    assert ranks[name] == ["", ""]
