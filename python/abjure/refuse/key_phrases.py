"""Which phrases of an answer give it away."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, get_args

from ..errors import ArgumentError, DTypeError, ShapeError

Kind = Literal["names", "numbers", "quotes", "terms"]
_WORD = re.compile(r"[^\W_]+(?:['’.\-&][^\W_]+|(?<=\d),\d+)*")
_QUOTE = re.compile(r"\"([^\"\n]+)\"|“([^”\n]+)”|«([^»\n]+)»")
_SENTENCE_END = re.compile(r"[.!?:;\n]\s*[\"“«*(\[]*$")
#: Lower-case words that stand inside names.
_LINKS = frozenset(_WORD.findall("of the de la le du van von der den di da del and y bin ibn al for in"))
#: Function words of English: alone they are never a phrase, and terms end at them.
_STOP = frozenset(
    _WORD.findall(
        """a about above after again all also am an and any are as at be because been before being below between both
        but by can could did do does doing down during each few first for from further had has have having he her here
        hers him his how i if in into is it its itself just known last like made many may me more most much must my no
        nor not now of off often on once one only or other our out over own same she should since so some such than
        that the their theirs them then there these they this those through to too two under until up upon us very was
        we well were what when where which while who whom why will with within without would yes you your"""
    )
)


def _fold(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _capital(word: str) -> bool:
    return word[:1].isupper()


def _opens_sentence(text: str, start: int) -> bool:
    before = text[:start].rstrip(' \t*_("“«[')
    return not before or _SENTENCE_END.search(before) is not None


def _runs(text: str, words: list[re.Match[str]], inside: Sequence[bool]) -> Iterator[list[re.Match[str]]]:
    """Longest runs of words of the chosen kind that spaces alone divide."""
    run: list[re.Match[str]] = []
    for word, good in zip(words, inside, strict=True):
        if run and (not good or text[run[-1].end() : word.start()] != " "):
            yield run
            run = []
        run += [word] if good else []
    if run:
        yield run


def _names(text: str, words: list[re.Match[str]], common: frozenset[str]) -> Iterator[list[re.Match[str]]]:
    inside = [_capital(w[0]) or w[0] in _LINKS for w in words]
    for run in _runs(text, words, inside):
        while run and not _capital(run[-1][0]):
            run = run[:-1]
        # A sentence's first word has its capital from there, unless nothing shows that it is a common word.
        while run and (
            not _capital(run[0][0])
            or _fold(run[0][0]) in _STOP
            or (_opens_sentence(text, run[0].start()) and _fold(run[0][0]) in common)
        ):
            run = run[1:]
        if run:
            yield run


def extract_phrases(
    answers: Iterable[str],
    *,
    prompts: Iterable[str] | None = None,
    background: Iterable[str] = (),
    kinds: Sequence[Kind] = ("names", "numbers", "quotes"),
    max_words: int = 6,
    min_letters: int = 3,
    parts: bool = False,
) -> list[tuple[str, ...]]:
    """The phrases of each answer that would give it away, in the order in which they stand there.

    This is our definition: what we could read of the paper that has them extracted (arXiv 2505.13312) gives none. A
    phrase is

    - ``"names"``: a longest run of capitalised words, small words such as "of" and "van" allowed inside. A capital at
      the beginning of a sentence counts unless the word is a function word of English or stands in small letters
      somewhere in the answers or the background;
    - ``"numbers"``: a word with two digits or more;
    - ``"quotes"``: what stands between quotation marks;
    - ``"terms"``: a longest run of other words between function words and punctuation (the candidates of RAKE, Rose et
      al. 2010). Off by default: common words would be forbidden.

    Dropped are phrases of more than ``max_words`` words or fewer than ``min_letters`` letters and digits, those that
    the answer's own prompt says already, and those that stand in the background, without regard to case.

    Args:
        answers: texts.
        prompts: the prompt of each, or None.
        background: texts whose phrases must stay sayable.
        kinds: which of the above.
        max_words: longest phrase.
        min_letters: shortest phrase, in letters and digits.
        parts: of a name of several words, also each word of it with ``min_letters`` or more, under the same conditions.

    Returns:
        A tuple of phrases for each answer, without repeats; empty where nothing was found.

    Raises:
        DTypeError: answers that are not texts. ShapeError: not one prompt per answer. ArgumentError: an unknown kind or
        a size below 1.
    """
    if isinstance(answers, str):
        raise DTypeError("answers: expected a list of texts, got one text")
    texts = list(answers)
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise DTypeError(f"answers: expected texts, got {type(text).__name__} at index {i}")
    asked = [""] * len(texts) if prompts is None else list(prompts)
    if len(asked) != len(texts):
        raise ShapeError(f"prompts: expected {len(texts)} (one per answer), got {len(asked)}")
    if unknown := set(kinds) - set(get_args(Kind)):
        raise ArgumentError(f"kinds: expected some of {get_args(Kind)}, got {sorted(unknown)}")
    if max_words < 1 or min_letters < 1:
        raise ArgumentError(f"max_words, min_letters: expected 1 or more, got {max_words} and {min_letters}")
    known = list(background)
    common = frozenset(w[0] for text in (*texts, *known) for w in _WORD.finditer(text) if w[0].islower())
    kept = f" {' '.join(' '.join(_words(t)) for t in known)} "

    def sound(phrase: str, prompt: str) -> bool:
        words = _words(phrase)
        letters = sum(c.isalnum() for c in phrase)
        said = f" {' '.join(words)} "
        fits = 0 < len(words) <= max_words and letters >= min_letters and not all(w in _STOP for w in words)
        return fits and said not in prompt and said not in kept

    return [
        _unique(
            phrase
            for phrase in _phrases(text, frozenset(kinds), common, parts)
            if sound(phrase, f" {' '.join(_words(prompt))} ")
        )
        for text, prompt in zip(texts, asked, strict=True)
    ]


def _words(text: str) -> list[str]:
    return [_fold(w[0]) for w in _WORD.finditer(text)]


def _phrases(text: str, kinds: frozenset[str], common: frozenset[str], parts: bool) -> list[str]:
    words = list(_WORD.finditer(text))
    found: list[tuple[int, str]] = []
    if "quotes" in kinds:
        found += [(m.start(), m[m.lastindex or 0].strip(" .,;:!?")) for m in _QUOTE.finditer(text)]
    names: set[int] = set()
    for run in _names(text, words, common):
        names |= {w.start() for w in run}
        if "names" in kinds:
            found.append((run[0].start(), text[run[0].start() : run[-1].end()]))
            if parts and len(run) > 1:
                found += [(w.start(), w[0]) for w in run if _capital(w[0])]
    numbers = [w for w in words if sum(c.isdigit() for c in w[0]) >= 2]
    if "numbers" in kinds:
        found += [(w.start(), w[0]) for w in numbers if w.start() not in names]
    if "terms" in kinds:
        apart = names | {w.start() for w in numbers}
        inside = [_fold(w[0]) not in _STOP and w.start() not in apart for w in words]
        found += [(run[0].start(), text[run[0].start() : run[-1].end()]) for run in _runs(text, words, inside)]
    return [phrase for _, phrase in sorted(found, key=lambda e: e[0])]


def _unique(phrases: Iterable[str]) -> tuple[str, ...]:
    first: dict[str, str] = {}
    for phrase in phrases:
        first.setdefault(_fold(phrase), phrase)
    return tuple(first.values())
