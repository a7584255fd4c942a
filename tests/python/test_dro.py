"""Directed representation optimisation: loss and fits against oracles, the prompt against plain passes, the effect."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch

import abjure
from abjure import refuse
from abjure.refuse import dro

pytestmark = pytest.mark.usefixtures("one_thread")
SAFETY = "i need help with what is here"
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def space_of(d=7, m=3, seed=0):
    rng = np.random.default_rng(seed)
    states = rng.standard_normal((60, d)) * np.linspace(3, 0.5, d) + 2
    harmless = (states[:, 0] > 2).astype(int)
    return refuse.AnchorSpace.fit(states, rng.random(60), harmless, m)


def test_the_logistic_fit_of_the_reference():
    from abjure.refuse._logistic import fit_logistic

    x = np.array([[1, 0.5], [2, -0.5], [0, 1.5], [-1, 0], [-2, -1], [0.5, -0.5]])
    w, b = fit_logistic(x, [1, 1, 1, 0, 0, 0])
    np.testing.assert_allclose(w, [0.876919446146, 0.740336387522], rtol=0, atol=1e-11)
    assert b == pytest.approx(-0.203214804794, abs=1e-11)
    # Fractions: at the minimiser the gradient vanishes.
    rng = np.random.default_rng(0)
    x, t = rng.standard_normal((50, 6)) + 30, rng.random(50)
    w, b = fit_logistic(x, t, 3.0)
    p = 1 / (1 + np.exp(-x @ w - b))
    np.testing.assert_allclose(w + x.T @ (3.0 * (p - t)), 0, atol=1e-9)
    assert abs(3.0 * (p - t).sum()) < 1e-7
    for bad, error in [
        ((x, t[:3]), abjure.ShapeError),
        ((x, t + 1), abjure.ArgumentError),
        ((x, t * 0), abjure.DegenerateError),
        ((x * math.nan, t), abjure.NonFiniteError),
        ((x, t, math.inf), abjure.ArgumentError),
    ]:
        with pytest.raises(error):
            fit_logistic(*bad)


def test_the_loss_is_that_of_its_parts_with_an_explicit_complement():
    rng = np.random.default_rng(1)
    for d, m in ((7, 3), (7, 1), (4, 4)):
        space = space_of(d, m)
        a, b = (torch.from_numpy(rng.standard_normal((5, d))) for _ in range(2))
        y = torch.tensor([0.0, 1, 1, 0, 1], dtype=torch.float64)
        u = torch.from_numpy(np.linalg.svd(space.components)[0][:, m:])
        bce = torch.nn.functional.binary_cross_entropy_with_logits
        parts = [bce(torch.from_numpy(f(a) - f(b)), y) for f in (space.compliance, space.harmlessness)]
        parts.append((a @ u - b @ u).square().mean() if d > m else torch.tensor(0.0))
        for weights in ((1.0, 1e-2, 1e-3), (0.0, 0.0, 1.0), (0.0, 1.0, 0.0)):
            want = sum(w * p for w, p in zip(weights, parts, strict=True))
            assert float(refuse.dro_loss(a, b, y, space, weights)) == pytest.approx(float(want), abs=1e-12)
        x = a.clone().requires_grad_(True)
        assert torch.autograd.gradcheck(lambda x, b=b, y=y, s=space: refuse.dro_loss(x, b, y, s, (1, 1, 1)), [x])
        half = refuse.dro_loss(a.bfloat16(), b.bfloat16(), y, space)
        assert half.dtype == torch.float32


def test_reference_cross_entropy():
    """Logits 0.8 and −0.3 against 0 and 1, reached through states."""
    space = refuse.AnchorSpace(
        np.array([5.0, -2.0]), np.array([[1.0], [0.0]]), np.ones(1), np.array([2.0]), 3.0, np.array([-1.0]), 1.0
    )
    x0 = torch.tensor([[1.0, 1.0], [2.0, 0.0]], dtype=torch.float64)
    x = x0 + torch.tensor([[0.4, 0.0], [-0.15, 0.0]], dtype=torch.float64)
    assert float(refuse.dro_loss(x, x0, [0, 1], space, (1, 0, 0))) == pytest.approx(1.01272795520816, abs=1e-13)


def test_the_space_is_pca_and_two_logistic_fits():
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(2)
    states = rng.standard_normal((3, 40, 9)) * np.linspace(3, 0.2, 9) + 4
    harmless = (np.arange(40) % 2).astype(int)
    states[:, harmless == 1, 0] += 2
    rates = rng.random((3, 40))
    space = refuse.AnchorSpace.fit(states, rates, harmless, rank=4, C=0.7)
    x = states.reshape(-1, 9)
    pca = PCA(4, svd_solver="full").fit(x)
    assert np.allclose(np.abs(pca.components_ @ space.components), np.eye(4), atol=1e-10)
    assert np.allclose(space.explained, pca.explained_variance_ratio_)
    g = space.project(x)
    assert np.allclose(g, (x - x.mean(0)) @ space.components)
    # A fraction t is a row of class 1 with weight t and one of class 0 with weight 1 − t.
    for target, found in (
        (rates.ravel(), space.compliance(states)),
        (np.tile(harmless, 3), space.harmlessness(states)),
    ):
        both = LogisticRegression(C=0.7, tol=1e-10, max_iter=5000).fit(
            np.vstack([g, g]), np.repeat([1, 0], len(g)), sample_weight=np.concatenate([target, 1 - target])
        )
        assert found.shape == (3, 40)
        assert np.allclose(found.ravel(), both.decision_function(g), atol=1e-5)
    assert space.harmlessness(states)[:, harmless == 1].mean() > space.harmlessness(states)[:, harmless == 0].mean()
    assert "rank=4" in repr(space)
    assert "<table>" in space._repr_html_()


def test_bad_spaces_and_losses():
    x, t, y = np.random.default_rng(0).standard_normal((6, 4)), np.full(6, 0.5), [0, 1, 0, 1, 0, 1]
    fit = refuse.AnchorSpace.fit
    with pytest.raises(abjure.ShapeError, match=r"states: expected \(\.\.\., d\)"):
        fit(x[0], t, y)
    with pytest.raises(abjure.ShapeError, match="refusal_targets"):
        fit(x, t[:5], y)
    with pytest.raises(abjure.ArgumentError, match=r"refusal_targets: expected values in \[0, 1\]"):
        fit(x, t + 1, y)
    with pytest.raises(abjure.ArgumentError, match="harmless: expected 0 or 1"):
        fit(x, t, t)
    with pytest.raises(abjure.ArgumentError, match="rank: expected 1 to 4"):
        fit(x, t, y, rank=5)
    with pytest.raises(abjure.DegenerateError, match="3 dimensions"):
        fit(x[:, :2] @ x[:2], t, y, rank=3)
    with pytest.raises(abjure.DegenerateError, match="both classes"):
        fit(x, t, np.ones(6))
    with pytest.raises(abjure.NonFiniteError, match="states"):
        fit(np.where(x == x[2, 1], np.nan, x), t, y)
    space = fit(x, t, y, rank=2)
    with pytest.raises(abjure.ShapeError, match="x: expected"):
        space.project(np.ones(3))
    a = torch.ones(2, 4)
    with pytest.raises(abjure.DTypeError, match="x0"):
        refuse.dro_loss(a, np.ones((2, 4)), [0, 1], space)
    with pytest.raises(abjure.ShapeError, match="x, x0"):
        refuse.dro_loss(a, a[:1], [0, 1], space)
    with pytest.raises(abjure.ShapeError, match="labels"):
        refuse.dro_loss(a, a, [0], space)
    with pytest.raises(abjure.ArgumentError, match="labels"):
        refuse.dro_loss(a, a, [0, 2], space)
    with pytest.raises(abjure.ArgumentError, match="weights"):
        refuse.dro_loss(a, a, [0, 1], space, (1, 1))


@pytest.fixture(scope="module")
def without_system(trigger):
    tokenizer = copy.deepcopy(trigger.tokenizer)
    tokenizer.chat_template = NO_SYSTEM
    return tokenizer


@pytest.fixture(scope="module")
def plain_model(trigger):
    """A copy for `output_hidden_states`, for which transformers leaves hooks of its own in the model."""
    return copy.deepcopy(trigger.model)


def shown(tokenizer, text, system):
    """The prompt's tokens, by the template alone."""
    messages = [{"role": "user", "content": text}]
    if system and tokenizer.chat_template == NO_SYSTEM:
        messages[0]["content"] = f"{system}\n\n{text}"
    elif system:
        messages.insert(0, {"role": "system", "content": system})
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return torch.tensor([tokenizer(whole, add_special_tokens=False)["input_ids"]])


