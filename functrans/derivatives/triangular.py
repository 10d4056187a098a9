"""``triangular_solve``, in whose forward mode PyTorch lets the triangle have a tangent that is not read."""

from __future__ import annotations

import torch
from torch import Tensor

from functrans.decompositions import DECOMPOSITIONS

aten = torch.ops.aten


@DECOMPOSITIONS.register(aten.triangular_solve.default)
def triangular_solve(
    self: Tensor, A: Tensor, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> tuple[Tensor, Tensor]:
    matrix, upper = (A.mT, not upper) if transpose else (A, upper)
    solution = torch.linalg.solve_triangular(matrix, self, upper=upper, unitriangular=unitriangular)
    return solution, A.expand(*solution.shape[:-2], *A.shape[-2:]).clone()
