"""Know, with error bars, whether any of it worked.

Similarity of representations (:func:`cka`, :class:`LinearCKA`), nearest-neighbour transfer (:func:`knn_transfer`), the
tug-of-war score (:func:`tug_of_war`) and membership inference (:func:`entropy_mia`, :func:`svc_mia`).
"""

from __future__ import annotations

from .membership import SVC_FEATURES, entropy_mia, modified_entropy, svc_mia
from .similarity import LinearCKA, cka
from .transfer import Transfer, knn_transfer
from .tug_of_war import tug_of_war

__all__ = [
    "SVC_FEATURES",
    "LinearCKA",
    "Transfer",
    "cka",
    "entropy_mia",
    "knn_transfer",
    "modified_entropy",
    "svc_mia",
    "tug_of_war",
]