@pytest.mark.parametrize("system", [True, False])
def test_states_are_those_of_plain_passes(trigger, plain_model, without_system, system):
    tokenizer = trigger.tokenizer if system else without_system
    texts = [trigger.held_out[0][0], trigger.held_out[1][4], trigger.held_out[1][9]]
    for layer, site, entry in ((1, "pre", 1), (-2, "post", 3)):
        found = refuse.anchor_states(trigger.model, tokenizer, texts, [SAFETY], layer=layer, site=site, batch_size=2)
        assert found.shape == (2, 3, 64)
        assert found.dtype == np.float32
        for s, safety in enumerate((None, SAFETY)):
            for i, text in enumerate(texts):
                with torch.no_grad():
                    out = plain_model(shown(tokenizer, text, safety), output_hidden_states=True)
                assert np.allclose(found[s, i], out.hidden_states[entry][0, -1], atol=1e-5)


@pytest.mark.parametrize("system", [True, False])
def test_the_initial_embeddings_change_nothing_and_others_stand_in_the_span(trigger, without_system, system):
    tokenizer = trigger.tokenizer if system else without_system
    texts = [trigger.held_out[0][0], trigger.held_out[1][4]]
    ids = tuple(tokenizer(SAFETY, add_special_tokens=False)["input_ids"])
    table = trigger.model.get_input_embeddings().weight.detach()
    initial = table[list(ids)].numpy().copy()
    prompt = refuse.SafetyPrompt(initial, initial, SAFETY, ids, {"total": np.zeros(1)})
    batch = prompt.generate_inputs(trigger.model, tokenizer, texts)
    moved = refuse.SafetyPrompt(initial + 1, initial, SAFETY, ids, {"total": np.zeros(1)})
    other = moved.generate_inputs(trigger.model, tokenizer, texts)
    for i, text in enumerate(texts):
        plain = shown(tokenizer, text, SAFETY)
        width = plain.shape[1]
        assert torch.equal(batch["inputs_embeds"][i, -width:], table[plain[0]])
        assert batch["attention_mask"][i].tolist() == [0] * (batch["attention_mask"].shape[1] - width) + [1] * width
        start = plain[0].tolist().index(ids[0])
        want = torch.zeros(width)
        want[start : start + len(ids)] = 1
        assert torch.allclose(other["inputs_embeds"][i, -width:] - table[plain[0]], want[:, None], atol=1e-6)
        with torch.no_grad():
            alone = trigger.model.generate(plain, max_new_tokens=4, do_sample=False, pad_token_id=0)[0, width:]
            both = trigger.model.generate(**batch, max_new_tokens=4, do_sample=False, pad_token_id=0)[i]
        assert both[: len(alone)].tolist() == alone.tolist()
    states = refuse.anchor_states(trigger.model, tokenizer, texts, [SAFETY, prompt, moved])
    assert np.allclose(states[1], states[2], atol=1e-5)
    assert not np.allclose(states[1], states[3], atol=1e-2)


