"""The door: the one place where operators enter, from user code to the interpreter stack.

There are two ways to it. The whole of PyTorch comes through ``__torch_dispatch__`` (torch_dispatch.py): PyTorch parses
the call, walks its dispatcher, and hands over an operator. The short way is ``__torch_function__`` (torch_function.py):
PyTorch hands over the function that was called (``torch.sin``) as soon as it sees a wrapper among the arguments, and
Python's operators (``x * y``) are methods of the wrapper to begin with. Frequent functions enter there (entrances.py),
as a pointwise program or as the operator that they are; everything else goes back to PyTorch's parser and comes the
first way. ``autograd.Function.apply`` has no dispatch of its own and is part of the door too (autograd_function.py).
"""
