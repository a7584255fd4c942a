"""The compiled kernels. Private: the wings are the public face."""

from collections.abc import Callable
from typing import Any

__version__: str

def get_num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
def simd_level() -> tuple[str, str]: ...
def set_simd_level(name: str) -> str: ...
def describe(x: Any) -> tuple[int, str, list[int], list[int], bool]: ...
def _spin(seconds: float, progress: Callable[[int], object] | None = None) -> None: ...
def _copy(a: Any, b: Any) -> None: ...
def _triad(a: Any, b: Any, c: Any) -> None: ...

# forget

# directions

# decoding

# protect
def published_error(
    x: Any,
    y: Any,
    classes: int,
    options: dict[str, Any],
    gradient: bool,
    posterior: bool,
    block: int | None = None,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]: ...
def cross_error(
    x: Any,
    y: Any,
    classes: int,
    queries: Any,
    query_y: Any,
    query_rows: Any,
    options: dict[str, Any],
    centre_gradient: str,
    query_gradient: bool,
    posterior: bool,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]: ...
def find_bandwidth(
    x: Any,
    y: Any,
    classes: int,
    rule: str,
    perplexity: float,
    progress: Callable[[int], object] | None = None,
) -> float: ...
def ascend(
    x: Any,
    y: Any,
    classes: int,
    out: Any,
    options: dict[str, Any],
    plan: dict[str, Any],
    progress: Callable[[int], object] | None = None,
) -> tuple[list[float], list[tuple[int, float]], int]: ...