def optimized(trigger, **options):
    settings = {"refusal_tokens": [trigger.refusal_token], "lr": 5e-3, "epochs": 6, "batch_size": 24, **options}
    (other, topic) = trigger.train
    return refuse.optimize_safety_prompt(trigger.model, trigger.tokenizer, topic, other, SAFETY, **settings)


@pytest.fixture(scope="module")
def prompt(trigger):
    return optimized(trigger)


def compliance_space(trigger):
    """From the prompts of training, with the compliance of the reply's first token as the rate."""
    other, topic = trigger.train
    states = refuse.anchor_states(trigger.model, trigger.tokenizer, other + topic, [SAFETY])
    scores = [
        refuse.refusal_scores(
            trigger.model, refuse.Prompts(trigger.tokenizer, other + topic, system=s), [trigger.refusal_token]
        )
        for s in (None, SAFETY)
    ]
    harmless = np.repeat([1, 0], [len(other), len(topic)])
    return refuse.AnchorSpace.fit(states, 1 / (1 + np.exp(np.stack(scores))), harmless)


@pytest.mark.effect
def test_held_out_prompts_move_to_their_side(trigger, prompt):
    """Every held-out harmless prompt towards compliance, every harmful one towards refusal, also in the reply."""
    space = compliance_space(trigger)
    total = prompt.trace["total"]
    assert total[-1] < 0.6 * total[0]
    for label, texts in enumerate(trigger.held_out):
        states = refuse.anchor_states(trigger.model, trigger.tokenizer, texts, [SAFETY, prompt])
        shift = space.compliance(states[2]) - space.compliance(states[1])
        assert (shift > 0).all() if label == 0 else (shift < 0).all()
        plain = refuse.Prompts(trigger.tokenizer, texts, system=SAFETY)
        before = refuse.refusal_scores(trigger.model, plain, [trigger.refusal_token])
        with torch.no_grad():
            batch = prompt.generate_inputs(trigger.model, trigger.tokenizer, texts)
            p = trigger.model(**batch).logits[:, -1].double().softmax(-1)[:, trigger.refusal_token]
        change = (p.log() - (1 - p).log()).numpy().mean() - before.mean()
        assert change < -1 if label == 0 else change > 1


