"""Programs of users: per-example gradients, ensembles, and meta-learning over whole models."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from loop import for_each
from slow_ways import agree, gradient, no_history
from torch import Tensor, nn

import functrans as ft
from functrans import functional_call, grad, grad_and_value, jvp, stack_module_state, vjp, vmap

BATCH = 4


class Tokens(nn.Module):
    """Embedding, a body of sequence layers, mean over time, and a head."""

    def __init__(self, body: nn.Module, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8, padding_idx=0)
        self.body = body
        self.head = nn.Linear(width, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.body(self.embedding(tokens))
        return self.head((hidden[0] if isinstance(hidden, tuple) else hidden).mean(-2))


class SelfAttention(nn.Module):
    """nn.MultiheadAttention of a sequence with itself, with options of its call."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, **self.options)[0]


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.MaxPool2d(2),
        nn.Conv2d(4, 4, 3, stride=2, groups=2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 3),
    )  # fmt: skip


def residual() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Mish(), nn.AvgPool2d(2), nn.ConvTranspose2d(4, 2, 2),
        nn.InstanceNorm2d(2, affine=True),
        nn.Upsample(scale_factor=2), nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip


def encoder_layer(norm_first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)


IMAGES = (lambda: torch.randn(BATCH, 2, 8, 8))
TOKENS = (lambda: torch.randint(0, 11, (BATCH, 5)))
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5).isinf()
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Dropout(0.0), nn.Linear(7, 3)),
        lambda: torch.randn(BATCH, 5),
    ),
    "convolutional": (convolutional, IMAGES),
    "residual eval": (lambda: residual().eval(), IMAGES),
    "embedding bag": (lambda: nn.Sequential(nn.EmbeddingBag(11, 6), nn.Linear(6, 3)), TOKENS),
    "lstm": (lambda: Tokens(nn.LSTM(8, 6, num_layers=2, batch_first=True), 6), TOKENS),
    "bidirectional gru": (lambda: Tokens(nn.GRU(8, 3, bidirectional=True, batch_first=True), 6), TOKENS),
    "rnn": (lambda: Tokens(nn.RNN(8, 6, nonlinearity="relu", batch_first=True), 6), TOKENS),
    "transformer layer train": (lambda: Tokens(encoder_layer(False), 8), TOKENS),
    "transformer layer norm first": (lambda: Tokens(encoder_layer(True), 8), TOKENS),
    "transformer layer eval": (lambda: Tokens(encoder_layer(False), 8).eval(), TOKENS),
    "transformer eval": (lambda: Tokens(nn.TransformerEncoder(encoder_layer(False), 2), 8).eval(), TOKENS),
    "attention train": (lambda: Tokens(SelfAttention(), 8), TOKENS),
    "attention eval": (lambda: Tokens(SelfAttention(), 8).eval(), TOKENS),
    "attention without weights": (lambda: Tokens(SelfAttention(need_weights=False), 8).eval(), TOKENS),
    "attention all weights": (
        lambda: Tokens(SelfAttention(average_attn_weights=False, attn_mask=CAUSAL), 8).eval(),
        TOKENS,
    ),
    "attention causal": (
        lambda: Tokens(SelfAttention(need_weights=False, attn_mask=CAUSAL, is_causal=True), 8),
        TOKENS,
    ),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def build(name: str) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    make, data = MODELS[name]
    x = data()
    model = make()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(x)  # lazy layers get their shape
    model = model.double()
    params = {n: p.detach() for n, p in model.named_parameters()}
    return (
        model,
        params,
        dict(model.named_buffers()),
        x.double() if x.is_floating_point() else x,
        torch.randint(0, 3, (BATCH,)),
    )


def loss_of(model: nn.Module) -> Callable[..., Tensor]:
    def loss(params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, (params, buffers), (x.unsqueeze(0),)), y.unsqueeze(0))

    return loss


@pytest.mark.filterwarnings("ignore:.*nested tensor.*")
@pytest.mark.parametrize("name", MODELS)
def test_per_example_gradients(name: str) -> None:
    model, params, buffers, x, y = build(name)
    loss = loss_of(model)
    got = vmap(grad(loss), in_dims=(None, None, 0, 0))(params, buffers, x, y)
    agree(got, no_history(for_each(gradient(loss), (None, None, 0, 0))(params, buffers, x, y)))


