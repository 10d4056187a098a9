"""Every private name of PyTorch that functrans uses, each with what it is for.

Another PyTorch may have moved one: ``private`` then says which, at import. Nothing else in the package names one
(tests/test_torch_private.py), except for the attributes below that are read off objects where they are used.
"""

from __future__ import annotations

import functools
import pkgutil
import sys
from collections.abc import Callable
from contextlib import nullcontext
from operator import attrgetter
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from functrans.pytorch.versions import TorchMovedError

__all__ = [
    "ADD_BATCH_DIM",
    "ATTRIBUTES",
    "AUTOCAST_KEYS",
    "AUTOGRAD",
    "COMPOSITE",
    "CONJUGATE",
    "DECOMPOSITION_TABLE",
    "ENGINE_CALLBACK",
    "FAKE_MODE",
    "FLEX_ATTENTION",
    "FSDP_BEFORE",
    "FSDP_STATES",
    "FUNCTIONAL_COLLECTIVES",
    "FUNCTION_ENABLED",
    "INDEX_BATCHED",
    "INDEX_BATCHED_KEYS",
    "IN_PLACE_COLLECTIVES",
    "KEY_OF_MODE",
    "NEGATIVE",
    "PLACES_OF_TORCH_FUNC",
    "PRE_DISPATCH",
    "PYTHON",
    "REMOVE_BATCH_DIM",
    "TENSOR_MODULE",
    "TRACER_MODE",
    "TRACING_MODES",
    "TREE_NODES",
    "VIEWS_AND_VERSIONS",
    "ZERO_TENSOR",
    "BatchNormModule",
    "DisableTorchDispatch",
    "DisableTorchFunction",
    "EnableTorchFunction",
    "FakeTensor",
    "HigherOrderOperator",
    "Mode",
    "ModuleHook",
    "MultiHandle",
    "OpOverload",
    "associative_module",
    "autocast_enabled",
    "autocast_off",
    "base_of",
    "debug_mode",
    "dynamo_names",
    "finished_work",
    "forget_call",
    "forget_rules_of_dynamo",
    "forward_class",
    "function_enabled",
    "function_mode_enabled",
    "function_mode_stack_size",
    "function_state",
    "functorch_core",
    "functorch_vmap",
    "graph_task",
    "has_kernel",
    "is_forward_enabled",
    "is_key_excluded",
    "is_key_included",
    "is_torch_func_active",
    "keep_parametrizations",
    "kept_by",
    "kept_parametrizations",
    "leave_alone",
    "make_wrapper",
    "mode_at",
    "mode_of_kind",
    "mode_stack_size",
    "no_dispatch",
    "no_setup_context",
    "nowrap_functions",
    "overload_of_library",
    "parameter_at",
    "places_of",
    "pop_function_mode",
    "pop_mode",
    "pop_packing",
    "push_function_mode",
    "push_mode",
    "push_packing",
    "register_tree_node",
    "replace_in_flex_attention",
    "replace_in_fsdp",
    "run_as_written_while",
    "run_untraced",
    "set_eval_frame",
    "set_forward_enabled",
    "set_function_state",
    "set_grad_enabled",
    "set_key_excluded",
    "set_key_included",
    "special",
    "swap_tensor",
    "tensor_as_subclass",
    "tensor_torch_function",
    "top_packing",
    "torch_pytree",
    "torch_utils",
    "tracers_before_autograd",
    "trackers",
    "unset_mode",
    "vmap_rule_of_library",
    "without_torch_function",
]


def private(name: str, purpose: str) -> Any:
    """What stands in PyTorch under the dotted ``name``.

    Args:
        name: such as ``"torch._C._set_grad_enabled"``.
        purpose: what functrans needs it for, as it would end the sentence "functrans needs it ...".

    Raises:
        TorchMovedError: the installed PyTorch has no such name.
    """
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        raise TorchMovedError(name, purpose) from error


# Types, and the modules that are imported for what they do.
if TYPE_CHECKING:
    from torch._ops import OpOverload
    from torch.utils._python_dispatch import TorchDispatchMode
else:
    OpOverload = private("torch._ops.OpOverload", "to know operators, which are the keys of all rules")
    TorchDispatchMode = private(
        "torch.utils._python_dispatch.TorchDispatchMode", "to see operators that have no wrapper among their arguments"
    )
