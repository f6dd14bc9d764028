"""The cost of a run: time, storage and memory from a model's sizes alone, before anything is computed."""

from funcattrib.planning.estimate import Estimate, Machine, Run, estimate
from funcattrib.planning.sizes import Matrix, Sizes, sizes_of

__all__ = ["Estimate", "Machine", "Matrix", "Run", "Sizes", "estimate", "sizes_of"]