@pytest.mark.filterwarnings("ignore:.*nested tensor.*")
@pytest.mark.parametrize("name", MODELS)
def test_forward_mode_and_hessian_vector_products(name: str) -> None:
    model, params, buffers, x, y = build(name)
    loss = loss_of(model)
    tangents = {n: torch.randn_like(p) for n, p in params.items()}
    if "embedding.weight" in tangents:
        tangents["embedding.weight"][0] = 0.0  # the padding, which reverse mode leaves out by definition

    def value(p: dict[str, Tensor]) -> Tensor:
        return loss(p, buffers, x[1], y[1])

    def moved(step: float) -> dict[str, Tensor]:
        return no_history(gradient(value)({n: p + step * tangents[n] for n, p in params.items()}))

    slope = sum((g * tangents[n]).sum() for n, g in moved(0.0).items())
    agree(jvp(value, (params,), (tangents,))[1], slope)
    # by differences, because autograd has no second derivative of some of the kernels
    h = 3e-5
    near, far = ({n: a - b[n] for n, a in moved(k * h).items()} for k in (1, 2) for b in [moved(-k * h)])
    product = {n: (8 * near[n] - far[n]) / (12 * h) for n in params}
    agree(jvp(grad(value), (params,), (tangents,))[1], product, rtol=1e-6, atol=1e-8)
    agree(vjp(grad(value), params)[1](tangents)[0], product, rtol=1e-6, atol=1e-8)
    agree(grad(lambda p: jvp(value, (p,), (tangents,))[1])(params), product, rtol=1e-6, atol=1e-8)


def test_gradient_norms_clipping_and_a_private_step() -> None:
    model, params, buffers, x, y = build("convolutional")
    loss = loss_of(model)

    def clipped(params: Any, x: Tensor, y: Tensor) -> tuple[Any, Tensor]:
        grads, value = grad_and_value(loss)(params, buffers, x, y)
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        return {n: g * torch.clamp(0.3 / (norm + 1e-6), max=1.0) for n, g in grads.items()}, value

    grads, values = vmap(clipped, in_dims=(None, 0, 0), chunk_size=3)(params, x, y)
    for i in range(BATCH):
        one = no_history(gradient(loss)(params, buffers, x[i], y[i]))
        norm = torch.cat([g.flatten() for g in one.values()]).norm()
        agree({n: g[i] for n, g in grads.items()}, {n: g * min(1.0, 0.3 / (norm + 1e-6)) for n, g in one.items()})
        agree(values[i], loss(params, buffers, x[i], y[i]))


@pytest.mark.parametrize("steps", [1, 3])
def test_maml_on_sines(steps: int) -> None:
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    params = {n: p.detach() for n, p in net.named_parameters()}
    amplitude, phase = torch.rand(BATCH, 1, 1, dtype=torch.float64) + 0.5, torch.rand(BATCH, 1, 1, dtype=torch.float64)
    x = torch.randn(BATCH, 6, 1, dtype=torch.float64)
    y = amplitude * torch.sin(x + phase)

    def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(functional_call(net, params, (x,)), y)

    def adapted(differentiate: Callable[..., Any]) -> Callable[..., Tensor]:
        def run(params: Any, x: Tensor, y: Tensor) -> Tensor:
            new = params
            for _ in range(steps):
                grads = differentiate(loss)(new, x[:3], y[:3])
                new = {n: new[n] - 0.1 * grads[n] for n in new}
            return loss(new, x[3:], y[3:])

        return run

    got = grad(lambda p: vmap(adapted(grad), in_dims=(None, 0, 0))(p, x, y).mean())(params)
    expected = gradient(lambda p: for_each(adapted(gradient), (None, 0, 0))(p, x, y).mean())(params)
    agree(got, no_history(expected))
    # the same through autograd at the base, as a training step would have it
    leaves = {n: p.clone().requires_grad_() for n, p in params.items()}
    vmap(adapted(grad), in_dims=(None, 0, 0))(leaves, x, y).mean().backward()
    agree({n: p.grad for n, p in leaves.items()}, no_history(expected))


