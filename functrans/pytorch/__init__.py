"""What is used of PyTorch beyond its documented names, and what is switched in a thread."""
