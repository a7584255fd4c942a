"""The compiled kernels. Private: the wings are the public face."""

from collections.abc import Callable
from decimal import Decimal
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
def permitted_top_k(
    rows: Any,
    queries: npt.NDArray[np.float64],
    permitted: npt.NDArray[np.uint32],
    k: int,
    scale: npt.NDArray[np.float64] | None = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]: ...
def inverse_lengths(rows: Any) -> npt.NDArray[np.float64]: ...

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
def tilted(log_p: Any, n: int, bias: Any, sharpness: float) -> tuple[float, Any, Any]: ...
def margin_value(text: str) -> float: ...
def margin_sum(a: str, b: str) -> str: ...
def shortest_margin(low: float, high: float) -> str | None: ...

class Deletion:
    def __init__(self, x: _F64, y: _F64, penalty: _F64, logistic: bool) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def theta(self) -> _F64: ...
    @property
    def leverages(self) -> _F64: ...
    def effects(self, q: _F64) -> _F64: ...
    def without(self, records: list[int], method: str) -> _F64: ...
    def worst(self, q: _F64, k: int, corrected: bool) -> list[int]: ...
    def pursue(self, q: _F64, k: int) -> list[int]: ...
    def exhaust(self, q: _F64, k: int, limit: int) -> tuple[float, list[int]]: ...
    def constants(self, k: int) -> dict[str, float]: ...
    def bound(self, q: _F64, k: int, convex: bool) -> tuple[float, _F64] | None: ...

def grow_tree(
    codes: npt.NDArray[np.uint16],
    targets: list[npt.NDArray[np.int64]],
    classes: list[int],
    alpha: float,
    leaves: int,
    leaf_rows: int,
    depth: int | None = None,
    rows: npt.NDArray[np.int64] | None = None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64], _F64]: ...
def forest_probabilities(
    codes: npt.NDArray[np.uint16],
    target: npt.NDArray[np.int64],
    classes: int,
    queries: npt.NDArray[np.uint16],
    trees: int,
    leaves: int,
    leaf_rows: int,
    features: int,
    seed: int,
) -> _F64: ...

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
    def apply_(self, logits: Any, generated: Any, every: bool, mask: bool) -> Any: ...

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
def half_errors(
    x: Any,
    y: Any,
    classes: int,
    queries: Any,
    query_y: Any,
    query_rows: Any,
    options: dict[str, Any],
    halves: int,
    seed: int,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]: ...
def nearest_neighbours(x: Any, k: int, progress: Callable[[int], object] | None = None) -> tuple[Any, Any]: ...
def spanning_tree(x: Any, progress: Callable[[int], object] | None = None) -> tuple[Any, Any]: ...
def draw_rows(state: int, n: int, m: int) -> tuple[npt.NDArray[np.int64], int]: ...
def step_rows(x: Any | None, delta: Any, gradient: Any, limits: dict[str, Any], alpha: float) -> None: ...
def publish_rows(x: Any, delta: Any, out: Any, limits: dict[str, Any], levels: float | None = None) -> None: ...
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
) -> tuple[list[float], list[tuple[int, float]], int, float]: ...
def noise_add(
    x: Any,
    y: Any,
    patterns: Any,
    budget: tuple[str, float, float, float],
    out: Any,
    progress: Callable[[int], object] | None = None,
) -> None: ...
def noise_separable(
    x: Any,
    y: Any,
    centroids: Any,
    mixing: Any,
    shape: tuple[int, int, int, int],
    patch: int,
    seed: int,
    budget: tuple[str, float, float, float],
    out: Any,
    progress: Callable[[int], object] | None = None,
) -> None: ...
def noise_autoregressive(
    x: Any,
    y: Any,
    filters: Any,
    shape: tuple[int, int, int, int],
    crop: int,
    seed: int,
    budget: tuple[str, float, float, float],
    out: Any,
    progress: Callable[[int], object] | None = None,
) -> None: ...
def noise_processes(
    y: Any, filters: Any, shape: tuple[int, int, int, int], crop: int, seed: int
) -> npt.NDArray[np.float32]: ...
def noise_convolve(
    x: Any,
    y: Any,
    kernels: Any,
    shape: tuple[int, int, int, int],
    high: float,
    truncate: bool,
    out: Any,
    progress: Callable[[int], object] | None = None,
) -> None: ...
def noise_set_pixels(
    x: Any,
    y: Any,
    places: list[int],
    colours: Any,
    per: int,
    shape: tuple[int, int, int, int],
    out: Any,
    progress: Callable[[int], object] | None = None,
) -> None: ...
def noise_class_sums(
    x: Any,
    y: Any,
    classes: int,
    bounds: tuple[float, float],
    progress: Callable[[int], object] | None = None,
) -> tuple[list[int], npt.NDArray[np.float64], npt.NDArray[np.float64]]: ...

# measure: matching
def match_phrases(
    responses: list[Any], phrases: list[str], form: str, place: str, limit: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]: ...
def fold_text(text: str) -> str: ...

# measure.text
def text_ngrams(
    texts: list[str],
    options: dict[str, Any],
    min_df: int,
    max_df: int,
    max_features: int | None,
    binary: bool,
) -> tuple[Any, Any, Any, tuple[Any, Any, Any]]: ...
def text_weights(indptr: Any, indices: Any, data: Any, idf: Any, use_idf: bool, sublinear: bool, norm: str) -> Any: ...

