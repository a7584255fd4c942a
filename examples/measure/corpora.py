"""Real texts that a package brings: the Reuters newswire articles of 1987 that come with Weka.

Debian's package ``weka`` holds two tasks, articles on grain or not and on corn or not: 1554 to learn from and 604 to
test on, cut by date (a part of the ModApte split of Reuters-21578). ``apt-get install weka`` puts the files where they
are looked for; to read them without installing anything, ``apt-get download weka`` and ``dpkg-deb -x weka_*.deb DIR``.
"""

from __future__ import annotations

import re
from pathlib import Path

INSTALLED = Path("/usr/share/doc/weka/examples")
_ROW = re.compile(r"'((?:[^'\\]|\\.)*)'\s*,\s*(\d)\s*$")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r"}


def read_arff(path: Path) -> tuple[list[str], list[int]]:
    """Texts and labels of a Weka file with one string and one class of digits."""
    texts, labels = [], []
    for line in path.read_text(encoding="latin-1").splitlines():
        if row := _ROW.match(line):
            texts.append(re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[1]), row[1]))
            labels.append(int(row[2]))
    if not texts:
        raise SystemExit(f"{path}: no rows of a text and a class")
    return texts, labels


def reuters(topic: str, folder: Path = INSTALLED) -> tuple[list[str], list[int], list[str], list[int]]:
    """Articles and labels to learn from, articles and labels to test on."""
    files = [folder / f"Reuters{topic}-{part}.arff" for part in ("train", "test")]
    if missing := [f for f in files if not f.is_file()]:
        raise SystemExit(f"{missing[0]} is not there: apt-get install weka, or --reuters FOLDER")
    (x, y), (held, truth) = (read_arff(f) for f in files)
    return x, y, held, truth
