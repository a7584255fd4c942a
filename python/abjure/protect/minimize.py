"""Vertical data minimisation: every column only as finely as the task needs, and what is still given away."""

from __future__ import annotations

import html
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ..errors import ArgumentError, DegenerateError, DTypeError, ShapeError
from ..measure import Rate, rate
from ._tables import Table, read_labels, read_table, write_table
from ._trees import forest, grow, naive_bayes

Array = np.ndarray[Any, Any]
Method = Literal["tree", "uniform", "feature_selection", "model_tree", "iterative", "k_anonymity"]
METHODS = ("tree", "uniform", "feature_selection", "model_tree", "iterative", "k_anonymity")
#: Codes that a column of numbers is cut into at most, before a tree looks at it.
FINE = 256
#: Codes in which users and adversaries read a column that is known in full.
RAW = 64
ADVERSARIES = {
    "A1": "the release",
    "A2": "the release, judged where it is most certain",
    "A3": "the release and every attribute that is not sensitive, in full",
    "A4": "the release and every other attribute, in full",
    "A5": "the release and some of the other sensitive attributes, averaged over how many",
}


@dataclass(frozen=True)
class Buckets:
    """How one column is coarsened: numbers by borders (a value at a border belongs below), categories by groups."""

    name: str
    #: Sorted borders of a column of numbers, else None.
    borders: Array | None
    #: Group of each known category, else None. Others go to the largest group.
    groups: dict[Any, int] | None
    #: Values released as they are.
    kept: bool
    count: int
    #: Median, or most frequent category, of each bucket in the data of the fit.
    representatives: list[Any]
    largest: int

    @property
    def collected(self) -> bool:
        """Whether the column tells anything."""
        return self.count > 1

    @property
    def labels(self) -> list[str]:
        """What each bucket holds."""
        if self.groups is not None:
            members: list[list[str]] = [[] for _ in range(self.count)]
            for value, group in self.groups.items():
                members[group].append(str(value))
            return ["{" + ", ".join(m) + "}" for m in members]
        assert self.borders is not None
        edges = ["-inf", *(f"{b:.6g}" for b in self.borders), "inf"]
        return [f"({a}, {b}]" for a, b in itertools.pairwise(edges)]

    def codes(self, values: Array) -> Array:
        """Bucket of each value."""
        if self.groups is not None:
            return np.array([self.groups.get(v, self.largest) for v in values.tolist()], dtype=np.int64)
        return np.asarray(np.searchsorted(self.borders, values, side="left"), dtype=np.int64)  # type: ignore[call-overload]

    def release(self, values: Array, output: str) -> Array:
        if self.kept and output == "representative":
            return values
        codes = self.codes(values)
        if output == "code":
            return codes
        names = self.labels if output == "label" else self.representatives
        numeric = output == "representative" and self.groups is None
        return np.array(names, dtype=np.float64 if numeric else object)[codes]


