"""The transforms: what grad, jvp and vmap do with an operator, and PyTorch's own derivative where no rule has one."""
