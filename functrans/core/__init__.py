"""The interpreter stack, the wrapper tensor, and an operator's way down; what every other room is built on.

The modules, in the order to read them: ``thread_state`` and ``stack`` (what is on the stack, what is switched with it),
``tensor`` (the wrapper), ``operators`` and ``rules`` (what is known of an operator, tables of rules), ``dispatch`` (how
an operator goes down).
"""
