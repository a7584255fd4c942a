"""Training and evaluation modes of torch modules, put back whatever happens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def modes_kept(*models: Any) -> Iterator[None]:
    """Each submodule's own mode is restored after."""
    modes = [(m, m.training) for model in models for m in model.modules()]
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Eval mode inside; each submodule's own mode is restored after."""
    with modes_kept(*models):
        for model in models:
            model.eval()
        yield