private("torch.utils._cxx_pytree", "to have PyTorch's node types known to optree")

is_key_excluded = private(
    "torch._C._dispatch_tls_is_dispatch_key_excluded",
    "to find whether a thread skips a dispatch key, which may be put back",
)
set_key_excluded = private(
    "torch._C._dispatch_tls_set_dispatch_key_excluded", "to stand in front of autograd, whose dispatch key it excludes"
)
_KEY = "torch._C.DispatchKey."
AUTOGRAD = private(_KEY + "AutogradFunctionality", "to switch autograd off and on as a whole")
VIEWS_AND_VERSIONS = private(
    _KEY + "ADInplaceOrView", "to switch view tracking and version counters together with autograd"
)
CONJUGATE = private(_KEY + "Conjugate", "to have a lazy conj() of base tensors computed while a handler runs")
NEGATIVE = private(_KEY + "Negative", "to have a lazy .imag of base tensors computed while a handler runs")
ZERO_TENSOR = private(_KEY + "ZeroTensor", "to have forward AD of base tensors in order")
PYTHON = private(_KEY + "Python", "to see that PyTorch is reading the elements of torch.tensor([...])")
COMPOSITE = private(_KEY + "CompositeImplicitAutograd", "to know which operators are made of others")
# NOTE [Scalar indices] says how.
INDEX_BATCHED = private("torch._C._dispatch_key_parse", "to make a dispatch key of its name")("BatchedNestedTensor")
INDEX_BATCHED_KEYS = private("torch._C.DispatchKeySet", "to tell PyTorch's indexing not to read a number")(
    INDEX_BATCHED
)

# torch.export traces in front of autograd, where wrappers are; the tracer is moved to where the base is.
_FOR_EXPORT = "to have torch.export trace behind autograd"
PRE_DISPATCH = private(_KEY + "PreDispatch", _FOR_EXPORT)
is_key_included = private("torch._C._dispatch_tls_is_dispatch_key_included", _FOR_EXPORT)
set_key_included = private("torch._C._dispatch_tls_set_dispatch_key_included", _FOR_EXPORT)
tracers_before_autograd = private("torch._ops.mode_stack_state_for_pre_dispatch", _FOR_EXPORT)
unset_mode = private("torch._C._unset_dispatch_mode", _FOR_EXPORT)
TRACER_MODE = private("torch._C._TorchDispatchModeKey.PROXY", _FOR_EXPORT)
KEY_OF_MODE = "_dispatch_key"  # of the tracer while it is in front of autograd

# Operators that take functions; NOTE [Control flow] says what they come to.
mode_of_kind = private("torch._C._get_dispatch_mode", "to know whether what happens at the base is traced")
_modes = private("torch._C._TorchDispatchModeKey", "to know the modes that trace")
FAKE_MODE = _modes.FAKE
TRACING_MODES = (_modes.PROXY, FAKE_MODE, _modes.FUNCTIONAL)
FakeTensor: Any = private("torch._subclasses.fake_tensor.FakeTensor", "to know whether a truth value can be read")
associative_module: Any = private("torch._higher_order_ops.associative_scan", "to scan by a function of one pair")
private("torch._higher_order_ops.associative_scan.generic_associative_scan", "to scan by a function of one pair")
FLEX_ATTENTION = "torch.nn.attention.flex_attention"


def replace_in_flex_attention(make: Callable[[Callable[..., None]], Callable[..., None]]) -> None:
    """Let ``make`` of it stand for the check of devices in front of flex_attention, which has been imported."""
    check = private(FLEX_ATTENTION + "._validate_device", "to have derivatives of flex_attention on the CPU")
    private(FLEX_ATTENTION, "to have derivatives of flex_attention on the CPU")._validate_device = make(check)


def kept_by(function: Callable[..., Any], name: str) -> Any:
    """What ``while_loop`` or ``associative_scan`` keeps in the function that it calls its operator with, by the name
    that it has there: a tree structure, the user's function. None: the function is somebody else's."""
    if isinstance(function, functools.partial):
        return function.keywords.get(name)
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return function.__closure__[names.index(name)].cell_contents if name in names else None  # type: ignore[index]


