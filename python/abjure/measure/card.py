"""Cards of data sets: who made the data, under which conditions, for whom, and what is not in them."""

from __future__ import annotations

import hashlib
import html
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from .._files import write_atomically
from ..errors import ArgumentError, DTypeError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["CARD_QUESTIONS", "CardCheck", "CardQuestion", "DatasetCard"]

_FORMAT = "abjure.dataset_card.1"


@dataclass(frozen=True)
class CardQuestion:
    """One question of a card.

    Attributes:
        key: its name in files.
        section: heading it stands under.
        text: the question.
    """

    key: str
    section: str
    text: str


#: What a card asks, in order. The four pairs of values are those of Scheuerman, Denton and Hanna, 2021.
CARD_QUESTIONS: tuple[CardQuestion, ...] = (
    CardQuestion("purpose", "The data", "What were the data made for, and what should they not be used for?"),
    CardQuestion("source", "The data", "Where do the records come from, and when were they collected?"),
    CardQuestion("composition", "The data", "What is one record, how many are there, in which languages and splits?"),
    CardQuestion("annotators", "The people", "Who made the annotations, and how were they chosen and instructed?"),
    CardQuestion(
        "conditions", "The people", "Under which conditions did they work: pay, time, support, exposure to harm?"
    ),
    CardQuestion(
        "disagreement", "The people", "How far did annotators agree, and what became of annotations in the minority?"
    ),
    CardQuestion(
        "consent", "Care against efficiency", "Did the people in the data consent, to what, and how can they withdraw?"
    ),
    CardQuestion(
        "care", "Care against efficiency", "What was done more slowly or at greater cost for the sake of those people?"
    ),
    CardQuestion(
        "context", "Context against universality", "In which place, time and language do labels mean what they say?"
    ),
    CardQuestion(
        "universality",
        "Context against universality",
        "Which categories are claimed to hold beyond, and on what grounds?",
    ),
    CardQuestion(
        "position", "Position against impartiality", "Who are the makers, who paid, and what view do the data take?"
    ),
    CardQuestion(
        "impartiality", "Position against impartiality", "Where a neutral judgement is claimed, how was it reached?"
    ),
    CardQuestion(
        "data_work",
        "Data work against model work",
        "What effort went into the data, and who maintains and corrects them?",
    ),
    CardQuestion(
        "model_work", "Data work against model work", "Which models or tasks shaped what was collected or filtered?"
    ),
    CardQuestion("licence", "Terms", "Under which licence, with which conditions, may the data be used and passed on?"),
    CardQuestion(
        "retention", "Terms", "How long are the data kept, and how are deletions carried on to what was made?"
    ),
    CardQuestion("absences", "Known absences", "Who and what is missing or rare, and what does that make unreliable?"),
)
_KEYS = {q.key: q for q in CARD_QUESTIONS}
#: How an answer begins that says why there is none.
_DECLINED = ("unknown:", "not applicable:")


