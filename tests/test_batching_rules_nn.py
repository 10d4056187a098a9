"""Every batching rule of the layers (convolution, pooling, norms, losses, attention, recurrent) against the loop."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batching_checker import Call, check_rule, recorded_calls
from rule_cases import rules_of
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.func import functional_call, stack_module_state
from torch.utils._pytree import tree_map

import functrans
from functrans.decompositions.recurrent import STEPS
from functrans.decompositions.table import DECOMPOSITIONS
from functrans.interpreters.vmap.families import RuleDeclined
from functrans.interpreters.vmap.rules import attention, batch_norm, convolution, losses, norms, pooling, rnn
from functrans.interpreters.vmap.rules.random import RandomnessError
from functrans.interpreters.vmap.table import BATCHING_RULES, BatchInfo

aten = torch.ops.aten

MODULES = (convolution, pooling, norms, batch_norm, losses, attention, rnn)


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand(shape, dtype=dtype) + 0.1


@cache
def from_samples() -> dict[OpOverload, list[Call]]:
    """Calls that PyTorch's samples and their derivatives make."""
    wanted = rules_of(*MODULES)

    parts = ("pool", "upsample", "interpolate", "_norm", "loss", "cross_entropy", "grid_sample", "fold", "conv")

    def names(name: str) -> bool:
        return any(part in name for part in parts) and "linear_cross" not in name

    forward = recorded_calls(wanted, names=names, per_op=5, samples=16)
    backward = recorded_calls(wanted, names=names, per_op=3, samples=16, backward=True)
    return {op: forward.get(op, []) + backward.get(op, []) for op in wanted}