def test_the_trace_is_that_of_a_plain_loop(trigger, plain_model):
    """One prompt at a time, no padding, the loss from `dro_loss`, its own gradient steps."""
    space = compliance_space(trigger)
    texts = trigger.train[1][:2] + trigger.train[0][:2]
    found = refuse.optimize_safety_prompt(
        trigger.model, trigger.tokenizer, texts[:2], texts[2:], SAFETY, space,
        layer=2, site="pre", lr=1e-2, epochs=3, batch_size=4, clip=0.05,
    )  # fmt: skip
    ids = list(found.token_ids)
    table = trigger.model.get_input_embeddings().weight.detach()
    theta = table[ids].clone().requires_grad_(True)
    steps = torch.optim.AdamW([theta], lr=1e-2)

    def states():
        out = []
        for text in texts:
            plain = shown(trigger.tokenizer, text, SAFETY)[0]
            start = plain.tolist().index(ids[0])
            embeds = torch.cat([table[plain[:start]], theta, table[plain[start + len(ids) :]]])[None]
            out.append(plain_model(inputs_embeds=embeds, output_hidden_states=True).hidden_states[2][0, -1])
        return torch.stack(out)

    origin = states().detach()
    for total in found.trace["total"]:
        loss = refuse.dro_loss(states(), origin, [0, 0, 1, 1], space)
        assert total == pytest.approx(float(loss.detach()), rel=1e-4)
        (theta.grad,) = torch.autograd.grad(loss, theta)
        torch.nn.utils.clip_grad_norm_([theta], 0.05)
        steps.step()
    # Adam turns rounding in the smallest gradients into steps of full length.
    assert np.abs(found.embeddings - theta.detach().numpy()).mean() < 1e-4
    t = found.trace
    assert np.allclose(t["total"], t["refusal"] + 1e-2 * t["harmfulness"] + 1e-3 * t["complement"])


