"""Differentiable optimal-transport losses with exact gradients, also by learned marginals."""

from otloss.backends import backends, use_backend
from otloss.cost import cosine_cost
from otloss.operators import ConvergenceWarning
from otloss.sinkhorn import SinkhornOutput, cosine_sinkhorn, sinkhorn

__version__ = "0.1.0"

__all__ = [
    "ConvergenceWarning",
    "SinkhornOutput",
    "backends",
    "cosine_cost",
    "cosine_sinkhorn",
    "sinkhorn",
    "use_backend",
]