def test_maml_of_a_convolutional_net_with_batch_statistics() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3, affine=True, track_running_stats=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 2),
    ).double()
    params = {n: p.detach() for n, p in net.named_parameters()}
    x, y = torch.randn(3, 6, 1, 6, 6, dtype=torch.float64), torch.randint(0, 2, (3, 6))

    def loss(params: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(net, params, (x,)), y)

    def task(differentiate: Callable[..., Any]) -> Callable[..., Tensor]:
        def run(params: Any, x: Tensor, y: Tensor) -> Tensor:
            grads = differentiate(loss)(params, x[:4], y[:4])
            return loss({n: p - 0.5 * grads[n] for n, p in params.items()}, x[4:], y[4:])

        return run

    got = vmap(grad(task(grad)), in_dims=(None, 0, 0))(params, x, y)
    agree(got, no_history(for_each(gradient(task(gradient)), (None, 0, 0))(params, x, y)))


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_an_ensemble_trains_as_its_models_would(chunk_size: int | None) -> None:
    models = [nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double() for _ in range(3)]
    params, buffers = stack_module_state(models)
    x, y = torch.randn(3, 10, 4, dtype=torch.float64), torch.randint(0, 2, (3, 10))

    def loss(params: Any, buffers: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(models[0], (params, buffers), (x,)), y)

    optimizer = torch.optim.Adam(params.values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        vmap(loss, chunk_size=chunk_size)(params, buffers, x, y).sum().backward()
        optimizer.step()
    for i, model in enumerate(models):
        single = torch.optim.Adam(model.parameters(), lr=0.1)
        for _ in range(3):
            single.zero_grad()
            F.cross_entropy(model(x[i]), y[i]).backward()
            single.step()
        agree({n: p.detach()[i] for n, p in params.items()}, {n: p.detach() for n, p in model.named_parameters()})


def test_an_ensemble_trained_inside_vmap_by_its_own_loop() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.randn(12, 1, dtype=torch.float64)
    start = {n: torch.randn(5, *p.shape, dtype=torch.float64) for n, p in net.named_parameters()}

    def train(differentiate: Callable[..., Any]) -> Callable[..., Any]:
        def run(params: Any) -> tuple[Any, Tensor]:
            momentum = {n: torch.zeros_like(p) for n, p in params.items()}
            losses = torch.zeros(4, dtype=torch.float64)
            for step in range(4):
                grads = differentiate(lambda p: F.mse_loss(functional_call(net, p, (x,)), y))(params)
                losses[step] = torch.stack([g.norm() for g in grads.values()]).sum().detach()
                momentum = {n: 0.9 * m + grads[n] for n, m in momentum.items()}
                params = {n: p - 0.05 * momentum[n] for n, p in params.items()}
            return params, losses

        return run

    agree(vmap(train(grad))(start), no_history(for_each(train(gradient))(start)))


def test_batch_norm_in_training_mode_inside_grad_updates_its_statistics() -> None:
    net, twin = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).double() for _ in range(2))
    twin.load_state_dict(net.state_dict())
    x = torch.randn(6, 3, dtype=torch.float64)
    params = {n: p.detach() for n, p in net.named_parameters()}
    for _ in range(2):
        got = grad(lambda p: functional_call(net, p, (x,)).pow(2).sum())(params)
    for _ in range(2):
        expected = gradient(lambda p: functional_call(twin, p, (x,)).pow(2).sum())(params)
    agree(got, no_history(expected))
    agree(dict(net.named_buffers()), dict(twin.named_buffers()))


