"""The entropy attack against what it must say on cases whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from abjure.errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from abjure.measure.membership import (
    SVC_FEATURES,
    entropy_mia,
    lira_scores,
    logistic_mia,
    logit_confidence,
    modified_entropy,
    svc_mia,
    threshold_mia,
)


def rows(confidence: float, n: int, classes: int = 10, spread: float = 0.0, seed: int = 0) -> np.ndarray:
    """Predictions that give the top class about ``confidence``."""
    top = np.clip(confidence + spread * np.random.default_rng(seed).standard_normal(n), 0.2, 0.999)
    p = np.repeat(((1 - top) / (classes - 1))[:, None], classes, axis=1)
    p[:, 0] = top
    return p


def test_tells_sure_members_from_unsure_outsiders():
    train, test = rows(0.97, 200, spread=0.01), rows(0.6, 100, spread=0.05, seed=1)
    assert entropy_mia(train, test, rows(0.97, 50)) == 1.0
    assert entropy_mia(train, test, rows(0.6, 50)) == 0.0
    mixed = np.concatenate([rows(0.97, 30), rows(0.6, 10)])
    assert entropy_mia(train, test, mixed) == 0.75


def test_agrees_with_the_plain_form():
    from sklearn.linear_model import LogisticRegression

    draw = np.random.default_rng(3)
    train, test, forget = (draw.dirichlet(np.full(5, a), size=n) for a, n in ((0.2, 300), (0.6, 90), (0.4, 70)))

    def entropy(p):
        return np.array([-sum(v * np.log(v) for v in row if v > 0) for row in p])[:, None]

    x = np.concatenate([entropy(train), entropy(test)])
    y = np.array([1] * 300 + [0] * 90)
    expected = LogisticRegression(class_weight="balanced").fit(x, y).predict(entropy(forget)).mean()
    assert entropy_mia(train, test, forget) == expected
    assert 0 < expected < 1


def test_certain_predictions_have_entropy_0():
    sure = np.eye(4)
    with np.errstate(all="raise"):
        assert entropy_mia(sure, rows(0.5, 20, 4), sure) == 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_takes_tensors_of_every_dtype_even_with_a_gradient(dtype):
    train, test = rows(0.97, 50, spread=0.01), rows(0.5, 50, spread=0.05, seed=1)
    tensors = [torch.from_numpy(p).to(dtype).requires_grad_() for p in (train, test, train)]
    assert entropy_mia(*tensors) == 1.0


@given(st.permutations(range(12)))
def test_order_of_rows_does_not_matter(order):
    train, test, forget = (rows(c, 12, 3, 0.1, s) for c, s in ((0.9, 0), (0.6, 1), (0.75, 2)))
    assert entropy_mia(train, test, forget[order]) == entropy_mia(train, test, forget)


def test_bad_input_names_the_argument():
    good = rows(0.9, 5)
    bad = good.copy()
    bad[2, 1] = np.nan
    with pytest.raises(ShapeError, match=r"test: expected probabilities of shape \(n, classes\), got \(10,\)"):
        entropy_mia(good, good[0], good)
    with pytest.raises(ShapeError, match=r"forget: .*got \(0, 10\)"):
        entropy_mia(good, good, good[:0])
    with pytest.raises(ShapeError, match="expected one number of classes, got 10, 10, 4"):
        entropy_mia(good, good, rows(0.9, 5, 4))
    with pytest.raises(NonFiniteError, match="retain: expected finite"):
        entropy_mia(bad, good, good)
    with pytest.raises(ArgumentError, match="test: expected rows of probabilities that sum to 1"):
        entropy_mia(good, 3 * good, good)
    with pytest.raises(ArgumentError, match="retain: expected rows of probabilities"):
        entropy_mia(good * np.array([-1, *[3] * 9]), good, good)


def plain_modified_entropy(p, y):
    return np.array(
        [
            -(1 - row[t]) * np.log(row[t]) - sum(v * np.log(1 - v) for i, v in enumerate(row) if i != t)
            for row, t in zip(p, y, strict=True)
        ]
    )


def repo_modified_entropy(p, labels):
    """The published code line by line, in torch."""
    p, labels = torch.from_numpy(p), torch.from_numpy(labels)
    log_prob = torch.where(p > 0, p.log(), torch.tensor(1e-30, dtype=p.dtype).log())
    reverse_prob = 1 - p
    log_reverse_prob = torch.where(p > 0, p.log(), torch.tensor(1e-30, dtype=p.dtype).log())
    modified_probs = p.clone()
    modified_probs[:, labels] = reverse_prob[:, labels]
    modified_log_probs = log_reverse_prob.clone()
    modified_log_probs[:, labels] = log_prob[:, labels]
    return -torch.sum(modified_probs * modified_log_probs, dim=-1).numpy()


def test_modified_entropy_and_the_published_bug():
    draw = np.random.default_rng(0)
    p, y = draw.dirichlet(np.ones(6), 40), draw.integers(0, 4, 40)
    np.testing.assert_allclose(modified_entropy(p, y), plain_modified_entropy(p, y), rtol=1e-12)
    repo = modified_entropy(p, y, preset="svc_mia_repo")
    np.testing.assert_allclose(repo, repo_modified_entropy(p, y), rtol=1e-12)
    assert abs(repo - modified_entropy(p, y)).max() > 0.1
    sure = np.array([[1.0, 0, 0]])
    with np.errstate(all="raise"):
        assert modified_entropy(sure, [0])[0] == 0
        assert modified_entropy(sure, [1])[0] == pytest.approx(2 * 69.0775527898)
    with pytest.raises(ArgumentError, match="preset: expected None or"):
        modified_entropy(sure, [0], preset="other")
    with pytest.raises(ArgumentError, match="labels: expected labels of 0 or more and below 3, got 3 to 3"):
        modified_entropy(sure, [3])


def test_svc_attack_agrees_with_the_plain_form():
    from sklearn.svm import SVC

    draw = np.random.default_rng(3)
    groups = [(draw.dirichlet(np.full(4, a), n), draw.integers(0, 4, n)) for a, n in ((0.2, 150), (0.8, 60), (0.5, 50))]

    def plain(column, weight):
        seen, unseen, asked = (np.asarray(column(p, y), float).reshape(len(y), -1) for p, y in groups)
        machine = SVC(C=3, gamma="auto", kernel="rbf", class_weight=weight)
        machine.fit(np.concatenate([seen, unseen]), np.array([1] * 150 + [0] * 60))
        return machine.predict(asked).mean()

    columns = {
        "correctness": lambda p, y: p.argmax(1) == y,
        "confidence": lambda p, y: p[np.arange(len(y)), y],
        "entropy": lambda p, y: -(p * np.log(p)).sum(1),
        "modified_entropy": plain_modified_entropy,
        "probabilities": lambda p, y: p,
    }
    found = svc_mia(*groups)
    assert list(found) == list(SVC_FEATURES)
    assert found == {name: plain(column, "balanced") for name, column in columns.items()}
    columns["modified_entropy"] = repo_modified_entropy
    repo = svc_mia(*groups, preset="svc_mia_repo", limit=None)
    assert repo == {name: plain(column, None) for name, column in columns.items()}
    assert repo != found


def test_svc_attack_on_cases_whose_answer_is_known():
    def group(confidence, n, seed):
        return rows(confidence, n, spread=0.01, seed=seed), np.zeros(n, int)

    members, outsiders = group(0.97, 100, 0), group(0.5, 80, 1)
    for feature in ("confidence", "entropy", "modified_entropy", "probabilities"):
        assert svc_mia(members, outsiders, group(0.97, 20, 2), features=[feature], limit=40)[feature] == 1
        assert svc_mia(members, outsiders, group(0.5, 20, 2), features=[feature], limit=40)[feature] == 0
    wrong = outsiders[0], np.ones(80, int)
    assert svc_mia(members, wrong, members, features=["correctness"]) == {"correctness": 1}


def test_svc_attack_refuses_bad_input():
    good = rows(0.9, 5), np.zeros(5, int)
    with pytest.raises(ArgumentError, match=r"features: expected some of .*got \['loss'\]"):
        svc_mia(good, good, good, features=["loss"])
    with pytest.raises(ArgumentError, match="forget: expected a pair of probabilities and labels, got ndarray"):
        svc_mia(good, good, good[0])
    with pytest.raises(ShapeError, match="test labels: expected one label per row"):
        svc_mia(good, (good[0], good[1][:3]), good)
    with pytest.raises(DTypeError, match="retain labels: expected integer labels"):
        svc_mia((good[0], good[1] / 1), good, good)
    with pytest.raises(ShapeError, match="expected one number of classes, got 10, 4, 10"):
        svc_mia(good, (rows(0.9, 5, 4), good[1]), good)
    with pytest.raises(ArgumentError, match="limit: expected None or 1 or more"):
        svc_mia(good, good, good, limit=0)


def test_threshold_attack_on_normal_scores():
    draw = np.random.default_rng(0)
    inside, outside = draw.standard_normal(4000) + 1, draw.standard_normal(4000)
    found = threshold_mia(inside, outside, fpr=0.05)
    # Two unit normals a standard deviation apart: area Φ(1/√2), best threshold 1/2, accuracy Φ(1/2), and at 5 % false
    # positives 1 − Φ(1.645 − 1).
    assert found.auroc.value == pytest.approx(0.7602, abs=0.02)
    assert found.threshold == pytest.approx(0.5, abs=0.35)
    assert found.accuracy == pytest.approx(0.6915, abs=0.03)
    assert found.advantage == pytest.approx(2 * found.accuracy - 1)
    assert found.tpr.rate == pytest.approx(0.2595, abs=0.05)
    assert "advantage" in repr(found)
    noise = [threshold_mia(*draw.standard_normal((2, 60)), seed=s).accuracy for s in range(100)]
    assert np.mean(noise) == pytest.approx(0.5, abs=0.03)  # the same rows would give about 0.6
    with pytest.raises(ShapeError, match="others"):
        threshold_mia(inside, [1.0])
    with pytest.raises(NonFiniteError, match="members"):
        threshold_mia([1.0, np.nan], outside)
    with pytest.raises(ArgumentError, match="fpr"):
        threshold_mia(inside, outside, fpr=1)


def test_tpr_counts_members_above_all_allowed_others():
    others = np.arange(100.0)
    assert threshold_mia([98.5, 99.5], others, fpr=0.0).tpr.k == 1
    assert threshold_mia([98.5, 99.5], others, fpr=0.01).tpr.k == 2
    assert threshold_mia([99.0, 99.0], others, fpr=0.0).tpr.k == 0


def test_logistic_attack():
    draw = np.random.default_rng(1)
    inside, outside = draw.standard_normal((300, 3)) + np.eye(3)[0], draw.standard_normal((200, 3))
    p = logistic_mia(inside, outside, np.array([[3, 0, 0], [-3, 0, 0.0]]))
    assert p[0] > 0.85
    assert p[1] < 0.15
    with pytest.raises(ShapeError, match="asked"):
        logistic_mia(inside, outside, inside[:, :2])


def test_logit_confidence():
    p = np.array([[0.8, 0.2, 0], [0.1, 0.1, 0.8], [1, 0, 0]])
    found = logit_confidence(p, [0, 0, 0])
    assert found[:2] == pytest.approx([np.log(4), np.log(1 / 9)])
    assert found[2] == pytest.approx(-np.log(1e-30))
    sharp = np.array([[1 - 1e-20, 1e-20]])
    assert logit_confidence(sharp, [0])[0] == pytest.approx(-np.log(1e-20))


def test_lira_tells_members_that_a_global_threshold_cannot():
    """Samples differ in difficulty by more than membership moves them."""
    draw = np.random.default_rng(2)
    n, models = 2000, 16
    hard = 3 * draw.standard_normal(n)
    seen = draw.integers(0, 2, (models + 1, n)).astype(bool)
    statistic = hard + 1.5 * seen + 0.7 * draw.standard_normal(seen.shape)
    target, truth = statistic[0], seen[0]
    raw = threshold_mia(target[truth], target[~truth]).auroc.value
    online = lira_scores(target, statistic[1:], seen[1:])
    area = threshold_mia(online[truth], online[~truth]).auroc.value
    # The best possible: a shift of 1.5 at a standard deviation of 0.7 is an area of .935.
    assert raw < 0.7
    assert 0.9 < area < 0.945
    offline = lira_scores(target, hard + 0.7 * draw.standard_normal((models, n)))
    assert threshold_mia(offline[truth], offline[~truth]).auroc.value > 0.88
    own = (
        lira_scores(target, statistic[1:], seen[1:], shared_variance=False)
        if (seen[1:].sum(axis=0) > 1).all()
        else None
    )
    assert own is None or len(own) == n


def test_lira_by_its_definition():
    reference = np.array([[0.0, 2.0], [1.0, 3.0], [4.0, 4.0], [6.0, 8.0]])
    member = np.array([[0, 0], [0, 0], [1, 1], [1, 1]])
    found = lira_scores([5.0, 1.0], reference, member, shared_variance=False)
    for j, t in enumerate((5.0, 1.0)):
        fits = [(reference[rows, j].mean(), reference[rows, j].std(ddof=1)) for rows in (slice(2, 4), slice(0, 2))]
        (m1, s1), (m0, s0) = fits
        assert found[j] == pytest.approx(stats.norm.logpdf(t, m1, s1) - stats.norm.logpdf(t, m0, s0))
    offline = lira_scores([0.5, 40.0], reference[:2])
    sd = np.sqrt((reference[:2].var(axis=0, ddof=1)).mean())
    assert offline == pytest.approx(-stats.norm.logsf((np.array([0.5, 40.0]) - [0.5, 2.5]) / sd), rel=1e-9)
    with pytest.raises(ShapeError, match="reference: expected 2 rows or more"):
        lira_scores([1.0, 2.0], reference[:1])
    with pytest.raises(ShapeError, match="reference: expected 3 samples"):
        lira_scores([1.0, 2.0, 3.0], reference)
    with pytest.raises(ShapeError, match="member"):
        lira_scores([1.0, 2.0], reference, member[:, :1])
    with pytest.raises(DegenerateError, match="for every sample"):
        lira_scores([1.0, 2.0], reference, np.ones_like(member))
    with pytest.raises(DegenerateError, match="vary"):
        lira_scores([1.0, 2.0], np.ones((3, 2)))
