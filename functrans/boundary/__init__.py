"""Tensors that meet the stack from outside: leftovers, the user's subclasses, what was just made."""
