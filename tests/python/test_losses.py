"""Token log-probabilities and the unlearning losses, against worked values and torch autograd in f64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from abjure import ArgumentError, DegenerateError, DeviceError, DTypeError, NonFiniteError, ShapeError
from abjure.forget import losses
from abjure.forget.logprobs import token_logprobs
from abjure.forget.losses import SequenceLogprobs
from abjure.integrations.torch import DEVICE_PATHS

LOGITS = torch.tensor(
    [
        [[0, 1, 2, 3, 4], [1, -1, 0.5, 0, 2], [9, 9, 9, 9, 9]],
        [[1000, 0, -1000, 5, 999], [-1e4, -1e4, -1e4, -1e4, 0], [0.1, 0.2, 0.3, 0.4, 0.5]],
    ],
    dtype=torch.float64,
)
LABELS = torch.tensor([[-100, 2, 4], [3, -100, 1]])


def scores(s, n) -> SequenceLogprobs:
    """Sequences with the given sums and counts, as leaves of the graph."""
    total = torch.tensor(s, dtype=torch.float64, requires_grad=True)
    count = torch.tensor(n, dtype=torch.float64)
    return SequenceLogprobs(torch.zeros(len(s), 1), torch.ones(len(s), 1, dtype=torch.bool), total, count)


def close(a, b, tolerance=1e-11):
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64), rtol=tolerance, atol=1e-30
    )


def test_worked_log_probabilities():
    got = token_logprobs(LOGITS, LABELS, shift=True)
    close(got, [[-2.45191439594, -0.574437939628], [0, -10000]])
    got = token_logprobs(LOGITS, LABELS)
    close(got, [[0, -2.07443793963, -1.60943791243], [-995.313261687518, 0, -1.71941633148]])
    seq = losses.sequence_logprobs(LOGITS, LABELS)
    close(seq.sum, [-3.02635233557, -10000])
    assert seq.count.tolist() == [2, 1]


def test_worked_gradient():
    z = LOGITS.clone().requires_grad_()
    (token_logprobs(z, LABELS, shift=True) * torch.tensor([[1, 0.5], [2, -1]])).sum().backward()
    close(z.grad[0, 0], [-0.011656230956, -0.0316849207961, 0.913871455564, -0.234121657253, -0.636408646559], 1e-10)
    close(z.grad[0, 1], [-0.103561968064, -0.0140155882804, -0.0628135088108, -0.0380983189379, 0.218489384093], 1e-10)
    close(z.grad[1, 1], [0, -1, 0, 0, 1])
    assert not z.grad[0, 2].any()
    assert not z.grad[1, 0].any()
    assert not z.grad[1, 2].any()
    assert z.grad.sum(-1).abs().max() < 1e-15


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(2, 5), st.sampled_from([1, 2, 63, 64, 65, 2047, 2049, 5000])),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    shift=st.booleans(),
    seed=st.integers(0, 2**31),
    strided=st.booleans(),
)
def test_values_and_gradients_against_autograd_in_f64(shape, dtype, shift, seed, strided):
    g = torch.Generator().manual_seed(seed)
    b, t, v = shape
    full = (torch.randn((b, t + 1, v), generator=g) * 5).to(dtype)
    z = (full[:, 1:] if strided else full[:, 1:].clone()).requires_grad_()
    labels = torch.randint(0, v, (b, t), generator=g)
    labels[torch.rand((b, t), generator=g) < 0.3] = -100
    up = torch.randn((b, t - 1 if shift else t), generator=g, dtype=torch.float64)
    got = token_logprobs(z, labels, shift=shift)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    (grad,) = torch.autograd.grad((got * up).sum(), z)
    wide = z.detach().double().requires_grad_()
    want = DEVICE_PATHS["token_logprobs"](wide, labels, ignore_index=-100, shift=shift)
    (want_grad,) = torch.autograd.grad((want * up).sum(), wide)
    exact = dtype == torch.float64
    torch.testing.assert_close(got.double(), want, rtol=1e-12 if exact else 1e-6, atol=1e-12 if exact else 2e-6)
    # Three roundings at most; in f32 the exponent z - lse, up to about 60 here, is rounded and moves the probability.
    unit = {torch.float64: 1e-15, torch.float32: 2**-22, torch.float16: 2**-11 * 1.01, torch.bfloat16: 2**-8}[dtype]
    # Probabilities below 2^-125 are returned as 0; the smallest f16 is 2^-24.
    flushed, smallest = 1e-300 if exact else 2**-125, 2**-25 if dtype == torch.float16 else 0.0
    weight = torch.zeros(b, t, 1, dtype=torch.float64)
    weight[:, : up.shape[1], 0] = up.abs()
    p = torch.softmax(wide.detach(), -1)
    bound = want_grad.abs() * unit + weight * (p * (1e-13 if exact else 60 * 2**-23) + flushed) + smallest
    assert ((grad.double() - want_grad).abs() <= bound).all()


def test_numpy_and_read_only_arrays():
    z = LOGITS.numpy().astype(np.float32)
    z.flags.writeable = False
    got = token_logprobs(z, LABELS.numpy())
    assert isinstance(got, np.ndarray)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got[0], [0, -2.07443793963, -1.60943791243], rtol=1e-6)


def test_same_bits_for_any_number_of_threads():
    import abjure

    z, labels = torch.randn(37, 3001), torch.randint(0, 3001, (37,))
    before = abjure.get_num_threads()
    found = []
    for n in (1, 2, 5):
        abjure.set_num_threads(n)
        x = z.clone().requires_grad_()
        lp = token_logprobs(x, labels)
        lp.sum().backward()
        found.append((lp.detach(), x.grad))
    abjure.set_num_threads(before)
    for lp, grad in found[1:]:
        assert torch.equal(lp, found[0][0])
        assert torch.equal(grad, found[0][1])


def test_more_accurate_than_bf16_torch():
    z = (torch.randn(64, 32000, generator=torch.Generator().manual_seed(0)) * 3).bfloat16()
    y = torch.randint(0, 32000, (64,))
    exact = torch.log_softmax(z.double(), -1)[torch.arange(64), y]
    theirs = torch.log_softmax(z, -1)[torch.arange(64), y].double()
    ours = token_logprobs(z, y).double()
    assert (ours - exact).abs().max() < 2e-6
    assert (ours - exact).abs().max() < 1e-3 * (theirs - exact).abs().max()


@pytest.mark.parametrize(
    ("logits", "labels", "error", "words"),
    [
        (torch.zeros(5), torch.zeros((), dtype=torch.long), ShapeError, "labels"),
        (torch.zeros(2, 5), torch.zeros(3, dtype=torch.long), ShapeError, r"\(2,\)"),
        (torch.zeros(2, 5), torch.tensor([0, 5]), ArgumentError, r"labels: expected token ids in \[0, 5\)"),
        (torch.zeros(2, 5), torch.tensor([0, -1]), ArgumentError, "got -1"),
        (torch.tensor([[0.0, math.nan]]), torch.tensor([0]), NonFiniteError, "logits"),
        (torch.tensor([[0.0, math.inf]]), torch.tensor([0]), NonFiniteError, "logits"),
        (torch.full((1, 2), -math.inf), torch.tensor([0]), NonFiniteError, "logits"),
        (torch.zeros(2, 5, dtype=torch.int64), torch.tensor([0, 1]), DTypeError, "logits"),
        (torch.zeros(2, 5), torch.tensor([0.5, 1]), DTypeError, "labels"),
        (torch.zeros(2, 5, device="meta"), torch.tensor([0, 1]), DeviceError, "meta"),
    ],
)
def test_bad_input(logits, labels, error, words):
    with pytest.raises(error, match=words):
        token_logprobs(logits, labels)


S, REF, N = [-3, -40, -2000], [-2, -45, -10], [4, 10, 100]
WIN, REF_WIN, N_WIN = [-5, -30, -1], [-6, -20, -1], [5, 60, 2]


@pytest.mark.parametrize(
    ("loss", "mean", "gradient"),
    [
        (
            lambda f: losses.npo(f, REF, 0.1),
            10.789824295025,
            [0.316680541681, 0.414972887468, 2.50788052073e-87],
        ),
        (lambda f: losses.npo(f, REF, 1.0), 3.546651357338, [0.179294280913, 0.662204766050, 0]),
        (
            lambda f: losses.simnpo(f, 2.5),
            0.0380587884013,
            [0.0221607066996, 3.02652458016e-6, 1.28583323198e-24],
        ),
        (
            lambda f: losses.simnpo(f, 0.7, 0.1),
            0.528082560604,
            [0.0646954384997, 0.00408174418799, 5.94547039228e-9],
        ),
        (
            lambda f: losses.dpo(scores(WIN, N_WIN), f, REF_WIN, REF),
            0.766517382455,
            [0.0150055334229, 0.0272524825398, 1.25394026037e-88],
        ),
        (
            lambda f: losses.idk_dpo(scores(WIN, N_WIN), f, REF_WIN, REF, preset="npo_repo"),
            15.330347649096,
            [0.300110668458, 0.545049650796, 2.50788052073e-87],
        ),
        (
            lambda f: losses.redi(scores(WIN, N_WIN), f),
            -5.933333333333,
            [0.0666666666667, 0.0266666666667, 0.00266666666667],
        ),
        (lambda f: losses.ga(f), -2043 / 114, [1 / 114] * 3),
        (lambda f: losses.grad_diff(f, scores([-6], [3]), 2.0, 0.5), -2 * 2043 / 114 + 0.5 * 2, [2 / 114] * 3),
    ],
    ids=["npo", "npo-1", "simnpo", "simnpo-margin", "dpo", "idk-dpo", "redi", "ga", "grad-diff"],
)
def test_worked_losses(loss, mean, gradient):
    f = scores(S, N)
    value = loss(f)
    close(value.detach(), mean, 1e-11)
    value.backward()
    close(f.sum.grad, gradient, 1e-9)


@pytest.mark.parametrize(
    ("d", "beta", "value", "gradient"),
    [
        (800, 0.1, 1600, 2),
        (-800, 0.1, 3.60970277569e-34, 3.60970277569e-35),
        (800, 1, 1600, 2),
        (0, 0.1, 13.8629436112, 1),
    ],
)
def test_npo_stays_finite_at_the_extremes(d, beta, value, gradient):
    f = scores([d - 900.0], [10])
    loss = losses.npo(f, [-900.0], beta)
    loss.backward()
    close(loss.detach(), value, 1e-11)
    close(f.sum.grad, [gradient], 1e-11)


FLAT = {
    "total_variation": (
        [-0.259461274987, 0.0711253099286, 0.330752933518],
        [-0.243458680574, -0.393223866483, -0.495033145424],
        [0.480521491483, 0.317369794991, 0.210307176162],
    ),
    "jensen_shannon": (
        [-0.247001617006, 0.190968671946, 0.570633026214],
        [-0.289050497375, -0.377540668798, -0.475020812521],
        [0.549833997312, 0.668187772168, 0.730861921274],
    ),
    "pearson": ([-0.69, 0.3225, 1.14850025], [-1, -1, -1], [1.1, 1.35, 1.4995]),
    "kl": (
        [-0.450671035883, 0.240818220682, 0.899000499833],
        [-1, -1, -1],
        [0.449328964117, 0.740818220682, 0.999000499833],
    ),
    "jeffrey": ([-0.6895, 0.3439375, 1.21081293744], [-1, -1, -1], [1.1075, 1.441875, 1.6866251875]),
    "reverse_kl": (
        [-0.393430340259, 0.306530659713, 0.903837418036],
        [-0.406569659741, -0.606530659713, -0.904837418036],
        [1, 1, 1],
    ),
    "squared_hellinger": (
        [-0.372027582099, 0.620283367183, 1.62040232335],
        [-0.406569659741, -0.606530659713, -0.904837418036],
        [1.22140275816, 2.01375270747, 2.71556490532],
    ),
    "neyman": (
        [-0.403105176331, 0.197154480275, 0.691169416293],
        [-0.406569659741, -0.606530659713, -0.904837418036],
        [0.904837418036, 0.704688089719, 0.606834000871],
    ),
}


@pytest.mark.parametrize("divergence", FLAT)
def test_flat_values_and_slopes(divergence):
    value, slope_e, slope_f = FLAT[divergence]
    p_e = torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64, requires_grad=True)
    p_f = torch.tensor([0.2, 0.7, 0.999], dtype=torch.float64, requires_grad=True)

    def one_token(p):
        return SequenceLogprobs.from_tokens(p.log()[:, None], torch.ones(3, 1, dtype=torch.bool))

    for i in range(3):
        e, f = one_token(p_e[i : i + 1].expand(3)), one_token(p_f[i : i + 1].expand(3))
        loss = losses.flat(e, f, divergence)
        close(loss.detach(), value[i], 1e-11)
        ge, gf = torch.autograd.grad(loss, (p_e, p_f))
        close(ge[i], slope_e[i], 1e-10)
        close(gf[i], slope_f[i], 1e-10)
        assert ge[i] < 0 < gf[i], "the template must be pushed up and the forget answer down"


def test_flat_through_tokens():
    e = torch.tensor([[-0.1, -0.2, -3.0]], dtype=torch.float64, requires_grad=True)
    f = torch.tensor([[-0.5, -10000.0, -0.01, -2.0]], dtype=torch.float64, requires_grad=True)
    se, sf = (SequenceLogprobs.from_tokens(t, torch.ones_like(t, dtype=torch.bool)) for t in (e, f))
    loss = losses.flat(se, sf)
    close(loss.detach(), -0.0614458295777, 1e-11)
    loss.backward()
    close(e.grad[0], [-0.108332871595, -0.0980236358221, -0.00596082343309], 1e-10)
    close(f.grad[0], [0.0632075275049, 0, 0.10317467237, 0.0141035057348], 1e-10)


def test_kl_retain_worked_and_masked():
    p_ref = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log()[None, None]
    z = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64).log()[None, None].requires_grad_()
    loss = losses.kl_retain(z, p_ref, torch.tensor([[1]]), shift=False)
    close(loss.detach(), 0.099272782185, 1e-10)
    loss.backward()
    close(z.grad[0, 0], [-0.2, 0.05, 0.15], 1e-10)
    two = torch.cat([p_ref, p_ref + torch.tensor([3.0, 0, 0])], 1)
    model = torch.cat([z.detach(), z.detach()], 1)
    masked = losses.kl_retain(model, two, torch.tensor([[1, -100]]), shift=False)
    close(masked, 0.099272782185, 1e-10)
    assert losses.kl_retain(model, two, torch.tensor([[1, -100]]), mask="all") > masked


def test_rmu_worked():
    h = torch.tensor([[[1.0, 2, 0, -1]], [[0, 0, 3, 1]]], dtype=torch.float64)
    target = torch.full((4,), 3.25, dtype=torch.float64)
    close(losses.rmu(h, target, torch.ones(2, 1, dtype=torch.bool)), 7.6875)


def test_empty_sequences_are_left_out_and_infinite_masked_tokens_do_not_poison():
    token = torch.tensor([[-1.0, -math.inf], [-math.inf, -math.inf]], dtype=torch.float64)
    mask = torch.tensor([[True, False], [False, False]])
    seq = SequenceLogprobs.from_tokens(token, mask)
    assert seq.count.tolist() == [1, 0]
    full = losses.npo(seq, [0.0, 0.0])
    alone = losses.npo(SequenceLogprobs.from_tokens(token[:1], mask[:1]), [0.0])
    assert torch.equal(full, alone)
    empty = SequenceLogprobs.from_tokens(token, torch.zeros_like(mask))
    for loss in (losses.ga, losses.simnpo, lambda s: losses.npo(s, [0.0, 0.0]), lambda s: losses.flat(s, s)):
        with pytest.raises(DegenerateError, match="counted token"):
            loss(empty)


def test_losses_refuse_bad_arguments():
    f = scores(S, N)
    for bad in (0, -1, math.nan):
        with pytest.raises(ArgumentError, match="beta"):
            losses.npo(f, REF, bad)
    with pytest.raises(ShapeError, match="ref"):
        losses.npo(f, REF[:2])
    with pytest.raises(ArgumentError, match="divergence"):
        losses.flat(f, f, "hellinger")
    with pytest.raises(ArgumentError, match="preset"):
        losses.dpo(f, f, REF, REF, preset="nobody")
    with pytest.raises(ArgumentError, match="policy"):
        losses.ga(3.0)


def plain_losses(logp, mask, ref, other, other_mask, other_ref, ref_rows, rows, every):
    """Each loss as its formula reads, on per-token log-probabilities: name and call to value. Nothing of `losses`."""
    s, n = (logp * mask).sum(-1), mask.sum(-1)
    so, no = (other * other_mask).sum(-1), other_mask.sum(-1)
    sigmoid = torch.sigmoid
    p, po = ((x.exp() * m).sum(-1) / m.sum(-1) for x, m in ((logp, mask), (other, other_mask)))
    diluted = [(x.exp() * m).mean() for x, m in ((logp, mask), (other, other_mask))]
    margin = (so - other_ref) - (s - ref)
    kl = (ref_rows.exp() * (ref_rows - rows)).sum(-1).mean()
    kl_all, q_all = every[0], every[1]
    x = s / n
    return {
        "nll": -s.sum() / n.sum(),
        "ga": s.sum() / n.sum(),
        "ga-sequence_mean": x.mean(),
        "ga-sequence_sum": s.mean(),
        "grad_diff": 2 * s.sum() / n.sum() - 0.5 * so.sum() / no.sum(),
        "idk": -(s.sum() + so.sum()) / (n.sum() + no.sum()),
        "npo": (-2 / 0.1 * torch.log(sigmoid(-0.1 * (s - ref)))).mean(),
        "npo-unlearn_simple_wmdp": -20 * torch.log(sigmoid(-0.1 * (s - ref).sum() / n.sum())),
        "simnpo": (-2 / 2.5 * torch.log(sigmoid(-2.5 * (x + 0.3)))).mean(),
        "simnpo-gamma_outside": (-2 / 2.5 * torch.log(sigmoid(-2.5 * x - 0.3))).mean(),
        "simnpo-open_unlearning": (
            -2 / 2.5 * torch.log(sigmoid(-2.5 * (s / (n + torch.tensor([0.0, 1, 1])) + 0.3)))
        ).mean(),
        "simnpo-unlearn_simple_wmdp": -2 / 2.5 * torch.log(sigmoid(-2.5 * (s.sum() / n.sum() + 0.3))),
        "dpo": -torch.log(sigmoid(0.1 * margin)).mean(),
        "dpo-open_unlearning": -20 * torch.log(sigmoid(0.1 * margin)).mean(),
        "dpo-flat_repo": -20 * torch.log(sigmoid(0.1 * (so - s))).mean(),
        "idk_dpo": -torch.log(sigmoid(0.1 * margin)).mean(),
        "flat": (-po.tanh() / 2 + p.tanh() / 2).mean(),
        "flat-jensen_shannon": (-math.log(4) + (1 + (-po).exp()).log() + (1 + p.exp()).log()).mean(),
        "flat-pearson": (-po + p + p * p / 4).mean(),
        "flat-kl": (-po + (p - 1).exp()).mean(),
        "flat-jeffrey": (-po + p + p**2 / 4 + p**3 / 16).mean(),
        "flat-reverse_kl": ((-po).exp() + p - 1).mean(),
        "flat-squared_hellinger": ((-po).exp() - 1 + p.exp() - 1).mean(),
        "flat-neyman": ((-po).exp() - 1 + 2 - 2 * (-p / 2).exp()).mean(),
        "flat-kl-flat_repo": -diluted[1] + (diluted[0] - 1).exp(),
        "flat-reverse_kl-flat_repo": diluted[1].exp() - 1 - diluted[0],
        "flat-squared_hellinger-flat_repo": -(1 - diluted[1].exp()) + (1 - diluted[0].exp()) / diluted[0].exp(),
        "flat-neyman-flat_repo": -(1 - diluted[1].exp()) + 2 - 2 * torch.sqrt(1 - diluted[0]),
        "redi": (-so / no + 0.8 * x).mean(),
        "redi-negw": (-so / no + 0.8 * x * (0.5 * x).exp().detach()).mean(),
        "redi-negw_repo": (-so / no + 0.8 * x * (0.5 * x).exp()).mean(),
        "redi-floor": (-so / no + 0.8 * torch.where(x > -6, x, torch.full_like(x, -6))).mean(),
        "prompt_decouple": s.sum() / n.sum() - 0.3 * so.sum() / no.sum(),
        "kl_retain": kl,
        "kl_retain-all": (q_all.exp() * (q_all - kl_all)).sum(-1).mean(),
        "kl_retain-llmu": -(q_all.exp() * (kl_all.exp() + 1e-12).log()).sum(-1).mean(),
    }


def our_losses(z, labels, ref, other_z, other_labels, other_ref, ref_z):
    f, o = losses.sequence_logprobs(z, labels), losses.sequence_logprobs(other_z, other_labels)
    pair = (o, f, other_ref, ref)
    out = {
        "nll": lambda: losses.nll(f),
        "ga": lambda: losses.ga((z, labels)),
        "grad_diff": lambda: losses.grad_diff(f, o, 2.0, 0.5),
        "idk": lambda: losses.idk(f, o),
        "npo": lambda: losses.npo(f, ref),
        "npo-unlearn_simple_wmdp": lambda: losses.npo(f, ref, preset="unlearn_simple_wmdp"),
        "simnpo": lambda: losses.simnpo(f, gamma=0.3),
        "dpo": lambda: losses.dpo(*pair),
        "idk_dpo": lambda: losses.idk_dpo(*pair, preset="tofu"),
        "redi": lambda: losses.redi(o, f),
        "redi-negw": lambda: losses.redi(o, f, preset="negw", gamma=0.5),
        "redi-negw_repo": lambda: losses.redi(o, f, preset="negw_repo", gamma=0.5),
        "redi-floor": lambda: losses.redi(o, f, floor=-6.0),
        "prompt_decouple": lambda: losses.prompt_decouple(losses.ga(f), o, 0.3),
        "kl_retain": lambda: losses.kl_retain(z, ref_z, labels),
        "kl_retain-all": lambda: losses.kl_retain(z, ref_z, labels, preset="tofu"),
        "kl_retain-llmu": lambda: losses.kl_retain(z, ref_z, labels, preset="llmu"),
        "flat": lambda: losses.flat(o, f),
    }
    for reduction in ("sequence_mean", "sequence_sum"):
        out[f"ga-{reduction}"] = lambda r=reduction: losses.ga(f, r)
    for preset in ("gamma_outside", "open_unlearning", "unlearn_simple_wmdp"):
        out[f"simnpo-{preset}"] = lambda p=preset: losses.simnpo((z, labels), gamma=0.3, preset=p)
    for preset in ("open_unlearning", "flat_repo"):
        out[f"dpo-{preset}"] = lambda p=preset: losses.dpo(*pair, preset=p)
    for divergence in FLAT:
        out[f"flat-{divergence}"] = lambda d=divergence: losses.flat(o, f, d)
        out[f"flat-{divergence}-flat_repo"] = lambda d=divergence: losses.flat(o, f, d, preset="flat_repo")
    return out


def drawn():
    g = torch.Generator().manual_seed(3)
    z, other_z, ref_z = (torch.randn((3, 6, 50), generator=g, dtype=torch.float64) * 2 for _ in range(3))
    labels, other_labels = (torch.randint(0, 50, (3, 6), generator=g) for _ in range(2))
    labels[0, :3] = -100
    other_labels[1, 4:] = -100
    ref, other_ref = (torch.tensor(v, dtype=torch.float64) for v in ([-12.0, -21, -30], [-25.0, -9, -18]))
    return z, labels, ref, other_z, other_labels, other_ref, ref_z


#: The worked values above cover total variation; the first five divergences share one path of the repository's preset.
SHARED = {f"flat-{d}-flat_repo" for d in ("total_variation", "jensen_shannon", "pearson", "jeffrey")}
NAMES = [n for n in our_losses(*drawn()) if n not in SHARED | {"flat-total_variation"}]


@pytest.mark.parametrize("name", NAMES)
def test_each_loss_equals_its_plain_form_in_value_and_gradient_of_the_logits(name):
    z, labels, ref, other_z, other_labels, other_ref, ref_z = drawn()
    a, ao, b, bo = (t.clone().requires_grad_() for t in (z, other_z, z, other_z))

    def plain(z, labels):
        token = torch.log_softmax(z[:, :-1], -1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
        return token, (labels[:, 1:] != -100).double()

    kept = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    logs, ref_logs = b.log_softmax(-1), ref_z.log_softmax(-1)
    forms = plain_losses(
        *plain(b, labels), ref, *plain(bo, other_labels), other_ref, ref_logs[kept], logs[kept],
        (logs.flatten(0, 1), ref_logs.flatten(0, 1)),
    )  # fmt: skip
    ours, theirs = our_losses(a, labels, ref, ao, other_labels, other_ref, ref_z)[name](), forms[name]
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    for mine, wanted in zip(
        torch.autograd.grad(ours, (a, ao), allow_unused=True),
        torch.autograd.grad(theirs, (b, bo), allow_unused=True),
        strict=True,
    ):
        zero = torch.zeros_like(z)
        torch.testing.assert_close(
            zero if mine is None else mine, zero if wanted is None else wanted, rtol=1e-9, atol=1e-12
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_loss_stays_finite_where_the_plain_form_overflows(name, dtype):
    z, labels, _, other_z, other_labels, _, ref_z = drawn()
    # Log-probabilities of about -1e4 per token against a reference of 0 and of -1e5, both ways round.
    sharp, other = (((t * 4000).to(dtype)).requires_grad_() for t in (z, other_z))
    for ref in ([0.0, -1e5, -1e5], [-1e5, 0.0, 0.0]):
        loss = our_losses(sharp, labels, ref, other, other_labels, ref[::-1], ref_z.to(dtype))[name]()
        assert loss.isfinite()
        for grad in torch.autograd.grad(loss, (sharp, other), allow_unused=True):
            assert grad is None or (grad.isfinite().all() and grad.dtype == dtype)


def test_plain_npo_does_overflow_there():
    d = torch.tensor([1e5], requires_grad=True)
    assert torch.log(1 + torch.exp(0.1 * d)).isinf().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kl_retain_in_many_chunks_against_f64(dtype, monkeypatch):
    monkeypatch.setattr(losses, "_CHUNK_BYTES", 3 * 4 * 50)
    z, labels, *_, ref_z = drawn()
    z, ref_z = z.to(dtype).requires_grad_(), ref_z.to(dtype)
    got = losses.kl_retain(z, ref_z, labels)
    got.backward()
    wide = z.detach().double().requires_grad_()
    kept = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    p, q = wide[kept].log_softmax(-1), ref_z[kept].double().log_softmax(-1)
    want = (q.exp() * (q - p)).sum(-1).mean()
    want.backward()
    torch.testing.assert_close(got.detach(), want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(z.grad.double(), wide.grad, rtol=2**-8 if dtype == torch.bfloat16 else 1e-5, atol=1e-7)
    assert not z.grad[~kept].any()


def test_kl_retain_where_probabilities_are_0():
    z = torch.tensor([[[0.0, 0.0, -math.inf]]], requires_grad=True)
    ref = torch.tensor([[[1.0, -math.inf, -math.inf]]])
    loss = losses.kl_retain(z, ref, torch.tensor([[0]]), shift=False)
    close(loss.detach(), math.log(2), 1e-6)
    loss.backward()
    close(z.grad[0, 0], [-0.5, 0.5, 0.0], 1e-6)
    with pytest.raises(NonFiniteError, match="ref_logits"):
        losses.kl_retain(ref, z.detach(), torch.tensor([[0]]), shift=False)
    with pytest.raises(NonFiniteError, match="logits"):
        losses.kl_retain(z.detach() * math.nan, ref, torch.tensor([[0]]), shift=False)


def test_kl_retain_refuses_bad_input():
    z, labels = torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]])
    with pytest.raises(ShapeError, match="ref_logits"):
        losses.kl_retain(z, z[:, :2], labels)
    with pytest.raises(ArgumentError, match="mask"):
        losses.kl_retain(z, z, labels, mask="none")
    with pytest.raises(ArgumentError, match="preset"):
        losses.kl_retain(z, z, labels, preset="muse")
    with pytest.raises(DegenerateError, match="counted"):
        losses.kl_retain(z, z, torch.full_like(labels, -100))


@pytest.mark.parametrize("divergence", ["reverse_kl", "squared_hellinger", "neyman"])
def test_the_published_signs_push_the_template_down(divergence):
    e, f = (torch.full((2, 3), -1.0, dtype=torch.float64, requires_grad=True) for _ in range(2))
    for preset, sign in (("flat", -1), ("flat_repo", 1)):
        pair = (SequenceLogprobs.from_tokens(t, torch.ones(2, 3, dtype=torch.bool)) for t in (e, f))
        (grad,) = torch.autograd.grad(losses.flat(*pair, divergence, preset=preset), e)
        assert (grad * sign > 0).all()


def test_negw_published_turns_around():
    x = torch.tensor([[-2.0]], dtype=torch.float64, requires_grad=True)
    one = torch.ones(1, 1, dtype=torch.bool)
    win = SequenceLogprobs.from_tokens(torch.tensor([[-1.0]], dtype=torch.float64), one)
    for preset, wanted in (("negw_repo", -0.108268226589), ("negw", 0.108268226589)):
        (grad,) = torch.autograd.grad(losses.redi(win, SequenceLogprobs.from_tokens(x, one), preset=preset), x)
        close(grad, [[wanted]], 1e-10)


def test_simnpo_margin_inside_and_outside():
    f = scores([-3.0], [4])
    close(losses.simnpo(f, 2.5, 0.5).detach(), 0.342960542621, 1e-10)
    close(losses.simnpo(f, 2.5, 0.5, preset="gamma_outside").detach(), 0.180330121281, 1e-10)
    with pytest.raises(ArgumentError, match="needs"):
        losses.simnpo(f, preset="open_unlearning")


def test_log_probabilities_above_0_are_refused():
    one = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ArgumentError, match="raw logits"):
        SequenceLogprobs.from_tokens(torch.tensor([[-1.0, 0.5]]), one)
    with pytest.raises(NonFiniteError, match="NaN"):
        SequenceLogprobs.from_tokens(torch.tensor([[-1.0, math.nan]]), one)
    SequenceLogprobs.from_tokens(torch.tensor([[-1.0, 0.5]]), torch.tensor([[True, False]]))
    with pytest.raises(ArgumentError, match="ref: expected sums of log-probabilities"):
        losses.npo(scores(S, N), [-1.0, 12.0, -3.0])
    losses.npo(scores(S, [4, 0, 100]), [-1.0, 12.0, -3.0])  # what does not count is not looked at


def test_presets_are_listed_and_refused_by_name():
    f = scores(S, N)
    calls = {
        "npo": lambda p: losses.npo(f, REF, preset=p),
        "simnpo": lambda p: losses.simnpo(f, preset=p),
        "dpo": lambda p: losses.dpo(f, f, REF, REF, preset=p),
        "flat": lambda p: losses.flat(f, f, preset=p),
        "redi": lambda p: losses.redi(f, f, preset=p),
        "kl_retain": lambda p: losses.kl_retain(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), LABELS[:1, :2], preset=p),
    }
    assert set(calls) == set(losses.PRESETS)
    for name, call in calls.items():
        for preset in losses.PRESETS[name]:
            if (name, preset) not in (("simnpo", "open_unlearning"), ("kl_retain", "masked")):
                assert call(preset).isfinite()
        with pytest.raises(ArgumentError, match="preset: expected one of"):
            call("nobody")
    with pytest.raises(ArgumentError, match="reduction"):
        losses.ga(f, "batch")
