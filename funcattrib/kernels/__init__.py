"""Kernels with explicit leading example axes: attention, experts and the fused cross-entropy head.

Each is an ``autograd.Function`` whose ``vmap`` rule folds the vmapped axis into the example axis, so one
kernel serves ``vmap(grad(...))`` and ordinary batched autograd.
"""

from funcattrib.kernels.attention import attention
from funcattrib.kernels.attention_interface import register_attention
from funcattrib.kernels.experts import expert_linear, register_experts
from funcattrib.kernels.linear_cross_entropy import linear_cross_entropy

__all__ = ["attention", "expert_linear", "linear_cross_entropy", "register_attention", "register_experts"]
