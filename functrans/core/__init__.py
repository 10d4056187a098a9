"""An operator's way down the stack. In the order to read them: ``interpreter`` and ``stack`` (what a running transform
is, how it is entered), ``tensor`` (the wrapper), ``dispatch`` (to whom an operator goes, and how it is lowered). What a
transform does with an operator is its ``process``, in functrans/interpreters; pointwise code such as ``torch.sin`` goes
the same way as a program (functrans/programs), by the ``programs.py`` beside each ``interpreter.py`` there.
"""
