"""The evidence of the text classifiers on a few articles in Weka's form, and on digits."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "measure"
HEAD = "@relation 'articles'\n@attribute Text string\n@attribute class-att {0,1}\n\n@data\n\n"


def load(name: str, patch: pytest.MonkeyPatch) -> ModuleType:
    patch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(f"abjure_example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def articles(tmp_path: Path) -> Path:
    """Forty articles to learn from and twenty to test on, of both topics' names."""
    rng = np.random.default_rng(0)
    common = [f"word{i}" for i in range(60)]
    for topic in ("Grain", "Corn"):
        for part, n in (("train", 40), ("test", 20)):
            lines = []
            for i in range(n):
                words = list(rng.choice(common, 30)) + list(
                    rng.choice([f"{'crop' if i % 2 else 'bank'}{j}" for j in range(4)], 5)
                )
                lines.append(f"'{' '.join(words)}\\nIt\\'s over.',{i % 2}")
            (tmp_path / f"Reuters{topic}-{part}.arff").write_text(HEAD + "\n".join(lines) + "\n", encoding="latin-1")
    return tmp_path


def test_articles_are_read(articles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpora = load("corpora", monkeypatch)
    x, y, held, truth = corpora.reuters("Corn", articles)
    assert (len(x), len(held), sum(y), sum(truth)) == (40, 20, 20, 10)
    assert x[0].endswith("\nIt's over.")
    with pytest.raises(SystemExit, match="apt-get install weka"):
        corpora.reuters("Corn", articles / "nowhere")
    (articles / "ReutersCorn-test.arff").write_text(HEAD)
    with pytest.raises(SystemExit, match="no rows"):
        corpora.reuters("Corn", articles)


def test_the_comparison_of_n_grams(articles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("refusal_classifier", monkeypatch)
    assert example.break_even([3.0, 2.0, 1.0, 0.0], [1, 0, 1, 0]) == 0.5
    report = example.articles("Grain", articles)
    assert [r["accuracy"] for r in report["rows"][:2]] == [1.0, 1.0]
    assert report["rows"][0]["low"] < 1.0
    assert any(n.startswith("crop") for n in report["top"]["1"])


def test_the_comparison_of_machines(articles: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("tsetlin", monkeypatch)
    data, names = example.texts("Grain", articles)
    assert data[0].shape == (40, len(names))
    rows = example.compare("articles", data, (20, 5, 3.0, 10), False)
    assert rows[0]["model"] == "abjure"
    assert min(rows[0]["accuracy"]) > 0.8
    x, y, held, truth = example.digits()
    assert x.shape[1] == 320
    assert example.ours((x, y, held, truth), 40, 20, 5.0, 3, 1, True)[1] > 0.8
