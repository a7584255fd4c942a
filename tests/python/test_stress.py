"""What is left of a protection after a learner's treatments: figures, the parts by themselves, bad input."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from abjure.errors import ArgumentError, DegenerateError, ShapeError
from abjure.protect import StressReport, noise, stress

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 3


def blobs(n, seed, shape=(1, 8, 8)):
    """Classes that differ in a blurred pattern, so that few rows teach them."""
    pattern = np.random.default_rng(7).uniform(0.2, 0.8, (CLASSES, shape[0], 2, 2)).repeat(shape[1] // 2, 2)
    pattern = pattern.repeat(shape[2] // 2, 3)
    rng = np.random.default_rng(seed)
    y = np.arange(n) % CLASSES
    x = np.clip(pattern[y] + rng.normal(size=(n, *shape)) * 0.08, 0, 1)
    return np.rint(x * 255).astype(np.uint8), y + 5


def tiny(shape, classes):
    from abjure.protect import networks

    return networks.mlp(shape, classes, hidden=16)


def nearest(shape, classes):
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(3)


@pytest.fixture(scope="module")
def protected():
    x, y = blobs(90, 0)
    return noise.class_mean_shift(x, y, epsilon=100 / 255)


@pytest.fixture(scope="module")
def report(protected):
    return stress(
        protected,
        blobs(60, 1),
        treatments=["none", "jpeg:50", "median:3", "augment", "class_mean", "adversarial:0.05", "mix:0.5"],
        models={"mlp": tiny, "neighbours": nearest},
        extra={"upside down": lambda x: x.flip(2)},
        epochs=12,
        seeds=(0, 1),
        learning_rate=1e-2,
        batch_size=16,
        progress=False,
    )


def test_figures(report):
    assert report.treatments == (
        "none",
        "jpeg:50",
        "median:3",
        "augment",
        "class_mean",
        "adversarial:0.05",
        "mix:0.5",
        "upside down",
    )
    # Classes become each other's neighbours, and only what is known of the clean ones gives them away.
    assert report.mean("none", "mlp").clean > 0.95
    assert report.mean("none", "mlp").lost > 0.4
    assert report.mean("none", "neighbours").lost > 0.4
    assert report.mean("class_mean", "mlp").protected > 0.9
    assert report.mean("upside down", "neighbours").protected == report.mean("none", "neighbours").protected
    mix = report.mean("mix:0.5", "mlp")
    assert mix.clean == report.mean("none", "mlp").clean
    assert mix.benefit == pytest.approx(mix.protected - mix.clean_part)
    assert report.mean("none", "mlp").benefit is None
    # Estimators learn from whole training sets alone.
    assert {(o.treatment, o.model) for o in report.outcomes if o.model == "neighbours"}.isdisjoint(
        {("augment", "neighbours"), ("adversarial:0.05", "neighbours")}
    )
    assert len(report.notes) == 2
    assert report.chance == pytest.approx(1 / 3)


def test_prints_plots_and_comes_back(report, tmp_path):
    text = repr(report)
    assert "upside down" in text
    assert f"{report.mean('none', 'mlp').protected:.3f}" in text
    assert "<td>mix:0.5</td>" in report._repr_html_()
    report.save(tmp_path / "report.json")
    assert StressReport.from_json((tmp_path / "report.json").read_text()) == report
    for broken in ("{}", "[", '{"outcomes": [{}]}', "[]"):
        with pytest.raises(ArgumentError, match="stress report"):
            StressReport.from_json(broken)
    with pytest.raises(ArgumentError, match="treatment"):
        report.mean("none", "forest")
    pytest.importorskip("matplotlib")
    assert len(report.plot().axes) == 2


def test_deterministic_and_leaves_torchs_generator_alone(protected):
    options = {"treatments": ["augment", "mix:0.2"], "models": {"mlp": tiny}, "epochs": 2, "progress": False}
    state = torch.random.get_rng_state()
    one = stress(protected, blobs(30, 1), **options)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(99)
    assert stress(protected, blobs(30, 1), **options) == one
    assert stress(protected, blobs(30, 1), seeds=(1,), **options) != one


def test_progress_counts_trainings(protected):
    seen = []
    stress(protected, blobs(30, 1), treatments=["none"], models={"a": tiny, "b": tiny}, epochs=1, progress=seen.append)
    assert seen == [1, 2]


def test_filters_by_hand():
    from abjure.protect.survival import grey, jpeg, median, subtract_class_means

    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.uniform(0, 1, (4, 3, 8, 9)).astype(np.float32))
    from scipy.ndimage import median_filter

    want = median_filter(x.numpy(), size=(1, 1, 3, 3), mode="nearest")
    assert np.array_equal(median(x, 3).numpy(), want)
    shade = grey(x)
    assert torch.allclose(shade[:, 0], 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2])
    assert torch.equal(shade[:, 0], shade[:, 2])
    flat = torch.full((1, 1, 16, 16), 100 / 255)
    assert torch.allclose(jpeg(flat, 90), flat)
    errors = [float((jpeg(x, q) - x).abs().mean()) for q in (100, 50, 5)]
    assert errors[0] < errors[1] < errors[2]
    wide = jpeg(x * 4 - 2, 100, (-2.0, 2.0))
    assert float((wide - (x * 4 - 2)).abs().mean()) < 4.5 * errors[0]
    y = torch.tensor([0, 0, 1, 1])
    shifted = x * 0.5 + 0.2 + y[:, None, None, None] * 0.05
    back = subtract_class_means(shifted, y, x * 0.5 + 0.2, y, (0.0, 1.0))
    assert torch.allclose(back, x * 0.5 + 0.2, atol=1e-6)


def test_mixes_keep_every_class(protected):
    seen = []

    class Spy:
        def fit(self, x, y):
            seen.append((x, y))

        def predict(self, x):
            return np.zeros(len(x))

    stress(
        protected, blobs(30, 1), treatments=["mix:0.2"], models={"spy": lambda s, c: Spy()}, epochs=1, progress=False
    )
    mixed, _, part = seen
    clean, published = (np.asarray(a, dtype=np.float32).reshape(90, -1) / 255 for a in (protected.clean, protected.x))
    is_clean = np.isclose(mixed[0], clean, atol=1e-6).all(1)
    assert is_clean.sum() == 72
    assert np.isclose(mixed[0][~is_clean], published[~is_clean], atol=1e-6).all()
    assert np.array_equal(part[0], mixed[0][is_clean])
    assert np.bincount(part[1]).tolist() == [24, 24, 24]


def test_bad_input(protected):
    test = blobs(30, 1)
    for treatment in ("blur", "jpeg:0", "jpeg:x", "median:4", "mix:0", "mix:1", "none:3", "grey:1", "adversarial:-1"):
        with pytest.raises(ArgumentError, match="treatments"):
            stress(protected, test, treatments=[treatment], epochs=1)
    with pytest.raises(ShapeError, match="3 channels"):
        stress(protected, test, treatments=["grey"], epochs=1)
    for kwargs, error, message in [
        ({"epochs": 0}, ArgumentError, "epochs"),
        ({"seeds": ()}, ArgumentError, "seeds"),
        ({"models": {}}, ArgumentError, "models"),
        ({"models": {"x": lambda s, c: 3}, "treatments": ["none"]}, ArgumentError, "models"),
        ({"known": (test[0][:2], test[1][:2])}, DegenerateError, "every class"),
        ({"known": (test[0][:, :, :4], test[1])}, ShapeError, "known"),
        ({"extra": {"half": lambda x: x[:, :, ::2]}}, ShapeError, "half"),
    ]:
        with pytest.raises(error, match=message):
            stress(protected, test, progress=False, **kwargs)
    with pytest.raises(ShapeError, match="test"):
        stress(protected, (test[0][:, :, :4], test[1]))
    with pytest.raises(ArgumentError, match="labels that occur"):
        stress(protected, (test[0], test[1] + 1))
    with pytest.raises(ArgumentError, match="x, clean and labels"):
        stress(test[0], test)
    bad = SimpleNamespace(x=np.full((6, 4), 0.5), clean=np.full((6, 4), 3.0), labels=[0, 1] * 3)
    with pytest.raises(ArgumentError, match="clean: expected values in the box"):
        stress(bad, (bad.x, bad.labels))
