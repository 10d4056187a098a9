"""An operator's way down the stack. In the order to read them: ``interpreter`` and ``stack`` (what a running transform
is, how it is entered), ``tensor`` (the wrapper), ``dispatch`` (to whom an operator goes, and how it is lowered).
"""
