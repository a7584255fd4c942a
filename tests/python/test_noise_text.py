"""Noise from captions: the interface a text-to-image model is plugged into, and the small generator trained here."""

from __future__ import annotations

import numpy as np
import pytest

from abjure.errors import ArgumentError, DegenerateError, NonFiniteError, ShapeError
from abjure.protect import noise
from abjure.protect.noise.text import contrastive_loss, token_cells

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ("a red boot", "one small coat", "two bags", "the summer dress")


def captioned(n=64, seed=0, shape=(1, 12, 12)):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % len(WORDS)
    pattern = np.random.default_rng(5).uniform(0.4, 0.6, (len(WORDS), shape[0], 4, 4)).repeat(3, 2).repeat(3, 3)
    x = np.clip(pattern[y] + rng.normal(size=(n, *shape)) * 0.1, 0, 1)
    return np.rint(x * 255).astype(np.uint8), [WORDS[k] for k in y]


@pytest.fixture(scope="module")
def generator():
    x, words = captioned(128)
    return noise.train_text_generator(x, words, epsilon=32 / 255, rounds=60, batch_size=16, width=16, progress=False)


def test_any_callable_is_a_generator():
    x, words = captioned()
    calls = []

    def pipeline(captions, shape, seed):
        """Stands in for a text-to-image model: half the size, one channel, NumPy."""
        calls.append((len(captions), shape, seed))
        rng = np.random.default_rng([seed, len(captions)])
        return 50 * rng.normal(size=(len(captions), 1, 6, 6))

    got = noise.text_conditioned(x, words, pipeline, epsilon=10 / 255, batch_size=40, seed=3, progress=False)
    assert calls == [(40, (1, 12, 12), 3), (24, (1, 12, 12), 4)]
    assert got.x.dtype == np.uint8
    assert np.abs(got.delta).max() == 10
    assert got.budget.holds
    assert len(set(got.labels.tolist())) == 4
    again = noise.text_conditioned(x, words, pipeline, epsilon=10 / 255, batch_size=40, seed=3, progress=False)
    assert np.array_equal(got.x, again.x)


def test_trained_noise_says_the_caption(generator):
    x, words = captioned()
    got = noise.text_conditioned(x, words, generator, epsilon=32 / 255, progress=False)
    means = np.stack([got.delta[got.labels == c].mean(0).reshape(-1) for c in range(4)])
    # A caption's noise is its own, whichever image it is added to.
    cosine = np.corrcoef(means)
    assert cosine[~np.eye(4, dtype=bool)].max() < 0.9
    one = noise.text_conditioned(x, words, generator, epsilon=32 / 255, seed=1, progress=False)
    assert not np.array_equal(one.x, got.x)


def test_encoders_trained_on_it_do_not_know_clean_images(generator):
    x, words = captioned(128)
    test_x, test_words = captioned(64, seed=9)
    test = torch.from_numpy(test_x).float() / 255
    got = noise.text_conditioned(x, words, generator, epsilon=32 / 255, progress=False).x

    def retrieval(train):
        pair = noise.ContrastivePair((1, 12, 12), size=32, seed=7)
        pair.fit(torch.from_numpy(train).float() / 255, words, epochs=4, batch_size=32)
        return pair.retrieval(test, test_words), pair.retrieval(torch.from_numpy(train).float() / 255, words)

    clean, protected = retrieval(x), retrieval(got)
    # On the data with noise they find the captions at once, on clean images hardly: they learnt the noise.
    assert clean[1] - clean[0] < 0.15
    assert protected[1] > 0.95
    assert protected[1] - protected[0] > 0.3
    assert protected[0] < clean[0] - 0.1


def test_training_is_deterministic_and_saves(generator, tmp_path):
    x, words = captioned(128)
    again = noise.train_text_generator(x, words, epsilon=32 / 255, rounds=60, batch_size=16, width=16, progress=False)
    path = tmp_path / "generator.safetensors"
    again.save(path)
    back = noise.TextGenerator.load(path)
    for made in (again, back):
        assert torch.equal(made(WORDS, (1, 12, 12), 0), generator(WORDS, (1, 12, 12), 0))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArgumentError, match="TextGenerator"):
        noise.TextGenerator.load(path)
    with pytest.raises(ArgumentError, match="TextGenerator"):
        noise.TextGenerator.load(tmp_path / "nothing")


def test_loss_of_distinct_and_of_shared_captions():
    torch.manual_seed(0)
    s = torch.randn(5, 5)
    plain = torch.nn.functional.cross_entropy
    own = torch.arange(5)
    want = 0.5 * (plain(s, own) + plain(s.T, own))
    assert torch.isclose(contrastive_loss(s, torch.eye(5)), want)
    # Two rows with one caption are each other's positives: their order does not matter.
    same = torch.eye(5)
    same[0, 1] = same[1, 0] = 1
    swapped = s[[1, 0, 2, 3, 4]]
    assert torch.isclose(contrastive_loss(s, same), contrastive_loss(swapped, same))


def test_words():
    assert token_cells("Red BOOT") == token_cells("red boot!")
    assert token_cells("boot") != token_cells("coat")
    # Pieces are shared by words that are nearly the same.
    assert set(token_cells("boot")) & set(token_cells("boots"))


def test_bad_input(generator):
    x, words = captioned(8)

    def run(generator=generator, x=x, captions=words, **kwargs):
        return noise.text_conditioned(x, captions, generator, progress=False, **kwargs)

    for call, error, message in [
        (lambda: run(captions=words[:-1]), ShapeError, "captions"),
        (lambda: run(captions="boots"), ArgumentError, "captions"),
        (lambda: run(captions=[*words[:-1], " . "]), ArgumentError, "index 7"),
        (lambda: run(captions=["boot"] * 8), DegenerateError, "two classes"),
        (lambda: run(generator=3), ArgumentError, "generator"),
        (lambda: run(generator=lambda c, s, k: np.zeros((1, 1, 2, 2))), ShapeError, "generator"),
        (lambda: run(generator=lambda c, s, k: np.full((len(c), 1, 2, 2), np.nan)), NonFiniteError, "generator"),
        (lambda: run(epsilon=0), ArgumentError, "epsilon"),
        (lambda: run(x=np.full((8, 1, 12, 12), 2.0)), ArgumentError, "box"),
        (lambda: noise.train_text_generator(x, words, rounds=0), ArgumentError, "rounds"),
        (lambda: noise.train_text_generator(x, words[:3]), ShapeError, "captions"),
    ]:
        with pytest.raises(error, match=message):
            call()
