"""Operators that take functions: torch.cond, while_loop, scan, associative_scan, map; flex_attention.

NOTE [Control flow]
Each is *defined* by plain ``torch`` code (definitions.py) that runs at the level where it was called: a Python ``if``
or loop over the functions that it was given, whatever these capture. So every transform sees operators, and has its
meaning for them already. Two things need more. A new transform may want to see the whole: a rule in its table comes
first. And a truth value that differs between the examples of a vmap does not choose one branch: both are run and
chosen from, each at a level of its own (NOTE [Branches] in interpreters/branch.py).

They come in by the door: called on anything inside a transform, PyTorch hands them to its topmost mode. What stands in
front of the operators (``torch.cond`` compiles itself) is run as it was written; see api/compiled.py.
"""
