"""The interpreter stack, the wrapper tensor, and an operator's way down; what every other room is built on.

The modules, in the order to read them: ``interpreter`` and ``stack`` (what a running transform is, how it is entered),
``tensor`` (the wrapper), ``dispatch`` (how an operator goes down). These four tell the story. Beside them stand
``thread_state`` (what is switched with the stack), ``operators`` and ``rules`` (what is known of an operator, tables of
rules), and ``errors``.
"""