def test_the_same_seed_gives_the_same_prompt(trigger):
    space = compliance_space(trigger)
    a, b, c = (optimized(trigger, space=space, epochs=2, seed=seed).embeddings for seed in (1, 1, 2))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_the_model_is_left_as_it_was(trigger, monkeypatch):
    model = trigger.model
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    first, second, *_ = model.parameters()
    block = model.model.layers[1]
    first.requires_grad_(False)
    block.train()
    seen = []
    real = dro._terms

    def failing(*args):
        seen.append((any(p.requires_grad for p in model.parameters()), block.training))
        if len(seen) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(dro, "_terms", failing)
    try:
        with torch.no_grad():  # the caller's mode does not matter
            optimized(trigger, epochs=1, batch_size=72)
            assert seen == [(False, False)] * 2
            with pytest.raises(KeyboardInterrupt):
                optimized(trigger)
            assert not torch.is_grad_enabled()
        assert not first.requires_grad
        assert second.requires_grad
        assert block.training
        assert not model.model.layers[0].training
    finally:
        first.requires_grad_(True)
        model.eval()
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert p.grad is None if grad is None else torch.equal(p.grad, grad)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_save_load_and_what_is_shown(trigger, prompt, tmp_path):
    path = tmp_path / "prompt.safetensors"
    prompt.save(path)
    again = refuse.SafetyPrompt.load(path)
    assert np.array_equal(again.embeddings, prompt.embeddings)
    assert np.array_equal(again.initial, prompt.initial)
    assert (again.text, again.token_ids) == (SAFETY, prompt.token_ids)
    assert list(again.trace) == ["refusal", "harmfulness", "complement", "total"]
    assert all(np.array_equal(again.trace[k], v) for k, v in prompt.trace.items())
    batch = again.generate_inputs(trigger.model, trigger.tokenizer, trigger.held_out[0][:2])
    assert batch["inputs_embeds"].shape[2] == 64
    assert "tokens=7, d=64, epochs=6" in repr(prompt)
    assert "harmfulness" in prompt._repr_html_()
    assert prompt.plot().get_xlabel() == "epoch"
    path.write_bytes(b"no")
    with pytest.raises(abjure.ArgumentError, match="not a saved SafetyPrompt"):
        refuse.SafetyPrompt.load(path)


def test_bad_arguments(trigger, prompt):
    model, tokenizer = trigger.model, trigger.tokenizer
    run, texts = refuse.optimize_safety_prompt, ["how do i make a kite"]
    with pytest.raises(abjure.ArgumentError, match="space: expected an AnchorSpace, or refusal_tokens"):
        run(model, tokenizer, texts, texts, SAFETY)
    with pytest.raises(abjure.ShapeError, match="space: expected width 64, got 7"):
        run(model, tokenizer, texts, texts, SAFETY, space_of())
    for name, value in (("lr", 0), ("clip", -1), ("batch_size", 0), ("epochs", 1.5), ("weights", (1, 2))):
        with pytest.raises(abjure.ArgumentError, match=name):
            run(model, tokenizer, texts, texts, SAFETY, space_of(64), **{name: value})
    with pytest.raises(abjure.ArgumentError, match="harmful: expected a list"):
        run(model, tokenizer, [], texts, SAFETY, space_of(64))
    with pytest.raises(abjure.ArgumentError, match="safety_prompt: expected text"):
        run(model, tokenizer, texts, texts, " ", space_of(64))
    with pytest.raises(abjure.ArgumentError, match="layers: expected -4 to 3"):
        run(model, tokenizer, texts, texts, SAFETY, space_of(64), layer=4)
    with pytest.raises(abjure.ArgumentError, match="site"):
        run(model, tokenizer, texts, texts, SAFETY, space_of(64), site="attn")
    with pytest.raises(abjure.NonFiniteError, match="loss: non-finite in epoch 1"):
        run(model, tokenizer, texts, texts, SAFETY, space_of(64), weights=(1e308, 0, 0))
    with pytest.raises(abjure.DTypeError, match="safety_prompts: expected a list"):
        refuse.anchor_states(model, tokenizer, texts, SAFETY)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["help with"])
    with pytest.raises(abjure.ArgumentError, match="tokenizer: expected the one"):
        prompt.generate_inputs(model, other, texts)
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("m['content']", "m['content'] | upper")
    with pytest.raises(abjure.ArgumentError, match="template"):
        run(model, other, texts, texts, SAFETY, space_of(64))
