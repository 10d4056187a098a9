"""The stations of the tour, each of which compares function transforms with loops over plain PyTorch."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import functrans as ft
from functrans.tour.data import DigitNet, Digits
from functrans.tour.privacy import privacy_spent
from functrans.tour.report import Report, duration

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Settings:
    """What the tour runs with; the defaults end in well under two minutes on two cores."""

    steps: int = 200
    #: expected number of examples in a batch; every example is drawn independently of the others
    batch: int = 512
    learning_rate: float = 10.0
    #: norm to which the gradient of every example is clipped
    clip: float = 0.3
    #: standard deviation of the noise, in units of ``clip``
    noise: float = 3.5
    delta: float = 1e-5
    #: examples that the loops of plain PyTorch are run on
    checked: int = 64
    hessians: int = 16
    members: int = 8
    member_steps: int = 60
    member_learning_rate: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"the tour needs at least one step of training, got steps={self.steps}")


class Tour:
    """The model, the data and the stations; every station compares itself with plain PyTorch through the report."""

    def __init__(self, settings: Settings, digits: Digits, report: Report) -> None:
        self.settings, self.digits, self.report = settings, digits, report
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.net = _new_net(settings.seed)
        self.params: Params = {name: value.detach().clone() for name, value in self.net.named_parameters()}

    def logits(self, params: Params, image: Tensor) -> Tensor:
        """The ten logits of one image."""
        return ft.functional_call(self.net, params, (image.unsqueeze(0),)).squeeze(0)

    def example_loss(self, params: Params, image: Tensor, label: Tensor) -> Tensor:
        """The loss of one example: what a user writes, with no batch anywhere."""
        return F.cross_entropy(self.logits(params, image), label)

    def batch_loss(self, params: Params, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(ft.functional_call(self.net, params, (images,)), labels)

    def accuracy(self, logits: Tensor) -> float:
        return 100 * (logits.argmax(-1) == self.digits.test_labels).double().mean().item()

    # Private training

    def clipped_sum(self, params: Params, images: Tensor, labels: Tensor) -> Params:
        """The sum of the examples' gradients, each clipped."""
        return ft.clipped_grad(self.example_loss, self.settings.clip)(params, images, labels)

    def clipped_sum_by_loop(self, params: Params, images: Tensor, labels: Tensor) -> Params:
        """The same in plain PyTorch: one forward and one backward pass per example."""
        net = _plain_net(params)
        total = {name: torch.zeros_like(value) for name, value in params.items()}
        for image, label in zip(images, labels):
            gradients = _plain_gradient(net, image.unsqueeze(0), label.unsqueeze(0))
            norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
            scale = (self.settings.clip / norm).clamp(max=1.0)
            for name, gradient in gradients.items():
                total[name] += scale * gradient
        return total

    def train_privately(self) -> None:
        settings, digits, report = self.settings, self.digits, self.report
        report.heading("1. Private training: clipped_grad(loss) sums the gradients of all examples, each clipped")
        count = settings.checked
        images, labels = digits.train_images[:count], digits.train_labels[:count]
        report.check(
            f"the gradients of {count} examples, clipped one by one and summed",
            lambda: self.clipped_sum(self.params, images, labels),
            lambda: self.clipped_sum_by_loop(self.params, images, labels),
            ("clipped_grad(loss)", "loop over autograd.grad"),
        )
        rate = min(1.0, settings.batch / len(digits.train_images))
        # The average over the later steps is better than the last step, and what is computed from the steps is as
        # private as they are.
        averaged_from = settings.steps // 2
        average = {name: torch.zeros_like(value) for name, value in self.params.items()}
        start = time.perf_counter()
        for step in report.progress(settings.steps, "training"):
            self.private_step(rate)
            if step >= averaged_from:
                for name, value in self.params.items():
                    average[name] += value / (settings.steps - averaged_from)
        self.params = average
        seconds = time.perf_counter() - start
        report.line(
            f"{settings.steps} steps, batches of about {settings.batch}, clipped to {settings.clip:g}, noise "
            f"{settings.noise:g}: {duration(seconds)}, {duration(seconds / settings.steps)} a step"
        )
        accuracy = self.accuracy(_plain_logits(self.params, digits.test_images))
        epsilon = privacy_spent(settings.steps, rate, settings.noise, settings.delta)
        report.line(f"test accuracy {accuracy:.1f} %")
        report.line(f"privacy spent: (epsilon, delta) = ({epsilon:.2f}, {settings.delta:g})")

    def private_step(self, rate: float) -> None:
        """One step of DP-SGD; the batch is drawn as the accountant assumes, each example on its own."""
        settings, digits = self.settings, self.digits
        drawn = torch.rand(len(digits.train_images), generator=self.generator) < rate
        if drawn.any():
            total = self.clipped_sum(self.params, digits.train_images[drawn], digits.train_labels[drawn])
        else:
            total = {name: torch.zeros_like(value) for name, value in self.params.items()}
        for name, value in self.params.items():
            noise = torch.randn(value.shape, generator=self.generator, dtype=value.dtype)
            gradient = (total[name] + settings.noise * settings.clip * noise) / settings.batch
            self.params[name] = value - settings.learning_rate * gradient

    # Curvature

    def hessian_vector_product(self) -> None:
        report, params = self.report, self.params
        report.heading("2. A Hessian-vector product: jvp(grad(loss))")
        images, labels = self.digits.test_images, self.digits.test_labels
        direction = {
            name: torch.randn(value.shape, generator=self.generator, dtype=value.dtype)
            for name, value in params.items()
        }

        def transformed() -> Params:
            gradient = ft.grad(lambda p: self.batch_loss(p, images, labels))
            return ft.jvp(gradient, (params,), (direction,))[1]

        def plain() -> Params:
            net = _plain_net(params)
            gradients = _plain_gradient(net, images, labels, create_graph=True)
            slope = torch.stack([(g * direction[name]).sum() for name, g in gradients.items()]).sum()
            return dict(zip(params, torch.autograd.grad(slope, list(net.parameters()))))

        product = report.check(
            f"the Hessian of the test loss, {sum(v.numel() for v in params.values()):,} by as many, times a vector",
            transformed,
            plain,
            ("jvp(grad(loss))", "autograd.grad twice"),
        )
        curvature = sum((product[name] * direction[name]).sum().item() for name in product)
        length = sum(value.square().sum().item() for value in direction.values())
        report.line(f"curvature of the loss along that direction: {curvature / length:.3g}")

    def logit_hessians(self) -> None:
        report, params = self.report, self.params
        report.heading("3. A Hessian for every image: vmap(hessian(logit))")
        count = self.settings.hessians
        images, labels = self.digits.test_images[:count], self.digits.test_labels[:count]

        def logit(image: Tensor, label: Tensor) -> Tensor:
            return self.logits(params, image).gather(0, label.unsqueeze(0)).squeeze(0)

        def plain() -> Tensor:
            net = _plain_net(params)
            rows = []
            for image, label in zip(images, labels):
                pixels = image.clone().requires_grad_()
                value = net(pixels.unsqueeze(0))[0, label]
                (slope,) = torch.autograd.grad(value, pixels, create_graph=True)
                for entry in slope.flatten():
                    rows.append(torch.autograd.grad(entry, pixels, retain_graph=True)[0].flatten())
            return torch.stack(rows).reshape(count, 64, 64)

        hessians = report.check(
            f"64 by 64 second derivatives of the true digit's logit for {count} images",
            lambda: ft.vmap(ft.hessian(logit))(images, labels).reshape(count, 64, 64),
            plain,
            ("vmap(hessian(logit))", "loops over autograd.grad"),
        )
        curved = torch.linalg.eigvalsh(hessians).abs().amax(dim=1)
        report.line(f"largest curvature of a logit: {curved.min():.2f} to {curved.max():.2f}, by image")

    # An ensemble

    def ensemble(self) -> None:
        settings, digits, report = self.settings, self.digits, self.report
        report.heading(f"4. An ensemble of {settings.members} networks trained as one: vmap over their parameters")
        nets = [_new_net(settings.seed + 1 + member) for member in range(settings.members)]
        rate = settings.member_learning_rate
        draws = torch.randint(len(digits.train_images), (settings.member_steps, 128), generator=self.generator)

        def together() -> Params:
            stacked, _ = ft.stack_module_state(nets)
            params = {name: value.detach() for name, value in stacked.items()}
            step = ft.vmap(ft.grad(self.batch_loss), in_dims=(0, None, None))
            for draw in draws:
                gradients = step(params, digits.train_images[draw], digits.train_labels[draw])
                params = {name: value - rate * gradients[name] for name, value in params.items()}
            return params

        def one_by_one() -> Params:
            trained = []
            for net in map(copy.deepcopy, nets):
                for draw in draws:
                    gradients = _plain_gradient(net, digits.train_images[draw], digits.train_labels[draw])
                    with torch.no_grad():
                        for name, value in net.named_parameters():
                            value.sub_(rate * gradients[name])
                trained.append(dict(net.named_parameters()))
            return {name: torch.stack([params[name] for params in trained]) for name in self.params}

        params = report.check(
            f"their parameters after {settings.member_steps} steps of SGD",
            together,
            one_by_one,
            ("vmap(grad(loss)) over parameters", "loop over the networks"),
        )
        logits = report.check(
            "their logits on the test images",
            lambda: ft.vmap(lambda p: ft.functional_call(self.net, p, (digits.test_images,)))(params),
            lambda: torch.stack([_plain_logits(row, digits.test_images) for row in _rows(params)]),
            ("vmap(functional_call)", "loop over the networks"),
        )
        alone = [self.accuracy(row) for row in logits]
        both = self.accuracy(logits.softmax(-1).mean(0))
        report.line(
            f"test accuracy, not private: each alone {min(alone):.1f} to {max(alone):.1f} %, together {both:.1f} %"
        )


def _new_net(seed: int) -> DigitNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DigitNet().double()


def _rows(params: Params) -> Iterator[Params]:
    for values in zip(*params.values()):
        yield dict(zip(params, values))


def _plain_net(params: Params) -> DigitNet:
    net = _new_net(0)
    net.load_state_dict(params)
    return net


def _plain_gradient(net: nn.Module, images: Tensor, labels: Tensor, create_graph: bool = False) -> Params:
    loss = F.cross_entropy(net(images), labels)
    gradients = torch.autograd.grad(loss, list(net.parameters()), create_graph=create_graph)
    return {name: gradient for (name, _), gradient in zip(net.named_parameters(), gradients)}


def _plain_logits(params: Params, images: Tensor) -> Tensor:
    with torch.no_grad():
        return _plain_net(params)(images)
