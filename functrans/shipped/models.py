"""Probabilistic models as functions that draw by ``sample`` and meet data by ``observe``.

What these mean is for the levels around to say: ``condition`` gives values, ``seed`` the random numbers,
``log_density`` adds up. Each is a level without wrappers, so that grad and vmap see the model's own operators alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from functrans.api.checks import call_function, check_callable, check_kind
from functrans.api.compiled import TRACED, UNTRACED, named_after
from functrans.core.interpreter import Interpreter
from functrans.core.stack import run_transformed
from functrans.errors import CallTypeError, CallValueError, MissingRuleError
from functrans.errors.wording import shown, what
from functrans.extension.levels import Handler
from functrans.extension.primitives import Primitive
from functrans.extension.table_interpreter import TableInterpreter
from functrans.interpreters.branch import BranchInterpreter
from functrans.interpreters.grad.interpreter import GradInterpreter
from functrans.interpreters.jvp.interpreter import JvpInterpreter
from functrans.interpreters.linearize import LinearizeInterpreter
from functrans.interpreters.transpose import TransposeInterpreter
from functrans.interpreters.vmap.interpreter import VmapInterpreter
from functrans.pytorch.thread_state import running_at
from functrans.shipped.by_derivatives import DerivativeInterpreter
from functrans.shipped.sow import of_basis, of_each, sow
from functrans.shipped.sparsity_level import SparsityLevel

SAMPLE, OBSERVE, CONDITION = "sample(distribution, name)", "observe(distribution, value)", "condition(model, values)"
LOG_DENSITY, SEED = "log_density(model)(values, ...)", "seed(model, number)"


def sample(distribution: Any, name: str) -> Tensor:
    """A value of ``distribution``: drawn, or what a level around has under this name.

    Args:
        distribution: a ``torch.distributions.Distribution``, or another object with ``sample`` and ``log_prob``.
        name: a string; ``condition`` and ``log_density`` give values by it, and ``reap`` returns what it was.

    Returns:
        What ``condition`` or ``log_density`` around the call has for the name. Otherwise a draw, by ``rsample`` where
        there is one, so that it has a derivative by the distribution's parameters; under vmap by its ``randomness``.

    Raises:
        CallTypeError: ``distribution`` or ``name`` is of another kind.
        CallValueError: the value given does not have the shape of a draw, or none was given inside ``log_density``.

    Example:
        >>> import torch
        >>> from functrans import condition, reap, sample, seed
        >>> def model():
        ...     center = sample(torch.distributions.Normal(0.0, 1.0), "center")
        ...     return sample(torch.distributions.Normal(center, 0.1), "x")
        >>> x, drawn = reap(seed(model, 0))()
        >>> x == drawn["x"], x == seed(model, 0)()
        (tensor(True), tensor(True))
        >>> condition(model, {"center": torch.tensor(5.0)})() > 4
        tensor(True)
    """
    check_distribution(SAMPLE, distribution)
    check_kind(SAMPLE, "name", name, str, "a string")
    value = choosing(name)
    if value is None:
        value = draw(distribution)
    elif hasattr(distribution, "batch_shape"):
        shape = distribution.batch_shape + distribution.event_shape
        if value.shape != shape:
            got = f"a value of shape {tuple(value.shape)} for {name!r}"
            raise CallValueError(SAMPLE, got, f"one of shape {tuple(shape)}, as is drawn of {what(distribution)}")
    value = sow(value, name)
    score(distribution, value)
    return value


def observe(distribution: Any, value: Tensor) -> Tensor:
    """Say that ``value`` was drawn of ``distribution``: ``log_density`` adds the logarithm of its density.

    Args:
        distribution: a ``torch.distributions.Distribution``, or another object with ``sample`` and ``log_prob``.
        value: a tensor.

    Returns:
        ``value``.

    Raises:
        CallTypeError: ``distribution`` or ``value`` is of another kind.

    Example:
        >>> import torch
        >>> from functrans import log_density, observe
        >>> coin = lambda heads: observe(torch.distributions.Bernoulli(torch.tensor(0.25)), heads)
        >>> log_density(coin)({}, torch.tensor([1.0, 0.0])).exp()
        tensor(0.1875)
    """
    check_distribution(OBSERVE, distribution)
    check_kind(OBSERVE, "value", value, Tensor, "a tensor")
    score(distribution, value)
    return value


def condition(model: Callable[..., Any], values: Mapping[str, Tensor]) -> Callable[..., Any]:
    """``model``, with these values where it samples under their names. The innermost ``condition`` of a name decides.

    Args:
        model: a function that calls ``sample``; it may apply transforms and be transformed.
        values: tensors by name, of the shape of a draw; for a ``sample`` inside of a vmap, with the examples in front.

    Returns:
        A function of the same arguments and result. ``log_density`` of it takes these values as observations.

    Raises:
        CallTypeError: ``values`` is no dict from names to tensors.
        CallValueError: nothing was sampled under one of the names.

    Example:
        >>> import torch
        >>> from functrans import condition, sample
        >>> model = lambda: 2 * sample(torch.distributions.Normal(0.0, 1.0), "x")
        >>> condition(model, {"x": torch.tensor(3.0)})()
        tensor(6.)
    """
    check_callable("condition", model)
    check_values(CONDITION, values)

    @named_after(model)
    def conditioned(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            return TRACED(condition, model, {}, args, kwargs, {"values": values})
        level = Conditioning(model)
        level.values = values
        out = run_transformed(level, lambda: call_function(CONDITION, model, args, kwargs))
        level.check_used(CONDITION)
        return out

    return conditioned


def seed(model: Callable[..., Any], number: int) -> Callable[..., Any]:
    """``model``, whose draws are the same in every call, and leave PyTorch's generators as they are.

    Args:
        model: a function that calls ``sample``; other random numbers are not concerned.
        number: what the draws start from.

    Returns:
        A function of the same arguments and result.

    Raises:
        CallTypeError: ``number`` is no int.
        CallValueError: it has more than 64 bits.

    Example:
        >>> import torch
        >>> from functrans import sample, seed
        >>> model = lambda: sample(torch.distributions.Normal(torch.zeros(3), 1.0), "x")
        >>> torch.equal(seed(model, 0)(), seed(model, 0)()), torch.equal(seed(model, 0)(), seed(model, 1)())
        (True, False)
    """
    check_callable("seed", model)
    if type(number) is not int:
        raise CallTypeError(SEED, f"{what(number)} as number", "an int")
    if not -(2**63) <= number < 2**64:
        raise CallValueError(SEED, f"{shown(number)} as number", "an int of 64 bits")

    @named_after(model)
    def seeded(*args: Any, **kwargs: Any) -> Any:
        if is_dynamo_compiling():
            why = "A graph draws by PyTorch's own generators, and not by one that starts anew at every call."
            return UNTRACED("seed", why, seed(model, number), args, kwargs)
        level = Seeding(model)
        level.generator = torch.Generator().manual_seed(number)
        return run_transformed(level, lambda: call_function(SEED, model, args, kwargs))

    return seeded


def log_density(model: Callable[..., Any]) -> Callable[..., Tensor]:
    """The logarithm of the joint density of what ``model`` samples and observes.

    Args:
        model: a function that calls ``sample`` and ``observe``; it may apply transforms and be transformed.

    Returns:
        A function ``(values, *args, **kwargs)``. ``values`` is a dict with a tensor for every name that ``model(*args,
        **kwargs)`` samples, and is not conditioned on. It returns a tensor without dimensions: the sum, over all
        samples and observations, of ``distribution.log_prob(value).sum()``; inside of a vmap in the model, over all
        examples. The result of ``model`` is dropped. It is a function as any other: ``grad(log_density(model))`` is the
        gradient by the values, a dict.

    Raises:
        CallTypeError: ``values`` is no dict from names to tensors.
        CallValueError: the value of a name is missing or of another shape, or nothing was sampled under one of the
            names, or twice.

    Example:
        >>> import torch
        >>> from functrans import grad, hessian, log_density, observe, sample
        >>> def model(data):
        ...     center = sample(torch.distributions.Normal(0.0, 1.0), "center")
        ...     observe(torch.distributions.Normal(center, 0.5), data)
        >>> values, data = {"center": torch.tensor(0.0)}, torch.tensor([1.0, 2.0])
        >>> grad(log_density(model))(values, data)
        {'center': tensor(12.)}
        >>> hessian(log_density(model))(values, data)
        {'center': {'center': tensor(-9.)}}
    """
    check_callable("log_density", model)

    @named_after(model)
    def density(values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if is_dynamo_compiling():
            return TRACED(log_density, model, {}, args, kwargs, (values,))
        check_values(LOG_DENSITY, values)
        level = Scoring(model)
        level.values = values
        run_transformed(level, lambda: call_function(LOG_DENSITY, model, args, kwargs))
        level.check_used(LOG_DENSITY)
        return torch.zeros(()) if level.total is None else level.total

    return density


class Conditioning(Handler):
    """Has values for names."""

    kind = "condition"
    values: Mapping[str, Tensor]

    def __init__(self, model: Callable[..., Any]) -> None:
        super().__init__(model)
        #: the names that were asked for
        self.used: set[str] = set()

    def check_used(self, call: str) -> None:
        unused = [name for name in self.values if name not in self.used]
        if unused:
            got = f"a value for {', '.join(map(repr, unused))}, which the model did not ask for"
            raise CallValueError(call, got, f"names that it samples here: {sorted(self.used)}")


class Scoring(Conditioning):
    """Has a value for every name, and adds up densities."""

    kind = "log_density"
    total: Tensor | None = None


class Seeding(Handler):
    """Says what draws start from."""

    kind = "seed"
    generator: torch.Generator


def check_distribution(call: str, distribution: Any) -> None:
    if not all(callable(getattr(distribution, name, None)) for name in ("sample", "log_prob")):
        cure = "The distribution comes first." if isinstance(distribution, str) else ""
        raise CallTypeError(call, f"{what(distribution)} as distribution", "a torch.distributions.Distribution", cure)


def check_values(call: str, values: Any) -> None:
    check_kind(call, "values", values, Mapping, "a dict from names to tensors")
    for name, value in values.items():
        check_kind(call, "a name", name, str, "a string")
        check_kind(call, f"the value of {name!r}", value, Tensor, "a tensor")


def draw(distribution: Any) -> Tensor:
    run = distribution.rsample if getattr(distribution, "has_rsample", False) else distribution.sample
    number = seeding()
    if number is None:
        return run()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(number)
        return run()


def score(distribution: Any, value: Tensor) -> None:
    if scored():
        scoring(distribution.log_prob(value).sum())


#: The value that a level around has for a name; None: none has.
choosing = Primitive("sample", lambda name: None)
#: What the next draw starts from; None: no level around says.
seeding = Primitive("seed", lambda: None)
#: Whether there is a ``log_density`` around.
scored = Primitive("log_density", lambda: False)
#: Adds to the innermost ``log_density`` around.
scoring = Primitive("log_density", lambda amount: None)


@choosing.rule(Conditioning)
def chosen(level: Conditioning, name: str) -> Any:
    level.used.add(name)
    if name not in level.values:
        return NotImplemented
    return level.values[name].clone()  # the model may write it


@choosing.rule(Scoring)
def chosen_once(level: Scoring, name: str) -> Any:
    if name in level.used:
        cure = "Number the names of a loop; give vmap no chunks."
        raise CallValueError(f"sample(..., name={shown(name)})", "a name that was sampled before", "a new name", cure)
    if name in level.values:
        return chosen(level, name)
    given = choosing.below(level, name)
    if given is None:
        raise CallValueError(LOG_DENSITY, f"no value for {name!r}", "one for every name that the model samples")
    level.used.add(name)
    return given


@choosing.rule(VmapInterpreter)
def of_example(level: VmapInterpreter, name: str) -> Any:
    return of_each(level, choosing.below(level, name), CONDITION, name)


@seeding.rule(Seeding)
def next_number(level: Seeding) -> int:
    with running_at(None):
        return int(torch.randint(2**62, (), generator=level.generator))


@scored.rule(Scoring)
def is_scored(level: Scoring) -> bool:
    return True


@scoring.rule(Scoring)
def add_up(level: Scoring, amount: Tensor) -> None:
    level.total = amount if level.total is None else level.total + amount


@scoring.rule(GradInterpreter, JvpInterpreter, LinearizeInterpreter, DerivativeInterpreter)
def primal(level: Interpreter, amount: Any) -> Any:
    return scoring.below(level, level.value_of(amount))


@scoring.rule(TransposeInterpreter)
def of_linear_function(level: TransposeInterpreter, amount: Any) -> Any:
    raise MissingRuleError("log_density", level, "A linear function is transposed without values.")


@scoring.rule(SparsityLevel)
def unless_rehearsed(level: SparsityLevel, amount: Any) -> Any:
    return None if level.rehearsal else primal(level, amount)


@scoring.rule(BranchInterpreter)
def of_those_that_take_it(level: BranchInterpreter, amount: Any) -> Any:
    return scoring.below(level, torch.where(level.takes, level.leave(level.enter(amount)), 0))


@scoring.rule(TableInterpreter)
def carried_beside(level: TableInterpreter, amount: Any) -> Any:
    if not level.owns(amount) or level.is_constant(amount):
        return NotImplemented
    cure = f"It carries more than a value, which is not added up outside: take the {level.kind} of the density itself."
    raise MissingRuleError("log_density", level, cure)


@scoring.rule(VmapInterpreter)
def of_all(level: VmapInterpreter, amount: Any) -> Any:
    """The sum over the examples."""
    batched = level.owns(amount) and amount.bdim is not None
    if of_basis(level):
        return NotImplemented
    value = level.value_of(amount)
    return scoring.below(level, value.sum() if batched else value * level.batch_size)