def convolutions() -> list[tuple[OpOverload, tuple[Any, ...]]]:
    calls: list[tuple[OpOverload, tuple[Any, ...]]] = []
    for transposed, groups, spatial, n in itertools.product((False, True), (1, 2), (1, 2), (2, 0)):
        x = rand(n, 4, *[5] * spatial)
        weight = rand(*((4, 6 // groups) if transposed else (6, 4 // groups)), *[3] * spatial)
        options = ([2] * spatial, [1] * spatial, [1] * spatial, transposed, [int(transposed)] * spatial, groups)
        for bias in (None, rand(6)):
            calls.append((aten.convolution.default, (x, weight, bias, *options)))
        grad = rand(*aten.convolution.default(x, weight, None, *options).shape)
        for mask in ([True, True, True], [True, False, False], [False, True, False]):
            calls.append((aten.convolution_backward.default, (grad, x, weight, [6], *options, mask)))
    return calls


def resamplings() -> list[tuple[OpOverload, tuple[Any, ...]]]:
    calls: list[tuple[OpOverload, tuple[Any, ...]]] = []
    image, small = rand(2, 3, 5, 6), rand(2, 3, 3, 4)
    for name in ("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"):
        packet = getattr(aten, name)
        calls.append((packet.default, (image, [3, 4], False)))
        calls.append((packet.vec, (image, None, False, [0.5, 0.75])))
        calls.append((getattr(aten, name + "_backward").default, (small, [3, 4], [2, 3, 5, 6], False)))
    volume, smaller = rand(2, 3, 4, 5, 6), rand(2, 3, 2, 3, 4)
    calls.append((aten._upsample_nearest_exact3d.default, (volume, [2, 3, 4])))
    calls.append((aten._upsample_nearest_exact3d.vec, (volume, None, [2.0, 1.0, 0.5])))
    calls.append((aten._upsample_nearest_exact3d_backward.default, (smaller, [2, 3, 4], [2, 3, 4, 5, 6])))
    calls.append((aten.affine_grid_generator.default, (rand(2, 2, 3), [2, 3, 4, 5], False)))
    calls.append((aten.affine_grid_generator.default, (rand(2, 3, 4), [2, 3, 4, 5, 6], True)))
    return calls


def normalizations() -> list[tuple[OpOverload, tuple[Any, ...]]]:
    calls: list[tuple[OpOverload, tuple[Any, ...]]] = []
    for dtype, param_dtype in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        x, weight, bias = rand(2, 4, 5, dtype=dtype), rand(5, dtype=param_dtype), rand(5, dtype=param_dtype)
        calls.append((aten.native_layer_norm.default, (x, [5], weight, bias, 1e-5)))
        calls.append((aten.layer_norm.default, (x, [5], weight)))
        weight, bias = rand(4, dtype=param_dtype), rand(4, dtype=param_dtype)
        calls.append((aten.native_group_norm.default, (x, weight, bias, 2, 4, 5, 2, 1e-5)))
    x, weight, bias, mean, var = rand(2, 4, 5), rand(4), rand(4), rand(4), rand(4)
    for given in ((weight, bias), (None, None)):
        for training in (True, False):
            calls.append(
                (aten._native_batch_norm_legit_functional.default, (x, *given, mean, var, training, 0.1, 1e-5))
            )
        calls.append((aten.batch_norm.default, (x, *given, None, None, True, 0.1, 1e-5, False)))
        calls.append((aten.batch_norm.default, (x, *given, mean, var, False, 0.1, 1e-5, False)))
    for train, mask in itertools.product((True, False), ([True, True, True], [True, False, False])):
        arguments = (rand(2, 4, 5), x, weight, mean, var, rand(4), rand(4), train, 1e-5, mask)
        calls.append((aten.native_batch_norm_backward.default, arguments))
    return calls


def losses() -> list[tuple[OpOverload, tuple[Any, ...]]]:
    calls: list[tuple[OpOverload, tuple[Any, ...]]] = []
    op = aten.cross_entropy_loss.default
    logits, indices, weight = rand(4, 3, 2), torch.randint(0, 3, (4, 2)), rand(3)
    indices[0, 0] = indices[2, 1] = 1
    for reduction, given, ignored in itertools.product((0, 1, 2), (None, weight), (-100, 1)):
        calls.append((op, (logits, indices, given, reduction, ignored, 0.2)))
        calls.append((op, (logits, rand(4, 3, 2), given, reduction)))
    calls.append((op, (rand(3), torch.tensor(2))))
    return calls


def recurrent_calls() -> list[tuple[OpOverload, tuple[Any, ...]]]:
    calls: list[tuple[OpOverload, tuple[Any, ...]]] = []
    for kind, gates in (("lstm", 4), ("gru", 3), ("rnn_tanh", 1), ("rnn_relu", 1)):
        packet = getattr(aten, kind)
        for bidirectional, biases, batch_first, projected in itertools.product((False, True), repeat=4):
            if projected and kind != "lstm":
                continue
            layers, directions, size = 2, 1 + bidirectional, 2 if projected else 4
            params = []
            for layer, _ in itertools.product(range(layers), range(directions)):
                params += [rand(gates * 4, size * directions if layer else 3), rand(gates * 4, size)]
                params += [rand(gates * 4), rand(gates * 4)] if biases else []
                params += [rand(2, 4)] if projected else []
            state: Any = rand(layers * directions, 2, size)
            if kind == "lstm":
                state = [state, rand(layers * directions, 2, 4)]
            options = (biases, layers, 0.0, False, bidirectional)
            x = rand(2, 5, 3) if batch_first else rand(5, 2, 3)
            calls.append((packet.input, (x, state, params, *options, batch_first)))
            if not projected and not batch_first:
                calls.append((packet.data, (rand(7, 3), torch.tensor([2, 2, 1, 1, 1]), state, params, *options)))
    sizes = torch.tensor([2, 2, 1])
    calls.append((aten._pack_padded_sequence.default, (rand(3, 2, 4), torch.tensor([3, 2]), False)))
    calls.append((aten._pack_padded_sequence_backward.default, (rand(5, 4), [3, 2, 4], sizes, False)))
    calls.append((aten._pad_packed_sequence.default, (rand(5, 4), sizes, True, 0.5, 4)))
    return calls


@cache
def by_hand() -> dict[OpOverload, list[Call]]:
    """Calls that the samples do not make."""
    torch.manual_seed(0)
    calls: dict[OpOverload, list[Call]] = {}
    for op, args in (
        *convolutions(), *resamplings(), *normalizations(), *losses(), *recurrent_calls()
    ):  # fmt: skip
        calls.setdefault(op, []).append((args, {}))
    query, key, value = rand(2, 4, 5, 8), rand(2, 4, 6, 8), rand(2, 4, 6, 8)
    attention = aten.scaled_dot_product_attention.default
    masks = (None, rand(5, 6), rand(4, 5, 6), rand(2, 1, 5, 6), rand(1, 4, 5, 6), rand(2, 4, 5, 6) > 0.3)
    for mask in masks:
        calls.setdefault(attention, []).append(((query, key, value, mask), {}))
    calls[attention].append(((query[0], key[0], value[0], rand(5, 6)), {"scale": 0.3}))
    calls[attention].append(((query, key[:, :1], value[:, :1], None, 0.0, True), {"enable_gqa": True}))
    flash = aten._scaled_dot_product_flash_attention_for_cpu
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    for mask, causal in ((None, False), (None, True), (rand(5, 6), False), (rand(2, 4, 5, 6), False)):
        options = {"attn_mask": mask, "scale": 0.4}
        output, logsumexp = flash.default(query, key, value, 0.0, causal, **options)
        calls.setdefault(flash.default, []).append(((query, key, value, 0.0, causal), options))
        arguments = (rand(*output.shape), query, key, value, output, logsumexp, 0.0, causal)
        calls.setdefault(backward.default, []).append((arguments, options))
    for op, dims in ((aten.max_pool1d.default, 1), (aten.max_pool2d.default, 2)):
        calls.setdefault(op, []).append(((rand(2, 3, *[7] * dims), [3] * dims, [2] * dims, [1] * dims), {}))
    return calls


@pytest.mark.parametrize("op", rules_of(*MODULES), ids=str)
def test_rule_against_the_loop(op: OpOverload) -> None:
    calls = from_samples()[op] + by_hand().get(op, [])
    compared = sum(
        check_rule(op, args, kwargs, batch_sizes=(3, 0) if k % 2 else (3, 1), seed=k)
        for k, (args, kwargs) in enumerate(calls)
    )
    assert compared > 0, f"nothing exercises the rule of {op}"


@pytest.mark.parametrize("op", rules_of(convolution, pooling, batch_norm), ids=str)
def test_wherever_the_batch_is(op: OpOverload) -> None:
    """Folding keeps the batch where the largest operand has it, so that every pair of places is a case of its own."""
    calls = by_hand().get(op, []) + from_samples()[op]
    chosen = calls[:3] if op not in (aten.convolution.default, aten.convolution_backward.default) else calls[:36]
    compared = sum(check_rule(op, *call, max_subsets=8, everywhere=True) for call in chosen)
    assert compared > len(chosen), f"nothing exercises the rule of {op}"


def copied_by_rules(f: Any, *args: Any) -> list[int]:
    """The numbers of elements of what ``f`` copies, other than in the kernels of convolutions."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        f(*args)
    found = []
    for event in profile.events():
        outer, within = event.cpu_parent, []
        while outer is not None:
            within.append(outer.name)
            outer = outer.cpu_parent
        if event.name == "aten::copy_" and not any("_convolution" in n or "convolution_backward" in n for n in within):
            found.append(math.prod(event.input_shapes[0]))
    return found


def test_an_ensemble_of_cnns_copies_no_activations() -> None:
    """Its convolutions have the batch among the channels, behind N, and what follows leaves it there.

    On the way back the cotangent comes from the linear layer with the batch in front, and is laid out anew once.
    """
    n, channels = 4, 3
    net = nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(), nn.BatchNorm2d(channels).eval(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(channels * 4, 5),
    ).double()  # fmt: skip
    images = rand(n, 1, 8, 8)
    params = {name: torch.randn(6, *p.shape, dtype=p.dtype) for name, p in net.named_parameters()}
    logits = lambda params: functional_call(net, params, (images,))

    forward = copied_by_rules(functrans.vmap(logits), params)
    both = copied_by_rules(functrans.vmap(functrans.grad(lambda params: logits(params).square().sum())), params)
    activations = 6 * n * channels * 2 * 2  # the smallest of them
    assert [size for size in forward if size >= activations] == []
    assert [size for size in both if size >= activations] == [activations]


@pytest.mark.parametrize("in_dims", [(0, 0), (1, 1), (-1, -1), (0, 1), (1, 0), (0, None), (1, None), (None, 1)])
def test_second_derivatives_of_a_convolution_and_a_pooling(in_dims: tuple[int | None, int | None]) -> None:
    """Against autograd of autograd, example by example, for weights and images batched anywhere."""
    weights, images = rand(3, 4, 2, 3, 3), rand(3, 2, 2, 6, 6)

    def loss(weight: Tensor, image: Tensor) -> Tensor:
        hidden = F.avg_pool2d(F.conv2d(image, weight, padding=1).tanh(), 2)
        return F.conv2d(hidden, weight.transpose(0, 1), padding=1).sin().sum()

    def curvature(weight: Tensor, image: Tensor) -> Tensor:
        of_weight, of_image = functrans.grad(loss, argnums=(0, 1))(weight, image)
        return of_weight.square().sum() + of_image.pow(3).sum()

    placed = [a[0] if d is None else a.movedim(0, d) for a, d in zip((weights, images), in_dims)]
    got = functrans.vmap(functrans.grad(curvature, argnums=(0, 1)), in_dims)(*placed)
    for i in range(3):
        leaves = [a[0 if d is None else i].clone().requires_grad_() for a, d in zip((weights, images), in_dims)]
        of_weight, of_image = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
        expected = torch.autograd.grad(of_weight.square().sum() + of_image.pow(3).sum(), leaves)
        torch.testing.assert_close([g[i] for g in got], list(expected))


def test_every_module_has_rules() -> None:
    assert all(map(rules_of, MODULES))


def test_shared_indices_of_adaptive_max_pool3d() -> None:
    """The kernel ignores the strides of its indices: an expanded view of them crashed it."""
    x = rand(2, 5, 5, 5)
    output, indices = aten.adaptive_max_pool3d.default(x, [2, 2, 2])
    grads = torch.randn(3, *output.shape, dtype=torch.float64)
    got = functrans.vmap(lambda g: aten.adaptive_max_pool3d_backward.default(g, x, indices))(grads)
    expected = torch.stack([aten.adaptive_max_pool3d_backward.default(g, x, indices) for g in grads])
    torch.testing.assert_close(got, expected)


def test_batch_norm_that_would_write_is_declined() -> None:
    x, mean, var = rand(3, 2, 4), rand(4), rand(4)
    for op in (aten.batch_norm.default, aten.native_batch_norm.default):
        rule = BATCHING_RULES.get(op)
        assert rule is not None
        with pytest.raises(RuleDeclined):
            rule(BatchInfo(3, "error"), (0, *[None] * 8), x, None, None, mean, var, True, 0.1, 1e-5, False)


def test_batch_norm_of_nothing() -> None:
    """An example without channels."""
    x, mean, var = rand(3, 0), rand(0), rand(0)
    assert functrans.vmap(lambda x: F.batch_norm(x, mean, var))(x).shape == (3, 0)


@pytest.mark.parametrize("op", STEPS, ids=str)
def test_recurrent_decompositions(op: OpOverload) -> None:
    for args, _ in by_hand()[op]:
        torch.testing.assert_close(DECOMPOSITIONS.get(op)(*args), op(*args))


def test_dropout_between_recurrent_layers() -> None:
    """It follows the vmap's randomness, although it is inside of the operator."""
    layer = nn.LSTM(3, 400, num_layers=2, dropout=0.5, dtype=torch.float64)
    x = rand(5, 1, 3).expand(2, 5, 1, 3)
    same = functrans.vmap(lambda x: layer(x)[0], randomness="same")(x)
    different = functrans.vmap(lambda x: layer(x)[0], randomness="different")(x)
    torch.testing.assert_close(same[0], same[1])
    assert not torch.allclose(different[0], different[1])
    assert not torch.allclose(same[0], layer.eval()(x[0])[0])
    layer.train()
    with pytest.raises(RandomnessError):
        functrans.vmap(layer)(x)


# ---------------------------------------------------------------------------------------------------------------
# Whole modules


def cnn() -> nn.Module:
    features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.MaxPool2d(2))
    head = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4), nn.GELU(), nn.AdaptiveAvgPool2d(2))
    return nn.Sequential(features, head, nn.Flatten(), nn.Linear(16, 5), nn.LayerNorm(5)).double().eval()


