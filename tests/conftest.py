"""What holds for every test."""

import torch

# The tensors are so small that the threads of one operator would only wait for each other, and the more so
# when several processes run tests.
torch.set_num_threads(1)
