"""Libraries that are written for torch.func run on functrans, by ``compat.install()``: programs of theirs, unchanged.

Their results are held against loops, dense matrices by plain autograd, and closed forms. ``pip install ".[clients]"``
has the libraries; what is not installed is skipped.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from functrans import compat
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.interpreters.jvp.interpreter import JvpInterpreter
from functrans.interpreters.vmap.interpreter import VmapInterpreter

close = torch.testing.assert_close


def needs(client: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(client) is None
    return pytest.mark.skipif(missing, reason=f"{client} is not installed: pip install '.[clients]'")


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """functrans is in place, and at the end a transform of it has run."""
    torch.manual_seed(0)
    ran: set[str] = set()
    for cls in (GradInterpreter, JvpInterpreter, VmapInterpreter):

        def init(self, *args, original=cls.__init__, **kwargs):
            ran.add(self.kind)
            original(self, *args, **kwargs)

        monkeypatch.setattr(cls, "__init__", init)
    with compat.install():
        yield ran
    assert ran, "the library did not come to functrans"


def network(*sizes: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).to(dtype)


def flat(tensors) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def gradient(loss: Tensor, parameters) -> Tensor:
    """By plain autograd, as one vector."""
    return flat(torch.autograd.grad(loss, parameters, create_graph=True))


def hessian_matrix(loss: Tensor, parameters) -> Tensor:
    return jacobian_matrix(gradient(loss, parameters), parameters)


def jacobian_matrix(outputs: Tensor, parameters) -> Tensor:
    return torch.stack([flat(torch.autograd.grad(o, parameters, retain_graph=True)) for o in outputs.reshape(-1)])


# opacus


def models_for_opacus():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))
            self.head = nn.Linear(4, 2)

        def forward(self, x):
            weights = torch.softmax(self.query(x) @ self.key(x).transpose(-1, -2), -1)
            return self.head((weights @ self.value(x)).mean(1))

    convolutional = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.GroupNorm(1, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 2)
    )
    embedding = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Flatten(), nn.Linear(12, 2))
    return {
        "linear": (network(5, 4, 2, dtype=torch.float32), torch.randn(6, 5)),
        "convolution": (convolutional, torch.randn(6, 1, 6, 6)),
        "embedding": (embedding, torch.randint(7, (6, 3))),
        "attention": (Attention(), torch.randn(6, 3, 4)),
    }


@needs("opacus")
@pytest.mark.parametrize("kind", ["linear", "convolution", "embedding", "attention"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_opacus_per_sample_gradients(kind, reduction):
    import opacus

    model, inputs = models_for_opacus()[kind]
    targets = torch.arange(6) % 2
    expected = []
    for x, t in zip(inputs, targets, strict=True):
        loss = nn.functional.cross_entropy(model(x[None]), t[None])
        expected.append(torch.autograd.grad(loss, list(model.parameters())))
    sampling = opacus.GradSampleModule(model, loss_reduction=reduction, force_functorch=True)
    nn.functional.cross_entropy(sampling(inputs), targets, reduction=reduction).backward()
    for parameter, *own in zip(model.parameters(), *expected, strict=True):
        close(parameter.grad_sample, torch.stack(own), rtol=1e-4, atol=1e-5)


@needs("opacus")
def test_opacus_trains_with_clipped_gradients():
    import opacus

    model, inputs, targets = network(5, 4, 2, dtype=torch.float32), torch.randn(8, 5), torch.arange(8) % 2
    start = [p.detach().clone() for p in model.parameters()]
    per_sample = torch.stack(
        [
            gradient(nn.functional.cross_entropy(model(x[None]), t[None]), list(model.parameters())).detach()
            for x, t in zip(inputs, targets, strict=True)
        ]
    )
    clipped = per_sample * (0.1 / (per_sample.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=8)
    private, optimizer, loader = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.5),
        data_loader=loader,
        noise_multiplier=0.0,
        max_grad_norm=0.1,
        poisson_sampling=False,
        grad_sample_mode="functorch",
    )
    for x, t in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(private(x), t).backward()
        optimizer.step()
    close(flat(model.parameters()), flat(start) - 0.5 * clipped.mean(0), rtol=1e-4, atol=1e-6)


# curvlinops


def curvature_problem(loss):
    model = network(4, 3, 2)
    inputs = torch.randn(6, 4, dtype=torch.float64)
    targets = torch.arange(6) % 2 if isinstance(loss, nn.CrossEntropyLoss) else torch.randn(6, 2, dtype=torch.float64)
    return model, inputs, targets, [p for p in model.parameters() if p.requires_grad]


LOSSES = [nn.MSELoss(), nn.CrossEntropyLoss(), nn.MSELoss(reduction="sum")]


@needs("curvlinops")
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_curvlinops_hessian(loss):
    import curvlinops

    model, inputs, targets, parameters = curvature_problem(loss)
    dense = hessian_matrix(loss(model(inputs), targets), parameters)
    operator = curvlinops.HessianLinearOperator(model, loss, parameters, [(inputs, targets)])
    close(operator @ torch.eye(len(dense), dtype=torch.float64), dense)
    vector = torch.randn(len(dense), dtype=torch.float64)
    close(operator @ vector, dense @ vector)


@needs("curvlinops")
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_curvlinops_gauss_newton(loss):
    import curvlinops

    model, inputs, targets, parameters = curvature_problem(loss)
    outputs = model(inputs)
    jacobian = jacobian_matrix(outputs, parameters)
    at = outputs.detach().requires_grad_()
    dense = jacobian.T @ hessian_matrix(loss(at, targets), [at]) @ jacobian
    batches = [(inputs[:2], targets[:2]), (inputs[2:], targets[2:])]
    operator = curvlinops.GGNLinearOperator(model, loss, parameters, batches)
    close(operator @ torch.eye(len(dense), dtype=torch.float64), dense)


@needs("curvlinops")
@pytest.mark.parametrize("loss", LOSSES[:2], ids=str)
def test_curvlinops_fisher_and_jacobian(loss):
    import curvlinops

    model, inputs, targets, parameters = curvature_problem(loss)
    rows = torch.stack(
        [gradient(loss(model(x[None]), t[None]), parameters) for x, t in zip(inputs, targets, strict=True)]
    ).detach()
    # of the mean over n examples (and, of squares, c outputs): (1 / n) Σ g gᵀ of each example's own gradient, times c
    scale = (1 if isinstance(loss, nn.CrossEntropyLoss) else 2) / len(inputs)
    identity = torch.eye(rows.shape[1], dtype=torch.float64)
    empirical = curvlinops.EFLinearOperator(model, loss, parameters, [(inputs, targets)])
    close(empirical @ identity, scale * rows.T @ rows)
    jacobian = jacobian_matrix(model(inputs), parameters)
    close(curvlinops.JacobianLinearOperator(model, parameters, [(inputs, targets)]) @ identity, jacobian)
    transposed = curvlinops.TransposedJacobianLinearOperator(model, parameters, [(inputs, targets)])
    close(transposed @ torch.eye(12, dtype=torch.float64), jacobian.T)


@needs("curvlinops")
def test_curvlinops_monte_carlo_fisher_comes_to_the_gauss_newton():
    """Of a softmax they are the same matrix; 5,000 draws are within 5 % of it."""
    import curvlinops

    loss = nn.CrossEntropyLoss()
    model, inputs, targets, parameters = curvature_problem(loss)
    outputs = model(inputs)
    jacobian = jacobian_matrix(outputs, parameters)
    at = outputs.detach().requires_grad_()
    dense = jacobian.T @ hessian_matrix(loss(at, targets), [at]) @ jacobian
    operator = curvlinops.FisherMCLinearOperator(model, loss, parameters, [(inputs, targets)], mc_samples=5000)
    drawn = operator @ torch.eye(len(dense), dtype=torch.float64)
    assert (drawn - dense).norm() < 0.05 * dense.norm()


# tensordict


@needs("tensordict")
@pytest.mark.parametrize("how", ["module", "plain", "lazy"])
def test_tensordict_ensemble_from_modules(how):
    import tensordict

    models = [network(3, 4, 2) for _ in range(5)]
    inputs = torch.randn(7, 3, dtype=torch.float64)
    expected = torch.stack([model(inputs) for model in models])
    grads = [torch.autograd.grad(model(inputs).square().sum(), list(model.parameters())) for model in models]
    options = {"module": {"as_module": True}, "plain": {"as_module": False}, "lazy": {"lazy_stack": True}}[how]
    parameters = tensordict.TensorDict.from_modules(*models, **options)

    def call(parameters, x):
        with parameters.to_module(models[0]):
            return models[0](x)

    outputs = torch.vmap(call, (0, None))(parameters, inputs)
    close(outputs, expected)
    outputs.square().sum().backward()
    if how != "lazy":
        by_name = {name: torch.stack(own) for (name, _), *own in zip(models[0].named_parameters(), *grads, strict=True)}
        assert {k: v.shape for k, v in parameters.flatten_keys(".").items()} == {k: v.shape for k, v in by_name.items()}
        for name, own in by_name.items():
            close(parameters[tuple(name.split("."))].grad, own)


@needs("tensordict")
def test_tensordict_module_over_a_batch_and_over_parameters():
    import tensordict
    from tensordict.nn import TensorDictModule, TensorDictSequential

    first = TensorDictModule(network(3, 4), in_keys=["x"], out_keys=["hidden"])
    second = TensorDictModule(network(4, 2), in_keys=["hidden"], out_keys=["y"])
    sequence = TensorDictSequential(first, second)
    inputs = torch.randn(5, 3, dtype=torch.float64)
    data = tensordict.TensorDict({"x": inputs}, [5])
    expected = second.module(first.module(inputs))

    out = torch.vmap(sequence)(data)
    assert out.batch_size == (5,) and set(out.keys()) == {"x", "hidden", "y"}
    close(out["y"], expected)
    assert set(data.keys()) == {"x"}, "the function wrote to a tensordict of its own"

    parameters = tensordict.TensorDict.from_module(sequence).data
    several = torch.stack([parameters, 2 * parameters])

    def call(parameters, data):
        with parameters.to_module(sequence):
            return sequence(data)

    out = torch.vmap(call, (0, None))(several, data)
    assert out.batch_size == (2, 5)
    close(out["y"][0], expected)
    with torch.no_grad():
        for parameter in sequence.parameters():
            parameter.mul_(2)
    close(out["y"][1], second.module(first.module(inputs)))


@needs("tensordict")
def test_tensordict_gradients_by_example():
    import tensordict

    model, inputs = network(3, 4, 1), torch.randn(6, 3, dtype=torch.float64)
    parameters = tensordict.TensorDict.from_module(model).data.clone()

    def loss(parameters, x):
        with parameters.to_module(model):
            return model(x).square().sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0))(parameters, inputs)
    assert found.batch_size == (6,)
    own = [torch.autograd.grad(model(x).square().sum(), list(model.parameters())) for x in inputs]
    for (name, _), *expected in zip(model.named_parameters(), *own, strict=True):
        close(found[tuple(name.split("."))], torch.stack(expected))


@needs("tensordict")
@pytest.mark.parametrize("how", ["set_", "update_", "items", "arithmetic"])
def test_tensordict_writes_reach_the_caller(how):
    import tensordict

    start = torch.randn(3, 4)
    data = tensordict.TensorDict({"a": start.clone(), "nested": {"b": torch.randn(3, 4)}}, [3])

    def write(data):
        twice = data["a"] * 2
        if how == "set_":
            data.set_("a", twice)
        elif how == "update_":
            data.update_({"a": twice})
        elif how == "items":
            data["a"][:] = twice
        else:
            data.mul_(2)
        return data

    out = torch.vmap(write)(data)
    assert out.batch_size == (3,)
    close(out["a"], 2 * start)
    close(data["a"], 2 * start)


@needs("tensordict")
def test_tensordict_derivatives_of_every_kind():
    import tensordict

    a, b = torch.randn(3, 4), torch.randn(3, 4)
    data = tensordict.TensorDict({"a": a, "nested": {"b": b}}, [3])
    f = lambda data: (data["a"].sin() * data["nested", "b"]).sum()
    outside = torch.func.grad(lambda data: torch.vmap(f)(data).sum())(data)
    inside = torch.vmap(torch.func.grad(f))(data)
    for found in (outside, inside):
        assert found.batch_size == (3,)
        close(found["a"], a.cos() * b)
        close(found["nested", "b"], a.sin())
    tangents = torch.vmap(lambda data: torch.func.jvp(f, (data,), (data,))[1])(data)
    close(tangents, (a.cos() * a * b + a.sin() * b).sum(1))
    mixed = torch.vmap(torch.func.hessian(f))(data)["a"]["nested", "b"]
    close(mixed, torch.diag_embed(a.cos()))


# torchrl


@needs("torchrl")
def test_torchrl_loss_of_several_q_networks_at_once():
    from tensordict import TensorDict
    from torchrl.data import Bounded
    from torchrl.modules import Actor, ValueOperator
    from torchrl.objectives import TD3Loss
    from torchrl.objectives.utils import ValueEstimators

    class Value(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 1)

        def forward(self, observation, action):
            return self.layer(torch.cat([observation, action], -1))

    spec = Bounded(-torch.ones(2), torch.ones(2), (2,))
    actor = Actor(nn.Sequential(nn.Linear(4, 2), nn.Tanh()), spec=spec)
    value = ValueOperator(Value(), in_keys=["observation", "action"])
    options = {"num_qvalue_nets": 3, "loss_function": "l2", "policy_noise": 0.0}
    loss = TD3Loss(actor, value, action_spec=spec, **options)
    loss.make_value_estimator(ValueEstimators.TD0, gamma=0.9)
    state, action, following, reward = torch.randn(5, 4), torch.rand(5, 2), torch.randn(5, 4), torch.randn(5, 1)
    ended = torch.zeros(5, 1, dtype=torch.bool)
    step = {"observation": following, "reward": reward, "done": ended, "terminated": ended}
    found = loss(TensorDict({"observation": state, "action": action, "next": step}, [5]))

    def act(observation):
        layer = [p.detach() for p in loss.actor_network_params.values(True, True)]
        weight, bias = sorted(layer, key=Tensor.dim, reverse=True)
        return torch.tanh(observation @ weight.T + bias)

    def of_each(params, observation, action):
        weights, biases = params["module", "layer", "weight"], params["module", "layer", "bias"]
        pair = torch.cat([observation, action], -1)
        return [pair @ weight.T + bias for weight, bias in zip(weights, biases, strict=True)]

    params = loss.qvalue_network_params
    target = reward + 0.9 * torch.stack(of_each(params.data, following, act(following))).amin(0)
    expected = sum((value - target).square().mean() for value in of_each(params, state, action))
    close(found["loss_qvalue"], expected)
    close(found["loss_actor"], -of_each(params.data, state, act(state))[0].mean())
    weight = params["module", "layer", "weight"]
    (own,) = torch.autograd.grad(found["loss_qvalue"], weight, retain_graph=True)
    close(own, torch.autograd.grad(expected, weight)[0])


# posteriors


def regression():
    inputs = torch.randn(9, 3, dtype=torch.float64)
    return inputs, inputs @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 0.1


def log_likelihood(parameters, batch):
    x, y = batch
    return -0.5 * (x @ parameters["w"] + parameters["b"] - y) ** 2, torch.tensor([])


@needs("posteriors")
def test_posteriors_extended_kalman_filter():
    import posteriors

    inputs, targets = regression()
    parameters = {"w": torch.zeros(3, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
    transform = posteriors.ekf.diag_fisher.build(log_likelihood, lr=0.3, per_sample=True)
    state, _ = transform.update(transform.init(parameters), (inputs, targets), inplace=False)
    residuals = targets  # of the model that is zero
    gradients = torch.cat([inputs * residuals[:, None], residuals[:, None]], 1)
    deviations = (1 + 0.3 * gradients.square().mean(0)) ** -0.5
    means = deviations**2 * 0.3 * gradients.mean(0)
    close(state.params["w"], means[:3])
    close(state.params["b"], means[3])
    close(state.sd_diag["w"], deviations[:3])


@needs("posteriors")
def test_posteriors_laplace_is_exact_for_a_linear_model():
    import posteriors

    inputs, targets = regression()
    parameters = {"w": torch.zeros(3, dtype=torch.float64), "b": torch.zeros((), dtype=torch.float64)}
    design = torch.cat([inputs, torch.ones(9, 1, dtype=torch.float64)], 1)

    def log_posterior(parameters, batch):
        values, aux = log_likelihood(parameters, batch)
        return values.sum(), aux

    transform = posteriors.laplace.dense_hessian.build(log_posterior)
    state, _ = transform.update(transform.init(parameters), (inputs, targets))
    order = [3, 0, 1, 2]  # optree takes the keys of a dict in their order: b, w
    close(state.prec, (design.T @ design)[order][:, order])
    forward = lambda p: (inputs @ p["w"] + p["b"])[:, None]
    loss = lambda z: 0.5 * (z[:, 0] - targets).square().sum()
    found = posteriors.ggn(forward, loss, normalize=False)(parameters)
    close(found, (design.T @ design)[order][:, order])


@needs("posteriors")
def test_posteriors_variational_inference_comes_to_the_posterior():
    import posteriors
    import torchopt

    target = torch.tensor([1.0, -2.0])

    def log_posterior(p, batch):
        return -0.5 * ((p["w"] - target) / 0.5).square().sum(), torch.tensor([])

    transform = posteriors.vi.diag.build(log_posterior, torchopt.adam(lr=5e-2), temperature=1.0, n_samples=16)
    state = transform.init({"w": torch.zeros(2)})
    for _ in range(300):
        state, _ = transform.update(state, None)
    close(state.params["w"], target, atol=0.1, rtol=0)
    close(state.log_sd_diag["w"].exp(), torch.tensor([0.5, 0.5]), atol=0.1, rtol=0)


@needs("posteriors")
def test_posteriors_finds_that_the_aux_output_is_missing():
    import posteriors

    for transform in (torch.func.grad, torch.func.grad_and_value, torch.func.jacrev, torch.func.jacfwd):
        with pytest.raises(RuntimeError, match="forgotten to return the aux output"), posteriors.CatchAuxError():
            transform(torch.square, has_aux=True)(torch.tensor(1.0))


# dattri


def logistic_regression():
    """A regularized one: its loss, what it is given, and its Hessian."""
    inputs, targets, weights = torch.randn(20, 4), torch.arange(20.0) % 2, torch.randn(4)

    def loss(weights, inputs, targets):
        terms = nn.functional.binary_cross_entropy_with_logits(inputs @ weights, targets)
        return terms + 0.15 * weights @ weights

    p = torch.sigmoid(inputs @ weights)
    hessian = (inputs * (p * (1 - p))[:, None]).T @ inputs / 20 + 0.3 * torch.eye(4)
    return loss, (weights, inputs, targets), hessian


@needs("dattri")
@pytest.mark.parametrize("mode", ["rev-rev", "rev-fwd"])
def test_dattri_products_with_the_hessian_and_its_inverse(mode):
    from dattri.func.hessian import hvp, ihvp_cg, ihvp_explicit, ihvp_lissa

    loss, given, hessian = logistic_regression()
    vectors = torch.randn(3, 4)
    close(hvp(loss, mode=mode)(given, vectors[0]), hessian @ vectors[0])
    solutions = torch.linalg.solve(hessian, vectors.T).T
    close(ihvp_explicit(loss)(given, vectors), solutions, rtol=1e-4, atol=1e-5)
    close(ihvp_cg(loss, max_iter=4, mode=mode)(given, vectors), solutions, rtol=1e-4, atol=1e-5)
    summed = ihvp_lissa(loss, batch_size=20, num_repeat=1, recursion_depth=100, scaling=1, mode=mode)
    close(summed(given, vectors, in_dims=(None, 0, 0)), solutions, rtol=1e-4, atol=1e-5)


@needs("dattri")
@pytest.mark.parametrize("name", ["IFAttributorExplicit", "IFAttributorCG"])
def test_dattri_influence_functions(name):
    from dattri.algorithm import influence_function
    from dattri.task import AttributionTask

    model, inputs, targets = nn.Linear(4, 2), torch.randn(20, 4), torch.arange(20) % 2
    parameters = list(model.parameters())

    def loss(params, data):
        x, y = data
        return nn.functional.cross_entropy(torch.func.functional_call(model, params, x), y)

    def batches(count):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs[:count], targets[:count]), count)

    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    options = {"max_iter": 10} if name == "IFAttributorCG" else {}
    attributor = getattr(influence_function, name)(task=task, regularization=0.1, **options)
    attributor.cache(batches(20))
    with torch.no_grad():
        scores = attributor.attribute(batches(20), batches(5))

    losses = [nn.functional.cross_entropy(model(x[None]), t[None]) for x, t in zip(inputs, targets, strict=True)]
    gradients = torch.stack([gradient(loss, parameters) for loss in losses]).detach()
    hessian = hessian_matrix(sum(losses) / 20, parameters) + 0.1 * torch.eye(10)
    close(scores, gradients @ torch.linalg.solve(hessian, gradients[:5].T), rtol=1e-3, atol=1e-5)


# pypose


@needs("pypose")
@pytest.mark.parametrize("name", ["modjacrev", "modjacfwd"])
def test_pypose_jacobian_of_a_module(name):
    from pypose.optim import functional

    model, inputs = network(3, 4, 2), torch.randn(5, 3, dtype=torch.float64)
    found = getattr(functional, name)(model, inputs)
    parameters = dict(model.named_parameters())
    expected = jacobian_matrix(model(inputs), list(parameters.values()))
    close(torch.cat([found[name].reshape(10, -1) for name in parameters], 1), expected)


@needs("pypose")
def test_pypose_derivatives_along_a_group():
    import pypose

    pose, points = pypose.randn_SE3(1, dtype=torch.float64), torch.randn(1, 3, dtype=torch.float64)
    found = pypose.func.jacrev(lambda pose, points: pose @ points, 1)(pose, points)
    close(found.squeeze(), pose.rotation().matrix().squeeze())
