"""Byte mode against brute force over text, the bytes of tokenizers against what they decode."""

from __future__ import annotations

import math
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import abjure
from abjure.errors import ArgumentError, DegenerateError, DTypeError, NonFiniteError, ShapeError
from abjure.integrations.torch import DEVICE_PATHS
from abjure.refuse import ForbiddenPhrases, TokenBytes

INF = math.inf
CORPUS = [
    "Harry Potter met Ron Weasley on the platform; Harry waved.",
    "A comparison of Paris and London, in prose: parisian nights!",
    "naïve café, Привет мир, 你好世界 🙂 and 1234 numbers\n\twith tabs",
] * 3


@pytest.fixture(scope="module")
def byte_level():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=["<eos>", "<turn>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    t.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=t, eos_token="<eos>", extra_special_tokens=["<turn>"])


@pytest.fixture(scope="module")
def metaspace():
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    fallback = [f"<0x{b:02X}>" for b in range(256)]
    t = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    t.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    t.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<unk>", "<s>", "</s>"], limit_alphabet=60, show_progress=False
    )
    t.train_from_iterator(CORPUS, trainer)
    t.add_tokens(fallback)
    import json

    spec = json.loads(t.to_str())
    # Byte pieces belong to the model's vocabulary, as in SentencePiece, and not to the added tokens.
    vocabulary = spec["model"]["vocab"]
    for token in fallback:
        vocabulary.setdefault(token, len(vocabulary))
    spec["added_tokens"] = [a for a in spec["added_tokens"] if a["content"] not in fallback]
    t = Tokenizer.from_str(json.dumps(spec))
    return PreTrainedTokenizerFast(tokenizer_object=t, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("name", ["byte_level", "metaspace"])
def test_bytes_are_those_the_tokenizer_decodes(name, request):
    tokenizer = request.getfixturevalue(name)
    table = TokenBytes(tokenizer)
    assert table.scheme == name
    for text in ("Harry Potter", "  naïve\n 你 ☂ zz", "x"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert table.spell(ids).decode() == (f" {text}" if name == "metaspace" else text)
    assert table.spell(tokenizer.all_special_ids) == b""
    assert table.spell([10**6]) == b""
    with pytest.raises(ArgumentError, match="0 or more"):
        table.spell([-1])
    assert name in repr(table)


def test_tokenizers_without_exact_bytes():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "ha": 1, "##rry": 2}, unk_token="[UNK]"))
    pieces.decoder = decoders.WordPiece()
    with pytest.raises(ArgumentError, match="WordPiece"):
        TokenBytes(PreTrainedTokenizerFast(tokenizer_object=pieces, unk_token="[UNK]"))
    with pytest.raises(DTypeError, match="Hugging Face"):
        TokenBytes(object())

    class Plain:
        all_special_ids = ()

        def get_vocab(self):
            return {"▁a": 0, "b": 1}

        def encode(self, text, add_special_tokens):
            return [0, 1]

        def decode(self, ids, **options):
            return "a!"

    with pytest.raises(ArgumentError, match="scheme"):
        TokenBytes(Plain())
    with pytest.raises(ArgumentError, match="do not spell"):
        TokenBytes(Plain(), scheme="metaspace")
    assert TokenBytes(Plain(), scheme="metaspace", proof=[]).spell([0, 1]) == b" ab"
    for options in ({"special": "drop"}, {"scheme": "other"}):
        with pytest.raises(ArgumentError):
            TokenBytes(Plain(), **options)


