"""Weight-space ablation: known matrices, f64 oracles over axes, dtypes and forms, and every bad argument."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import abjure
from abjure import refuse
from abjure.integrations import torch as torch_forms

D = np.array([4 / 3, -0.75, -1 / 12, 2.25])
W = np.array([[1, 2, 0], [0.5, -1, 1], [-1, 0.25, 2], [2, 1, -0.5]])
FORMS = [None, "in", "row", "row_pre"]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
ROUNDOFF = {torch.float64: 2**-50, torch.float32: 2**-20, torch.float16: 2**-9, torch.bfloat16: 2**-6}


def exact(w, q, scale, form):
    """The definitions in float64; the residual axis is the first one."""
    q = refuse.orthonormal_basis(q)
    rows = np.linalg.norm(w, axis=1, keepdims=True)
    columns = np.linalg.norm(w, axis=0, keepdims=True)
    start = w / np.where(rows > 0, rows, 1) if form in ("row", "row_pre") else w
    y = start - scale * q.T @ (q @ start)
    if form == "in":
        return y * columns / np.linalg.norm(y, axis=0, keepdims=True)
    if form == "row":
        return y * rows / np.linalg.norm(y, axis=1, keepdims=True)
    return y * rows if form == "row_pre" else y


def test_known_matrix():
    w = W.copy()
    report = refuse.orthogonalize_(w, D, 0)
    np.testing.assert_allclose(w[0], [0.00281162136832247, 0.98406747891284, 0.36738519212746], rtol=1e-12)
    assert report.rank == 1
    assert report.residual_before == pytest.approx(
        np.linalg.norm([2.03582027661773, 2.0740875750504, -0.750039049280218])
    )
    assert report.residual_after < 1e-15
    assert "residual_after" in report._repr_html_()
    w = W.copy()
    refuse.orthogonalize_(w, D, 0, norm_preserving="in")
    np.testing.assert_allclose(np.linalg.norm(w, axis=0), [2.5, 2.46221445044903, 2.29128784747792])
    np.testing.assert_allclose(D @ w, 0, atol=1e-14)
    bias = np.array([1, -1, 0.5, 2])
    refuse.orthogonalize_(bias, D, 0)
    np.testing.assert_allclose(bias, [-0.177132146204311, -0.337863167760075, 0.573570759137769, 0.0135895032802253])


def test_stacks_of_experts():
    q = [0.6, 0, 0.8]
    w = np.arange(1.0, 13).reshape(2, 3, 2) / 4
    refuse.orthogonalize_(w, q, 1)
    want = [[[-0.44, -0.4], [0.75, 1], [0.33, 0.3]], [[-0.2, -0.16], [2.25, 2.5], [0.15, 0.12]]]
    np.testing.assert_allclose(w, want, atol=1e-15)
    w = np.arange(1.0, 13).reshape(2, 2, 3) / 4
    refuse.orthogonalize_(w, q, 2)
    want = [[[-0.2, 0.5, 0.15], [-0.08, 1.25, 0.06]], [[0.04, 2, -0.03], [0.16, 2.75, -0.12]]]
    np.testing.assert_allclose(w, want, atol=1e-15)


def test_gain_of_a_norm_behind_the_branch():
    g, r, h = np.array([2, 1, 0.5, 1]), np.full(4, 0.5), np.array([1.0, -1, 2])

    def written(w):
        z = w @ h
        return r @ (g * z / np.sqrt((z**2).mean()))

    plain, right = W.copy(), W.copy()
    refuse.orthogonalize_(plain, r, 0)
    refuse.orthogonalize_(right, r, 0, post_gain=g)
    assert written(W) == pytest.approx(0.630196118004)
    assert written(plain) == pytest.approx(-0.812405567335)
    assert written(right) == pytest.approx(0, abs=1e-15)
    np.testing.assert_allclose(right[0], [-0.28, 0.68, -0.48], atol=1e-15)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    form=st.sampled_from(FORMS),
    shape=st.tuples(st.integers(1, 3), st.integers(9, 60), st.integers(1, 40)),
    last=st.booleans(),
    three=st.booleans(),
    rank=st.integers(1, 4),
    scale=st.sampled_from([1.0, 0.5, 2.0]),
    seed=st.integers(0, 2**31),
)
def test_against_float64(dtype, form, shape, last, three, rank, scale, seed):
    gen = torch.Generator().manual_seed(seed)
    experts, out, inputs = shape
    w = torch.randn(experts, out, inputs, generator=gen, dtype=torch.float64).to(dtype)
    q = torch.randn(rank, out, generator=gen, dtype=torch.float64).numpy()
    want = np.stack([exact(e.double().numpy(), q, scale, form) for e in w])
    stored = w.transpose(1, 2).contiguous() if last else w.clone()
    axis = 2 if last else 1
    if not three:
        stored, axis, want = stored[0], axis - 1, want[:1]
    by_torch = stored.clone()
    report = refuse.orthogonalize_(stored, q, axis, scale, form)
    got = stored.double().numpy().reshape(len(want), *stored.shape[-2:])
    got = np.swapaxes(got, 1, 2) if last else got
    tol = ROUNDOFF[dtype] * max(1.0, np.abs(want).max()) * (1 if form is None else 8)
    np.testing.assert_allclose(got, want, rtol=0, atol=tol)
    basis = refuse.orthonormal_basis(q)
    assert report.rank == rank
    np.testing.assert_allclose(report.residual_after, np.linalg.norm(basis @ got), rtol=1e-3, atol=tol)
    other = torch_forms.orthogonalize_(by_torch, basis, axis, scale, form)
    np.testing.assert_allclose(by_torch.double(), stored.double(), rtol=0, atol=2 * tol)
    assert other.residual_before == pytest.approx(report.residual_before, rel=1e-3)


def test_parameters_conv1d_and_views():
    layer = torch.nn.Linear(6, 4)
    refuse.orthogonalize_(layer.weight, D, 0)
    refuse.orthogonalize_(layer.bias, D, 0)
    y = layer(torch.randn(5, 6))
    assert (y @ torch.tensor(D, dtype=torch.float32)).abs().max() < 1e-5
    transposed = torch.tensor(W, dtype=torch.float32).T.contiguous().T
    refuse.orthogonalize_(transposed, D, 0)
    plain = W.astype(np.float32)
    refuse.orthogonalize_(plain, D, 0)
    np.testing.assert_allclose(transposed.numpy(), plain, atol=1e-6)
    empty = np.zeros((4, 0))
    assert refuse.orthogonalize_(empty, D, 0).residual_before == 0


def test_what_cannot_be_restored():
    w = np.stack([D, np.zeros(4), np.ones(4)])
    for form, stored, axis in (("in", w.copy(), 1), ("in", w.T.copy(), 0)):
        report = refuse.orthogonalize_(stored, D, axis, norm_preserving=form)
        assert report.unrestored == 1
        assert report.residual_after < 1e-14
        rows = stored if axis == 1 else stored.T
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), [0, 0, 2], atol=1e-14)


def test_bad_arguments():
    w = W.copy()
    bad = W.copy()
    bad[2, 1] = np.nan
    experts = np.stack([W, bad])
    kept = experts.copy()
    cases = [
        (lambda: refuse.orthogonalize_(w, D, 1), abjure.ShapeError, "q:"),
        (lambda: refuse.orthogonalize_(w, D, 2), abjure.ArgumentError, "axis:"),
        (lambda: refuse.orthogonalize_(w, D, 0.5), abjure.DTypeError, "axis:"),
        (lambda: refuse.orthogonalize_(experts, D, 0), abjure.ArgumentError, "axis:"),
        (lambda: refuse.orthogonalize_(np.zeros((1, 1, 1, 4)), D, 3), abjure.ShapeError, "weight:"),
        (lambda: refuse.orthogonalize_(w, D, 0, norm_preserving="column"), abjure.ArgumentError, "norm_preserving:"),
        (lambda: refuse.orthogonalize_(w[:, 0], D, 0, 1.0, "row"), abjure.ArgumentError, "norm_preserving:"),
        (lambda: refuse.orthogonalize_(w, D, 0, scale=np.nan), abjure.ArgumentError, "scale:"),
        (lambda: refuse.orthogonalize_(w, D, 0, post_gain=np.ones(3)), abjure.ShapeError, "post_gain:"),
        (lambda: refuse.orthogonalize_(w, D, 0, post_gain=[1, 1, 1, np.inf]), abjure.NonFiniteError, "post_gain:"),
        (lambda: refuse.orthogonalize_(w, D, 0, post_gain=np.zeros(4)), abjure.DegenerateError, "post_gain:"),
        (lambda: refuse.orthogonalize_(w, np.zeros(4), 0), abjure.DegenerateError, "q:"),
        (lambda: refuse.orthogonalize_(experts, D, 1), abjure.NonFiniteError, "weight:"),
        (lambda: refuse.orthogonalize_(np.ones((4, 2), dtype=np.int64), D, 0), abjure.DTypeError, "weight:"),
        (lambda: refuse.orthogonalize_([[1.0]], D, 0), abjure.DTypeError, "weight:"),
        (lambda: refuse.orthogonalize_(torch.ones(4, 2, device="meta"), D, 0), abjure.DeviceError, "meta"),
    ]
    for call, error, match in cases:
        with pytest.raises(error, match=match):
            call()
    np.testing.assert_array_equal(w, W)
    np.testing.assert_array_equal(experts, kept)