def transformer() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()


CASES = {
    "cnn": (cnn, (2, 3, 8, 8)),
    "transformer": (transformer, (2, 5, 8)),
    "lstm": (lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True).double(), (5, 2, 3)),
    "gru": (lambda: nn.GRU(3, 4).double(), (5, 2, 3)),
    "rnn": (lambda: nn.RNN(3, 4).double(), (5, 2, 3)),
    "lstm_cell": (lambda: nn.LSTMCell(3, 4).double(), (2, 3)),
    "gru_cell": (lambda: nn.GRUCell(3, 4).double(), (2, 3)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("x_dim", (0, None))
def test_ensembles(case: str, x_dim: int | None) -> None:
    torch.manual_seed(0)
    make, shape = CASES[case]
    models = [make() for _ in range(3)]
    params, buffers = stack_module_state(models)
    x = rand(3, *shape) if x_dim == 0 else rand(*shape)

    def run(params: Any, buffers: Any, x: torch.Tensor) -> Any:
        return functional_call(models[0], (params, buffers), (x,))

    got = functrans.vmap(run, in_dims=(0, 0, x_dim))(params, buffers, x)
    rows = [model(x[i] if x_dim == 0 else x) for i, model in enumerate(models)]
    torch.testing.assert_close(got, tree_map(lambda *parts: torch.stack(parts), *rows))


@pytest.mark.parametrize("case", CASES)
def test_per_example_gradients(case: str) -> None:
    torch.manual_seed(0)
    make, shape = CASES[case]
    model, x = make(), rand(3, *shape)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: Any, x: torch.Tensor) -> torch.Tensor:
        output = functional_call(model, params, (x,))
        output = output if isinstance(output, torch.Tensor) else output[0]
        return F.mse_loss(output.sin(), torch.ones_like(output))

    got = functrans.vmap(functrans.grad(loss), in_dims=(None, 0))(params, x)
    for i in range(3):
        leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
        grads = torch.autograd.grad(loss(leaves, x[i]), list(leaves.values()))
        torch.testing.assert_close([got[name][i] for name in params], list(grads))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_complex_convolutions(dims: int, transposed: bool) -> None:
    """Against four real ones for each example, and the derivatives of these by plain autograd."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(shape, dtype=torch.complex128, generator=generator)
    convolve = getattr(F, f"conv{'_transpose' * transposed}{dims}d")
    x, weight, bias = randn(3, 2, 4, *[4] * dims), randn(3, 4, 2, *[2] * dims), randn(3, 4)

    def by_real_ones(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        f = lambda x, w: convolve(x, w, stride=2, groups=2)
        real = f(x.real, weight.real) - f(x.imag, weight.imag)
        imag = f(x.real, weight.imag) + f(x.imag, weight.real)
        return torch.complex(real, imag) + bias.reshape(-1, *[1] * dims)

    total = lambda f: lambda *args: torch.view_as_real(f(*args)).sin().sum()
    direct = lambda x, weight, bias: convolve(x, weight, bias, stride=2, groups=2)
    for in_dims in ((0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0), (0, None, 0)):
        args = [a if d == 0 else a[0] for a, d in zip((x, weight, bias), in_dims, strict=True)]
        rows = [[a[i] if d == 0 else a for a, d in zip(args, in_dims, strict=True)] for i in range(3)]
        torch.testing.assert_close(
            functrans.vmap(direct, in_dims)(*args), torch.stack([by_real_ones(*row) for row in rows])
        )
        _, tangents = functrans.jvp(functrans.vmap(direct, in_dims), tuple(args), tuple(a.conj() for a in args))
        expected = []
        for i, row in enumerate(rows):
            moved = [a.conj() for a in row]
            step = [[a + e * t for a, t in zip(row, moved, strict=True)] for e in (1e-6, -1e-6)]
            torch.testing.assert_close(
                tangents[i], (by_real_ones(*step[0]) - by_real_ones(*step[1])) / 2e-6, rtol=1e-7, atol=1e-7
            )
            leaves = [a.clone().requires_grad_() for a in row]
            expected.append(torch.autograd.grad(total(by_real_ones)(*leaves), leaves))
        slopes = functrans.vmap(functrans.grad(total(direct), argnums=(0, 1, 2)), in_dims)(*args)
        torch.testing.assert_close(slopes, tuple(map(torch.stack, zip(*expected, strict=True))))


NO_CHANNELS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "adaptive_max_pool1d": (lambda x: F.adaptive_max_pool1d(x, 2), (torch.zeros(3, 0, 4),)),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, 2), (torch.zeros(3, 0, 4, 4),)),
    "adaptive_avg_pool3d": (lambda x: F.adaptive_avg_pool3d(x, 2), (torch.zeros(3, 0, 4, 4, 4),)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), (torch.zeros(3, 0, 2, 4, 4),)),
    "conv2d, weights": (lambda w: F.conv2d(torch.ones(1, 0, 5, 5), w), (torch.zeros(3, 2, 0, 3, 3),)),
    "conv2d, both": (F.conv2d, (torch.zeros(3, 1, 0, 5, 5), torch.zeros(3, 2, 0, 3, 3))),
    "conv2d, no images": (F.conv2d, (torch.zeros(3, 0, 2, 5, 5), torch.zeros(3, 2, 2, 3, 3))),
}


@pytest.mark.filterwarnings("ignore:vmap has no batching rule")
@pytest.mark.parametrize("name", NO_CHANNELS)
def test_examples_without_channels(name: str) -> None:
    """PyTorch takes some images without channels alone, and not in a batch."""
    f, batch = NO_CHANNELS[name]
    places = tuple(range(len(batch)))
    slopes = functrans.grad(lambda *args: f(*args).square().sum(), argnums=places)
    examples = [tuple(x[i] for x in batch) for i in range(3)]
    for g in (lambda *args: (f(*args),), slopes, lambda *args: functrans.jvp(f, args, args)):
        wanted = [torch.stack(column) for column in zip(*(g(*example) for example in examples), strict=True)]
        found = functrans.vmap(g)(*batch)
        assert [x.shape for x in found] == [x.shape for x in wanted]
        torch.testing.assert_close(list(found), wanted)
