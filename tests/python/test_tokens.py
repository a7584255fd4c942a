"""Biases, reductions and gates against plain float64 NumPy, the torch forms, and the reference vectors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import abjure
from abjure import refuse
from abjure.errors import (
    ArgumentError,
    DegenerateError,
    DeviceError,
    DTypeError,
    LayoutError,
    NonFiniteError,
    ShapeError,
)
from abjure.integrations.torch import DEVICE_PATHS
from abjure.refuse import RefusalTokens
from abjure.refuse.tokens import NO_FIRE, NOT_ASKED, NOT_SELECTED

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
PROMPT = np.zeros((1, 3), dtype=np.int64)


def lse(z: np.ndarray) -> np.ndarray:
    peak = z.max(axis=-1, keepdims=True)
    peak = np.where(np.isfinite(peak), peak, 0.0)
    with np.errstate(divide="ignore"):
        return (peak + np.log(np.exp(z - peak).sum(axis=-1, keepdims=True)))[..., 0]


def margins(z: np.ndarray, groups: list[list[int]], temperature: float = 1.0) -> np.ndarray:
    z = z / temperature
    rest = [[j for j in range(z.shape[1]) if j not in g] for g in groups]
    return np.stack([lse(z[:, g]) - lse(z[:, r]) for g, r in zip(groups, rest, strict=True)], axis=1)


def bits(t: torch.Tensor) -> np.ndarray:
    return t.contiguous().view(torch.uint8).numpy().copy()


def random_logits(seed: int, rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 4).to(dtype)


# ---- biases


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("strided", [False, True])
def test_bias_adds_once_and_leaves_other_bits(dtype, strided):
    whole = random_logits(0, 6, 40, dtype)
    z = whole[::2, 3:33] if strided else whole
    before = z.clone()
    ids, bias = np.array([4, 29, 4, 0]), np.array([0.3, -2.0, 0.45, 0.0])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = before.clone()
    for token, b in ((4, 0.75), (29, -2.0)):
        expected[:, token] = (before[:, token].to(wide) + torch.tensor(b, dtype=wide)).to(dtype)
    outside = whole.clone()
    assert refuse.bias_(z, ids, bias) is z
    assert torch.equal(z, expected)
    if strided:
        outside[::2, 3:33] = expected
        assert np.array_equal(bits(whole), bits(outside))
    torch_form = before.clone()
    DEVICE_PATHS["bias_"](torch_form, ids, bias, None)
    assert np.array_equal(bits(torch_form), bits(expected))


def test_bias_per_row_numpy_and_columns_not_contiguous():
    z = np.zeros((5, 4)).T
    refuse.bias_(z, [1, 0, 4], [1.0, 2.0, -np.inf], indptr=[0, 1, 1, 3, 3])
    expected = np.zeros((4, 5))
    expected[0, 1], expected[2, 0], expected[2, 4] = 1.0, 2.0, -np.inf
    assert np.array_equal(z, expected)


def test_a_small_bias_is_lost_in_bfloat16():
    z = torch.full((1, 2), 17.25, dtype=torch.bfloat16)
    for bias, result in ((0.03, 17.25), (0.0625, 17.25), (0.07, 17.375)):
        assert float(refuse.bias_(z.clone(), [0], bias)[0, 0]) == result


@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 50), st.sampled_from(DTYPES))
@settings(max_examples=60, deadline=None)
def test_bias_equals_the_torch_form(seed, rows, vocab, dtype):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 6, rows)
    indptr = np.concatenate([[0], np.cumsum(counts)])
    ids, bias = rng.integers(0, vocab, counts.sum()), rng.normal(size=counts.sum())
    z = random_logits(seed, rows, vocab, dtype)
    other = z.clone()
    refuse.bias_(z, ids, bias, indptr)
    DEVICE_PATHS["bias_"](other, ids, bias, indptr)
    wide = {torch.float64: 1e-14, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}
    torch.testing.assert_close(z, other, rtol=wide[dtype], atol=wide[dtype])


@pytest.mark.parametrize("path", [refuse.bias_, DEVICE_PATHS["bias_"]])
@pytest.mark.parametrize(
    ("z", "ids", "bias", "indptr", "error"),
    [
        (torch.zeros(2, 3), [3], [1.0], None, ArgumentError),
        (torch.zeros(2, 3), [-1], [1.0], None, ArgumentError),
        (torch.zeros(2, 3), [0], [math.nan], None, ArgumentError),
        (torch.zeros(2, 3), [0], [math.inf], None, ArgumentError),
        (torch.zeros(2, 3), [0, 1], [1.0, 2.0, 3.0], None, ShapeError),
        (torch.zeros(2, 3), [0], [1.0], [0, 1], ShapeError),
        (torch.zeros(2, 3), [0], [1.0], [0, 2, 1], ArgumentError),
        (torch.zeros(3), [0], [1.0], None, ShapeError),
        (torch.zeros(2, 3, dtype=torch.int64), [0], [1.0], None, DTypeError),
        (torch.tensor([[0.0, 1], [0, math.nan]]), [1], [1.0], None, NonFiniteError),
        (torch.tensor([[0.0, 1], [0, math.inf]]), [1], [-math.inf], None, NonFiniteError),
        (torch.tensor([[0.0, 1], [0, -math.inf]]), [0], [-math.inf], None, DegenerateError),
        (torch.tensor([[0.0], [65000]], dtype=torch.float16), [0], [600.0], None, ArgumentError),
    ],
)
def test_bad_biases_write_nothing(path, z, ids, bias, indptr, error):
    before = bits(z)
    with pytest.raises(error):
        path(z, np.array(ids), np.array(bias), None if indptr is None else np.array(indptr))
    assert np.array_equal(bits(z), before)


def test_read_only_logits_and_wrong_types():
    z = np.zeros((1, 3))
    z.flags.writeable = False
    with pytest.raises(LayoutError, match="read-only"):
        refuse.bias_(z, [0], [1.0])
    with pytest.raises(DTypeError):
        refuse.bias_(np.zeros((1, 3)), [0.5], [1.0])
    with pytest.raises(DTypeError):
        refuse.bias_(np.zeros((1, 3)), [0], ["x"])


def test_force():
    z = torch.tensor([[1.0, -math.inf, 3.0]] * 3)
    other = z.clone()
    refuse.force_(z, [2, 1, -1])
    DEVICE_PATHS["force_"](other, np.array([2, 1, -1]))
    inf = math.inf
    assert z.tolist() == other.tolist() == [[-inf, -inf, 3], [-inf, 0, -inf], [1, -inf, 3]]
    for ids, error in (([3, 0, 0], ArgumentError), ([0, 0], ShapeError)):
        with pytest.raises(error):
            refuse.force_(z, ids)
    with pytest.raises(NonFiniteError):
        refuse.force_(torch.tensor([[math.nan, 0.0]]), [0])


# ---- reductions


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [2, 17, 1024, 5003])
def test_reductions_equal_numpy_and_the_torch_forms(dtype, vocab):
    z = random_logits(vocab, 7, vocab, dtype)
    z[0, 0] = -math.inf
    wide = z.double().numpy()
    groups = [[1], [0, vocab - 1]] if vocab > 2 else [[1], [0]]
    for strided in (z, torch.cat([z, z], dim=1)[:, :vocab]):
        np.testing.assert_allclose(refuse.row_lse(strided, 1.3).numpy(), lse(wide / 1.3), rtol=1e-13)
        np.testing.assert_allclose(
            refuse.row_margin(strided, groups, 0.8).numpy(), margins(wide, groups, 0.8), rtol=1e-12
        )
        rest = [np.delete(wide, g, axis=1).max(axis=1) for g in groups]
        gaps = np.stack([wide[:, g].max(axis=1) - r for g, r in zip(groups, rest, strict=True)], axis=1)
        assert np.array_equal(refuse.row_max_gap(strided, groups).numpy(), gaps)
    torch.testing.assert_close(DEVICE_PATHS["row_lse"](z, 1.3), refuse.row_lse(z, 1.3), rtol=1e-13, atol=0)
    torch.testing.assert_close(DEVICE_PATHS["row_margin"](z, groups), refuse.row_margin(z, groups), rtol=1e-12, atol=0)
    assert torch.equal(DEVICE_PATHS["row_max_gap"](z, groups), refuse.row_max_gap(z, groups))


def test_reductions_give_the_same_bits_for_any_thread_count():
    z = random_logits(1, 9, 70_001, torch.bfloat16)
    before, seen = abjure.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            abjure.set_num_threads(threads)
            seen.append((refuse.row_lse(z).tolist(), refuse.row_margin(z, [3, [9, 70_000]]).tolist()))
    finally:
        abjure.set_num_threads(before)
    assert seen[0] == seen[1] == seen[2]


def test_margins_do_not_change_with_normalisation_and_bound_the_gap():
    z = random_logits(2, 20, 999, torch.float64)
    m = refuse.row_margin(z, [5])
    torch.testing.assert_close(refuse.row_margin(torch.log_softmax(z, dim=1), [5]), m, rtol=1e-12, atol=1e-12)
    gap = refuse.row_max_gap(z, [5])
    assert bool((m <= gap + 1e-12).all())
    assert bool((gap <= m + math.log(998) + 1e-12).all())


def test_reference_vectors():
    z = np.array([[2, 1, -0.5, 0.25, -1]])
    assert refuse.row_lse(z)[0] == pytest.approx(2.5149324501664716, rel=1e-15)
    m = refuse.row_margin(z, [2])[0, 0]
    assert m == pytest.approx(-2.9646395513879704, rel=1e-15)
    assert refuse.bias_for_probability(m, 0.3) == pytest.approx(2.117341691000767, rel=1e-14)
    for bias, p in ((0.0, 0.049049148636939245), (0.5, 0.07837455692559692), (3.0, 0.5088391911569689)):
        assert refuse.bias_to_threshold(-(m + bias)) == pytest.approx(p, rel=1e-14)
    assert refuse.threshold_to_bias(0.3) == pytest.approx(0.8472978603872036, rel=1e-14)
    # Temperature changes the order of prompts, so a threshold is valid for one only.
    pair = np.array([[3, 3.2, 0, 0, 0, 0], [1, 1.5, -9, -9, -9, -9]])
    one, two = refuse.row_margin(pair, [0])[:, 0], refuse.row_margin(pair, [0], 2.0)[:, 0]
    assert one[0] > one[1]
    assert two[0] < two[1]
    assert 1 / (1 + np.exp(-two)) == pytest.approx([0.3335900243332193, 0.43271737945883487], rel=1e-13)


def test_logit_at_the_ends():
    assert (refuse.logit(0.0), refuse.logit(1.0), refuse.logit(0.5)) == (-math.inf, math.inf, 0.0)
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ArgumentError):
            refuse.logit(bad)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("form", ["kernel", "torch"])
def test_reductions_refuse_non_finite_rows(form, poison):
    z = torch.zeros(3, 2000)
    z[1, 1500] = poison
    for name, args in (("row_lse", ()), ("row_margin", ([[3]],)), ("row_max_gap", ([[3]],))):
        f = getattr(refuse, name) if form == "kernel" else DEVICE_PATHS[name]
        with pytest.raises(NonFiniteError, match="index 3500"):
            f(z, *args)
        with pytest.raises(DegenerateError, match="row 0"):
            f(torch.full((1, 10), -math.inf), *args)


def test_reductions_refuse_bad_groups():
    z = np.zeros((1, 4))
    for groups in ([], [[]], [[1, 1]], [4], [-1]):
        with pytest.raises(ArgumentError):
            refuse.row_margin(z, groups)
    for groups in ("ab", 3, [[0.5]]):
        with pytest.raises(DTypeError):
            refuse.row_margin(z, groups)
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ArgumentError, match="temperature"):
            refuse.row_lse(z, temperature)


# ---- the gate


def ask(z: np.ndarray, categories: dict[str, object], **options: object) -> tuple[np.ndarray, np.ndarray]:
    processor = RefusalTokens(categories, prompt_length=3, **options)  # type: ignore[arg-type]
    z = z.copy()
    processor(np.zeros((len(z), 3), dtype=np.int64), z)
    assert processor.verdicts is not None
    return processor.verdicts, z


def oracle(z: np.ndarray, categories: list[list[int]], thresholds: list[float | None], rule: str) -> int:
    own = np.array([lse(z[None, ids])[0] for ids in categories])
    top = int(own.argmax())
    if rule == "mass":
        union = [i for ids in categories for i in ids]
        return top if margins(z[None], [union])[0, 0] >= thresholds[0] else NO_FIRE
    m = margins(z[None], categories)[0]
    if rule == "argmax_then_threshold":
        if thresholds[top] is None:
            return NOT_SELECTED
        return top if m[top] >= thresholds[top] else NO_FIRE
    excess = [-math.inf if t is None else v - t for v, t in zip(m, thresholds, strict=True)]
    best = int(np.argmax(excess))
    return best if excess[best] >= 0 else NO_FIRE


@given(
    st.integers(0, 2**32),
    st.sampled_from(["ratio", "argmax_then_threshold", "mass"]),
    st.sampled_from(["keep", "free", 0]),
    st.sampled_from(DTYPES),
)
@settings(max_examples=60, deadline=None)
def test_gate_equals_the_definition_and_the_torch_form(seed, rule, on_no_fire, dtype):
    rng = np.random.default_rng(seed)
    vocab = int(rng.integers(12, 3000))
    ids = 1 + rng.permutation(vocab - 1)[:5]
    groups = [[int(i) for i in g] for g in (ids[:1], ids[1:3], ids[3:])]
    z = random_logits(seed, 8, vocab, dtype)
    z[:, torch.from_numpy(ids)] += 6
    thresholds: list[float | None] = [float(t) for t in rng.normal(-1, 3, 3)]
    if rule == "mass":
        thresholds = [thresholds[0]] * 3
    elif rng.random() < 0.5:
        thresholds[int(rng.integers(3))] = None
    categories = dict(zip("abc", groups, strict=True))
    options = {
        "threshold": thresholds[0] if rule == "mass" else dict(zip("abc", thresholds, strict=True)),
        "rule": rule,
        "on_no_fire": on_no_fire,
    }
    processor = RefusalTokens(categories, prompt_length=3, **options)
    written, other = z.clone(), z.clone()
    context = torch.zeros(8, 3, dtype=torch.int64)
    assert processor(context, written) is written
    verdicts = DEVICE_PATHS["gate_"](other, np.ones(8, dtype=np.int64), processor)
    assert np.array_equal(bits(written), bits(other))
    assert verdicts.tolist() == processor.verdicts.tolist()
    wide = z.double().numpy()
    union = [i for g in groups for i in g]
    for row, verdict in enumerate(processor.verdicts):
        assert verdict == oracle(wide[row], groups, thresholds, rule)
        expected = wide[row].copy()
        if verdict >= 0:
            token = sorted(groups[verdict])[int(wide[row, sorted(groups[verdict])].argmax())]
        elif verdict == NO_FIRE and on_no_fire == 0:
            token = 0
        else:
            if verdict == NO_FIRE and on_no_fire == "free":
                expected[union] = -math.inf
            token = None
        if token is not None:
            expected = np.where(np.arange(vocab) == token, expected, -math.inf)
        assert np.array_equal(written[row].double().numpy(), expected)


def test_thresholds_decide_exactly_at_the_margin():
    z = random_logits(3, 1, 4000, torch.float64).numpy()
    z[0, 9] = 12.0
    m = float(refuse.row_margin(z, [9])[0, 0])
    for threshold, fires in ((m, True), (math.nextafter(m, -math.inf), True), (math.nextafter(m, math.inf), False)):
        verdicts, _ = ask(z, {"refuse": 9}, threshold=threshold)
        assert (verdicts[0] == 0) == fires


def test_bias_reaches_the_wanted_probabilities():
    z = np.array([[1.5, 0.5, -0.25, 0.75, -1.0, 0.0]])
    bias = {"a": 1.1507755397837902, "b": 0.20762835922384482}
    _, out = ask(z, {"a": 2, "b": 5}, bias=bias)
    p = np.exp(out - lse(out)[:, None])[0]
    assert p[[2, 5]] == pytest.approx([0.2, 0.1], rel=1e-14)
    _, out = ask(z, {"a": 2, "b": 5}, bias={"a": 0.8, "b": -0.4})
    p = np.exp(out - lse(out)[:, None])[0]
    assert p[[2, 5]] == pytest.approx([0.15729871942872173, 0.060833867739946285], rel=1e-14)
    assert p.argmax() == 0


def test_gates_once_per_generation_at_the_first_response_position():
    processor = RefusalTokens({"refuse": 1}, threshold=-math.inf, elsewhere="mask")
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, 9, (2, 4))

    def call(ids: np.ndarray) -> tuple[list[int], np.ndarray]:
        z = np.zeros((len(ids), 5), dtype=np.float32)
        processor(ids, z)
        return [int(v) for v in processor.verdicts], z

    for _ in range(2):
        verdicts, z = call(prompt)
        assert verdicts == [0, 0]
        assert np.isneginf(z).sum() == 8
        longer = np.concatenate([prompt, [[1], [2]]], axis=1)
        _, z = call(longer)
        assert np.isneginf(z).sum() == 2, "masked after the first position"
        # Rows may be permuted within a prompt, as beams are; the prompt stays.
        _, z = call(np.concatenate([longer, [[3], [4]]], axis=1))
        assert np.isneginf(z).sum() == 2
    other = rng.integers(10, 19, (2, 7))
    _, z = call(other)
    assert np.isneginf(z).sum() == 8, "another prompt, by chance one token wider, is a new generation"
    processor.reset()
    _, z = call(np.concatenate([other, other[:, :1]], axis=1))
    assert np.isneginf(z).sum() == 8, "after a reset any call is the first"


def test_rows_with_their_own_prompt_lengths_and_beams():
    processor = RefusalTokens({"refuse": 1}, threshold=-math.inf, prompt_length=[3, 5])
    z = np.zeros((4, 5))
    processor(np.zeros((4, 5), dtype=np.int64), z)
    assert processor.verdicts.tolist() == [NOT_ASKED, NOT_ASKED, 0, 0]
    assert processor.fired() == [None, None, "refuse", "refuse"]
    with pytest.raises(ShapeError, match="prompt_length"):
        processor(np.zeros((3, 5), dtype=np.int64), np.zeros((3, 5)))


class Tokenizer:
    unk_token_id = 0

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert add_special_tokens is False
        return {" [refuse]": [7], " [a]": [8], "]": [3], "?": [0]}.get(text, [2, 3] if text else [])


def test_from_tokenizer_wants_exactly_one_token():
    made = RefusalTokens.from_tokenizer(Tokenizer(), {"refuse": " [refuse]", "two": [" [a]", "]"]}, threshold=0.0)
    assert made.categories == {"refuse": [7], "two": [8, 3]}
    for text in ("[refuse]", "", "?"):
        with pytest.raises(ArgumentError, match="one token"):
            RefusalTokens.from_tokenizer(Tokenizer(), {"refuse": text})


@pytest.mark.parametrize(
    ("categories", "options", "error"),
    [
        ({}, {}, ArgumentError),
        ([1], {}, ArgumentError),
        ({"a": []}, {}, ArgumentError),
        ({"a": -1}, {}, ArgumentError),
        ({"a": [1, 1]}, {}, ArgumentError),
        ({"a": 1, "b": [2, 1]}, {}, ArgumentError),
        ({"a": 1.5}, {}, DTypeError),
        ({"a": "one"}, {}, DTypeError),
        ({"a": 1}, {"threshold": math.nan}, ArgumentError),
        ({"a": 1}, {"threshold": {"b": 0.0}}, ArgumentError),
        ({"a": 1}, {"threshold": "high"}, DTypeError),
        ({"a": 1}, {"bias": math.nan}, ArgumentError),
        ({"a": 1}, {"bias": {"a": math.inf}}, ArgumentError),
        ({"a": 1}, {"rule": "loudest"}, ArgumentError),
        ({"a": 1}, {"rule": "mass", "threshold": {"a": 0.0}}, ArgumentError),
        ({"a": 1}, {"on_no_fire": "stop"}, ArgumentError),
        ({"a": 1}, {"on_no_fire": -4}, ArgumentError),
        ({"a": 1}, {"on_no_fire": 1}, ArgumentError),
        ({"a": 1}, {"temperature": 0.0}, ArgumentError),
        ({"a": 1}, {"position": "last"}, ArgumentError),
        ({"a": 1}, {"elsewhere": "free"}, ArgumentError),
        ({"a": 1}, {"prompt_length": -1}, ArgumentError),
        ({"a": 1}, {"prompt_length": []}, ArgumentError),
    ],
)
def test_bad_recipes(categories, options, error):
    with pytest.raises(error):
        RefusalTokens(categories, **options)


@pytest.mark.parametrize("form", ["kernel", "torch"])
@pytest.mark.parametrize(
    ("z", "options", "error"),
    [
        ([[0.0, 1, 2], [0, math.nan, 1]], {"threshold": 0.0}, NonFiniteError),
        ([[0.0, 1, 2], [0, 1, math.inf]], {"threshold": 0.0}, NonFiniteError),
        ([[0.0, 1, 2], [-math.inf] * 3], {"threshold": 0.0}, DegenerateError),
        ([[0.0, 1, 2], [-math.inf, -math.inf, 1]], {"threshold": 1e9, "on_no_fire": "free"}, None),
        ([[0.0, 1, 2], [-math.inf, -math.inf, 1]], {"on_no_fire": "free"}, DegenerateError),
        ([[0.0, 1], [0, 1]], {"threshold": 0.0}, ArgumentError),
        ([[0.0, 1, 2]] * 2, {"threshold": 9.0, "on_no_fire": 3}, ArgumentError),
    ],
)
def test_bad_scores_write_nothing(form, z, options, error):
    z = torch.tensor(z)
    before = bits(z)
    processor = RefusalTokens({"a": 2}, prompt_length=1, **options)

    def run() -> None:
        if form == "torch":
            DEVICE_PATHS["gate_"](z, np.ones(2, dtype=np.int64), processor)
        else:
            processor(torch.zeros(2, 1, dtype=torch.int64), z)

    if error is None:
        run()
        return
    with pytest.raises(error):
        run()
    assert np.array_equal(bits(z), before)


def test_bad_calls():
    processor = RefusalTokens({"a": 1}, threshold=0.0)
    for ids, scores in (((2, 3), (3, 5)), ((3,), (3, 5)), ((3, 2), (5,))):
        with pytest.raises(ShapeError):
            processor(np.zeros(ids, dtype=np.int64), np.zeros(scores))


def test_every_position_and_before_the_first():
    processor = RefusalTokens({"refuse": 1}, threshold=-math.inf, position="every", prompt_length=3)
    for width, forced in ((2, False), (3, True), (4, True)):
        z = np.zeros((1, 5))
        processor(np.zeros((1, width), dtype=np.int64), z)
        assert np.isneginf(z).any() == forced


def test_another_device_takes_the_torch_forms(monkeypatch):
    with pytest.raises(DeviceError, match="meta"):
        refuse.bias_(torch.zeros(1, 3, device="meta"), [0], [1.0])
    for module in ("tokens", "phrases"):
        monkeypatch.setattr(f"abjure.refuse.{module}.device_path", lambda x, kernel: DEVICE_PATHS[kernel])
    z, context = random_logits(4, 3, 40), torch.tensor([[1, 2], [2, 3], [3, 1]])
    made = [
        RefusalTokens({"a": 4, "b": [5, 6]}, threshold=-2.0, bias={"b": 1.5}, on_no_fire="free", prompt_length=2),
        refuse.ForbiddenPhrases([[1, 2, 7], [3, 8], [9]], 40, scope="all", mode="prefix", penalty=2.0),
        refuse.ForbiddenPhrases([[1, 2, 7], [3, 8], [9]], 40, scope="all", eos_token_id=0, dead_end="eos"),
    ]
    moved = [p(context, z.clone()) for p in made]
    values = [refuse.row_lse(z), refuse.row_margin(z, [4]), refuse.row_max_gap(z, [4])]
    written = [refuse.bias_(z.clone(), [1, 2], [0.5, -1.0]), refuse.force_(z.clone(), [1, -1, 2])]
    monkeypatch.undo()
    assert all(torch.equal(p(context, z.clone()), m) for p, m in zip(made, moved, strict=True))
    here = [refuse.row_lse(z), refuse.row_margin(z, [4]), refuse.row_max_gap(z, [4])]
    for a, b in zip(values, here, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.equal(written[0], refuse.bias_(z.clone(), [1, 2], [0.5, -1.0]))
    assert torch.equal(written[1], refuse.force_(z.clone(), [1, -1, 2]))
