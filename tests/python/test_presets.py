"""The dampening family by name: what each preset measures and does, against the parts put together by hand."""

import numpy as np
import pytest
import torch

import abjure
from abjure.forget import (
    DAMPENING_PRESETS,
    Fisher,
    adaptive_alpha,
    cross_entropy,
    dampen_,
    importance,
    output_norm,
    potion_,
    squared_output_norm,
    unlearn_,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def setting():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 20), torch.nn.ReLU(), torch.nn.Linear(20, 3))
    x, y = torch.randn(90, 5), torch.randint(0, 3, (90,))

    def loader(rows):
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x[rows], y[rows]), batch_size=10)

    return model, loader(slice(0, 15)), loader(slice(15, 90)), loader(slice(0, 90))


def parameters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def test_constants():
    """Section 1.1 of the note on the published code."""
    constants = {n: (p.criterion, p.alpha, p.lam, p.second) for n, p in DAMPENING_PRESETS.items()}
    assert constants == {
        "ssd": (cross_entropy, 10.0, 1.0, "full"),
        "ssd_vit_class": (cross_entropy, 5.0, 1.0, "full"),
        "ssd_vit_subclass": (cross_entropy, 25.0, 1.0, "full"),
        "ssd_faces": (cross_entropy, 50.0, 0.1, "full"),
        "assd": (cross_entropy, "adaptive", 1.0, "retain"),
        "lfssd": (squared_output_norm, 10.0, 1.0, "full"),
        "potion": (output_norm, "search", 1.0, "retain"),
    }
    assert [p.criterion.power for p in DAMPENING_PRESETS.values()] == [2, 2, 2, 2, 2, 1, 1]


@pytest.mark.parametrize("name", list(DAMPENING_PRESETS))
def test_by_name_as_by_hand(setting, name):
    model, forget, retain, everything = setting
    p = DAMPENING_PRESETS[name]
    second = everything if p.second == "full" else retain
    before = parameters(model)

    def accuracy(model):
        return float(sum(q.detach().abs().sum() for q in model.parameters()))

    report = unlearn_(model, forget, second, name, accuracy=accuracy, rho=0.97, progress=False)
    after = parameters(model)
    report.undo(model)
    assert all(torch.equal(v, before[n]) for n, v in parameters(model).items())
    criterion = {"lfssd": squared_output_norm, "potion": output_norm}.get(name, cross_entropy)
    f = importance(model, forget, criterion, power=1 if name in ("lfssd", "potion") else 2, progress=False)
    d = importance(model, second, criterion, power=1 if name in ("lfssd", "potion") else 2, progress=False)
    if name == "assd":
        dampen_(model, f, d, adaptive_alpha(f, d, 15, 90))
    elif name == "potion":
        potion_(model, f, d, accuracy, 0.97, forget_size=15, total_size=90, progress=False)
    else:
        dampen_(model, f, full=d, alpha=p.alpha, lam=p.lam)
    assert all(torch.equal(v, after[n]) for n, v in parameters(model).items())


def test_what_is_missing_is_refused_before_anything_is_measured(setting):
    model, forget, retain, _ = setting
    before = parameters(model)

    def never(model, batch):
        raise AssertionError("measured")

    batches = list(forget)
    cases = [
        ({"method": "ssd2"}, "method: expected one of ssd"),
        ({"method": "potion"}, "accuracy"),
        ({"method": "assd", "forget_loader": batches}, "forget_size"),
    ]
    for change, match in cases:
        arguments = {"model": model, "forget_loader": forget, "second_loader": retain, "loss": never} | change
        with pytest.raises(abjure.ArgumentError, match=match):
            unlearn_(**arguments, progress=False)
    squares = Fisher().update({n: np.ones(tuple(p.shape), np.float32) for n, p in model.named_parameters()})
    with pytest.raises(abjure.ArgumentError, match="forget: expected importances of power 1, as lfssd"):
        DAMPENING_PRESETS["lfssd"].dampen_(model, squares, squares)
    with pytest.raises(abjure.ArgumentError, match="accuracy"):
        DAMPENING_PRESETS["potion"].dampen_(model, Fisher(power=1), Fisher(power=1))
    assert all(torch.equal(v, before[n]) for n, v in parameters(model).items())


def test_units_and_powers_never_mix(setting):
    model, forget, _, everything = setting
    before = parameters(model)
    f = importance(model, forget, squared_output_norm, progress=False)
    d = importance(model, everything, squared_output_norm, power=2, progress=False)
    with pytest.raises(abjure.ArgumentError, match="expected power 1 as forget has, got 2"):
        dampen_(model, f, d)
    with pytest.raises(abjure.ArgumentError, match="expected power 1 as forget has, got 2"):
        adaptive_alpha(f, d, share=0.1)
    assert all(torch.equal(v, before[n]) for n, v in parameters(model).items())


def test_patterns_and_own_losses(setting):
    model, forget, _, everything = setting
    before = parameters(model)

    def loss(model, batch):
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1])

    report = unlearn_(model, forget, everything, "ssd", loss=loss, include="2.*", progress=False)
    assert list(report.sizes) == ["2.weight", "2.bias"]
    assert torch.equal(model[0].weight, before["0.weight"])
    f, d = (importance(model, x, loss, progress=False) for x in (forget, everything))
    assert isinstance(DAMPENING_PRESETS["ssd"].dampen_(model, f, d).total.count, int)
