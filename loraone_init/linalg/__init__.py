"""The linear algebra of the method: the truncated SVD with its accuracy, the factors made of it, angles between
subspaces, products in full precision, seeds.

May import none of the other packages.
"""

from __future__ import annotations

from .factors import LoraPair, spectral_init
from .layer_gradient import LayerGradient
from .svd import TruncatedSVD, truncated_svd

__all__ = ["LayerGradient", "LoraPair", "TruncatedSVD", "spectral_init", "truncated_svd"]
