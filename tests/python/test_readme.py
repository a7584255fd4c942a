"""The code blocks of the README and the guides run as written, in order, in one namespace per page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "docs/forget.md",
    "docs/refuse-directions.md",
    "docs/refuse-decoding.md",
    "docs/protect.md",
    "docs/protect-data.md",
    "docs/measure-benchmarks.md",
    "docs/measure-text.md",
    "docs/checkpoint.md",
    "docs/measure.md",
    "docs/audit.md",
    "docs/audit-parity.md",
    "docs/audit-labels.md",
    "docs/audit-cards.md",
    "docs/audit-constructive.md",
    "docs/audit-unlearning.md",
]


@pytest.mark.parametrize("page", PAGES)
def test_code_blocks_run(page, tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)
    assert blocks, f"{page} has no Python blocks"
    monkeypatch.chdir(tmp_path)
    scope: dict[str, object] = {"__name__": "__readme__"}
    for i, block in enumerate(blocks):
        exec(compile(block, f"{page}:block {i + 1}", "exec"), scope)