def test_dropout_and_a_vae_draw_as_asked() -> None:
    weight = torch.randn(4, 3, dtype=torch.float64)
    x = torch.randn(5, 3, dtype=torch.float64)

    def vae(w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_var = (F.dropout(w, 0.5) @ x).chunk(2)
        noise = torch.randn_like(mean)
        z = mean + noise * (0.5 * log_var).exp()
        kl = -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum()
        return ((z.sum() - x) ** 2).sum() + kl, noise

    grads, noise = vmap(grad(vae, has_aux=True), in_dims=(None, 0), randomness="different")(weight, x)
    assert len(noise.unique()) == noise.numel() and len((grads == 0).double().flatten(1).unique(dim=0)) > 1
    grads, noise = vmap(grad(vae, has_aux=True), in_dims=(None, 0), randomness="same")(weight, x)
    assert (noise == noise[0]).all()
    torch.manual_seed(3)
    grads = vmap(grad(vae, has_aux=True), in_dims=(None, 0), randomness="same")(weight, x)[0]

    def seeded_vae(w: Tensor, x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return vae(w, x)[0]

    agree(grads, no_history(for_each(gradient(seeded_vae), (None, 0))(weight, x)))
    with pytest.raises(ft.FunctransError, match="randomness"):
        vmap(vae, in_dims=(None, 0))(weight, x)


@pytest.mark.filterwarnings("ignore:.*nested tensor.*")
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masked", ["no mask", "causal", "padding", "both"])
def test_a_transformer_in_inference(masked: str, norm_first: bool) -> None:
    encoder = nn.TransformerEncoder(encoder_layer(norm_first), 2).double().eval()
    x = torch.randn(3, 2, 5, 8, dtype=torch.float64)
    padding = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]], dtype=torch.bool)
    mask, padding = (
        CAUSAL if masked in ("causal", "both") else None,
        padding if masked in ("padding", "both") else None,
    )
    with torch.no_grad():  # takes the fused kernels
        def model(x: Tensor) -> Tensor:
            return encoder(x, mask=mask, src_key_padding_mask=padding)[:, :3]

        agree(vmap(model)(x), for_each(model)(x), rtol=1e-9, atol=1e-12)
        direction = torch.randn_like(x[0])
        got = jvp(model, (x[0],), (direction,))[1]
        agree(got, (model(x[0] + 1e-6 * direction) - model(x[0] - 1e-6 * direction)) / 2e-6, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("form", ["plain", "causal", "float mask", "boolean mask", "grouped"])
def test_attention_in_every_derivative(form: str) -> None:
    q, k, v = (torch.randn(3, 2, 4, 5, dtype=torch.float64) for _ in range(3))
    options: dict[str, Any] = {
        "plain": {}, "causal": {"is_causal": True}, "float mask": {"attn_mask": torch.randn(4, 4, dtype=torch.float64)},
        "boolean mask": {"attn_mask": torch.rand(4, 4).tril() + torch.eye(4) > 0.3}, "grouped": {"enable_gqa": True},
    }[form]  # fmt: skip
    if form == "grouped":
        k, v = k[:, :1], v[:, :1]

    def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        mask = torch.ones(4, 4, dtype=torch.bool).tril() if form == "causal" else options.get("attn_mask")
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return torch.softmax(scores, -1) @ v

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, **options)

    directions = tuple(torch.randn_like(t) for t in (q, k, v))
    for primal in (attend(q, k, v), vmap(attend)(q, k, v)):
        agree(primal, by_hand(q, k, v), rtol=1e-8, atol=1e-10)
    expected = torch.func.jvp(by_hand, (q, k, v), directions)
    agree(jvp(attend, (q, k, v), directions), expected, rtol=1e-8, atol=1e-10)

    def slope(f: Callable[..., Tensor], take: Any) -> Callable[..., Tensor]:
        return lambda q, k, v: take(lambda q: (f(q, k, v) ** 2).sum())(q).pow(2).sum()

    got = vmap(grad(slope(attend, grad), argnums=(0, 1, 2)))(q, k, v)
    agree(
        got,
        torch.func.vmap(torch.func.grad(slope(by_hand, torch.func.grad), argnums=(0, 1, 2)))(q, k, v),
        rtol=1e-8,
        atol=1e-10,
    )


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_packed_sequences(kind: type[nn.Module], enforce_sorted: bool) -> None:
    net = kind(3, 4, bidirectional=True, batch_first=True).double()
    params = {n: p.detach() for n, p in net.named_parameters()}
    lengths = [5, 3, 2] if enforce_sorted else [2, 5, 3]

    def loss(p: Any, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(
            x, torch.tensor(lengths), batch_first=True, enforce_sorted=enforce_sorted
        )
        out, found = nn.utils.rnn.pad_packed_sequence(
            functional_call(net, p, (packed,))[0], True, padding_value=-1.5, total_length=6
        )
        assert found.tolist() == lengths and out.shape == (3, 6, 8)
        return out.pow(3).sum()

    x = torch.randn(2, 3, 5, 3, dtype=torch.float64)
    agree(vmap(grad(loss), (None, 0))(params, x), no_history(for_each(gradient(loss), (None, 0))(params, x)))
    slope = (gradient(lambda x: loss(params, x))(x[0]) * x[1]).sum()
    agree(jvp(lambda x: loss(params, x), (x[0],), (x[1],))[1], slope.detach())


@pytest.mark.parametrize("parametrize", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrized_weights(parametrize: str) -> None:
    net = getattr(nn.utils.parametrizations, parametrize)(nn.Linear(3, 3)).double().eval()
    params, x = {n: p.detach() for n, p in net.named_parameters()}, torch.randn(4, 3, dtype=torch.float64)

    def loss(p: Any, x: Tensor) -> Tensor:
        return functional_call(net, p, (x,)).pow(3).sum()

    agree(vmap(grad(loss), (None, 0))(params, x), no_history(for_each(gradient(loss), (None, 0))(params, x)))
