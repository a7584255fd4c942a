"""The audit's examples in their quick form, on a tiny random model: that they run, resume and keep users apart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "audit"


def run(name: str, out: Path) -> str:
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.effect
def test_one_users_texts_are_told_by_nobody_else(tmp_path: Path) -> None:
    page = run("personal", tmp_path)
    users = json.loads((tmp_path / "personal.json").read_text())
    assert len(users) == 3
    for name, found in users.items():
        assert found["non_interference"] is True
        assert len(found["zero_shot"]) == len(found["retrieval"]) == len(found["fine_tuned"]) == 6
        # What a user's own texts do to the losses must show, or nothing was retrieved or learnt.
        assert found["zero_shot"] != found["retrieval"]
        assert found["zero_shot"] != found["fine_tuned"]
        assert f"## {name}" in page
