"""The array intake on real NumPy arrays and torch tensors: addresses, layouts, refusals."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from abjure import DeviceError, DTypeError, LayoutError, _interop, _native, forget, protect, refuse

TORCH_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
NUMPY_DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0, 2), (5, 7), (2, 3, 4)])
def test_torch_tensors_come_in_without_a_copy(dtype, shape):
    x = torch.zeros(shape, dtype=dtype)
    address, name, got_shape, strides, writable = _native.describe(x)
    assert (address, name) == (x.data_ptr(), str(dtype).removeprefix("torch."))
    assert (tuple(got_shape), tuple(strides), writable) == (x.shape, x.stride(), True)


@pytest.mark.parametrize("dtype", NUMPY_DTYPES, ids=lambda d: np.dtype(d).name)
def test_numpy_arrays_come_in_without_a_copy(dtype):
    x = np.zeros((4, 6), dtype)[1:, ::2]
    address, name, shape, strides, writable = _native.describe(x)
    assert (address, name, tuple(shape), writable) == (x.ctypes.data, np.dtype(dtype).name, (3, 3), True)
    assert tuple(s * x.itemsize for s in strides) == x.strides


def test_dlpack_objects_that_are_neither():
    class Wrapped:
        def __init__(self, x):
            self.x = x

        def __dlpack__(self, **kwargs):
            return self.x.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return self.x.__dlpack_device__()

    x = np.arange(6.0).reshape(2, 3)
    assert _native.describe(Wrapped(x))[:3] == (x.ctypes.data, "float64", [2, 3])
    x.flags.writeable = False
    assert _native.describe(Wrapped(x))[4] is False
    assert _native.describe(x)[4] is False


def test_slices_of_tensors_keep_their_strides():
    x = torch.zeros(4, 10, 8, dtype=torch.bfloat16)[:, 2:5]
    address, _, shape, strides, _ = _native.describe(x)
    assert (address, shape, strides) == (x.data_ptr(), [4, 3, 8], [80, 8, 1])


@pytest.mark.parametrize(
    ("x", "error", "words"),
    [
        (np.zeros(3, np.int64), DTypeError, "int64"),
        (np.zeros(3, ">f4"), DTypeError, "float32"),
        (np.zeros(3, np.complex64), DTypeError, "complex64"),
        (torch.zeros(3, dtype=torch.int32), DTypeError, "expected"),
        ("text", DTypeError, "str"),
        (torch.zeros(3, requires_grad=True), LayoutError, "requires grad"),
        (torch.zeros(3, device="meta"), LayoutError, "meta"),
    ],
    ids=["int", "big-endian", "complex", "int-tensor", "text", "grad", "meta"],
)
def test_refusals_name_the_argument_and_what_was_found(x, error, words):
    with pytest.raises(error, match=words) as caught:
        _native.describe(x)
    assert str(caught.value).startswith("x:")


def test_misaligned_memory_is_refused_by_the_kernel_and_copied_by_the_face():
    raw = np.zeros(4 * 4 + 1, np.uint8)[1:].view(np.float32)
    with pytest.raises(LayoutError, match="aligned"):
        _native.describe(raw)
    assert _native.describe(_interop.source(raw, "x"))[2] == [4]


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T,
        lambda x: x[:, ::2],
        lambda x: x[::-1],
        lambda x: x[1:3],
        lambda x: x[:, 1:4],
    ],
    ids=["transposed", "every-other", "reversed", "rows", "columns"],
)
def test_target_writes_through_every_layout(view):
    base = np.arange(24.0).reshape(4, 6)
    expected = base.copy()
    view(expected)[...] = -view(expected)
    with _interop.target(view(base), "x") as w:
        np.negative(w, out=w)
    np.testing.assert_array_equal(base, expected)


def test_target_of_a_strided_tensor():
    x = torch.arange(12.0).reshape(3, 4)
    expected = x.clone()
    expected.t().neg_()
    with _interop.target(x.t(), "x") as w:
        assert w.is_contiguous()
        w.neg_()
    torch.testing.assert_close(x, expected, rtol=0, atol=0)


def test_target_refuses_before_anything_is_written():
    frozen = np.zeros(3)
    frozen.flags.writeable = False
    weight = torch.zeros(3, requires_grad=True)
    for x, words in [
        (frozen, "read-only"),
        (np.broadcast_to(np.zeros(3), (2, 3)), "read-only"),
        (torch.zeros(3).expand(2, 3), "overlap"),
        (np.lib.stride_tricks.as_strided(np.zeros(5), (3, 3), (8, 8)), "overlap"),
        (weight, "requires grad"),
    ]:
        with pytest.raises(LayoutError, match=words), _interop.target(x, "x"):
            raise AssertionError("the body must not run")
    with torch.no_grad(), _interop.target(weight, "x") as w:
        w += 1
    assert weight.detach().tolist() == [1, 1, 1]
    with pytest.raises(DTypeError, match="list"), _interop.target([1.0], "x"):
        raise AssertionError("the body must not run")


def test_device_paths_never_move_a_tensor():
    with pytest.raises(DeviceError, match="meta"):
        _interop.device_path(torch.zeros(3, device="meta"), "ablate")
    with pytest.raises(DeviceError, match="meta"):
        _interop.source(torch.zeros(3, device="meta"), "x")
    assert _interop.device_path(torch.zeros(3), "ablate") is None
    assert _interop.device_path(np.zeros(3), "ablate") is None


Q = np.ones((1, 3))
IDS = np.zeros((2, 4), np.int64)
#: Every public function that takes arrays, given ``x`` of shape (2, 3).
CALLS = {
    "dampen_array_": lambda x: forget.dampen_array_(x, x, x),
    "selection_curve": lambda x: forget.selection_curve(x, x, [1.0]),
    "Fisher.update": lambda x: forget.Fisher().update({"w": x}),
    "token_logprobs": lambda x: forget.token_logprobs(x, [0, 1]),
    "project": lambda x: refuse.project(x, Q),
    "ablate": lambda x: refuse.ablate(x, Q),
    "ablate_": lambda x: refuse.ablate_(x, Q),
    "affine_ablate_": lambda x: refuse.affine_ablate_(x, Q, Q[0]),
    "steer_": lambda x: refuse.steer_(x, Q[0]),
    "orthogonalize_": lambda x: refuse.orthogonalize_(x, Q, -1),
    "Contrast.update": lambda x: refuse.Contrast().update(x, [0, 1]),
    "bias_": lambda x: refuse.bias_(x, [0], [1.0]),
    "force_": lambda x: refuse.force_(x, [0, 1]),
    "row_lse": refuse.row_lse,
    "row_max_gap": lambda x: refuse.row_max_gap(x, [0]),
    "row_margin": lambda x: refuse.row_margin(x, [0]),
    "RefusalTokens": lambda x: refuse.RefusalTokens({"a": 1}, threshold=0.0, prompt_length=4)(IDS, x),
    "ForbiddenPhrases": lambda x: refuse.ForbiddenPhrases([[0]], scope="all")(IDS, x),
    "bayes_error": lambda x: protect.bayes_error(x, [0, 1], bandwidth=1.0, singleton="keep"),
    "bayes_error_gradient": lambda x: protect.bayes_error_gradient(x, [0, 1], bandwidth=1.0, singleton="keep"),
    "bandwidth": lambda x: protect.bandwidth(x, [0, 1]),
    "maximize_bayes_error": lambda x: protect.maximize_bayes_error(x, [0, 1], bandwidth=1.0),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_function_refuses_devices_dtypes_and_other_things(name):
    call = CALLS[name]
    with pytest.raises(DeviceError, match="meta"):
        call(torch.zeros(2, 3, device="meta"))
    for bad in (np.zeros((2, 3), np.complex64), np.zeros((2, 3), np.int32), torch.zeros(2, 3, dtype=torch.int32), "x"):
        with pytest.raises(DTypeError, match=r"^\S.*: expected "):
            call(bad)


def test_integers():
    assert _interop.integers(torch.tensor([1, 2]), "y").dtype == np.int64
    assert _interop.integers([1.0, 2.0], "y").tolist() == [1, 2]
    assert _interop.integers([], "y").size == 0
    for bad in ([1.5], np.array([np.nan]), ["a"]):
        with pytest.raises(DTypeError, match="y"):
            _interop.integers(bad, "y")
    with pytest.raises(DTypeError, match="uint8"):
        _interop.integers([300], "y", np.uint8)