# Entering a TorchDispatchMode through its context manager costs several microseconds.
mode_stack_size = private("torch._C._len_torch_dispatch_stack", "to know whether a mode was entered after its own")
mode_at = private("torch._C._get_dispatch_stack_at", "to put the modes back as they were")
push_mode = private("torch._C._push_on_torch_dispatch_stack", "to enter its mode")
pop_mode = private("torch._C._pop_torch_dispatch_stack", "to leave its mode")

set_grad_enabled = private("torch._C._set_grad_enabled", "to set the grad mode without the cost of a context manager")
is_forward_enabled = private("torch._C._is_fwd_grad_enabled", "to let forward mode follow forward AD's own switch")
set_forward_enabled = private("torch._C._set_fwd_grad_enabled", "to give every level a forward-mode switch of its own")

# Formulas are traced by objects with a __torch_function__, whatever the caller's state.
EnableTorchFunction = private(
    "torch._C._EnableTorchFunction", "to trace formulas where the caller has switched __torch_function__ off"
)
function_mode_stack_size = private(
    "torch._C._len_torch_function_stack", "to take function modes off while it traces formulas"
)
push_function_mode = private(
    "torch._C._push_on_torch_function_stack", "to put function modes back after it traced formulas"
)
pop_function_mode = private("torch._C._pop_torch_function_stack", "to take function modes off while it traces formulas")
DisableTorchFunction = private(
    "torch._C.DisableTorchFunction", "to hide wrappers' __torch_function__ and function modes from its own code"
)
base_of = private("torch.Tensor._base.__get__", "to show what a write to a view has written")
function_state = private("torch._C._get_torch_function_state", "to know how far __torch_function__ is switched off")
has_kernel = private("torch._C._dispatch_has_kernel", "to tell operators from forms that TorchScript alone knows")
function_enabled = private("torch._C._is_torch_function_enabled", "to know whether it is on, in less time")
FUNCTION_ENABLED = private("torch._C._TorchFunctionState.ENABLED", "to switch it on")
set_function_state = private(
    "torch._C._set_torch_function_state", "to switch __torch_function__ back on where an exception came in between"
)
function_mode_enabled = private(
    "torch._C._is_torch_function_mode_enabled", "to leave a call to the user's function modes"
)
autocast_enabled = private(
    "torch._C._is_any_autocast_enabled", "to leave a call to autocast, which stands in front of it"
)
AUTOCAST_KEYS = [
    private(_KEY + name, "to have the pieces of composite operators autocast")
    for name in dir(private("torch._C.DispatchKey", "to switch dispatch keys"))
    if name.startswith("Autocast")
]
_DisableAutocast = private("torch._C._DisableAutocast", "to have gradients computed in the dtypes of the forward pass")


def autocast_off() -> Any:
    """Context: what was computed under autocast or not goes on in the dtypes that it has."""
    return _DisableAutocast() if autocast_enabled() else nullcontext()


without_torch_function = private(
    "torch._C._disabled_torch_function_impl", "to hand a call to PyTorch's own argument parser"
)
tensor_as_subclass: Any = private("torch._C.TensorBase.as_subclass", "to give a tensor a class and to take it off")
nowrap_functions = private(
    "torch.overrides.get_default_nowrap_functions", "to know the functions that do not keep a tensor's class"
)
tensor_torch_function = private(
    "torch.Tensor.__torch_function__.__func__", "to tell tensor subclasses that have one of their own"
)

_HOOKS = "torch._C._autograd."
top_packing = private(
    _HOOKS + "_top_saved_tensors_default_hooks",
    "to find the hooks that pack what autograd saves (checkpoint, save_on_cpu)",
)
push_packing = private(
    _HOOKS + "_push_saved_tensors_default_hooks", "to set aside the hooks that pack what autograd saves"
)
pop_packing = private(
    _HOOKS + "_pop_saved_tensors_default_hooks", "to put back the hooks that pack what autograd saves"
)

is_torch_func_active = private(
    "torch._C._are_functorch_transforms_active", "to refuse to run inside a transform of torch.func"
)
_FOR_CLIENTS = "to answer for its own wrappers where others ask PyTorch's private names"
functorch_core: Any = private("torch._C._functorch", _FOR_CLIENTS)
functorch_vmap: Any = private("torch._functorch.vmap", _FOR_CLIENTS)
for _name in ("apis", "batch_norm_replacement", "eager_transforms", "functional_call"):
    private(f"torch._functorch.{_name}", "to put its functions in the place of torch.func's")