@dataclass(frozen=True)
class CardCheck:
    """What a card answers.

    Attributes:
        answered: keys with an answer.
        declined: keys whose answer is ``unknown:`` or ``not applicable:`` and a reason: counted apart, not as answers.
        missing: keys left unanswered, which includes a reason that is empty.
    """

    answered: tuple[str, ...]
    declined: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether nothing was left unanswered."""
        return not self.missing

    def __repr__(self) -> str:
        total = len(self.answered) + len(self.declined) + len(self.missing)
        rest = f"; unanswered: {', '.join(self.missing)}" if self.missing else ""
        return f"CardCheck({len(self.answered)} of {total} answered, {len(self.declined)} declined with a reason{rest})"


class DatasetCard:
    """A card that goes with protected data, forget sets and reports.

    Args:
        name: of the data.
        version: of the data.
        answers: text by key of :data:`CARD_QUESTIONS`. ``unknown: …`` and ``not applicable: …`` give a reason instead.
        files: SHA-256 (64 hexadecimal digits) of the data's files, by name; see :meth:`with_files`.

    Raises:
        ArgumentError: an empty name, an unknown question, a hash that is none. DTypeError: an answer that is no text.

    Source: Scheuerman, Denton, Hanna, Do datasets have politics?, 2021, for the pairs of values; Gebru and others,
    arXiv 1803.09010, for the form.
    """

    def __init__(
        self,
        name: str,
        version: str = "",
        answers: Mapping[str, str] | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        for what, value in (("name", name), ("version", version)):
            if not isinstance(value, str):
                raise DTypeError(f"{what}: expected text, got {type(value).__name__}")
        if not name.strip():
            raise ArgumentError("name: expected the name of the data, got an empty one")
        for key, text in (answers or {}).items():
            if key not in _KEYS:
                raise ArgumentError(f"answers: expected questions among {', '.join(_KEYS)}, got {key!r}")
            if not isinstance(text, str):
                raise DTypeError(f"answers: {key}: expected text, got {type(text).__name__}")
            if any(0xD800 <= ord(c) <= 0xDFFF for c in text):
                raise ArgumentError(f"answers: {key}: a lone surrogate, which is no Unicode text")
        for file, digest in (files or {}).items():
            known = isinstance(digest, str) and len(digest) == 64 and set(digest) <= set("0123456789abcdef")
            if not isinstance(file, str) or not known:
                raise ArgumentError(f"files: {file!r}: expected SHA-256 as 64 hexadecimal digits, got {digest!r:.80}")
        self.name, self.version = name, version
        given = dict(answers or {})
        self._answers = {q.key: given[q.key].strip() for q in CARD_QUESTIONS if given.get(q.key, "").strip()}
        self._files = dict(sorted((files or {}).items()))

    @property
    def answers(self) -> dict[str, str]:
        """Answers by key, in the order of the questions; unanswered ones are left out."""
        return dict(self._answers)

    @property
    def files(self) -> dict[str, str]:
        """SHA-256 of the data's files, by name."""
        return dict(self._files)

    def __getitem__(self, key: str) -> str:
        if key not in _KEYS:
            raise ArgumentError(f"key: expected one of {', '.join(_KEYS)}, got {key!r}")
        return self._answers.get(key, "")

    def with_answers(self, **answers: str) -> DatasetCard:
        """A copy with some answers given or replaced.

        Raises:
            ArgumentError, DTypeError: as the constructor.
        """
        return DatasetCard(self.name, self.version, {**self._answers, **answers}, self._files)

    def with_files(self, *paths: str | os.PathLike[str]) -> DatasetCard:
        """A copy bound to files of data by their SHA-256.

        Raises:
            ArgumentError: a file that cannot be read, or two of one name.
        """
        found: dict[str, str] = {}
        for path in paths:
            name = Path(path).name
            if name in found:
                raise ArgumentError(f"paths: expected files of different names, got {name!r} twice")
            found[name] = _sha256(path)
        return DatasetCard(self.name, self.version, self._answers, {**self._files, **found})

    def verify(self, folder: str | os.PathLike[str]) -> list[str]:
        """Names of the card's files that are absent from a folder or differ there; empty where all is as it was."""
        wrong = []
        for name, digest in self._files.items():
            path = Path(folder) / Path(name).name
            if not path.is_file() or _sha256(path) != digest:
                wrong.append(name)
        return wrong

    def check(self) -> CardCheck:
        """What is answered, declined with a reason, and left unanswered."""
        answered, declined, missing = [], [], []
        for key in _KEYS:
            text = self._answers.get(key, "")
            start = next((d for d in _DECLINED if text.lower().startswith(d)), None)
            if start is not None and text[len(start) :].strip():
                declined.append(key)
            elif text and start is None:
                answered.append(key)
            else:
                missing.append(key)
        return CardCheck(tuple(answered), tuple(declined), tuple(missing))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, unanswered questions as empty text."""
        return {
            "format": _FORMAT,
            "name": self.name,
            "version": self.version,
            "answers": {key: self._answers.get(key, "") for key in _KEYS},
            "files": self.files,
        }

    @property
    def digest(self) -> str:
        """SHA-256 of the card's content, 64 hexadecimal digits: the same for every form it is stored in."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True, ensure_ascii=False).encode()).hexdigest()

    def provenance(self) -> dict[str, Any]:
        """What an artefact made from the data notes: name, version, digest of the card, questions left unanswered."""
        check = self.check()
        return {"name": self.name, "version": self.version, "sha256": self.digest, "unanswered": list(check.missing)}

    def stamp(self, *artefacts: Any) -> None:
        """Notes the card in the provenance of what was made from the data.

        Args:
            artefacts: anything with a ``provenance`` that can be written to (:class:`Fisher`, :class:`Direction`), a
                :class:`Report` (in its settings), or a mapping. A second card is added to the first.

        Raises:
            DTypeError: something that has no provenance; nothing has been noted then.
        """
        places = []
        for a in artefacts:
            place = a if isinstance(a, dict) else getattr(a, "provenance", getattr(a, "settings", None))
            if not isinstance(place, dict):
                raise DTypeError(f"artefacts: expected something with provenance, got {type(a).__name__}")
            places.append(place)
        for place in places:
            cards = list(place.get("dataset_cards", []))
            if self.provenance() not in cards:
                place["dataset_cards"] = [*cards, self.provenance()]

    def to_json(self) -> str:
        """JSON with a line end."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    def to_toml(self, questions: bool = True) -> str:
        """TOML to be filled in; with ``questions`` each stands as a comment above its answer."""
        out = [f"format = {_toml(_FORMAT)}", f"name = {_toml(self.name)}", f"version = {_toml(self.version)}"]
        out += ["", "[answers]"]
        for q in CARD_QUESTIONS:
            out += [f"# {q.section}: {q.text}"] if questions else []
            out.append(f"{q.key} = {_toml(self._answers.get(q.key, ''))}")
        if self._files:
            out += ["", "[files]", *(f"{_toml(name)} = {_toml(digest)}" for name, digest in self._files.items())]
        return "\n".join(out) + "\n"

    def _sections(self) -> Iterator[tuple[str, list[CardQuestion]]]:
        for section in dict.fromkeys(q.section for q in CARD_QUESTIONS):
            yield section, [q for q in CARD_QUESTIONS if q.section == section]

    def to_markdown(self) -> str:
        """Markdown: every question, its answer or that there is none, and the digest."""
        from .report import _md

        check = self.check()
        out = [f"# {_md(f'{self.name} {self.version}'.strip())}", ""]
        if check.missing:
            out += [f"**Unanswered ({len(check.missing)} of {len(_KEYS)}): {_md(', '.join(check.missing))}**", ""]
        for section, questions in self._sections():
            out += [f"## {_md(section)}", ""]
            for q in questions:
                answer = self._answers.get(q.key, "")
                shown = "\n\n".join(_md(p) for p in answer.split("\n\n")) if answer else "*Not answered.*"
                out += [f"*{_md(q.text)}*", "", shown, ""]
        if self._files:
            out += ["## Files", "", "| file | SHA-256 |", "|---|---|"]
            out += [f"| {_md(name)} | {digest} |" for name, digest in self._files.items()] + [""]
        out.append(f"abjure {__version__}, card {self.digest}")
        return "\n".join(out) + "\n"

    def _body(self) -> str:
        parts = []
        if missing := self.check().missing:
            parts.append(f"<p><b>Unanswered: {html.escape(', '.join(missing))}</b></p>")
        for section, questions in self._sections():
            parts.append(f"<h3>{html.escape(section)}</h3><dl>")
            for q in questions:
                answer = self._answers.get(q.key, "")
                shown = html.escape(answer).replace("\n", "<br>") if answer else "<i>Not answered.</i>"
                parts.append(f"<dt>{html.escape(q.text)}</dt><dd>{shown}</dd>")
            parts.append("</dl>")
        rows = "".join(f"<tr><td>{html.escape(n)}</td><td>{d}</td></tr>" for n, d in self._files.items())
        parts.append(f"<table><tr><th>file</th><th>SHA-256</th></tr>{rows}</table>" if rows else "")
        return "\n".join(parts)

    def to_html(self) -> str:
        """One page that needs nothing else."""
        title = html.escape(f"{self.name} {self.version}".strip())
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta name="viewport" content="width=device-width,initial-scale=1"><title>{title}</title>'
            "<style>body{font:16px/1.5 system-ui,sans-serif;max-width:45rem;margin:2rem auto;padding:0 1rem}"
            "dt{color:#5a6475;margin-top:.8rem}td,th{text-align:left;padding:2px 12px 2px 0}"
            "footer{color:#5a6475;font-size:13.5px}</style></head><body>\n"
            f"<h1>{title}</h1>\n{self._body()}\n"
            f"<footer>abjure {__version__}, card {self.digest}</footer></body></html>\n"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes TOML, JSON, Markdown or HTML, by the ending; all of the file or nothing.

        Raises:
            ArgumentError: another ending, or a path that cannot be written.
        """
        writers = {".toml": self.to_toml, ".json": self.to_json, ".md": self.to_markdown, ".html": self.to_html}
        ending = Path(path).suffix.lower()
        if ending not in writers:
            raise ArgumentError(f"path: expected one of {', '.join(writers)}, got {os.fspath(path)!r}")
        write_atomically(path, writers[ending]().encode("utf-8"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DatasetCard:
        """Reads TOML or JSON.

        Raises:
            ArgumentError: a file that cannot be read, is neither, or holds what no card has. DTypeError: an answer that
                is no text.
        """
        ending = Path(path).suffix.lower()
        if ending not in (".toml", ".json"):
            raise ArgumentError(f"path: expected .toml or .json, got {os.fspath(path)!r}")
        try:
            text = Path(path).read_bytes().decode("utf-8-sig")
            found = tomllib.loads(text) if ending == ".toml" else json.loads(text)
        except (OSError, ValueError, RecursionError) as err:
            raise ArgumentError(f"path: expected a readable card, got {os.fspath(path)!r} ({err})") from err
        return cls.from_dict(found)

    @classmethod
    def from_dict(cls, state: Any) -> DatasetCard:
        """What :meth:`to_dict` gave.

        Raises:
            ArgumentError: an entry that no card has, another format, or as the constructor.
        """
        if not isinstance(state, Mapping):
            raise ArgumentError(f"card: expected a mapping, got {type(state).__name__}")
        unknown = sorted(set(map(str, state)) - {"format", "name", "version", "answers", "files"})
        if unknown:
            raise ArgumentError(f"card: expected format, name, version, answers and files, got {unknown[0]!r}")
        if state.get("format", _FORMAT) != _FORMAT:
            raise ArgumentError(f"card: expected format {_FORMAT!r}, got {state['format']!r}")
        for key in ("answers", "files"):
            if not isinstance(state.get(key, {}), Mapping):
                raise ArgumentError(f"card: {key}: expected a table, got {type(state[key]).__name__}")
        return cls(state.get("name", ""), state.get("version", ""), state.get("answers"), state.get("files"))

    @classmethod
    def template(cls, name: str, version: str = "") -> str:
        """A card without answers as TOML, each question above its place.

        Raises:
            ArgumentError: an empty name.
        """
        return cls(name, version).to_toml()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DatasetCard) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        check = self.check()
        named = f"{self.name} {self.version}".strip()
        rest = f", unanswered: {', '.join(check.missing)}" if check.missing else ""
        return f"DatasetCard({named!r}, {len(check.answered)} answered, {len(check.declined)} declined{rest})"

    def _repr_html_(self) -> str:
        return f"<h2>{html.escape(f'{self.name} {self.version}'.strip())}</h2>{self._body()}"


def _sha256(path: str | os.PathLike[str]) -> str:
    found = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    except OSError as err:
        raise ArgumentError(f"path: expected a readable file, got {os.fspath(path)!r} ({err.strerror})") from err
    return found.hexdigest()


def _toml(text: str) -> str:
    """A TOML basic string, over several lines where the text has them."""
    escaped = ""
    for c in text:
        if c in '\\"':
            escaped += "\\" + c
        elif c == "\n" or (ord(c) >= 32 and ord(c) != 127):
            escaped += c
        else:
            escaped += {"\t": "\\t", "\r": "\\r", "\b": "\\b", "\f": "\\f"}.get(c, f"\\u{ord(c):04X}")
    return f'"""\n{escaped}"""' if "\n" in escaped else f'"{escaped}"'