class TextVocabulary:
    def __init__(self, terms: Any, ends: Any, options: dict[str, Any]) -> None: ...
    @property
    def columns(self) -> int: ...
    def count(self, texts: list[str], binary: bool) -> tuple[Any, Any, Any]: ...

def sparse_logistic(
    indptr: Any,
    indices: Any,
    data: Any,
    columns: int,
    y: Any,
    classes: int,
    c: float,
    balanced: bool,
    penalize_intercept: bool,
    tol: float,
    max_iter: int,
    progress: Callable[[int], object] | None,
) -> tuple[Any, Any, float, float, int, bool]: ...
def sparse_decision(indptr: Any, indices: Any, data: Any, coef: Any, intercept: Any) -> Any: ...

class TsetlinRows:
    @staticmethod
    def dense(x: Any, negations: bool) -> TsetlinRows: ...
    @staticmethod
    def sparse(indptr: Any, indices: Any, data: Any, features: int, negations: bool) -> TsetlinRows: ...
    @property
    def rows(self) -> int: ...

class TsetlinBank:
    def __init__(
        self, options: dict[str, Any], states: Any | None = None, weights: Any | None = None, epochs: int = 0
    ) -> None: ...
    @property
    def epochs(self) -> int: ...
    def learn(self, x: TsetlinRows, y: Any, epochs: int, progress: Callable[[int], object] | None) -> None: ...
    def votes(self, x: TsetlinRows, clip: bool) -> Any: ...
    def rules(self) -> list[tuple[int, int, list[int]]]: ...
    def states(self) -> tuple[Any, Any]: ...

def text_words(
    texts: list[str], options: dict[str, Any], words: list[str] | None, min_count: int
) -> tuple[Any, Any, Any, list[str]]: ...
def document_vectors(
    words: Any, ends: Any, counts: Any, options: dict[str, Any], progress: Callable[[int], object] | None
) -> tuple[Any, Any, Any]: ...
def infer_vectors(words: Any, ends: Any, counts: Any, context: Any, options: dict[str, Any]) -> Any: ...
def row_cosines(x: Any, queries: Any) -> Any: ...
def local_outlier_factor(x: Any, neighbors: int) -> Any: ...

# checkpoint

_Tensor = tuple[str, str, list[int], int, int]
_Shard = tuple[str, str, int, list[_Tensor], list[tuple[str, str]]]

def checkpoint_open(path: str) -> tuple[str, str | None, list[_Shard]]: ...
def checkpoint_header(path: str) -> _Shard: ...

class ImportanceFile:
    def __init__(self, path: str) -> None: ...
    @property
    def tensors(self) -> list[_Tensor]: ...

class TensorEdit:
    @staticmethod
    def ablate(
        last_axis: bool, q: _F64, scale: float, keep: str | None, part: tuple[int, int, int] | None = None
    ) -> TensorEdit: ...
    @staticmethod
    def scale(factor: float, part: tuple[int, int, int] | None = None) -> TensorEdit: ...
    @staticmethod
    def dampen(
        forget: ImportanceFile,
        retain: ImportanceFile,
        name: str,
        offset: int,
        count: int,
        alpha: float,
        lam: float,
        forget_count: float,
        retain_count: float,
    ) -> TensorEdit: ...

class ShardJob:
    def __init__(
        self,
        source: str,
        *,
        dest: str | None = None,
        in_place: bool = False,
        patch: str | None = None,
        undo: str | None = None,
        edits: dict[str, list[TensorEdit]] | None = None,
        keep: list[tuple[str, str]] | None = None,
        record: str | None = None,
    ) -> None: ...

def checkpoint_run(
    jobs: list[ShardJob], memory: int, hash_all: bool = True, progress: Callable[[int], object] | None = None
) -> list[str]: ...
def journal_save(source: str, ranges: list[tuple[int, int]], journal: str) -> None: ...
def journal_rollback(journal: str, target: str) -> None: ...
def sha256_file(path: str) -> str: ...
def patch_tensors(path: str) -> list[str]: ...

# measure

def decimal_ratio(k: int, n: int, scale: int, digits: int, rounding: str) -> Decimal: ...
def decimal_difference(
    first: tuple[int, int], second: tuple[int, int], scale: int, digits: int, rounding: str
) -> Decimal: ...
def decimal_shares(counts: list[int], digits: int) -> list[Decimal]: ...
def decimal_compare(k: int, n: int, limit: Decimal) -> int: ...
def text_overlaps(candidates: list[str], references: list[str], unicode: bool) -> list[tuple[int, int, int]]: ...
def bootstrap_sums(
    values: list[npt.NDArray[np.float64]],
    weights: list[npt.NDArray[np.float64] | None],
    resamples: int,
    seed: int,
    progress: Callable[[int], object] | None = None,
) -> npt.NDArray[np.float64]: ...
def hsic(
    x: Any,
    y: Any,
    gamma_x: float,
    gamma_y: float,
    unbiased: bool,
    progress: Callable[[int], object] | None = None,
) -> tuple[float, float, float]: ...

class CrossMoments:
    def __init__(self, p: int, q: int) -> None: ...
    def update(self, x: Any, y: Any, progress: Callable[[int], object] | None = None) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def widths(self) -> tuple[int, int]: ...
    def dependence(self, unbiased: bool) -> tuple[float, float, float]: ...
    def matrices(
        self,
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64]]: ...