class Table:
    """A tokenizer of given pieces, none of them special but the empty ones."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces
        self.all_special_ids = [i for i, p in enumerate(pieces) if not p]

    def get_vocab(self):
        return {p.replace(" ", "▁") or f"<special {i}>": i for i, p in enumerate(self.pieces)}


def brute(pieces, phrases, context, fold=False, word=False, transparent=True):
    """Tokens whose text, behind that of the context, ends a phrase."""
    low = (lambda t: t.lower()) if fold else (lambda t: t)
    before = ""
    for i in context:
        before = "" if not pieces[i] and not transparent else before + low(pieces[i])
    found = []
    for i, piece in enumerate(pieces):
        text = before + low(piece)
        for p in map(low, phrases):
            ends = [j for j in range(len(text)) if text.startswith(p, j) and j + len(p) > len(before)]
            if any(not (word and p[0].isalnum() and j and text[j - 1].isalnum()) for j in ends):
                found.append(i)
                break
    return found


@given(
    st.lists(st.text("abA ", max_size=4), min_size=1, max_size=20, unique=True),
    st.lists(st.text("abA ", min_size=1, max_size=5).filter(str.strip), min_size=1, max_size=6, unique=True),
    st.data(),
    st.booleans(),
    st.sampled_from(["transparent", "break"]),
)
@settings(max_examples=150, deadline=None)
def test_equals_brute_force(pieces, phrases, data, word, special):
    if not any(pieces):
        pieces = [*pieces, "a"]
    context = data.draw(st.lists(st.integers(0, len(pieces) - 1), max_size=10))
    table = TokenBytes(Table(pieces), scheme="metaspace", proof=[], special=special)
    processor = ForbiddenPhrases(
        phrases, tokenizer=table, mode="bytes", variants=False, boundary="word" if word else "none", scope="all"
    )
    expected = brute(pieces, phrases, context, word=word, transparent=special == "transparent")
    assert sorted(processor.after(context)) == expected
    z = np.zeros((1, len(pieces) + 1), dtype=np.float32)
    if len(expected) < z.shape[1]:
        processor(np.array([context], dtype=np.int64), z)
        assert np.flatnonzero(np.isneginf(z[0])).tolist() == expected


PIECES = [
    " Har", " Harry", "Har", "Harry", "a", "arry", "ry", "ry P", "r", "rys", "y", "yard", "xHarryx", "H", "I met", "",
]  # fmt: skip


def names(processor, context):
    ids = [PIECES.index(p) for p in context]
    return {PIECES[i] for i, v in processor.after(ids).items() if v == -INF}


def test_reference_vector():
    table = TokenBytes(Table(PIECES), scheme="metaspace", proof=[])
    processor = ForbiddenPhrases(["Harry"], tokenizer=table, mode="bytes", variants=False)
    inner = {" Harry", "Harry", "xHarryx"}
    assert names(processor, ["I met", " Har"]) == inner | {"ry", "ry P", "rys"}
    assert names(processor, ["I met", " Har", "r"]) == inner | {"y", "yard"}
    assert names(processor, ["I met", "H"]) == inner | {"arry"}
    assert names(processor, ["I met"]) == inner
    # A special token hides nothing where text is read without it.
    assert names(processor, ["Har", "", ""]) == inner | {"ry", "ry P", "rys"}
    broken = TokenBytes(Table(PIECES), scheme="metaspace", proof=[], special="break")
    assert names(ForbiddenPhrases(["Harry"], tokenizer=broken, mode="bytes", variants=False), ["Har", ""]) == inner


def test_penalties_count_bytes():
    table = TokenBytes(Table(PIECES), scheme="metaspace", proof=[])
    options = {"tokenizer": table, "mode": "bytes", "variants": False, "penalty": 4.0, "gamma": 2.0}
    processor = ForbiddenPhrases(["Harry", "Hard"], **options)
    harry = PIECES.index("Har"), PIECES.index("r"), PIECES.index("y")
    soft = {PIECES[i]: v for i, v in processor.after(harry[:1]).items() if v != -INF}
    assert soft == {"r": -4 * (3 / 5) ** 2}
    # "a" extends both phrases: the shorter, of which more has been said, weighs more.
    soft = {PIECES[i]: v for i, v in processor.after([PIECES.index("H")]).items() if v != -INF}
    assert soft == {"a": -4 * (1 / 4) ** 2}
    assert processor.penalty_of(harry[:2]) == -4 * (3 / 5) ** 2
    assert ForbiddenPhrases(["Harry"], **{**options, "penalty": None}).penalty_of(harry) == 0.0


@given(st.integers(0, 2**32), st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]))
@settings(max_examples=30, deadline=None)
def test_writes_what_it_says(seed, dtype):
    g = torch.Generator().manual_seed(seed)
    table = TokenBytes(Table(PIECES), scheme="metaspace", proof=[])
    processor = ForbiddenPhrases(["Harry", "xH", "a"], tokenizer=table, mode="bytes", penalty=2.0, scope="all")
    ids = torch.randint(0, len(PIECES), (5, 4), generator=g)
    z = torch.randn(5, 20, generator=g).to(dtype)
    expected, other = z.clone(), z.clone()
    exact = torch.float64 if dtype is torch.float64 else torch.float32
    for row, context in zip(expected, ids.tolist(), strict=True):
        for i, v in processor.after(context).items():
            row[i] = (row[i].to(exact) + v).to(dtype)
    assert processor(ids, z) is z
    assert torch.equal(z, expected)
    begin = np.zeros(5, dtype=np.int64)
    DEVICE_PATHS["forbid_"](other, *processor._automaton.edits(ids.numpy().reshape(-1), begin), None)
    assert torch.equal(other, z)


def test_variants_cover_case_and_normal_forms(byte_level):
    processor = ForbiddenPhrases(["Café"], tokenizer=byte_level, mode="bytes", boundary="word")
    exact = ForbiddenPhrases(["Café"], tokenizer=byte_level, mode="bytes", variants=False)
    eos = byte_level.eos_token_id

    def completes(guard, text):
        ids = byte_level.encode(text, add_special_tokens=False)
        return any(guard.after(ids[:n]).get(i) == -INF for n, i in enumerate(ids))

    for text in ("Café", "a CAFÉ", "cafÉ", "—café", unicodedata.normalize("NFD", "Café"), "CaFé s"):
        assert completes(processor, text), text
    assert completes(exact, "xCafé")
    for text in ("cafe", "xcafé", "caf é"):
        assert not completes(processor, text), text
    assert not completes(exact, "CAFÉ")
    assert len(exact) == 1 < len(processor)
    assert eos not in processor.after([])
    inside = ForbiddenPhrases(["Paris"], tokenizer=byte_level, mode="bytes")
    assert completes(inside, "comparison")
    assert not completes(ForbiddenPhrases(["Paris"], tokenizer=byte_level, mode="bytes", boundary="word"), "comparison")


@pytest.mark.parametrize("name", ["byte_level", "metaspace"])
def test_random_text_never_holds_a_phrase(name, request):
    """Tokens drawn at random, special ones and single bytes among them: the worst that a model can do."""
    tokenizer = request.getfixturevalue(name)
    table = TokenBytes(tokenizer)
    rng = np.random.default_rng(0)
    phrases = ["ar", "Ron", "par", " o", "t", "你"]
    processor = ForbiddenPhrases(phrases, tokenizer=table, mode="bytes", scope="output")
    ids = np.full((16, 1), tokenizer.eos_token_id)
    free = ids
    for _ in range(60):
        z = rng.normal(size=(16, len(table))).astype(np.float32)
        free = np.concatenate([free, z.argmax(1)[:, None]], axis=1)
        processor(ids, z)
        ids = np.concatenate([ids, z.argmax(1)[:, None]], axis=1)
    text = [table.spell(row).decode(errors="replace").lower() for row in ids]
    unguarded = [table.spell(row).decode(errors="replace").lower() for row in free]
    wanted = [p.lower().strip() for p in phrases]
    assert not any(p in t for p in wanted for t in text)
    assert any(p in t for p in wanted for t in unguarded)


def test_windows_pass_over_tokens_without_text():
    table = TokenBytes(Table(PIECES), scheme="metaspace", proof=[])
    processor = ForbiddenPhrases(["Harry"], tokenizer=table, mode="bytes", scope="all")
    empty = PIECES.index("")
    ids = np.array([[PIECES.index("Har"), *[empty] * 40], [PIECES.index("y"), *[empty] * 40]])
    z = np.zeros((2, len(PIECES)))
    processor(ids, z)
    assert np.isneginf(z[:, PIECES.index("ry")]).tolist() == [True, False]
    # Not across the prompt's border, where the response alone counts.
    z = np.zeros((2, len(PIECES)))
    ForbiddenPhrases(["Harry"], tokenizer=table, mode="bytes", prompt_length=3)(ids, z)
    assert not np.isneginf(z[:, PIECES.index("ry")]).any()


def test_same_bits_for_any_thread_count():
    rng = np.random.default_rng(1)
    pieces = list(dict.fromkeys("".join(rng.choice(list("abcdef "), rng.integers(1, 6))) for _ in range(9000)))
    phrases = list(dict.fromkeys("".join(rng.choice(list("abcdef"), rng.integers(4, 9))) for _ in range(9000)))
    ids, z = rng.integers(0, len(pieces), (64, 8)), rng.normal(size=(64, len(pieces))).astype(np.float32)
    before, seen = abjure.get_num_threads(), []
    try:
        for threads in (1, 4):
            abjure.set_num_threads(threads)
            table = TokenBytes(Table(pieces), scheme="metaspace", proof=[])
            processor = ForbiddenPhrases(phrases, tokenizer=table, mode="bytes", penalty=1.0, scope="all")
            seen.append(processor(ids, z.copy()).tobytes())
    finally:
        abjure.set_num_threads(before)
    assert seen[0] == seen[1] != z.tobytes()


def test_bad_arguments_and_calls(byte_level):
    def make(phrases=("ab",), **options):
        return ForbiddenPhrases(phrases, **{"tokenizer": byte_level, "mode": "bytes", **options})

    for phrases, options, message in (
        ([], {}, "at least one phrase"),
        (["a", " ", "\u200b", "b"], {}, r"none at indices \[1, 2\]"),
        (["a", "b", "a"], {}, r"repeats at indices \[2\]"),
        (["a", "b" * 300], {}, r"at most 256 bytes .* \[1\]"),
        (["a"], {"vocab_size": 5}, "vocab_size"),
        (["a"], {"penalty": -1.0}, "penalty"),
        (["a"], {"boundary": "left"}, "boundary"),
        (["a"], {"boundary": "word", "mode": "hard"}, "boundary"),
    ):
        with pytest.raises(ArgumentError, match=message):
            make(phrases, **options)
    with pytest.raises(DTypeError, match="index 1"):
        make(["a", [1, 2]])
    with pytest.raises(DTypeError, match="tokenizer"):
        make(tokenizer=None)
    processor, size = make(["a", "bc"], scope="all"), len(byte_level)
    ids = np.zeros((1, 2), dtype=np.int64)
    inside = next(iter(processor.after([])))
    poison = np.zeros((1, size))
    poison[0, inside] = math.nan
    for context, z, error in (
        (ids, np.zeros((1, size - 1)), ShapeError),
        (ids, np.zeros((2, size)), ShapeError),
        (ids - 1, np.zeros((1, size)), ArgumentError),
        (ids, poison, NonFiniteError),
    ):
        start = z.copy()
        with pytest.raises(error):
            processor(context, z)
        assert np.array_equal(z, start, equal_nan=True)
    z = np.full((1, size), -INF)
    z[0, inside] = 1.0
    with pytest.raises(DegenerateError, match="row 0"):
        processor(ids, z)
    with pytest.raises(DegenerateError, match="row 0"):
        processor(ids, np.full((1, size), -INF))
    ending = make(["a", "bc"], scope="all", eos_token_id=0, dead_end="eos")(ids, z)
    assert np.flatnonzero(ending[0] > -INF).tolist() == [0]
    # Logits may be wider than the tokenizer: the ids beyond have no text.
    assert not np.isneginf(processor(ids, np.zeros((1, size + 8)))[0, size:]).any()


def test_says_what_it_holds(byte_level):
    table = TokenBytes(byte_level)
    assert table.nbytes == 0
    processor = ForbiddenPhrases(["Harry Potter", "Ron"], tokenizer=table, mode="bytes")
    assert processor.nbytes > 0 < table.nbytes
    assert processor.nodes == len("harry potter") + len("ron") + 1
    for part in ("2 phrases", "mode='bytes'", f"{processor.nodes} nodes", "MB", "TokenBytes"):
        assert part in repr(processor)
    assert "TokenBytes" not in repr(ForbiddenPhrases([[1, 2]]))