def _buckets(
    name: str, values: Array, borders: Array | None, groups: dict[Any, int] | None, kept: bool = False
) -> Buckets:
    count = len(borders) + 1 if borders is not None else max(groups.values()) + 1  # type: ignore[union-attr]
    made = Buckets(name, borders, groups, kept, count, [], 0)
    codes = made.codes(values)
    sizes = np.bincount(codes, minlength=count)
    representatives: list[Any] = []
    for c in range(count):
        inside = values[codes == c]
        if groups is not None:
            found, sums = np.unique(inside.astype(str), return_counts=True)
            text = found[np.argmax(sums)] if len(found) else None
            representatives.append(next((v for v in groups if str(v) == text), next(iter(groups))))
        elif len(inside):
            # A value that occurs, also between two.
            representatives.append(float(np.sort(inside)[(len(inside) - 1) // 2]))
        else:
            assert borders is not None
            representatives.append(float(borders[min(c, len(borders) - 1)]))
    return Buckets(name, borders, groups, kept, count, representatives, int(sizes.argmax()))


def _order(values: Array, y: Array, classes: int) -> list[Any]:
    """Categories in the order of their share of the commonest class: binary splits along it are the best ones."""
    # `repr` parts 1 from "1", and sorts what Python does not compare.
    known = sorted(set(values.tolist()), key=repr)
    common = int(np.bincount(y, minlength=classes).argmax())
    target = (y == 1) if classes == 2 else (y == common)
    share = dict.fromkeys(known, 0.0)
    count = dict.fromkeys(known, 0)
    for v, t in zip(values.tolist(), target.tolist(), strict=True):
        share[v] += t
        count[v] += 1
    return sorted(known, key=lambda v: (share[v] / count[v], repr(v)))


@dataclass(frozen=True)
class _Fine:
    """One column as ordered codes, and how thresholds on the codes become buckets."""

    name: str
    values: Array
    #: Borders between neighbouring codes, or categories in order.
    borders: Array | None
    order: list[Any] | None

    @classmethod
    def of(cls, name: str, values: Array, y: Array, classes: int, limit: int = FINE) -> _Fine:
        if values.dtype.kind != "f":
            return cls(name, values, None, _order(values, y, classes))
        distinct = np.unique(values)
        borders = distinct[:-1] + (distinct[1:] - distinct[:-1]) / 2
        # The middle of two neighbouring floats may round to the upper one.
        borders = np.where(borders >= distinct[1:], distinct[:-1], borders)
        if len(borders) >= limit:
            at = np.searchsorted(borders, np.quantile(values, np.arange(1, limit) / limit))
            borders = borders[np.unique(np.minimum(at, len(borders) - 1))]
        return cls(name, values, borders, None)

    @property
    def size(self) -> int:
        return len(self.borders) + 1 if self.borders is not None else len(self.order or [])

    def buckets(self, cuts: Sequence[int], kept: bool = False) -> Buckets:
        """Buckets between the codes ``cuts`` and their next."""
        cuts = sorted(set(cuts))
        if self.borders is not None:
            return _buckets(self.name, self.values, self.borders[np.array(cuts, dtype=np.int64)], None, kept)
        assert self.order is not None
        groups = {v: int(np.searchsorted(cuts, i, side="left")) for i, v in enumerate(self.order)}
        return _buckets(self.name, self.values, None, groups, kept)

    def codes(self) -> Array:
        return self.buckets(range(self.size - 1)).codes(self.values)


class ColumnMinimizer:
    """Coarsens columns so that a task can still be learnt and sensitive attributes less; scikit-learn's interface.

    Args:
        method:

            * ``"tree"``: the privacy-aware tree (PAT; Staab, Jovanović, Balunović and Vechev, arXiv 2311.10500). A
              decision tree whose impurity is ``(1 - α) Gini(y) + α (½ - mean Gini(s))`` grows best first; every
              threshold it uses anywhere becomes a border of that column, and a column it does not use is not collected.
            * ``"uniform"``: ``buckets`` of equal width.
            * ``"feature_selection"``: the ``keep`` columns of the largest ANOVA F as they are, no others.
            * ``"model_tree"``: the shallowest plain tree whose buckets keep ``target`` of the accuracy (the idea of
              Goldsteen et al., arXiv 2008.04113).
            * ``"iterative"``: from 8 quantile buckets per column, halve the column that costs least, as long as
              ``target`` of the accuracy is kept.
            * ``"k_anonymity"``: from 8 quantile buckets, halve the column with the most of them until every release is
              shared by ``k`` rows.
        sensitive: columns of ``X`` that are sensitive, by name or place. They may themselves be released, coarsened.
        alpha: weight of privacy in ``"tree"``: 0 is a plain tree, towards 1 leaves mix the sensitive attributes.
        max_leaf_nodes: of ``"tree"``.
        min_samples_leaf: of trees; None is 1/50 of the rows, at most 100.
        min_bucket: buckets with fewer rows than this part of the average are merged into the smaller neighbour.
        buckets, keep, target, k: see ``method``.
        sensitive_bins: quantile classes that a sensitive column of numbers is cut into.
        output: ``transform`` gives a ``"representative"`` of each bucket (in the column's own units), its ``"code"``,
            or its ``"label"``.
        drop: leave out columns that are not collected.
        seed: of what is drawn.

    Attributes:
        buckets_: one :class:`Buckets` per column.
        classes_: labels of the task.
    """

    def __init__(
        self,
        method: Method = "tree",
        *,
        sensitive: Sequence[int | str] = (),
        alpha: float = 0.7,
        max_leaf_nodes: int = 20,
        min_samples_leaf: int | None = None,
        min_bucket: float = 0.0,
        buckets: int = 5,
        keep: int = 2,
        target: float = 0.95,
        k: int = 10,
        sensitive_bins: int = 4,
        output: Literal["representative", "code", "label"] = "representative",
        drop: bool = True,
        seed: int = 0,
    ) -> None:
        self.method = method
        self.sensitive = sensitive
        self.alpha = alpha
        self.max_leaf_nodes = max_leaf_nodes
        self.min_samples_leaf = min_samples_leaf
        self.min_bucket = min_bucket
        self.buckets = buckets
        self.keep = keep
        self.target = target
        self.k = k
        self.sensitive_bins = sensitive_bins
        self.output = output
        self.drop = drop
        self.seed = seed

    _PARAMETERS = (
        "method", "sensitive", "alpha", "max_leaf_nodes", "min_samples_leaf", "min_bucket", "buckets", "keep", "target",
        "k", "sensitive_bins", "output", "drop", "seed",
    )  # fmt: skip

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments."""
        return {name: getattr(self, name) for name in self._PARAMETERS}

    def set_params(self, **params: Any) -> ColumnMinimizer:
        """Sets constructor's arguments.

        Raises:
            ArgumentError: an argument that does not exist.
        """
        for name, value in params.items():
            if name not in self._PARAMETERS:
                raise ArgumentError(f"{name}: expected a parameter of {', '.join(self._PARAMETERS)}")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        plain = type(self)().get_params()
        changed = {n: v for n, v in self.get_params().items() if repr(v) != repr(plain[n])}
        return f"ColumnMinimizer({', '.join(f'{n}={v!r}' for n, v in changed.items())})"

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import Tags, TargetTags, TransformerTags
        from sklearn.utils._tags import InputTags

        return Tags(
            estimator_type=None,
            target_tags=TargetTags(required=True),
            transformer_tags=TransformerTags(preserves_dtype=[]),
            input_tags=InputTags(string=True, categorical=True),
        )

    def _check(self) -> None:
        def whole(name: str, least: int) -> None:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise ArgumentError(f"{name}: expected a whole number of at least {least}, got {value!r}")

        if self.method not in METHODS:
            raise ArgumentError(f"method: expected one of {', '.join(map(repr, METHODS))}, got {self.method!r}")
        if self.output not in ("representative", "code", "label"):
            raise ArgumentError(f'output: expected "representative", "code" or "label", got {self.output!r}')
        for name, least in (("max_leaf_nodes", 2), ("buckets", 1), ("keep", 1), ("k", 2), ("sensitive_bins", 2)):
            whole(name, least)
        if self.min_samples_leaf is not None:
            whole("min_samples_leaf", 1)
        for name, high in (("alpha", 1.0), ("min_bucket", 1.0), ("target", 1.0)):
            value = getattr(self, name)
            if not 0 <= value <= high:
                raise ArgumentError(f"{name}: expected a number from 0 to {high:g}, got {value!r}")

    def fit(self, X: Any, y: Any, sensitive: Any = None) -> ColumnMinimizer:
        """Finds the buckets of every column.

        Args:
            X: table of pandas, polars or Arrow, mapping of columns, or ``(n, d)`` array: numbers and categories. A
                missing category is a category; a missing number is refused.
            y: ``(n,)`` labels of the task.
            sensitive: more sensitive attributes, which are not released: a table, or ``(n,)`` labels.

        Raises:
            ShapeError, DTypeError, NonFiniteError: malformed input.
            ArgumentError: a parameter outside its domain, or a sensitive column that is not there.
            DegenerateError: one class only.
        """
        self._check()
        if y is None:
            raise ArgumentError("y: this estimator requires y to be passed, but the target y is None")
        table = _table(X)
        if table.rows < 2:
            raise ShapeError("X: expected at least 2 rows, got 1 sample")
        self.classes_, codes = _classes(y, table.rows)
        self.n_features_in_ = len(table.names)
        self._names = table.names
        if table.kind not in ("numpy", "torch"):
            self.feature_names_in_ = np.array(table.names, dtype=object)
        elif hasattr(self, "feature_names_in_"):
            del self.feature_names_in_
        classes = len(self.classes_)
        known = [n for n, _, _ in sensitive_classes(table, self.sensitive, sensitive, self.sensitive_bins)]
        self.sensitive_names_ = known
        hidden = sensitive_classes(table, self.sensitive, sensitive, self.sensitive_bins)
        fine = [_Fine.of(n, c, codes, classes) for n, c in zip(table.names, table.columns, strict=True)]
        leaf = self.min_samples_leaf or min(100, max(1, table.rows // 50))
        find = {
            "tree": self._tree,
            "uniform": self._uniform,
            "feature_selection": self._select,
            "model_tree": self._model_tree,
            "iterative": self._iterative,
            "k_anonymity": self._anonymize,
        }[self.method]
        found = find(fine, codes, classes, [(c, m) for _, c, m in hidden], leaf)
        self.buckets_ = [
            _merge(b, f.values, self.min_bucket) if not b.kept else b for b, f in zip(found, fine, strict=True)
        ]
        return self

    def _tree(
        self, fine: list[_Fine], y: Array, classes: int, hidden: list[tuple[Array, int]], leaf: int
    ) -> list[Buckets]:
        tree = grow(
            np.stack([f.codes() for f in fine], axis=1),
            [y, *(c for c, _ in hidden)],
            [classes, *(m for _, m in hidden)],
            alpha=self.alpha if hidden else 0.0,
            max_leaf_nodes=self.max_leaf_nodes,
            min_samples_leaf=leaf,
        )
        return [f.buckets(tree.cuts(j)) for j, f in enumerate(fine)]

    def _uniform(self, fine: list[_Fine], *_: Any) -> list[Buckets]:
        found = []
        for f in fine:
            if f.borders is not None:
                low, high = float(f.values.min()), float(f.values.max())
                edges = np.unique(np.linspace(low, high, self.buckets + 1)[1:-1]) if high > low else np.empty(0)
                found.append(_buckets(f.name, f.values, edges, None))
            else:
                parts = np.array_split(np.arange(f.size), min(self.buckets, f.size))
                found.append(f.buckets([int(p[-1]) for p in parts[:-1]]))
        return found

    def _select(self, fine: list[_Fine], y: Array, classes: int, *_: Any) -> list[Buckets]:
        scores = [_anova(f.values if f.borders is not None else f.codes(), y, classes) for f in fine]
        best = set(np.argsort([-s for s in scores], kind="stable")[: self.keep].tolist())
        return [f.buckets(range(f.size - 1), kept=True) if j in best else f.buckets([]) for j, f in enumerate(fine)]

    def _model_tree(self, fine: list[_Fine], y: Array, classes: int, _: Any, leaf: int) -> list[Buckets]:
        codes = np.stack([f.codes() for f in fine], axis=1)
        goal = self.target * self._accuracy(codes, y, classes)
        for depth in range(1, 11):
            tree = grow(codes, [y], [classes], max_leaf_nodes=2**depth, max_depth=depth, min_samples_leaf=leaf)
            found = [f.buckets(tree.cuts(j)) for j, f in enumerate(fine)]
            released = np.stack([b.codes(f.values) for b, f in zip(found, fine, strict=True)], axis=1)
            if self._accuracy(released, y, classes) >= goal:
                break
        return found

    def _iterative(self, fine: list[_Fine], y: Array, classes: int, *_: Any) -> list[Buckets]:
        cuts = [_quantile_cuts(f, 8) for f in fine]
        columns = [f.buckets(c).codes(f.values) for f, c in zip(fine, cuts, strict=True)]
        goal = self.target * self._accuracy(np.stack([f.codes() for f in fine], axis=1), y, classes)
        while True:
            candidates = []
            for j, f in enumerate(fine):
                if cuts[j]:
                    coarser = cuts[j][1::2]
                    column = f.buckets(coarser).codes(f.values)
                    trial = np.stack([column if i == j else c for i, c in enumerate(columns)], axis=1)
                    candidates.append((-self._accuracy(trial, y, classes), j, coarser, column))
            if not candidates:
                break
            lost, j, coarser, column = min(candidates, key=lambda c: c[:2])
            if -lost < goal:
                break
            cuts[j], columns[j] = coarser, column
        return [f.buckets(c) for f, c in zip(fine, cuts, strict=True)]

    def _anonymize(self, fine: list[_Fine], *_: Any) -> list[Buckets]:
        if self.k > len(fine[0].values):
            raise ArgumentError(f"k: expected at most the {len(fine[0].values)} rows, got {self.k!r}")
        cuts = [_quantile_cuts(f, 8) for f in fine]
        while True:
            found = [f.buckets(c) for f, c in zip(fine, cuts, strict=True)]
            released = np.stack([b.codes(f.values) for b, f in zip(found, fine, strict=True)], axis=1)
            if anonymity(released).smallest >= self.k or not any(cuts):
                return found
            j = int(np.argmax([len(c) for c in cuts]))
            cuts[j] = cuts[j][1::2]

    def _accuracy(self, codes: Array, y: Array, classes: int) -> float:
        """Of a small tree, by three folds."""
        fold = np.random.default_rng(self.seed).permutation(len(y)) % 3
        right = 0
        for f in range(3):
            train, test = np.flatnonzero(fold != f), np.flatnonzero(fold == f)
            tree = grow(codes, [y], [classes], max_leaf_nodes=32, min_samples_leaf=3, rows=train)
            right += int((tree.predict_proba(codes[test]).argmax(axis=1) == y[test]).sum())
        return right / len(y)

    def _fitted(self, X: Any) -> Table:
        if not hasattr(self, "buckets_"):
            message = "This ColumnMinimizer instance is not fitted yet. Call 'fit' first."
            module = sys.modules.get("sklearn.exceptions")
            raise module.NotFittedError(message) if module is not None else DegenerateError(message)
        table = _table(X)
        if len(table.names) != self.n_features_in_:
            raise ShapeError(
                f"X has {len(table.names)} features, but ColumnMinimizer is expecting {self.n_features_in_} features "
                "as input"
            )
        if hasattr(self, "feature_names_in_") and table.kind not in ("numpy", "torch") and table.names != self._names:
            raise ArgumentError(f"X: expected the columns {self._names}, got {table.names}")
        for name, column, bucket in zip(table.names, table.columns, self.buckets_, strict=True):
            if (column.dtype.kind == "f") != (bucket.groups is None):
                was = "numbers" if bucket.groups is None else "categories"
                raise DTypeError(f"X: column {name!r}: expected {was}, as in the fit")
        return table

    def codes(self, X: Any) -> Array:
        """``(n, d)`` bucket of every value, of every column."""
        table = self._fitted(X)
        return np.stack([b.codes(c) for b, c in zip(self.buckets_, table.columns, strict=True)], axis=1)

    def transform(self, X: Any) -> Any:
        """The release: the kind of table that ``X`` is, with the columns that are collected."""
        table = self._fitted(X)
        pairs = [(b, c) for b, c in zip(self.buckets_, table.columns, strict=True) if b.collected or not self.drop]
        if not pairs:
            return write_table(table, [], [])
        names = [
            b.name if table.kind in ("numpy", "torch") else n for (b, _), n in zip(pairs, self._kept(), strict=True)
        ]
        return write_table(table, names, [b.release(c, self.output) for b, c in pairs])

    def fit_transform(self, X: Any, y: Any = None, sensitive: Any = None) -> Any:
        """The release of the data of the fit."""
        return self.fit(X, y, sensitive).transform(X)

    def _kept(self) -> list[str]:
        both = zip(self._names, self.buckets_, strict=True)
        return [n for n, b in both if b.collected or not self.drop]

    def get_feature_names_out(self, input_features: Any = None) -> Array:
        """Names of the columns of the release."""
        return np.array(self._kept(), dtype=object)

    def describe(self) -> str:
        """The buckets of every collected column, one column a line."""
        lines = []
        for b in self.buckets_:
            if b.kept:
                lines.append(f"{b.name}: as it is")
            elif b.collected:
                lines.append(f"{b.name}: {', '.join(b.labels)}")
            else:
                lines.append(f"{b.name}: not collected")
        return "\n".join(lines)


def _table(x: Any) -> Table:
    if hasattr(x, "toarray") or hasattr(x, "todense"):
        raise DTypeError("X: expected dense data, got a sparse matrix; pass X.toarray()")
    if isinstance(x, (list, tuple)):
        x = np.asarray(x)
    kind = getattr(getattr(x, "dtype", None), "kind", "f")
    if kind == "c":
        raise ArgumentError("X: Complex data not supported")
    if getattr(x, "ndim", 2) == 1:
        raise ShapeError("X: Expected 2D array, got 1D array instead. Reshape your data with X.reshape(-1, 1)")
    if getattr(x, "shape", (1, 1))[-1:] == (0,):
        raise ShapeError(f"X: 0 feature(s) (shape={x.shape}) while a minimum of 1 is required.")
    table = read_table(x, "X")
    if table.rows == 0:
        raise ShapeError("X: expected at least one row, got none")
    return table


def _classes(y: Any, rows: int) -> tuple[Array, Array]:
    values = read_labels(y, rows, "y")
    if values.dtype.kind == "f" and not (values == np.rint(values)).all():
        raise ArgumentError("y: Unknown label type: expected classes, got numbers that are not whole; cut them first")
    if values.dtype == object:
        values = values.astype(str)
    classes, codes = np.unique(values, return_inverse=True)
    if len(classes) < 2:
        raise DegenerateError(f"y: expected at least two classes, got {len(classes)}")
    if len(classes) > max(50, rows // 4):
        raise ArgumentError(f"y: expected classes, got {len(classes)} different values in {rows} rows")
    return classes, codes.reshape(-1).astype(np.int64)


def sensitive_classes(table: Table, named: Sequence[int | str], extra: Any, bins: int) -> list[tuple[str, Array, int]]:
    """Name, codes and number of classes of every sensitive attribute; numbers of more than ``bins`` values by quantile.

    Raises:
        ArgumentError: a column that is not there, or an attribute with one value.
    """
    found: list[tuple[str, Array]] = []
    for column in [named] if isinstance(named, str) else list(named):
        if isinstance(column, str) and column not in table.names:
            raise ArgumentError(f"sensitive: expected a column of {table.names}, got {column!r}")
        place = table.names.index(column) if isinstance(column, str) else int(column)
        if not 0 <= place < len(table.names):
            raise ArgumentError(f"sensitive: expected columns from 0 to {len(table.names) - 1}, got {column!r}")
        found.append((table.names[place], table.columns[place]))
    if extra is not None:
        if getattr(extra, "ndim", 2) == 1 or isinstance(extra, (list, tuple)):
            values = read_labels(extra, table.rows, "sensitive")
            one = values.astype(np.float64 if values.dtype.kind in "biuf" else object)
            found.append((str(getattr(extra, "name", None) or "sensitive"), one))
        else:
            more = read_table(extra, "sensitive")
            if more.rows != table.rows:
                raise ShapeError(f"sensitive: expected {table.rows} rows, got {more.rows}")
            found += zip(more.names, more.columns, strict=True)
    made = []
    for name, values in found:
        if values.dtype.kind == "f":
            known, codes = np.unique(values, return_inverse=True)
            if len(known) > bins:
                borders = np.unique(np.quantile(values, np.arange(1, bins) / bins))
                known, codes = np.unique(np.searchsorted(borders, values, side="left"), return_inverse=True)
        else:
            known, codes = np.unique([repr(v) for v in values.tolist()], return_inverse=True)
        if len(known) < 2:
            raise ArgumentError(f"sensitive: expected at least two values in {name!r}, got one")
        made.append((name, codes.reshape(-1).astype(np.int64), len(known)))
    return made


def _quantile_cuts(f: _Fine, buckets: int) -> list[int]:
    codes = np.sort(f.codes())
    at = codes[(np.arange(1, buckets) * len(codes)) // buckets]
    return sorted({int(c) for c in at if c < f.size - 1})


def _anova(values: Array, y: Array, classes: int) -> float:
    """Variance between the classes over variance within."""
    v = values.astype(np.float64)
    n = np.bincount(y, minlength=classes)
    means = np.bincount(y, weights=v, minlength=classes) / np.maximum(n, 1)
    between = float((n * (means - v.mean()) ** 2).sum()) / (classes - 1)
    within = float(((v - means[y]) ** 2).sum()) / max(len(v) - classes, 1)
    return between / within if within > 0 else (np.inf if between > 0 else 0.0)


def _merge(b: Buckets, values: Array, part: float) -> Buckets:
    """Merges buckets with fewer rows than ``part`` of the average, the smallest first, into the smaller neighbour."""
    merged = np.arange(b.count)
    sizes = np.bincount(b.codes(values), minlength=b.count).tolist()
    least = part * len(values) / b.count
    while len(sizes) > 1 and min(sizes) < least:
        i = int(np.argmin(sizes))
        j = i - 1 if i + 1 == len(sizes) or (i > 0 and sizes[i - 1] <= sizes[i + 1]) else i
        sizes[j : j + 2] = [sizes[j] + sizes[j + 1]]
        merged = np.where(merged > j, merged - 1, merged)
    if len(sizes) == b.count:
        return b
    if b.borders is not None:
        return _buckets(b.name, values, b.borders[merged[:-1] != merged[1:]], None)
    assert b.groups is not None
    return _buckets(b.name, values, None, {v: int(merged[g]) for v, g in b.groups.items()})


@dataclass(frozen=True)
class Anonymity:
    """How many rows share a release."""

    #: Rows of each different release, ascending.
    sizes: Array = field(repr=False)

    @property
    def smallest(self) -> int:
        """The k of k-anonymity."""
        return int(self.sizes[0])

    @property
    def unique(self) -> int:
        """Rows that nobody shares a release with."""
        return int((self.sizes == 1).sum())

    @property
    def releases(self) -> int:
        return len(self.sizes)


def anonymity(codes: Array) -> Anonymity:
    """Sizes of the groups of equal rows of ``codes``."""
    rows = np.ascontiguousarray(codes, dtype=np.int64)
    if rows.shape[1] == 0:
        return Anonymity(np.array([len(rows)]))
    _, counts = np.unique(rows, axis=0, return_counts=True)
    return Anonymity(np.sort(counts))


@dataclass(frozen=True)
class Attack:
    """How often one adversary names one sensitive attribute correctly."""

    adversary: str
    attribute: str
    accuracy: Rate
    #: Accuracy of naming the commonest value, for everybody.
    majority: Rate

    @property
    def error(self) -> float:
        return 1 - float(self.accuracy.rate)


@dataclass(frozen=True)
class MinimizationReport:
    """What a release is worth to the task and what it gives away, on rows that nothing was fitted to."""

    utility: Rate
    utility_raw: Rate
    attacks: list[Attack]
    #: The attacks on the data in full (A1 alone), for comparison.
    attacks_raw: list[Attack]
    anonymity: Anonymity
    collected: int
    columns: int

    def error(self, adversary: str = "A1") -> float:
        """Mean reconstruction error over the sensitive attributes (1 - accuracy)."""
        found = [a.error for a in self.attacks if a.adversary == adversary]
        if not found:
            raise ArgumentError(
                f"adversary: expected one of {sorted({a.adversary for a in self.attacks})}, got {adversary!r}"
            )
        return float(np.mean(found))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        return {
            "utility": float(self.utility.rate),
            "utility_raw": float(self.utility_raw.rate),
            "rows": int(self.utility.n),
            "columns": self.columns,
            "collected": self.collected,
            "attacks": [
                {
                    "adversary": a.adversary,
                    "attribute": a.attribute,
                    "accuracy": float(a.accuracy.rate),
                    "majority": float(a.majority.rate),
                }
                for a in self.attacks
            ],
            "smallest_group": self.anonymity.smallest,
            "unique_rows": self.anonymity.unique,
        }

    def _lines(self) -> list[tuple[str, str]]:
        def shown(r: Rate) -> str:
            interval = r.ci()
            return f"{r.rate:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")

        lines = [
            ("columns collected", f"{self.collected} of {self.columns}"),
            ("accuracy of the task, all data", shown(self.utility_raw)),
            ("accuracy of the task, release", shown(self.utility)),
        ]
        for a in self.attacks_raw:
            lines.append((f"{a.attribute} guessed from the data in full", f"{shown(a.accuracy)}"))
        for a in self.attacks:
            lines.append((f"{a.attribute} guessed by {a.adversary}, {ADVERSARIES[a.adversary]}", shown(a.accuracy)))
        for name, r in {a.attribute: a.majority for a in self.attacks}.items():
            lines.append((f"{name} guessed as the commonest value", shown(r)))
        lines.append(("rows that share a release", f"at least {self.anonymity.smallest}"))
        lines.append(("rows with a release of their own", str(self.anonymity.unique)))
        return lines

    def __str__(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in self._lines())

    def _repr_html_(self) -> str:
        cells = "".join(f"<tr><th>{html.escape(n)}</th><td>{html.escape(v)}</td></tr>" for n, v in self._lines())
        return f"<table><caption>Data minimisation</caption>{cells}</table>"


def _raw_codes(table: Table, fit: Array) -> Array:
    """Every column in full, as finely as a learner reads it; borders and categories from the rows ``fit``."""
    columns = []
    for name, values in zip(table.names, table.columns, strict=True):
        dummy = np.arange(len(fit)) % 2
        fine = _Fine.of(name, values[fit], dummy, 2, RAW)
        columns.append(fine.buckets(range(fine.size - 1)).codes(values))
    return np.stack(columns, axis=1)


def _one_hot(codes: Array, widths: Array) -> Array:
    ends = np.cumsum(widths)
    out = np.zeros((len(codes), int(ends[-1])))
    places = np.minimum(codes, widths - 1) + (ends - widths)
    np.put_along_axis(out, places, 1.0, axis=1)
    return out


class _Learner:
    """The better of a forest and naive Bayes by a fifth of the training rows, or a model given, on one-hot codes."""

    def __init__(self, model: Callable[[], Any] | None, seed: int) -> None:
        self._model, self._seed = model, seed

    def probabilities(self, codes: Array, y: Array, classes: int, train: Array, test: Array) -> Array:
        """``(test, classes)``; what was never seen in training has probability 0."""
        if codes.shape[1] == 0 or len(np.unique(y[train])) == 1:
            shares = np.bincount(y[train], minlength=classes) / len(train)
            return np.tile(shares, (len(test), 1))
        if self._model is not None:
            widths = codes.max(axis=0) + 1
            model = self._model()
            model.fit(_one_hot(codes[train], widths), y[train])
            out = np.zeros((len(test), classes))
            out[:, np.asarray(model.classes_, dtype=np.int64)] = model.predict_proba(_one_hot(codes[test], widths))
            return out
        order = np.random.default_rng(self._seed).permutation(train)
        held, kept = order[: max(1, len(order) // 5)], order[max(1, len(order) // 5) :]
        scores = []
        for kind in (forest, naive_bayes):
            guess = kind(codes[kept], y[kept], classes, codes[held], self._seed).argmax(axis=1)
            scores.append(int((guess == y[held]).sum()))
        best = forest if scores[0] >= scores[1] else naive_bayes
        return best(codes[train], y[train], classes, codes[test], self._seed)


def evaluate_release(
    minimizer: ColumnMinimizer | Sequence[ColumnMinimizer],
    x: Any,
    y: Any,
    *,
    sensitive: Any = None,
    train: Any,
    test: Any,
    adversaries: Sequence[str] = ("A1", "A2", "A3", "A4", "A5"),
    certain: float = 0.1,
    model: Callable[[], Any] | None = None,
    seed: int = 0,
) -> MinimizationReport:
    """Utility and leakage of a release, by models trained on the rows ``train`` and judged on the rows ``test``.

    Every adversary knows the releases of the rows ``train`` together with their sensitive attributes, and guesses those
    of the rows ``test``; see ``ADVERSARIES`` for what else each knows. Several minimizers are releases of the same
    people, joined (A6 of the paper). Adversaries are the better of a forest and naive Bayes on codes, chosen inside the
    training rows, so leakage is at least what is reported: another model may find more.

    Args:
        minimizer: fitted, best on other rows than ``train`` and ``test``.
        x: the table, ``y`` its labels, ``sensitive`` further sensitive attributes as in the fit.
        train, test: row numbers.
        adversaries: which.
        certain: part of the test rows that A2 is judged on.
        model: makes a scikit-learn classifier for one-hot codes, for the task and the adversaries.
        seed: of the models.

    Raises:
        ArgumentError: an unknown adversary, no sensitive attribute, or rows that overlap.
    """
    releases = [minimizer] if isinstance(minimizer, ColumnMinimizer) else list(minimizer)
    for name in adversaries:
        if name not in ADVERSARIES:
            raise ArgumentError(f"adversaries: expected names of {', '.join(ADVERSARIES)}, got {name!r}")
    if not 0 < certain <= 1:
        raise ArgumentError(f"certain: expected a part above 0, at most 1, got {certain!r}")
    train, test = np.asarray(train, dtype=np.int64), np.asarray(test, dtype=np.int64)
    if len(np.intersect1d(train, test)) or len(train) == 0 or len(test) == 0:
        raise ArgumentError("train, test: expected two sets of rows without a row in common")
    table = _table(x)
    _, target = _classes(y, table.rows)
    classes = int(target.max()) + 1
    first = releases[0]
    hidden = sensitive_classes(table, first.sensitive, sensitive, first.sensitive_bins)
    if not hidden:
        raise ArgumentError("sensitive: expected at least one sensitive attribute, got none")
    released = np.concatenate([r.codes(x)[:, [b.collected for b in r.buckets_]] for r in releases], axis=1)
    raw = _raw_codes(table, train)
    learner = _Learner(model, seed)

    def judged(codes: Array, y: Array, m: int) -> tuple[Array, Array]:
        p = learner.probabilities(codes, y, m, train, test)
        return p.argmax(axis=1) == y[test], p.max(axis=1)

    def counted(right: Array) -> Rate:
        return rate(right.astype(bool))

    names = [n for n, _, _ in hidden]
    inside = {n: table.names.index(n) for n in names if n in table.names}
    open_columns = [j for j, n in enumerate(table.names) if n not in inside]

    def known(attributes: Sequence[str]) -> Array:
        """Sensitive attributes in full: the column where it is one, else the classes."""
        found = [raw[:, inside[n]] if n in inside else hidden[names.index(n)][1] for n in attributes]
        return np.stack(found, axis=1) if found else np.empty((table.rows, 0), dtype=np.int64)

    attacks, attacks_raw = [], []
    random = np.random.default_rng(seed)
    for name, codes, m in hidden:
        others = [n for n in names if n != name]
        common = int(np.bincount(codes[train], minlength=m).argmax())
        majority = counted(codes[test] == common)
        right, confidence = judged(released, codes, m)
        without = [j for j in range(len(table.names)) if j != inside.get(name)]
        attacks_raw.append(Attack("A1", name, counted(judged(raw[:, without], codes, m)[0]), majority))
        for adversary in adversaries:
            if adversary == "A1":
                found = right
            elif adversary == "A2":
                sure = np.argsort(-confidence, kind="stable")[: max(1, round(certain * len(test)))]
                found = right[sure]
            elif adversary in ("A3", "A4"):
                extra = [raw[:, open_columns], known(others if adversary == "A4" else ())]
                found = judged(np.concatenate([released, *extra], axis=1), codes, m)[0]
            else:
                parts = [right] if not others else []
                for size in range(1, len(others) + 1):
                    # At most three sets of every size, drawn with the seed.
                    sets = list(itertools.combinations(others, size))
                    for chosen in (sets[i] for i in sorted(random.permutation(len(sets))[:3])):
                        parts.append(judged(np.concatenate([released, known(chosen)], axis=1), codes, m)[0])
                found = np.concatenate(parts)
            attacks.append(Attack(adversary, name, counted(found), majority))
    return MinimizationReport(
        utility=counted(judged(released, target, classes)[0]),
        utility_raw=counted(judged(raw, target, classes)[0]),
        attacks=attacks,
        attacks_raw=attacks_raw,
        anonymity=anonymity(released),
        collected=sum(b.collected for r in releases for b in r.buckets_),
        columns=len(table.names) * len(releases),
    )


@dataclass(frozen=True)
class Minimized:
    """A release with the minimizer that made it and the report of what it tells."""

    #: The kind of table that was given.
    x: Any = field(repr=False)
    minimizer: ColumnMinimizer
    report: MinimizationReport

    def __str__(self) -> str:
        return f"{self.minimizer.describe()}\n\n{self.report}"

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.minimizer.describe())}</pre>{self.report._repr_html_()}"


def _split(rows: int, shares: Sequence[float], y: Array, seed: int) -> list[Array]:
    """Rows of each fold, every class in proportion."""
    if len(shares) != 3 or not all(s > 0 for s in shares) or abs(sum(shares) - 1) > 1e-9:
        raise ArgumentError(f"split: expected three positive parts with the sum 1, got {shares!r}")
    random = np.random.default_rng(seed)
    order = random.permutation(rows)
    order = order[np.argsort(y[order], kind="stable")]
    # Rows of a class stand together, so walking through them with the shares keeps the proportions.
    position = (np.arange(rows) * 0.6180339887498949 + random.random()) % 1.0
    fold = np.searchsorted(np.cumsum(shares)[:2], position, side="right")
    return [np.sort(order[fold == i]) for i in range(3)]


def minimize_columns(
    x: Any,
    y: Any,
    *,
    sensitive: Sequence[int | str] | str = (),
    attributes: Any = None,
    method: Method = "tree",
    split: tuple[float, float, float] = (0.4, 0.3, 0.3),
    adversaries: Sequence[str] = ("A1", "A2", "A3", "A4", "A5"),
    model: Callable[[], Any] | None = None,
    seed: int = 0,
    **options: Any,
) -> Minimized:
    """Coarsens the columns of a table for a task, and measures what the release is worth and what it gives away.

    Buckets are found on one part of the rows, models of the task and of the adversaries are trained on the next and
    judged on the last, as in Staab et al. (arXiv 2311.10500).

    Args:
        x: table of pandas, polars or Arrow, mapping of columns, or ``(n, d)`` array.
        y: ``(n,)`` labels of the task.
        sensitive: columns of ``x`` that adversaries are after, by name or place.
        attributes: further sensitive attributes that are not part of ``x``: a table or ``(n,)`` labels.
        method: see :class:`ColumnMinimizer`.
        split: parts of the rows for the buckets, for training and for judging.
        adversaries, model: see :func:`evaluate_release`.
        seed: of the split and of everything drawn.
        **options: of :class:`ColumnMinimizer`.

    Returns:
        All rows as released, in the kind of ``x``, with the fitted minimizer and the report.

    Raises:
        As :meth:`ColumnMinimizer.fit` and :func:`evaluate_release`.
    """
    table = _table(x)
    _, target = _classes(y, table.rows)
    sensitive = (sensitive,) if isinstance(sensitive, str) else tuple(sensitive)
    fit, train, test = _split(table.rows, split, target, seed)
    if min(len(fit), len(train), len(test)) < 2:
        raise DegenerateError(f"x: expected at least two rows in every part, got {table.rows} rows in all")
    minimizer = ColumnMinimizer(method, sensitive=sensitive, seed=seed).set_params(**options)
    part = _rows(table, fit)
    minimizer.fit(part, target[fit], _rows_of(attributes, table.rows, fit))
    report = evaluate_release(
        minimizer, x, y, sensitive=attributes, train=train, test=test, adversaries=adversaries, model=model, seed=seed
    )
    return Minimized(minimizer.transform(x), minimizer, report)


def _rows(table: Table, pick: Array) -> Any:
    """Some rows, as a mapping of columns (or a matrix, where there are no names)."""
    columns = [c[pick] for c in table.columns]
    if table.kind in ("numpy", "torch"):
        numeric = all(c.dtype.kind == "f" for c in columns)
        return np.stack([c if numeric else c.astype(object) for c in columns], axis=1)
    return dict(zip(table.names, columns, strict=True))


def _rows_of(extra: Any, rows: int, pick: Array) -> Any:
    if extra is None:
        return None
    if getattr(extra, "ndim", 2) == 1 or isinstance(extra, (list, tuple)):
        return read_labels(extra, rows, "attributes")[pick]
    table = read_table(extra, "attributes")
    if table.rows != rows:
        raise ShapeError(f"attributes: expected {rows} rows, got {table.rows}")
    return {n: c[pick] for n, c in zip(table.names, table.columns, strict=True)}


@dataclass(frozen=True)
class FrontPoint:
    """One setting of one method, averaged over seeds."""

    method: str
    options: dict[str, Any]
    utility: float
    error: float
    collected: float
    smallest_group: float


@dataclass(frozen=True)
class Front:
    """Accuracy of the task and error of an adversary, over methods and settings."""

    points: list[FrontPoint]
    utility_raw: float
    #: Error of the adversary on the data in full (its attribute left out), and of naming the commonest value.
    error_raw: float
    error_majority: float
    adversary: str

    def pareto(self, method: str | None = None) -> list[FrontPoint]:
        """Points that no other (of the method) beats in both, by falling utility."""
        pool = [p for p in self.points if method is None or p.method == method]
        best, kept = -np.inf, []
        for p in sorted(pool, key=lambda p: (-p.utility, -p.error)):
            if p.error > best:
                kept.append(p)
                best = p.error
        return kept

    def __str__(self) -> str:
        lines = [
            f"all data: accuracy {self.utility_raw:.3f}; {self.adversary} error {self.error_raw:.3f}; "
            f"commonest value {self.error_majority:.3f}"
        ]
        on_front = {id(p) for p in self.pareto()}
        for p in self.points:
            options = ", ".join(f"{n}={v}" for n, v in p.options.items())
            mark = "*" if id(p) in on_front else " "
            lines.append(
                f"{mark} {p.method}({options}): accuracy {p.utility:.3f}, error {p.error:.3f}, "
                f"{p.collected:.1f} columns, groups of at least {p.smallest_group:.1f}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def plot(self) -> Any:
        """Accuracy against error, a line per method; a matplotlib figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7, 5), layout="constrained")
        axis = figure.subplots()
        for method in dict.fromkeys(p.method for p in self.points):
            own = [p for p in self.points if p.method == method]
            (line,) = axis.plot(
                [p.utility for p in self.pareto(method)], [p.error for p in self.pareto(method)], label=method
            )
            axis.plot([p.utility for p in own], [p.error for p in own], "o", color=line.get_color(), markersize=4)
        axis.axvline(self.utility_raw, linestyle=":", color="0.4", label="all data")
        axis.axhline(self.error_majority, linestyle="--", color="0.4", label="commonest value")
        axis.set(xlabel="accuracy of the task", ylabel=f"error of adversary {self.adversary}")
        axis.legend()
        return figure


#: Settings that :func:`minimization_front` tries where none are given.
GRID: dict[str, list[dict[str, Any]]] = {
    "tree": [
        {"alpha": a, "max_leaf_nodes": m} for m in (4, 20) for a in (0.0, 0.3, 0.6, 0.8, 0.9, 0.95)
    ],
    "uniform": [{"buckets": b} for b in (2, 3, 5, 10)],
    "feature_selection": [{"keep": k} for k in (1, 2, 4, 8)],
    "model_tree": [{"target": t} for t in (0.8, 0.9, 0.95, 0.99)],
    "iterative": [{"target": t} for t in (0.8, 0.9, 0.95, 0.99)],
    "k_anonymity": [{"k": k} for k in (2, 5, 20, 50)],
}  # fmt: skip


def minimization_front(
    x: Any,
    y: Any,
    *,
    sensitive: Sequence[int | str] | str = (),
    attributes: Any = None,
    grid: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    adversary: str = "A1",
    seeds: Sequence[int] = (0, 1, 2),
    model: Callable[[], Any] | None = None,
    progress: bool | None = None,
) -> Front:
    """Accuracy of the task against the error of an adversary, for methods and settings, averaged over splits.

    Args:
        x, y, sensitive, attributes, model: as :func:`minimize_columns`.
        grid: settings by method; ``GRID`` if None.
        adversary: which error, averaged over the sensitive attributes.
        seeds: one split and fit each.
        progress: a bar; None shows it on a terminal.
    """
    from tqdm.auto import tqdm

    chosen = GRID if grid is None else grid
    settings = [(m, dict(o)) for m, several in chosen.items() for o in several]
    points = []
    bar = tqdm(total=len(settings) * len(seeds), disable=None if progress is None else not progress)
    raw: list[tuple[float, float, float]] = []
    with bar:
        for method, options in settings:
            reports = []
            for seed in seeds:
                found = minimize_columns(
                    x, y, sensitive=sensitive, attributes=attributes, method=method, adversaries=(adversary,),  # type: ignore[arg-type]
                    model=model, seed=seed, **options,
                )  # fmt: skip
                reports.append(found.report)
                bar.update()
            raw = [
                (
                    float(r.utility_raw.rate),
                    float(np.mean([a.error for a in r.attacks_raw])),
                    float(np.mean([1 - float(a.majority.rate) for a in r.attacks])),
                )
                for r in reports
            ]
            points.append(
                FrontPoint(
                    method,
                    options,
                    float(np.mean([float(r.utility.rate) for r in reports])),
                    float(np.mean([r.error(adversary) for r in reports])),
                    float(np.mean([r.collected for r in reports])),
                    float(np.mean([r.anonymity.smallest for r in reports])),
                )
            )
    utility, error, majority = np.mean(raw, axis=0)
    return Front(points, float(utility), float(error), float(majority), adversary)
