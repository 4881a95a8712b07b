"""Differentiable optimal-transport losses with exact gradients, also by learned marginals."""

import warnings as _warnings

from otloss import plot
from otloss.assignment import assign, barycentric
from otloss.backends import backends, use_backend
from otloss.backends import cpu as _cpu
from otloss.cost import cosine_cost, sqeuclidean_cost
from otloss.cvsim import CVSIM
from otloss.losses import CosineCost, CosineSinkhornLoss, FeatureSinkhornLoss, SinkhornLoss
from otloss.operators import ConvergenceWarning
from otloss.optiml import MarginalCollapseWarning, OPTiMLLoss, OPTiMLOutput
from otloss.output import SinkhornOutput
from otloss.regularizers import CovarianceLoss, VarianceLoss
from otloss.sinkhorn import cosine_sinkhorn, feature_sinkhorn, sinkhorn

__version__ = "0.2.0"

__all__ = [
    "CVSIM",
    "ConvergenceWarning",
    "CosineCost",
    "CosineSinkhornLoss",
    "CovarianceLoss",
    "FeatureSinkhornLoss",
    "MarginalCollapseWarning",
    "OPTiMLLoss",
    "OPTiMLOutput",
    "SinkhornLoss",
    "SinkhornOutput",
    "VarianceLoss",
    "assign",
    "backends",
    "barycentric",
    "cosine_cost",
    "cosine_sinkhorn",
    "feature_sinkhorn",
    "plot",
    "sinkhorn",
    "sqeuclidean_cost",
    "use_backend",
]

# Asking all of backends() would start CUDA's driver, after which a forked process cannot use it.
if _cpu.status() is not None:
    _warnings.warn(
        f"otloss works without its C++ kernels, but slowly: the backend cpu is off: {_cpu.status()}",
        RuntimeWarning,
        stacklevel=2,
    )
