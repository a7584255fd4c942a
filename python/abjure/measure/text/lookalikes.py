"""Disguised text made plain: letters of other scripts that look Latin, compatibility forms, invisible characters."""

from __future__ import annotations

import re
import unicodedata

#: Letters that look like a Latin one in common fonts.
_CYRILLIC = dict(zip("аеорсухіјѕһԁԛԝӏвмнтк", "aeopcyxijshdqwlbmhtk", strict=True))
_CYRILLIC_CAPITALS = dict(zip("АВЕЅІЈКМНОРСТХУԌԚԜҮ", "ABESIJKMHOPCTXYGQWY", strict=True))
_GREEK = dict(zip("αορνικυτΑΒΕΖΗΙΚΜΝΟΡΤΥΧ", "aopvikutABEZHIKMNOPTYX", strict=True))
_TABLE = str.maketrans(_CYRILLIC | _CYRILLIC_CAPITALS | _GREEK)
_LATIN = re.compile("[A-Za-z]")
_OTHER = re.compile("[" + "".join(_CYRILLIC | _CYRILLIC_CAPITALS | _GREEK) + "]")
_WORD = re.compile(r"\w+")
_QUOTES = str.maketrans({"‘": "'", "’": "'", "ʼ": "'", "´": "'", "“": '"', "”": '"'})


def fold(text: str) -> str:
    """``text`` without disguises; what is only ASCII is returned as it is.

    In order: typographic quotes become plain; NFKC (full width, mathematical and circled letters); format characters
    (category Cf: zero-width space and joiners, soft hyphens, direction marks) go; and in words that hold a Latin
    letter, the Cyrillic and Greek letters that look like one are replaced by it. Words wholly in another script stay
    as they are.
    """
    if text.isascii():
        return text
    text = unicodedata.normalize("NFKC", text.translate(_QUOTES))
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    if _OTHER.search(text) is None:
        return text
    return _WORD.sub(lambda m: m[0].translate(_TABLE) if _LATIN.search(m[0]) else m[0], text)
