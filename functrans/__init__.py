"""functrans: composable function transforms for PyTorch.

``grad``, ``vmap``, ``jvp`` and everything made of them nest in any order. Each transform pushes an interpreter on a
stack, wrapper tensors carry their level, and every operator walks down the stack.
"""

from functrans import derivatives

# importing these connects them
from functrans.api import dynamo  # noqa: F401
from functrans.api.debug import debug_unwrap
from functrans.api.functionalize import functionalize
from functrans.api.jacobians import hessian, hvp, jacfwd, jacfwd_and_value, jacrev, jacrev_and_value
from functrans.api.linear import linear_transpose, linearize
from functrans.api.modules import functional_call, replace_all_batch_norm_modules_, stack_module_state
from functrans.api.rearrange import rearrange
from functrans.api.transforms import grad, grad_and_value, jvp, value_and_grad, vjp
from functrans.api.vmap import chunk_vmap, vmap
from functrans.decompositions import conjugates, foreach, fused, least_squares, recurrent, transformer  # noqa: F401
from functrans.decompositions.table import DECOMPOSITIONS
from functrans.derivatives.table import DERIVATIVES, derivative
from functrans.door import (  # noqa: F401
    at_base,
    autograd_function,
    autograd_inside,
    backward,
    data_attribute,
    dtensor,
    entrances,
    grad_attribute,
    gradient_hooks,
    higher_order,
    leaves,
    sharded_modules,
)
from functrans.errors import FunctransError
from functrans.explanation.comparing import diff
from functrans.explanation.explaining import explain
from functrans.explanation.printing import debug_print
from functrans.explanation.trace import make_trace
from functrans.functionalization import (  # noqa: F401
    collectives,
    hidden_effects,
    numbers_read,
    scalar_index,
    sparse_products,
)
from functrans.interpreters.grad.recording import GRAD_RULES
from functrans.interpreters.jvp.interpreter import JVP_RULES
from functrans.interpreters.vmap.rules import load as load_batching_rules
from functrans.interpreters.vmap.table import BATCHING_RULES, batching_rule
from functrans.operators.info import STAND_INS
from functrans.programs.fusible import watch
from functrans.shipped import jet_rules, laplacian_rules  # noqa: F401
from functrans.shipped.bilaplacian import bilaplacian
from functrans.shipped.bounds import bounds
from functrans.shipped.clipping import clipped_grad, per_example_norms
from functrans.shipped.collectives import all_gather, axis_index, pmax, pmean, pmin, psum
from functrans.shipped.count import count
from functrans.shipped.custom_jvp import custom_jvp
from functrans.shipped.custom_vjp import custom_vjp
from functrans.shipped.custom_vmap import custom_vmap
from functrans.shipped.jet import jet
from functrans.shipped.laplacian import laplacian
from functrans.shipped.lowp import lowp
from functrans.shipped.models import condition, log_density, observe, sample, seed
from functrans.shipped.sanitize import sanitize
from functrans.shipped.sow import plant, reap, sow
from functrans.shipped.sparsity import sparse_hessian, sparse_jacobian, sparsity

derivatives.load()
load_batching_rules()
watch(DERIVATIVES, BATCHING_RULES, DECOMPOSITIONS, GRAD_RULES, JVP_RULES, STAND_INS)

__all__ = [
    "FunctransError",
    "all_gather",
    "axis_index",
    "batching_rule",
    "bilaplacian",
    "bounds",
    "chunk_vmap",
    "clipped_grad",
    "condition",
    "count",
    "custom_jvp",
    "custom_vjp",
    "custom_vmap",
    "debug_print",
    "debug_unwrap",
    "derivative",
    "diff",
    "explain",
    "functional_call",
    "functionalize",
    "grad",
    "grad_and_value",
    "hessian",
    "hvp",
    "jacfwd",
    "jacfwd_and_value",
    "jacrev",
    "jacrev_and_value",
    "jet",
    "jvp",
    "laplacian",
    "linear_transpose",
    "linearize",
    "log_density",
    "lowp",
    "make_trace",
    "observe",
    "per_example_norms",
    "plant",
    "pmax",
    "pmean",
    "pmin",
    "psum",
    "reap",
    "rearrange",
    "replace_all_batch_norm_modules_",
    "sample",
    "sanitize",
    "seed",
    "sow",
    "sparse_hessian",
    "sparse_jacobian",
    "sparsity",
    "stack_module_state",
    "value_and_grad",
    "vjp",
    "vmap",
]

__version__ = "0.1.0"