#: The methods that a container which batches itself has (api/containers.py); they are named as PyTorch's functions.
ADD_BATCH_DIM, REMOVE_BATCH_DIM = "_add_batch_dim", "_maybe_remove_batch_dim"
#: The modules of PyTorch that others import the names of torch.func from; for each, the attributes that it has for its
#: own use.
PLACES_OF_TORCH_FUNC: dict[str, tuple[str, ...]] = {
    "torch": (),
    "torch.func": (),
    "torch._C._functorch": (),
    "torch._functorch.apis": (),
    "torch._functorch.batch_norm_replacement": (),
    "torch._functorch.eager_transforms": ("vmap", "get_unwrapped", "is_functorch_wrapped_tensor"),
    "torch._functorch.einops": (),
    "torch._functorch.functional_call": (),
    "torch._functorch.vmap": (),
}
make_wrapper = private("torch.Tensor._make_wrapper_subclass", "to make tensors that have metadata and no data")
TENSOR_MODULE: Any = private("torch._tensor", "to tell the code of Tensor's methods, which hands calls on")
no_dispatch = private("torch.utils._mode_utils.no_dispatch", "to make tensors past all modes")
DisableTorchDispatch = private("torch._C._DisableTorchDispatch", "to print tensors past all modes")
DECOMPOSITION_TABLE: dict[Any, Any] = private(
    "torch._decomp.decomposition_table", "to batch an operator that has no rule by its pieces"
)
TREE_NODES: dict[type, Any] = private(
    "torch.utils._pytree.SUPPORTED_NODES", "to know containers registered with PyTorch's pytrees"
)
register_tree_node: Any = private(
    "torch.utils._pytree.register_pytree_node", "to let the pullbacks that it returns be pytrees"
)
_parametrize: Any = private("torch.nn.utils.parametrize", "to know parametrize.cached()")
ModuleHook = private("torch.nn.modules._functions.BackwardHookFunction", "to have backward hooks of modules run")
torch_utils: Any = private("torch._utils", "to have tensors loaded inside of transforms")
private("torch._utils._rebuild_tensor", "to have tensors loaded inside of transforms")
_FOR_HOOKS = "to have hooks on several gradients, and what follows modules by them, run inside of transforms"
MultiHandle: Any = private("torch.autograd.graph._MultiHandle", _FOR_HOOKS)
graph_task: Any = private("torch._C._current_graph_task_id", _FOR_HOOKS)
private("torch.utils.module_tracker.ModuleTracker._maybe_set_engine_callback", _FOR_HOOKS)
ENGINE_CALLBACK = "_maybe_set_engine_callback"


def debug_mode() -> Any:
    """PyTorch's DebugMode; None in a version that has none."""
    try:
        return pkgutil.resolve_name("torch.utils._debug_mode.DebugMode")
    except (ImportError, AttributeError):
        return None


def trackers() -> list[type[Any]]:
    """The classes of trackers of modules that are imported by now."""
    names = ("torch.utils.module_tracker", "ModuleTracker"), ("torch.distributed._tools.mod_tracker", "ModTracker")
    return [getattr(sys.modules[module], name) for module, name in names if module in sys.modules]


def forward_class(node: Any) -> Any:
    """The autograd.Function that ``node``, a ``grad_fn``, is of; None for another."""
    return getattr(node, "_forward_cls", None)


_FOR_CACHED = "to keep parametrize.cached() to parameters that are still those it saw"
private("torch.nn.utils.parametrize._cache", _FOR_CACHED)
private("torch.nn.utils.parametrize._cache_enabled", _FOR_CACHED)


def kept_parametrizations() -> dict[Any, Any] | None:
    """Where ``parametrize.cached()`` keeps what it computes; None outside of it."""
    return _parametrize._cache if _parametrize._cache_enabled else None


def keep_parametrizations(kept: dict[Any, Any]) -> None:
    """Let ``parametrize.cached()`` keep what it computes in ``kept``."""
    _parametrize._cache = kept


BatchNormModule: Any = private("torch.nn.modules.batchnorm._BatchNorm", "to find batch norms among modules")
no_setup_context = private(
    "torch.autograd.function._SingleLevelFunction.setup_context", "to tell the two styles of autograd.Function"
)
_FOR_RULES = "to find the vmap rules of torch.library.custom_op"
_custom_operators: dict[str, Any] = private("torch._library.custom_ops.OPDEFS", _FOR_RULES)

