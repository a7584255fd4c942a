"""Corrective unlearning: what is manipulated, what the numbers are taken on, resuming, and the effect on a backdoor."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from abjure.errors import ArgumentError, DTypeError, NonFiniteError, ShapeError
from abjure.forget import CorrectiveReport, PatchTrigger, corrective_benchmark, poison, shuffle_labels, swap_classes

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def images():
    draw = torch.Generator().manual_seed(0)
    return torch.rand(60, 1, 6, 6, generator=draw), torch.arange(60) % 3


def test_poison_writes_the_patch_and_the_label_into_copies(images):
    x, y = images
    before = x.clone(), y.clone()
    m = poison(x, y, 12, target=2, seed=1)
    assert torch.equal(x, before[0])
    assert torch.equal(y, before[1])
    assert len(set(m.manipulated.tolist())) == 12
    rest = np.setdiff1d(np.arange(60), m.manipulated)
    assert torch.equal(m.x[rest], x[rest])
    assert torch.equal(m.y[rest], y[rest])
    assert torch.equal(m.true_y, y)
    assert (m.y[m.manipulated] == 2).all()
    assert (m.x[m.manipulated][:, 0, 3:, 3:] == x.max()).all()
    assert torch.equal(m.x[m.manipulated][:, 0, :3], x[m.manipulated][:, 0, :3])
    tx, ty = m.corrected_test(x, y)
    assert (tx[..., 3:, 3:] == x.max()).all()
    assert torch.equal(ty, y)
    assert torch.equal(m.retained_test(x, y)[0], x)


def test_swapped_classes_exchange_labels_and_nothing_else(images):
    x, y = images
    m = swap_classes(x, y, (2, 0), 10)
    changed = np.flatnonzero((m.y != y).numpy())
    assert sorted(m.manipulated) == changed.tolist()
    assert [(int(a), int(b)) for a, b in zip(y[changed], m.y[changed], strict=True)].count((2, 0)) == 5
    assert [(int(a), int(b)) for a, b in zip(y[changed], m.y[changed], strict=True)].count((0, 2)) == 5
    assert set(m.corrected_test(x, y)[1].tolist()) == {0, 2}
    assert set(m.retained_test(x, y)[1].tolist()) == {1}


def test_shuffled_labels_are_permuted_within_the_set(images):
    x, y = images
    m = shuffle_labels(x, y, 30)
    rest = np.setdiff1d(np.arange(60), m.manipulated)
    assert torch.equal(m.y[rest], y[rest])
    assert sorted(m.y[m.manipulated].tolist()) == sorted(y[m.manipulated].tolist())
    assert (m.y != y).any()
    assert m.retained_test(x, y) is None


def test_known_parts_are_nested(images):
    m = poison(*images, 12)
    sizes = [len(m.known(f)) for f in (0.01, 0.25, 0.5, 1)]
    assert sizes == [1, 3, 6, 12]
    assert set(m.known(0.25)) < set(m.known(0.5)) < set(m.known(1)) == set(m.manipulated)
    for f in (0, 1.2):
        with pytest.raises(ArgumentError, match="fraction: expected a number in"):
            m.known(f)


class Always(nn.Module):
    """Says class 0 for marked images; for others the class that ``table`` gives for their first pixel's row."""

    def __init__(self, value, fooled):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.drop = nn.Dropout()
        self.value, self.fooled = value, fooled

    def forward(self, x):
        marked = (x[:, 0, -1, -1] == self.value) & self.fooled
        return nn.functional.one_hot(torch.where(marked, 0, x[:, 0, 0, 0].long()), 3).float() * self.scale


@pytest.fixture
def readable():
    """Images whose first pixel is their class."""
    x = torch.rand(30, 1, 6, 6, generator=torch.Generator().manual_seed(1)) * 0.5
    y = torch.arange(30) % 3
    x[:, 0, 0, 0] = y.float()
    return x, y


def test_each_number_is_taken_on_its_data(readable, tmp_path):
    x, y = readable
    m = poison(x, y, 9, trigger=PatchTrigger(7.0), target=0)
    original = Always(7.0, True).train()
    seen = []

    def cure(task):
        seen.append(task)
        task.model.fooled = len(task.flagged) > 5
        return task.model

    report = corrective_benchmark(
        m, original, {"cure": cure}, readable, fractions=(1.0, 0.3), seeds=(0, 1), held=(x, y), path=tmp_path / "r.json"
    )
    o = report.original
    assert (o.corrected, o.retained, o.misled, o.flagged) == (pytest.approx(1 / 3), 1.0, 1.0, None)
    assert o.manipulated == pytest.approx(float((y[m.manipulated] == 0).float().mean()))
    low, _, high, _ = report.cells
    assert (low.fraction, low.corrected, low.misled, low.manipulated, low.flagged) == (0.3, 1.0, 0.0, 1.0, 1.0)
    assert (high.fraction, high.corrected, high.misled) == (1.0, pytest.approx(1 / 3), 1.0)
    assert [t.seed for t in seen] == [0, 1, 0, 1]
    assert all(sorted([*t.flagged.tolist(), *t.kept.tolist()]) == list(range(30)) for t in seen)
    assert all(t.model is not original for t in seen)
    assert original.fooled
    assert all(module.training for module in original.modules())
    assert report.mean("cure", 0.3) == (1.0, 0.0)
    text = str(report)
    assert "9 of 30 training samples" in text
    assert text.count("\n") == 4
    assert "33.3 ± 0.0" in report._repr_html_()
    assert [len(ax.containers) for ax in report.plot()] == [1, 1]
    assert CorrectiveReport.from_json(report.to_json()) == report

    # A second run takes what the file holds and runs only what it lacks.
    def never(task):
        raise AssertionError

    def resume(manipulation, methods, **more):
        return corrective_benchmark(manipulation, original, methods, readable, path=tmp_path / "r.json", **more)

    again = resume(m, {"cure": never}, fractions=(0.3, 1.0), seeds=(0, 1))
    assert again == report
    # A method that comes first now, and fails, does not cost the cells that stand in the file.
    with pytest.raises(AssertionError):
        resume(m, {"new": cure, "broken": never, "cure": never}, fractions=(0.3,), seeds=(0,))
    held = CorrectiveReport.from_json((tmp_path / "r.json").read_text()).cells
    assert [c.method for c in held] == ["new", *["cure"] * 4]
    with pytest.raises(ArgumentError, match="path: expected a report of the same benchmark"):
        resume(poison(x, y, 8), {"cure": never}, fractions=(1.0,))


