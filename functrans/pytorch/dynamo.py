"""Private names of Dynamo, PyTorch's compiler of frames, and what it is told by them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from functrans.pytorch.torch_private import private
from functrans.pytorch.versions import TorchMovedError

_FOR_DYNAMO = "to have torch.compile see a transform as one operator"
_FOR_FRAMES = "to run transforms untraced, and what is compiled as it was written inside of them"
_frames = private("torch._C._dynamo.eval_frame", _FOR_FRAMES)
_set_strategy = private("torch._C._dynamo.eval_frame.set_code_exec_strategy", _FOR_FRAMES)
_Strategy = private("torch._C._dynamo.eval_frame._FrameExecStrategy", _FOR_FRAMES)
_Action = private("torch._C._dynamo.eval_frame._FrameAction", _FOR_FRAMES)

#: What functrans/api/dynamo.py uses of Dynamo, by module. It is looked up when Dynamo has been imported.
_OF_DYNAMO = {
    "": "disable",
    "current_scope_id": "current_scope_id",
    "exc": "TorchDynamoException TorchRuntimeError unimplemented",
    "utils": "get_fake_value proxy_args_kwargs set_example_value",
    "variables": "AutogradFunctionVariable ConstantVariable ConstDictVariable LazyVariableTracker ListVariable "
    "SymNodeVariable TupleVariable UserDefinedObjectVariable VariableTracker",
    "guards": "GuardBuilder install_guard",
    "variables.builder": "wrap_fx_proxy",
    "variables.higher_order_ops": "discard_graph_changes speculate_subgraph TorchHigherOrderOperatorVariable",
}


def dynamo_names() -> SimpleNamespace:
    """The names of Dynamo, which has been imported."""

    def of_dynamo(module: str, name: str) -> Any:
        return private(".".join(part for part in ("torch._dynamo", module, name) if part), _FOR_DYNAMO)

    found = {name: of_dynamo(module, name) for module, names in _OF_DYNAMO.items() for name in names.split()}
    try:
        found["make_inlined"] = of_dynamo("utils", "_make_inlined")
    except TorchMovedError:  # PyTorch 2.11
        found["make_inlined"] = of_dynamo("variables.higher_order_ops", "_make_inlined")
    try:
        found["items"] = of_dynamo("utils", "unpack_iterable")
    except TorchMovedError:  # PyTorch 2.11 and 2.12
        found["items"] = lambda tx, variable: variable.unpack_var_sequence(tx)
    try:
        found["fake_errors"] = (found["TorchRuntimeError"], of_dynamo("exc", "FakeTensorObservedException"))
    except TorchMovedError:  # before PyTorch 2.14
        found["fake_errors"] = (found["TorchRuntimeError"],)
    found["function_in_graph"] = private("torch._functorch.autograd_function.autograd_function_apply", _FOR_DYNAMO)
    found["operators"] = of_dynamo("variables.higher_order_ops", "_hop_name_to_variable_class")
    return SimpleNamespace(**found)


def guard_or_false(comparison: Any) -> bool:
    """Whether a comparison of symbolic sizes is known to hold (PyTorch has imported sympy by then)."""
    return bool(private("torch.fx.experimental.symbolic_shapes.guard_or_false", _FOR_DYNAMO)(comparison))


def check_when_run(comparison: Any) -> None:
    """Have the graph that is traced check that a comparison of symbolic sizes holds."""
    private("torch._check", _FOR_DYNAMO)(comparison)


def run_untraced(function: Callable[..., Any]) -> None:
    """Let Dynamo break the graph where ``function`` is called, and never trace its code.

    (torch.compiler.disable would put another function in its place.)
    """
    private("torch._dynamo.trace_rules._disallowed_callable_ids", _FOR_FRAMES).add(id(function))
    private("torch._dynamo.eval_frame.skip_code", _FOR_FRAMES)(function.__code__)


def stand_in_graphs(function: Callable[..., Any], original: Callable[..., Any]) -> None:
    """Let Dynamo take a call of ``function`` for one of ``original``, which it knows."""

    def traced(*args: Any) -> Any:
        return original(*args)

    rules = private("torch._dynamo.trace_rules.get_torch_obj_rule_map", _FOR_FRAMES)()
    rules.pop(function, None)  # a rule of the original's name, which ``function`` has by now
    private("torch._dynamo.decorators.substitute_in_graph", _FOR_FRAMES)(function, skip_signature_check=True)(traced)


def leave_alone(function: Callable[..., Any]) -> None:
    """Let Dynamo compile neither the code of ``function`` nor what is called from there.

    It costs a call nothing, other than the context that PyTorch puts around the same methods of modes.
    """
    _set_strategy(function.__code__, _Strategy(_Action.SKIP, _Action.SKIP))


def forget_rules_of_dynamo() -> None:
    """Let Dynamo look up anew what the names of PyTorch's functions stand for, which it does once."""
    if "torch._dynamo.trace_rules" in sys.modules:
        private("torch._dynamo.trace_rules.clear_lru_cache", _FOR_FRAMES)()


def run_as_written_while(inside: Callable[[], bool]) -> None:
    """Let compiled functions run what they were compiled from while ``inside()`` holds for a thread."""
    module, name = private("torch._dynamo.eval_frame", _FOR_FRAMES), "_callback_from_stance"
    original = private(f"torch._dynamo.eval_frame.{name}", _FOR_FRAMES)
    set_count = getattr(_frames, "set_fullgraph_compiled_frame_count", None)  # from PyTorch 2.12 on

    def callback(compiling: Any) -> Any:
        if not inside():
            return original(compiling)
        if set_count is not None:
            set_count(-1)  # fullgraph=True does not ask for a frame that was compiled
        return None

    setattr(module, name, callback)