_FOR_DYNAMO = "to have torch.compile see a transform as one operator"
_FOR_FRAMES = "to run transforms untraced, and what is compiled as it was written inside of them"
torch_pytree: Any = private("torch.utils._pytree", "to take arguments apart as Dynamo does")
set_eval_frame: Any = private("torch._C._dynamo.eval_frame.set_eval_frame", _FOR_FRAMES)
_frames = private("torch._C._dynamo.eval_frame", _FOR_FRAMES)
_set_strategy = private("torch._C._dynamo.eval_frame.set_code_exec_strategy", _FOR_FRAMES)
_Strategy = private("torch._C._dynamo.eval_frame._FrameExecStrategy", _FOR_FRAMES)
_Action = private("torch._C._dynamo.eval_frame._FrameAction", _FOR_FRAMES)
if TYPE_CHECKING:
    from torch._ops import HigherOrderOperator
else:
    HigherOrderOperator = private("torch._ops.HigherOrderOperator", _FOR_DYNAMO)

#: What functrans/api/dynamo.py uses of Dynamo, by module. It is looked up when Dynamo has been imported.
_OF_DYNAMO = {
    "": "disable",
    "exc": "TorchDynamoException TorchRuntimeError unimplemented",
    "utils": "get_fake_value proxy_args_kwargs",
    "variables": "AutogradFunctionVariable ConstantVariable ConstDictVariable LazyVariableTracker ListVariable "
    "SymNodeVariable TupleVariable VariableTracker",
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
    found["operators"] = of_dynamo("variables.higher_order_ops", "_hop_name_to_variable_class")
    return SimpleNamespace(**found)


def run_untraced(function: Callable[..., Any]) -> None:
    """Let Dynamo break the graph where ``function`` is called, and never trace its code.

    (torch.compiler.disable would put another function in its place.)
    """
    private("torch._dynamo.trace_rules._disallowed_callable_ids", _FOR_FRAMES).add(id(function))
    private("torch._dynamo.eval_frame.skip_code", _FOR_FRAMES)(function.__code__)


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


def vmap_rule_of_library(op: OpOverload) -> Any:
    """The rule that a ``torch.library.custom_op`` was given by ``register_vmap``, with our signature, or None."""
    definition = None if op.namespace == "aten" else _custom_operators.get(op._schema.name)
    try:
        return None if definition is None else definition._vmap_fn
    except AttributeError as error:
        raise TorchMovedError("torch._library.custom_ops.CustomOpDef._vmap_fn", _FOR_RULES) from error


def overload_of_library(op: Any) -> Any:
    """The operator overload that a ``torch.library.custom_op`` stands for, or None."""
    return getattr(op, "_opoverload", None) if isinstance(op, torch.library.CustomOpDef) else None


class Mode(TorchDispatchMode):
    """A dispatch mode that Dynamo's protection does not wrap, which would cost more than the rest of the door."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


#: The functional collectives, and those with a derivative by PyTorch; none where PyTorch was built without them.
FUNCTIONAL_COLLECTIVES: list[Any] = []
#: The collectives that write in place what other processes send.
IN_PLACE_COLLECTIVES: list[OpOverload] = []
if torch.distributed.is_available():
    _FOR_COLLECTIVES = "to know collectives"
    private("torch.distributed._functional_collectives", _FOR_COLLECTIVES)  # which defines some, and their derivatives
    FUNCTIONAL_COLLECTIVES += [
        private(f"torch.ops.{name}", _FOR_COLLECTIVES) for name in ("_c10d_functional", "_c10d_functional_autograd")
    ]
    IN_PLACE_COLLECTIVES += [
        private(f"torch.ops.c10d.{name}.default", _FOR_COLLECTIVES)
        for name in (
            "_allgather_base_", "_reduce_scatter_base_", "allgather_", "allgather_coalesced_",
            "allgather_into_tensor_coalesced_", "allreduce_", "allreduce_coalesced_", "alltoall_", "alltoall_base_",
            "broadcast_", "gather_", "recv_", "recv_any_source_", "reduce_", "reduce_scatter_",
            "reduce_scatter_tensor_coalesced_", "scatter_", "send",
        )
    ]  # fmt: skip


def finished_work() -> Any:
    """What an in-place collective returns to be waited for, of one that is over."""
    return torch.distributed.Work.boxed(private("torch._C._distributed_c10d.FakeWork", _FOR_COLLECTIVES)())


# FSDP2, which is looked up when it has been imported; NOTE [Sharded modules] says what for.
_FOR_FSDP = "to call modules of fully_shard inside of transforms"
_FSDP = "torch.distributed.fsdp._fully_shard."
FSDP_STATES, FSDP_BEFORE = _FSDP + "_fsdp_state", "torch.distributed.fsdp.fully_sharded_data_parallel"
_IN_FSDP = {
    "before_forward": "_fsdp_param_group.FSDPParamGroup.pre_forward",
    "behind_forward": "_fsdp_param_group.FSDPParamGroup.post_forward",
    "ahead_of_time": "_fsdp_param_group.FSDPParamGroup._prefetch_unshard",
    "before_root": "_fsdp_state.FSDPState._root_pre_forward",
    "before_backward": "_fsdp_state.FSDPState._register_pre_backward_hook",
}
swap_tensor: Any = private("torch.nn.utils._named_member_accessor.swap_tensor", _FOR_FSDP)
_module_info = attrgetter("_module_info")


def replace_in_fsdp(**replacements: Callable[[Any], Any]) -> None:
    """Let what each function makes of it stand for the method of FSDP2."""
    for what, make in replacements.items():
        holder, _, method = (_FSDP + _IN_FSDP[what]).rpartition(".")
        cls, original = private(holder, _FOR_FSDP), private(_FSDP + _IN_FSDP[what], _FOR_FSDP)
        static = isinstance(vars(cls)[method], staticmethod)
        setattr(cls, method, staticmethod(make(original)) if static else make(original))


def forget_call(module: Any) -> None:
    """Let the state of a module of fully_shard be as it is between calls, whatever became of one."""
    state = private("torch.distributed._composable_state._get_module_state", _FOR_FSDP)(module)
    vars(state).update(_training_state=private(_FSDP + "_fsdp_common.TrainingState.IDLE", _FOR_FSDP))
    vars(state)["_modules_to_run_forward"].clear()


def places_of(parameter: Any) -> list[tuple[Any, str]]:
    """The modules that have a parameter of FSDP2, each with the name that it has there."""
    info = _module_info(parameter)
    return [(info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names, strict=True)]


def parameter_at(parameter: Any, owner: Any, name: str) -> Any:
    """What ``owner`` has under ``name``: what was put there, or the parameter of FSDP2, the part that is kept."""
    found = getattr(owner, name)
    temporary = (vars(parameter).get(kept) for kept in ("_unsharded_param", "_sharded_post_forward_param"))
    return parameter.sharded_param if any(found is x for x in temporary) else found


def special(parameter: Any) -> str | None:
    """What keeps a parameter of FSDP2 from being gathered as it is."""
    if parameter.is_dtensor:
        return "with parameters that were DTensors before"
    if parameter.offload_to_cpu:
        return "whose parameters are offloaded to the CPU"
    if hasattr(parameter.sharded_param.to_local(), "fsdp_pre_all_gather"):
        return "whose parameters say how they are gathered"
    return None


#: Attributes that are read off objects where they are used, many for every operator: where each is found, and its use.
ATTRIBUTES: dict[str, tuple[str, str]] = {
    "_schema": ("torch.ops.aten.sin.default", "to know the arguments and results of an operator"),
    "_overloadname": ("torch.ops.aten.sin.default", "to know the overload's name of an operator"),
    "_op": ("torch.ops.aten.sin.default", "to call an operator without what an overload object adds"),
    "_can_decompose": ("torch.ops.aten.sin.default", "to know whether an operator is made of others"),
    "_is_view": ("torch.Tensor", "to know whether an operator viewed or copied"),
    "_values": ("torch.Tensor", "to reach what a jagged nested tensor is made of"),
    "_version": ("torch.Tensor", "to notice that a tensor that was saved has been written"),
    "_cdata": ("torch.UntypedStorage", "to know whether two tensors share memory"),
    "_current_level": ("torch.autograd.forward_ad", "to know whether forward AD of PyTorch itself is on"),
}
for _name, (_holder, _purpose) in ATTRIBUTES.items():
    private(f"{_holder}.{_name}", _purpose)
