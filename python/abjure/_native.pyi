"""The compiled kernels. Private: the wings are the public face."""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

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
def token_logprobs(logits: Any, labels: Any, ignore_index: int, out: Any, lse: Any) -> None: ...
def token_logprobs_backward(
    logits: Any, labels: Any, lse: Any, upstream: Any, grad: Any, ignore_index: int
) -> None: ...

class Patch:
    @staticmethod
    def from_entries(shape: list[int], dtype: str, indices: npt.NDArray[np.uint64], old: npt.NDArray[Any]) -> Patch: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def shape(self) -> list[int]: ...
    @property
    def dtype(self) -> str: ...
    def __len__(self) -> int: ...
    def entries(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[Any]]: ...
    def check(self, weights: Any) -> None: ...
    def restore(self, weights: Any) -> None: ...

def dampen(
    weights: Any,
    forget: Any,
    retain: Any,
    alpha: float,
    lam: float,
    exponent: float,
    max_factor: float,
    min_factor: float,
    forget_count: float,
    retain_count: float,
    record: bool,
    dry_run: bool,
) -> tuple[tuple[int, int, int], Patch | None]: ...
def dampen_all(
    weights: list[Any],
    forget: list[Any],
    retain: list[Any],
    alpha: float,
    lam: float,
    exponent: float,
    max_factor: float,
    min_factor: float,
    forget_count: float,
    retain_count: float,
    record: bool,
    dry_run: bool,
) -> list[tuple[tuple[int, int, int], Patch | None]]: ...
def ratio_percentile(
    forget: list[Any], retain: list[Any], percentile: float, forget_count: float, retain_count: float
) -> tuple[float, int, int, int]: ...
def check_importances(forget: Any, retain: Any) -> None: ...
def selection_curve(
    forget: Any, retain: Any, alphas: list[float], forget_count: float, retain_count: float
) -> list[int]: ...
def fisher_check(sum: Any, grad: Any, weights: list[float], power: int) -> None: ...
def fisher_accumulate(sum: Any, grad: Any, weights: list[float], power: int, checked: bool = False) -> None: ...
def fisher_combine(sum: Any, other: Any, subtract: bool, check_only: bool = False) -> None: ...

# directions

_F64 = npt.NDArray[np.float64]

def orthonormal(vectors: _F64) -> _F64: ...
def check_weight(weight: Any) -> None: ...
def orthogonalize_leading(weight: Any, q: _F64, scale: float, keep: str | None) -> tuple[float, float, int]: ...
def probe_fit(
    x: Any,
    y: _F64,
    strengths: list[float],
    squared: bool,
    balanced: bool,
    tol: float,
    max_iter: int,
    fold: npt.NDArray[np.int64] | None,
) -> tuple[list[list[tuple[_F64, float, float, float, float, int, bool]]], _F64 | None]: ...
def probe_decision(x: Any, coef: _F64, intercept: float) -> _F64: ...
def count_experts(
    topk_ids: npt.NDArray[np.int64],
    weights: Any | None,
    owners: npt.NDArray[np.int64] | None,
    prompts: int,
    experts: int,
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], _F64 | None]: ...

class Edit:
    def __init__(
        self,
        width: int,
        left: _F64 | None = None,
        *,
        right: _F64 | None = None,
        origin: _F64 | None = None,
        scale: float = 1.0,
        shift: _F64 | None = None,
        keep_norm: bool = False,
    ) -> None: ...
    @property
    def width(self) -> int: ...
    @property
    def rank(self) -> int: ...
    def apply_(self, x: Any) -> None: ...
    def apply(self, x: Any, out: Any) -> None: ...
    def coefficients(self, x: Any, out: Any) -> None: ...

class Moments:
    def __init__(self, width: int, second: bool = False) -> None: ...
    @staticmethod
    def from_parts(weight: float, mean: _F64, second: _F64 | None = None) -> Moments: ...
    @property
    def width(self) -> int: ...
    @property
    def weight(self) -> float: ...
    @property
    def mean(self) -> _F64: ...
    @property
    def second(self) -> _F64 | None: ...
    def update(self, x: Any, weights: _F64 | None, skip: bool) -> int: ...
    def merge(self, other: Moments) -> None: ...
    def copy(self) -> Moments: ...

# decoding
def bias_(logits: Any, ids: Any, bias: Any, indptr: Any = None) -> None: ...
def force_(logits: Any, ids: Any) -> None: ...
def row_lse(logits: Any, temperature: float = 1.0) -> Any: ...
def row_margin(logits: Any, groups: list[list[int]], temperature: float = 1.0) -> Any: ...
def row_max_gap(logits: Any, groups: list[list[int]]) -> Any: ...

class RefusalGate:
    def __init__(
        self,
        categories: list[list[int]],
        bias: list[float],
        thresholds: list[float | None],
        rule: str,
        on_no_fire: int | str,
        temperature: float,
    ) -> None: ...
    def apply_(self, logits: Any, positions: Any) -> Any: ...

class ByteVocabulary:
    def __init__(self, tokens: list[bytes], fold: bool, transparent: bool) -> None: ...
    @property
    def size(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

class PhraseAutomaton:
    def __init__(
        self,
        ids: Any,
        lengths: Any,
        vocab_size: int | None,
        max_length: int,
        penalty: tuple[float, float] | None = None,
    ) -> None: ...
    @staticmethod
    def from_bytes(
        phrases: list[bytes],
        vocabulary: ByteVocabulary,
        word: bool,
        max_length: int,
        penalty: tuple[float, float] | None = None,
    ) -> PhraseAutomaton: ...
    @property
    def reach(self) -> int: ...
    @property
    def phrases(self) -> int: ...
    @property
    def nodes(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def edits(self, context: Any, begin: Any) -> tuple[Any, Any, Any]: ...
    def apply_(
        self, logits: Any, input_ids: Any, start: int, begin: Any | None = None, dead_end: int | None = None
    ) -> None: ...

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

# measure: matching
def match_phrases(
    responses: list[Any], phrases: list[str], form: str, place: str, limit: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]: ...
def fold_text(text: str) -> str: ...
