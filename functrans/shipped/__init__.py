"""Functions and transforms that torch.func does not have, of the kinds that ``functrans.extend`` is for."""
