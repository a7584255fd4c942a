"""Project, ablate, steer: known vectors, f64 oracles over dtypes, layouts and threads, and every bad argument."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import abjure
from abjure import refuse
from abjure.integrations import torch as torch_forms
from abjure.refuse.directions import Edit

D = np.array([4 / 3, -0.75, -1 / 12, 2.25])
X = np.array([[1, 2, -1, 0.5], [0, 0, 0, 0], [-2, 0.25, 3, 1]])
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
ROUNDOFF = {torch.float64: 2**-53, torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


def exact(x, q, scale=1.0, origin=0.0):
    """The definition in float64, by the pseudo-inverse."""
    x, q = np.asarray(x.double() if isinstance(x, torch.Tensor) else x, dtype=np.float64), np.atleast_2d(q)
    return x - scale * ((x - origin) @ np.linalg.pinv(q)) @ q


def tolerance(x, dtype, rank=1):
    return (4 * ROUNDOFF[dtype] + (rank + 40) * (2**-53 if dtype == torch.float64 else 2**-24)) * (
        np.abs(x).max() * np.sqrt(x.shape[-1]) + 1e-6
    )


def test_known_vectors():
    y = refuse.ablate(X, D)
    np.testing.assert_allclose(y[0], [0.812558575445173, 2.10543580131209, -0.988284910965323, 0.18369259606373])
    np.testing.assert_array_equal(y[1], 0)
    np.testing.assert_allclose(refuse.project(X, D), [0.382672984326642, 0, -0.313791847147846], atol=1e-15)
    steered = refuse.steer_(X.copy(), D, 1.5, unit=True)
    np.testing.assert_allclose(
        steered[1], [0.734732129907152, -0.413286823072773, -0.045920758119197, 1.23986046921832]
    )
    low = np.array([0.25, 0.5, 0.375, -0.25])
    acting = refuse.affine_ablate_(X.copy(), D, low, shift=D)
    np.testing.assert_allclose(acting[0], [2.03155263980006, 1.41975164011247, -1.0644720399875, 2.24074507966261])
    np.testing.assert_allclose(refuse.project(refuse.affine_ablate_(X.copy(), D, low), D), [-0.233430520439251] * 3)


def test_several_directions_are_removed_jointly():
    v = np.array([[1.0, 1, 0, 0], [1, 0, 1, 0]])
    np.testing.assert_allclose(refuse.ablate(X, v)[[0, 2]], [[0, 0, 0, 0.5], [-1.75, 1.75, 1.75, 1]], atol=2e-15)
    deficient = [[1.0, 1, 0], [2, 2, 0], [0, 1, 1]]
    assert refuse.orthonormal_basis(deficient).shape == (2, 3)
    np.testing.assert_allclose(refuse.ablate([[1.0, 2, 3]], deficient), [[2 / 3, -2 / 3, 2 / 3]])
    assert refuse.project(X, v).shape == (3, 2)
    np.testing.assert_allclose(refuse.project(X, v), X @ refuse.orthonormal_basis(v).T, atol=1e-15)


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    lead=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    width=st.integers(1, 130),
    rank=st.integers(1, 20),
    layout=st.sampled_from(["plain", "sliced", "swapped", "transposed"]),
    scale=st.sampled_from([1.0, 0.5, 2.0, -1.0]),
    threads=st.sampled_from([1, 2, 5]),
    seed=st.integers(0, 2**31),
)
def test_against_float64(dtype, lead, width, rank, layout, scale, threads, seed):
    gen = torch.Generator().manual_seed(seed)
    rank = min(rank, width)
    q = torch.randn(rank, width, generator=gen, dtype=torch.float64).numpy()
    x = 3 * torch.randn(*lead, width, generator=gen, dtype=torch.float64)
    x = x.to(dtype)
    if layout == "sliced" and lead:
        x = torch.randn(*lead[:-1], 2 * lead[-1], width + 3, generator=gen, dtype=torch.float64).to(dtype)
        x = x[..., ::2, :width]
    elif layout == "swapped" and len(lead) > 1:
        x = x.transpose(0, 1)
    elif layout == "transposed" and lead:
        x = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    kept = x.clone()
    before = abjure.get_num_threads()
    abjure.set_num_threads(threads)
    try:
        out = refuse.ablate(x, q, scale=scale)
        coefficients = refuse.project(x, q)
        in_place = x.clone(memory_format=torch.preserve_format)
        assert refuse.ablate_(in_place, q, scale=scale) is in_place
    finally:
        abjure.set_num_threads(before)
    assert torch.equal(x, kept)
    assert out.dtype == dtype
    assert out.shape == x.shape
    assert torch.equal(out, in_place)
    want = exact(kept, q, scale)
    tol = 3 * rank * tolerance(kept.double().numpy(), dtype, rank)
    np.testing.assert_allclose(out.double().numpy(), want, rtol=0, atol=tol)
    basis = refuse.orthonormal_basis(q)
    np.testing.assert_allclose(coefficients.double().numpy(), kept.double().numpy() @ basis.T, rtol=0, atol=tol)
    form = torch_forms.edit(kept, Edit(width, basis, scale=scale))
    np.testing.assert_allclose(form.double().numpy(), want, rtol=0, atol=tol)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype):
    x = torch.randn(700, 513).to(dtype)
    q = np.random.default_rng(0).standard_normal((3, 513))
    before, seen = abjure.get_num_threads(), []
    for threads in (1, 2, 3):
        abjure.set_num_threads(threads)
        seen.append((refuse.ablate(x, q, preserve_norm=True), refuse.ablate(x, q[0]), refuse.project(x, q)))
    abjure.set_num_threads(before)
    assert all(torch.equal(a, b) for s in seen[1:] for a, b in zip(s, seen[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_forms_agree_with_the_kernels(dtype):
    x = torch.randn(6, 5, 96).to(dtype)
    rng = np.random.default_rng(1)
    q, v, o = rng.standard_normal((3, 96)), rng.standard_normal(96), rng.standard_normal(96)
    for edit in (
        Edit(96, refuse.orthonormal_basis(q), origin=o, scale=0.7, shift=v),
        Edit(96, shift=v, preserve_norm=True),
        Edit(96, refuse.orthonormal_basis(q), preserve_norm=True),
        Edit(96, q, right=rng.standard_normal((3, 96)), origin=o),
    ):
        tol = {torch.float64: 1e-12, torch.float32: 5e-5, torch.float16: 0.2, torch.bfloat16: 1.5}[dtype]
        ours, theirs = edit.apply(x), torch_forms.edit(x, edit)
        scale = ours.double().abs().max().item()
        assert (ours.double() - theirs.double()).abs().max().item() <= tol * max(scale, 1) * 0.02 + tol * 1e-3
        written = x.clone()
        torch_forms.edit_(written, edit)
        assert torch.equal(written, theirs)
        if edit.left is not None:
            found = edit.coefficients(x).double() - torch_forms.edit_coefficients(x, edit).double()
            assert found.abs().max().item() <= (1e-12 if dtype == torch.float64 else 1e-3)


def test_more_accurate_than_eager_bf16():
    torch.manual_seed(0)
    r = torch.nn.functional.normalize(torch.randn(2048, dtype=torch.float64), dim=0)
    x = (torch.randn(200, 2048, dtype=torch.float64) + 6 * r).bfloat16()
    want = exact(x, r.numpy())
    half = r.bfloat16()
    eager = x - (x @ half).unsqueeze(-1) * half
    ours = refuse.ablate(x, r.numpy())
    error = [np.abs(y.double().numpy() - want).mean() for y in (ours, eager)]
    left = [np.abs(y.double().numpy() @ r.numpy()).mean() for y in (ours, eager)]
    assert error[0] < error[1]
    assert left[0] < 0.5 * left[1]


def test_bf16_vector_of_one_rounding():
    bits = np.array([0x3BA1, 0x3F99, 0xBF8C, 0xC064, 0xBFE9, 0xC07E, 0x3E76, 0x40AC], np.uint16)
    r = np.array(
        [0xBEA4312D, 0xBECEFAF8, 0x3EA36742, 0x3E6E1A7A, 0x3D8CA86E, 0xBF1B31CC, 0xBC9C207E, 0x3EE7F11D], np.uint32
    ).view(np.float32)
    x = torch.from_numpy(bits.view(np.int16).copy()).view(torch.bfloat16)
    got = refuse.ablate(x, r).view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(got, [0x3F7C, 0x401B, 0xC004, 0xC089, 0xC002, 0xC008, 0x3E99, 0x4080])


@settings(max_examples=30, deadline=None)
@given(dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**31))
def test_twice_is_once(dtype, seed):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 300, generator=gen, dtype=torch.float64).to(dtype)
    q = torch.randn(2, 300, generator=gen, dtype=torch.float64)
    once = refuse.ablate(x, q)
    twice = refuse.ablate(once, q)
    gap = (twice.double() - once.double()).norm(dim=-1)
    assert bool(
        (
            gap
            <= (2 * ROUNDOFF[dtype] + 64 * 2**-53 + (dtype != torch.float64) * 64 * 2**-24) * x.double().norm(dim=-1)
        ).all()
    )


def test_norms():
    x = torch.randn(50, 64)
    q = np.random.default_rng(0).standard_normal((2, 64))
    kept = refuse.ablate(x, q, preserve_norm=True)
    torch.testing.assert_close(kept.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(refuse.ablate(x, q, scale=2.0).norm(dim=-1), x.norm(dim=-1))
    only = torch.tensor(q[0] / np.linalg.norm(q[0]), dtype=torch.float32)[None]
    assert refuse.ablate(only, q[0], preserve_norm=True).norm() < 1e-6
    steered = refuse.steer_(x.clone(), q[0], 3.0, preserve_norm=True)
    torch.testing.assert_close(steered.norm(dim=-1), x.norm(dim=-1))


def test_kinds_of_array():
    import ml_dtypes

    d = np.arange(1.0, 5)
    half = X.astype(ml_dtypes.bfloat16)
    assert refuse.ablate(half, d).dtype == half.dtype
    assert isinstance(refuse.ablate(X, torch.tensor(d)), np.ndarray)
    np.testing.assert_array_equal(refuse.ablate(X, torch.tensor(d)), refuse.ablate(X, refuse.Direction(d)))
    np.testing.assert_array_equal(
        refuse.ablate(X, [refuse.Direction(d), refuse.Direction(D)]), refuse.ablate(X, np.stack([d, D]))
    )
    assert refuse.project(torch.zeros(2, 3, 4, dtype=torch.bfloat16), d).dtype == torch.float32
    assert refuse.project(X, d).dtype == np.float64
    assert refuse.ablate(np.zeros((0, 4)), d).shape == (0, 4)
    big_endian = X.astype(">f8")
    np.testing.assert_array_equal(refuse.ablate_(big_endian, d), refuse.ablate(X, d))
    backwards = X[::-1].copy()[::-1]
    np.testing.assert_array_equal(refuse.ablate_(backwards, d), refuse.ablate(X, d))


def test_non_finite_rows_stay_alone():
    x = torch.randn(300, 40)
    q = np.random.default_rng(0).standard_normal((5, 40))
    clean = [refuse.ablate(x, q), refuse.ablate(x, q[0]), refuse.project(x, q)]
    x[7, 3], x[100, 0] = float("nan"), float("inf")
    rest = [i for i in range(300) if i not in (7, 100)]
    for y, want in zip([refuse.ablate(x, q), refuse.ablate(x, q[0]), refuse.project(x, q)], clean, strict=True):
        assert torch.equal(y[rest], want[rest])
        assert not y[7].isfinite().all()
        assert not y[100].isfinite().all()


def test_gradient_is_the_adjoint():
    q, o = np.random.default_rng(0).standard_normal((2, 9)), np.arange(9.0)
    for edit in (
        Edit(9, refuse.orthonormal_basis(q), origin=o, scale=0.7, shift=o),
        Edit(9, q, right=q[::-1].copy()),
        Edit(9, shift=o),
        Edit(9, refuse.orthonormal_basis(q), preserve_norm=True),
    ):
        x = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(edit.apply, (x,))
        assert edit.left is None or torch.autograd.gradcheck(edit.coefficients, (x,))
        assert torch.autograd.gradgradcheck(edit.apply, (x,))


def test_direction_saves_everything(tmp_path):
    d = refuse.Direction(D, layer=3, site="post", position=-2, counts=(4, 3), provenance={"model": "tiny", "n": [1, 2]})
    d.save(tmp_path / "d.safetensors")
    back = refuse.Direction.load(tmp_path / "d.safetensors")
    np.testing.assert_array_equal(back.vector, d.vector)
    for name in ("layer", "site", "position", "counts", "provenance", "norm"):
        assert getattr(back, name) == getattr(d, name)
    assert d.norm == pytest.approx(2.72208049517685)
    np.testing.assert_allclose(d.unit, D / np.linalg.norm(D), rtol=1e-15)
    assert "norm" in d._repr_html_()
    assert "layer=3" in repr(d)
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]
    with pytest.raises(ValueError):
        d.vector[0] = 0


def test_direction_refuses(tmp_path):
    with pytest.raises(abjure.DegenerateError, match="vector"):
        refuse.Direction(np.zeros(3))
    with pytest.raises(abjure.ShapeError, match="vector"):
        refuse.Direction(np.zeros((2, 3)))
    with pytest.raises(abjure.NonFiniteError, match="vector"):
        refuse.Direction([1.0, np.nan])
    with pytest.raises(abjure.ArgumentError, match="site"):
        refuse.Direction(D, site="mid")
    with pytest.raises(abjure.ArgumentError, match="provenance"):
        refuse.Direction(D, provenance={"x": object()}).save(tmp_path / "d")
    with pytest.raises(abjure.ArgumentError, match=r"path: expected a writable.*missing"):
        refuse.Direction(D).save(tmp_path / "missing" / "d")
    with pytest.raises(abjure.ArgumentError, match="path: expected a readable"):
        refuse.Direction.load(tmp_path / "none")
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(abjure.ArgumentError, match="not a saved Direction"):
        refuse.Direction.load(tmp_path / "junk")
    assert [p.name for p in tmp_path.iterdir()] == ["junk"]


BAD_Q = [
    (np.ones(3), abjure.ShapeError),
    (np.ones((2, 3)), abjure.ShapeError),
    (np.ones((1, 2, 4)), abjure.ShapeError),
    (np.ones((0, 4)), abjure.ShapeError),
    (np.zeros(4), abjure.DegenerateError),
    (np.array([1, np.nan, 0, 0]), abjure.NonFiniteError),
    (np.array([1, np.inf, 0, 0]), abjure.NonFiniteError),
    (np.array(["a", "b", "c", "d"]), abjure.DTypeError),
    (np.ones(4, dtype=complex), abjure.DTypeError),
    (torch.ones(4, requires_grad=True), abjure.LayoutError),
]


@pytest.mark.parametrize(("q", "error"), BAD_Q)
@pytest.mark.parametrize("call", ["project", "ablate", "ablate_", "affine_ablate_"])
def test_bad_directions(q, error, call):
    x = X.copy()
    args = (np.zeros(4),) if call == "affine_ablate_" else ()
    with pytest.raises(error, match="q:"):
        getattr(refuse, call)(x, q, *args)
    np.testing.assert_array_equal(x, X)


def test_bad_arguments():
    x = X.copy()
    cases = [
        (lambda: refuse.steer_(x, np.ones(3)), abjure.ShapeError, "v:"),
        (lambda: refuse.steer_(x, np.full(4, np.nan)), abjure.NonFiniteError, "v:"),
        (lambda: refuse.steer_(x, np.zeros(4), unit=True), abjure.DegenerateError, "v:"),
        (lambda: refuse.steer_(x, D, float("nan")), abjure.ArgumentError, "scale:"),
        (lambda: refuse.ablate_(x, D, scale=float("inf")), abjure.ArgumentError, "scale:"),
        (lambda: refuse.ablate_(x, D, scale="1"), abjure.DTypeError, "scale:"),
        (lambda: refuse.affine_ablate_(x, D, np.ones(5)), abjure.ShapeError, "origin:"),
        (lambda: refuse.affine_ablate_(x, D, D, shift=np.full(4, np.inf)), abjure.NonFiniteError, "shift:"),
        (lambda: refuse.ablate_(np.ones((2, 4), dtype=np.int32), D), abjure.DTypeError, "x:"),
        (lambda: refuse.ablate(np.ones((2, 4), dtype=np.complex128), D), abjure.DTypeError, "x:"),
        (lambda: refuse.ablate_(np.float64(1.0), D), abjure.ShapeError, "x:"),
        (lambda: refuse.ablate_("text", D), abjure.DTypeError, "x:"),
        (lambda: refuse.ablate(np.ones((3, 0)), D), abjure.ShapeError, "x:"),
        (lambda: refuse.ablate_(torch.ones(2, 4, requires_grad=True), D), abjure.LayoutError, "x:"),
        (lambda: refuse.ablate_(torch.ones(1, 4).expand(3, 4), D), abjure.LayoutError, "x:"),
        (lambda: refuse.ablate_(torch.ones(2, 4, device="meta"), D), abjure.DeviceError, "meta"),
    ]
    for call, error, match in cases:
        with pytest.raises(error, match=match):
            call()
    np.testing.assert_array_equal(x, X)
    frozen = X.copy()
    frozen.flags.writeable = False
    with pytest.raises(abjure.LayoutError, match="read-only"):
        refuse.ablate_(frozen, D)


def test_other_devices_take_the_torch_forms(monkeypatch):
    """What a CUDA tensor goes through, on the CPU: the same calls give the same numbers."""
    import abjure.refuse.directions as module
    import abjure.refuse.weights as weights

    x, q = torch.randn(5, 7, 24), np.random.default_rng(0).standard_normal((2, 24))

    def everything():
        weight = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
        report = refuse.orthogonalize_(weight, q, 0, norm_preserving="in")
        return [
            refuse.project(x, q),
            refuse.project(x, q[0]),
            refuse.ablate(x, q),
            refuse.ablate_(x.clone(), q, scale=0.5, preserve_norm=True),
            refuse.steer_(x.clone(), q[0], 2.0),
            refuse.affine_ablate_(x.clone(), q, q[1], shift=q[0]),
            weight,
            torch.tensor([report.residual_before]),
        ]

    ours, called = everything(), []

    def device_path(tensor, kernel):
        called.append(kernel)
        return torch_forms.DEVICE_PATHS[kernel]

    monkeypatch.setattr(module, "device_path", device_path)
    monkeypatch.setattr(weights, "device_path", device_path)
    theirs = everything()
    assert set(called) == {"edit", "edit_", "edit_coefficients", "orthogonalize_"}
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def test_without_leaves_what_is_orthogonal_to_the_others():
    rng = np.random.default_rng(0)
    a, b, c = rng.standard_normal((3, 32))
    harm, refusal = refuse.Direction(a, layer=1, provenance={"method": "x"}), refuse.Direction(1e-6 * b, layer=2)
    left = harm.without(refusal, c)
    basis = np.linalg.qr(np.stack([b, c]).T)[0].T
    np.testing.assert_allclose(left.vector, a - basis.T @ (basis @ a), atol=1e-13)
    assert np.abs(basis @ left.vector).max() < 1e-14 * left.norm * 32
    [facts] = left.provenance["without"]
    assert facts["share"] == pytest.approx(left.norm / harm.norm)
    assert facts["others"][0]["layer"] == 2
    assert facts["others"][0]["cosine"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert (left.layer, left.provenance["method"]) == (1, "x")
    for others, error in [
        ((), abjure.ArgumentError),
        ((np.ones(3),), abjure.ShapeError),
        ((np.zeros(32),), abjure.DegenerateError),
        ((np.full(32, np.nan),), abjure.NonFiniteError),
        ((2 * a,), abjure.DegenerateError),
    ]:
        with pytest.raises(error):
            harm.without(*others)
