"""Functions and transforms that torch.func does not have, made of what ``functrans.extend`` offers to everybody."""