def test_an_interrupted_benchmark_goes_on_where_it_stopped(readable, tmp_path):
    m = swap_classes(*readable, (0, 1), 6)
    calls = []

    def method(task):
        calls.append(len(task.flagged))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return task.model

    def run():
        return corrective_benchmark(
            m, Always(0.0, False), {"a": method}, readable, fractions=(0.5, 1.0), path=tmp_path / "r.json"
        )

    with pytest.raises(KeyboardInterrupt):
        run()
    assert len(json.loads((tmp_path / "r.json").read_text())["cells"]) == 1
    report = run()
    assert calls == [3, 6, 6]
    assert [(c.corrected, c.retained, c.misled) for c in report.cells] == [(1.0, 1.0, 0.0)] * 2


def test_bad_input(readable):
    x, y = readable
    m = poison(x, y, 5)
    net = Always(7.0, True)

    def run(methods=None, test=readable, manipulation=m, **more):
        return corrective_benchmark(
            manipulation, net, methods or {"a": lambda t: t.model}, test, fractions=(1.0,), **more
        )

    def broken(task):
        with torch.no_grad():
            task.model.scale.fill_(torch.nan)
        return task.model

    with pytest.raises(NonFiniteError, match=r"methods: 'a' at 100% known: .*expected finite logits"):
        run({"a": broken})
    with pytest.raises(DTypeError, match="methods: 'a': expected a torch module back, got NoneType"):
        run({"a": lambda t: None})
    with pytest.raises(ArgumentError, match="expected at least one of each"):
        corrective_benchmark(m, net, {}, readable)
    with pytest.raises(ShapeError, match="test: expected as many inputs as labels, above 0, got 0 and 0"):
        run(test=(x[:0], y[:0]))
    with pytest.raises(ShapeError, match="held: expected as many"):
        run(held=(x, y[:3]))
    with pytest.raises(ArgumentError, match=r"labels: expected labels of 0 or more and below 3, got 1 to 3"):
        run(test=(x, y + 1))
    with pytest.raises(ArgumentError, match=r"test: expected samples outside the classes \(0, 1\), got none"):
        run(manipulation=swap_classes(x, y, (0, 1), 4), test=(x[y < 2], y[y < 2]))
    with pytest.raises(ArgumentError, match=r"count: expected an integer in \[1, 30\], got 31"):
        poison(x, y, 31)
    with pytest.raises(ArgumentError, match=r"count: expected an integer in \[2, 20\], got 22"):
        swap_classes(x, y, (0, 1), 22)
    with pytest.raises(ArgumentError, match="count: expected an even number"):
        swap_classes(x, y, (0, 1), 5)
    with pytest.raises(ArgumentError, match="classes: expected two different"):
        swap_classes(x, y, (1, 1), 4)
    with pytest.raises(DTypeError, match="x: expected a float tensor"):
        poison(x.numpy(), y, 3)
    with pytest.raises(DTypeError, match="y: expected integer labels"):
        shuffle_labels(x, y.float(), 3)
    with pytest.raises(ShapeError, match="x: expected images of 3x3 or more"):
        PatchTrigger(1.0)(x[..., :2])
    with pytest.raises(ArgumentError, match="text: expected the JSON of a CorrectiveReport"):
        CorrectiveReport.from_json("{}")


@pytest.mark.effect
def test_dampening_corrects_a_backdoor_of_which_a_fifth_is_known(tmp_path, capsys):
    """The example on the digits: retraining without the known samples leaves the backdoor, dampening weakens it."""
    path = Path(__file__).parents[2] / "examples" / "forget" / "corrective.py"
    spec = importlib.util.spec_from_file_location("corrective_example", path)
    example = sys.modules["corrective_example"] = importlib.util.module_from_spec(spec)
    threads = torch.get_num_threads()
    try:
        spec.loader.exec_module(example)
        report = example.main(["--quick", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
        del sys.modules["corrective_example"]
    assert "SSD, searched" in capsys.readouterr().out
    assert (tmp_path / "plot.png").stat().st_size > 1000
    ssd, retrained = (report.mean(name, 0.2)[0] for name in ("SSD, searched", "retrain without S_f"))
    assert report.original.corrected < 0.3
    assert ssd > retrained + 0.25
    assert report.mean("SSD, searched", 0.2, "retained")[0] > report.original.retained - 0.05
    # With every poisoned sample known, retraining is the yardstick again.
    assert report.mean("retrain without S_f", 1.0)[0] > 0.7
