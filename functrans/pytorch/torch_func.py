"""Private names of PyTorch that libraries written for torch.func use, and where they find them."""

from __future__ import annotations

from typing import Any

from functrans.pytorch.torch_private import private

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

_FOR_NESTING = "to know that a transform of torch.func runs inside of its own"
#: The modules of torch.func that enter its levels, with the names by which they do.
NESTING = {
    module: names.split()
    for module, names in (
        (private("torch._functorch.vmap", _FOR_NESTING), "vmap"),
        (private("torch._functorch.eager_transforms", _FOR_NESTING), "grad jvp func"),
    )
}
