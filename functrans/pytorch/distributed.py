"""Private names of PyTorch around collectives, and modules of fully_shard."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch

from functrans.pytorch.torch_private import OpOverload, private

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


def why_not_gathered(parameter: Any) -> str | None:
    """What keeps a parameter of FSDP2 from being gathered as it is."""
    if parameter.is_dtensor:
        return "with parameters that were DTensors before"
    if parameter.offload_to_cpu:
        return "whose parameters are offloaded to the CPU"
    if hasattr(parameter.sharded_param.to_local(), "fsdp_pre_all_gather"):
        return "whose parameters say how they are gathered"
    return None
