"""scikit-learn's estimator interface, without scikit-learn."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, TypeVar

import numpy as np

from ...errors import ArgumentError, DegenerateError, DTypeError, ShapeError

EstimatorT = TypeVar("EstimatorT", bound="Estimator")


class Estimator:
    """Parameters are the arguments of ``__init__``, kept as they were given and checked by ``fit``."""

    _kind = "transformer"
    _text_input = True

    @classmethod
    def _names(cls) -> list[str]:
        return list(inspect.signature(cls).parameters)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The parameters by name. ``deep`` is there for scikit-learn: no parameter is an estimator."""
        return {name: getattr(self, name) for name in self._names()}

    def set_params(self: EstimatorT, **params: Any) -> EstimatorT:
        """Changes parameters; what was fitted stays until the next fit. Returns ``self``.

        Raises:
            ArgumentError: a name that is no parameter; nothing was changed.
        """
        if unknown := sorted(set(params) - set(names := self._names())):
            raise ArgumentError(f"{', '.join(unknown)}: expected parameters among {', '.join(names)}")
        for name, value in params.items():
            setattr(self, name, value)
        return self

    @property
    def _fitted(self) -> bool:
        raise NotImplementedError

    def __sklearn_is_fitted__(self) -> bool:
        return self._fitted

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags, TransformerTags

        classifier = self._kind == "classifier"
        return Tags(
            estimator_type="classifier" if classifier else "transformer",
            target_tags=TargetTags(required=classifier),
            transformer_tags=None if classifier else TransformerTags(),
            classifier_tags=ClassifierTags() if classifier else None,
            input_tags=InputTags(two_d_array=not self._text_input, string=self._text_input),
        )

    def _check_fitted(self) -> None:
        if not self._fitted:
            raise ArgumentError(f"{type(self).__name__}: expected a fitted estimator; call fit first")

    def __repr__(self) -> str:
        defaults = inspect.signature(type(self)).parameters
        changed = [
            f"{name}={value!r}"
            for name, value in self.get_params().items()
            if defaults[name].default is inspect.Parameter.empty or not _same(value, defaults[name].default)
        ]
        return f"{type(self).__name__}({', '.join(changed)})"


def _same(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and not isinstance(a, np.ndarray) and bool(a == b))


class Classifier(Estimator):
    """An estimator with ``predict``."""

    _kind = "classifier"
    classes_: np.ndarray[Any, Any]

    def predict(self, x: Any) -> np.ndarray[Any, Any]:
        raise NotImplementedError

    def score(self, x: Any, y: Any) -> float:
        """Accuracy on labelled rows. Raises as ``predict``; ShapeError for labels that are not one per row."""
        found = self.predict(x)
        labels = label_array(y, len(found))
        return float(np.mean(found == labels))


def label_array(y: Any, rows: int) -> np.ndarray[Any, Any]:
    """Labels as a 1-d array of integers, booleans or strings.

    Raises:
        ShapeError: not one label per row. DTypeError: other kinds of labels.
    """
    labels = np.asarray(y)
    if labels.ndim != 1 or len(labels) != rows:
        raise ShapeError(f"y: expected {rows} labels, one per row, got shape {labels.shape}")
    if labels.dtype.kind == "O" and all(isinstance(v, str) for v in labels):
        labels = labels.astype(str)
    if labels.dtype.kind == "f" and bool(np.all(labels == np.rint(labels))):
        labels = labels.astype(np.int64)
    if labels.dtype.kind not in "iubU":
        raise DTypeError(f"y: expected integers, booleans or strings, got dtype {labels.dtype}")
    return labels


def encode_labels(y: Any, rows: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The classes in sorted order, and the number of each row's class.

    Raises:
        DegenerateError: fewer than two classes. Else as :func:`label_array`.
    """
    labels = label_array(y, rows)
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        found = "no labels" if rows == 0 else f"only {classes[0].item()!r}"
        raise DegenerateError(f"y: expected labels of at least two classes, got {found}")
    return classes, codes.astype(np.uint32)


def classes_to_json(classes: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Labels as JSON, with their dtype."""
    return {"dtype": classes.dtype.str, "labels": classes.tolist()}


def classes_from_json(facts: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The reverse of :func:`classes_to_json`."""
    return np.array(facts["labels"], dtype=np.dtype(facts["dtype"]))


def plain(value: Any) -> Any:
    """What JSON does not know (NumPy's numbers and arrays, sequences) as what it knows."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Iterable):
        return list(value)
    raise TypeError(f"{type(value).__name__} cannot be saved")


def integer(value: Any, name: str, low: int, high: int | None = None) -> int:
    """``value`` as an int from ``low`` to ``high``.

    Raises:
        ArgumentError: it is none.
    """
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        expected = f"a whole number from {low}" + (f" to {high}" if high is not None else "")
        raise ArgumentError(f"{name}: expected {expected}, got {value!r}")
    return int(value)


def positive(value: Any, name: str) -> float:
    """``value`` as a finite float above 0.

    Raises:
        ArgumentError: it is none.
    """
    number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    if not number or not 0 < value < float("inf"):
        raise ArgumentError(f"{name}: expected a finite number above 0, got {value!r}")
    return float(value)


def choice(value: Any, name: str, options: Iterable[Any]) -> Any:
    """``value`` if it is among ``options``.

    Raises:
        ArgumentError: it is not.
    """
    options = tuple(options)
    if not any(type(value) is type(o) and value == o for o in options):
        raise ArgumentError(f"{name}: expected one of {options}, got {value!r}")
    return value
