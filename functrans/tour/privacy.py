"""What privacy differentially private SGD has spent."""

from __future__ import annotations

import math


def sampled_gaussian_renyi(order: int, rate: float, noise: float) -> float:
    """Rényi divergence of one step of the sampled Gaussian mechanism, for an integer order of at least 2.

    Every example takes part with probability ``rate``; the noise has ``noise`` times the norm that one example can
    have. The formula is the one for integer orders in section 3.3 of Mironov, Talwar and Zhang, "Rényi Differential
    Privacy of the Sampled Gaussian Mechanism" (2019):

        log( sum over k of  C(order, k) (1 - rate)^(order - k) rate^k exp((k^2 - k) / (2 noise^2)) ) / (order - 1)

    Example:
        >>> sampled_gaussian_renyi(4, 1.0, 2.0)  # without sampling it is order / (2 noise^2)
        0.5
    """
    terms = []
    for k in range(order + 1):
        if rate == 1 and k < order:
            continue
        log_binomial = math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
        log_chance = k * math.log(rate) + ((order - k) * math.log1p(-rate) if k < order else 0.0)
        terms.append(log_binomial + log_chance + (k * k - k) / (2 * noise**2))
    largest = max(terms)
    return (largest + math.log(sum(math.exp(term - largest) for term in terms))) / (order - 1)


def privacy_spent(steps: int, rate: float, noise: float, delta: float) -> float:
    """The epsilon for which ``steps`` steps of DP-SGD are (epsilon, delta)-differentially private.

    Rényi divergences of the steps add up; the bound on epsilon that an order gives is that of theorem 21 in Balle,
    Barthe, Gaboardi, Hsu and Sato, "Hypothesis Testing Interpretations and Rényi Differential Privacy" (2020). The
    best order is taken.
    """
    return min(
        steps * sampled_gaussian_renyi(order, rate, noise)
        + math.log((order - 1) / order)
        - (math.log(delta) + math.log(order)) / (order - 1)
        for order in range(2, 257)
    )
