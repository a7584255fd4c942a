"""What fresh models learn from protected data: Fashion-MNIST at L∞ 8/255 and 16/255, and digits.

    python examples/protect/evidence.py --data DIR --out evidence-out      # hours on one core; stop and go on at will
    python examples/protect/evidence.py --quick                            # scikit-learn's digits at 64/255, seconds
    python examples/protect/evidence.py --out evidence-out --report        # the tables of what has been run so far

DIR holds Fashion-MNIST's four ``*-ubyte.gz`` files, for example those of Debian's package ``dataset-fashion-mnist``
(``apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb .``, then
``--data usr/share/datasets/fashion-mnist``).

For every kind of protection: the data are made once per budget (uint8 in, uint8 out), then a small residual network, a
CNN, an MLP and gradient-boosted trees are trained afresh on them and judged on clean test images, three seeds each.
``random`` is noise of the same size. Mixes: a share of the rows protected, the others clean, beside the clean part
alone and beside all rows clean. Networks that surrogate methods train (``error_minimizing``, ``adversarial_poison``)
are CNNs; the MLP and the residual network are used by none of them to make the data. Every result is a line of
``OUT/results.jsonl`` as soon as it is known, and is not computed again.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from abjure.protect import bayes_error, maximize_bayes_error, networks, noise
from abjure.protect.noise.result import images
from abjure.protect.survival import jpeg, learn, subtract_class_means

Array = np.ndarray[Any, Any]
Set = tuple[Array, Array]
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
SHARES = (0.2, 0.5, 0.8)
READING_ROWS = 2000


def fashion(folder: Path, rows: int) -> tuple[Set, Set]:
    """The first ``rows`` training images and all test images, uint8."""

    def read(name: str, header: int) -> Array:
        with gzip.open(folder / name) as file:
            return np.frombuffer(file.read(), np.uint8, offset=header)

    sets = []
    for name in ("train", "t10k"):
        y = read(f"{name}-labels-idx1-ubyte.gz", 8)
        sets.append((read(f"{name}-images-idx3-ubyte.gz", 16).reshape(len(y), 28, 28), y.astype(np.int64)))
    return (sets[0][0][:rows], sets[0][1][:rows]), sets[1]


def digits() -> tuple[Set, Set]:
    """1 200 training and 597 test images of 8 × 8 as uint8."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = np.rint(x[order] * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8), y[order]
    return (x[:1200], y[:1200]), (x[1200:], y[1200:])


def boosted_trees(shape: Any, classes: int) -> Any:
    """Gradient-boosted trees, small enough for a table of them."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(max_iter=20, max_leaf_nodes=15, max_bins=32, max_features=0.1)


MODELS: dict[str, Any] = {
    "cnn": networks.cnn,
    "mlp": networks.mlp,
    "resnet": networks.resnet,
    "trees": boosted_trees,
}


def random_signs(x: Array, y: Array, epsilon: float, per: str, seed: int = 0) -> Array:
    """Signs of the size of the budget, per sample or per class."""
    random = np.random.default_rng(seed)
    shape = (int(y.max()) + 1, *x.shape[1:]) if per == "class" else x.shape
    signs = random.choice(np.array([-1, 1], dtype=np.int16), size=shape) * int(255 * epsilon + 1e-9)
    return np.clip(x.astype(np.int16) + (signs[y] if per == "class" else signs), 0, 255).astype(np.uint8)


def kinds(x: Array, y: Array, epsilon: float, small: bool) -> dict[str, Callable[[], Array]]:
    """How every kind of data is made."""
    patch = 2 if small else 4
    rounds = 10 if small else 4
    quiet: dict[str, Any] = {"progress": False}

    def ours(**options: Any) -> Array:
        made = maximize_bayes_error(
            x,
            y,
            epsilon=epsilon,
            certificate_rows=64,
            certificate_subsamples=0,
            certificate_draws=2,
            **options,
            **quiet,
        )
        return np.asarray(made.x)

    def widths(*perplexities: float) -> list[float]:
        from abjure.protect import bandwidth

        points = (x.reshape(len(x), -1)[:4000] / np.float32(255)).astype(np.float32)
        return [bandwidth(points, y[:4000], "perplexity", perplexity=k) for k in perplexities]

    def relative(*factors: float) -> list[float]:
        (wide,) = widths(100)
        return [f * wide for f in factors]

    return {
        "clean": lambda: x,
        "random": lambda: random_signs(x, y, epsilon, "sample"),
        "random per class": lambda: random_signs(x, y, epsilon, "class"),
        "class": ours,
        "class_mean_shift": lambda: noise.class_mean_shift(x, y, epsilon=epsilon).x,
        "linearly_separable": lambda: noise.linearly_separable(x, y, epsilon=epsilon, norm="linf", patch=patch).x,
        "autoregressive": lambda: noise.autoregressive(x, y, epsilon=epsilon, norm="linf", crop=2 if small else 4).x,
        "error_minimizing per class": lambda: (
            noise.error_minimizing(x, y, epsilon=epsilon, per="class", max_rounds=10, **quiet).x
        ),
        "error_minimizing": lambda: noise.error_minimizing(x, y, epsilon=epsilon, max_rounds=rounds, **quiet).x,
        "adversarial_poison": lambda: (
            noise.adversarial_poison(x, y, epsilon=epsilon, steps=20, restarts=1, epochs=5, **quiet).x
        ),
        "class, wide": lambda: ours(bandwidth=relative(1.7)),
        "class, three bandwidths": lambda: ours(bandwidth=relative(0.6, 1.0, 1.7)),
        "sample": lambda: ours(per="sample"),
        "class and sample": lambda: ours(per="both"),
        "one_pixel (L0)": lambda: noise.one_pixel(x, y).x,
        "convolutional (unbounded)": lambda: noise.convolutional(x, y).x,
    }


#: Kinds whose mixes and treatments are run as well.
MIXED = ("class", "class_mean_shift")
#: Other forms of ours, a control, and what takes longest to make.
VARIANTS = (
    "random per class",
    "error_minimizing",
    "class, wide",
    "class, three bandwidths",
    "sample",
    "class and sample",
)
#: Outside the L∞ budget.
UNBOUNDED = ("one_pixel (L0)", "convolutional (unbounded)")


def ssim(a: Array, b: Array) -> float:
    """Mean structural similarity (Wang et al. 2004), windows of 7 × 7, population moments, range 255."""
    from scipy.ndimage import uniform_filter

    def mean(v: Array) -> Array:
        return np.asarray(uniform_filter(v, size=(1, 7, 7), mode="reflect"))

    a, b = a.astype(np.float64), b.astype(np.float64)
    ma, mb = mean(a), mean(b)
    va, vb, cov = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float((((2 * ma * mb + c1) * (2 * cov + c2)) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean())


def describe(clean: Array, published: Array, y: Array) -> dict[str, float]:
    """Budget, visibility and both readings, the latter on the first rows."""
    change = published.astype(np.float64) - clean
    mse = float((change**2).mean())
    rows = slice(0, READING_ROWS)
    a, b = ((v[rows].reshape(len(y[rows]), -1) / 255).astype(np.float32) for v in (clean, published))
    k = min(100.0, len(a) / 12)
    first = bayes_error(a, y[rows])
    wide = bayes_error(a, y[rows], queries=a, bandwidth=("perplexity", k))
    after = bayes_error(b, y[rows], bandwidth=first.bandwidth)
    under = bayes_error(b, y[rows], queries=a, bandwidth=wide.bandwidth)
    return {
        "largest level": float(np.abs(change).max()),
        "psnr": float(10 * np.log10(255**2 / mse)) if mse > 0 else float("inf"),
        "ssim": ssim(clean[rows], published[rows]),
        "published plugin before": first.plugin,
        "published plugin": after.plugin,
        "clean soft before": wide.soft,
        "clean soft": under.soft,
    }


class Results:
    """Lines of JSON, each known by its key."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.found: dict[str, dict[str, Any]] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                try:
                    self._keep(json.loads(line))
                except ValueError:
                    continue  # the end of a run that was cut off

    def _keep(self, line: dict[str, Any]) -> None:
        self.found[json.dumps(line["key"])] = line

    def once(self, key: list[Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The line of ``key``, computed if it is not there yet."""
        if json.dumps(key) not in self.found:
            start = time.perf_counter()
            line = {"key": key, **make(), "seconds": round(time.perf_counter() - start, 2)}
            self._keep(line)
            if self.path is not None:
                with self.path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
        return self.found[json.dumps(key)]

    def accuracy(self, *key: Any) -> float | None:
        line = self.found.get(json.dumps(list(key)))
        return None if line is None else float(line["accuracy"])


class Evidence:
    """One data set: its kinds of data, and the runs in order of importance."""

    def __init__(self, name: str, train: Set, test: Set, results: Results, out: Path | None, epochs: int) -> None:
        self.name, self.results, self.out, self.epochs = name, results, out, epochs
        (self.x, self.y), (test_x, self.test_labels) = train, test
        self.test_x = images(test_x, self.test_labels, (0, 1), "auto").planar()
        self.test_y = torch.from_numpy(self.test_labels)
        self.classes = int(self.y.max()) + 1
        self.made: dict[tuple[str, float], Array] = {}
        #: Models that learn from mixes.
        self.mixers = ("mlp", "cnn")

    def data(self, kind: str, epsilon: float) -> Array:
        """Published images, made once and kept beside the results."""
        if kind == "clean":
            return self.x
        key = kind, epsilon
        if key not in self.made:
            name = "".join(c if c.isalnum() else "_" for c in f"{self.name} {kind} {round(255 * epsilon)}")
            path = None if self.out is None else self.out / f"{name}.npy"
            if path is not None and path.exists():
                self.made[key] = np.load(path)
            else:
                start = time.perf_counter()
                made = kinds(self.x, self.y, epsilon, self.x.shape[1] < 16)[kind]()
                seconds = round(time.perf_counter() - start, 2)
                self.made[key] = made
                if path is not None:
                    np.save(path, made)
                self.results.once(
                    [self.name, round(255 * epsilon), kind, "data"],
                    lambda: {**describe(self.x, made, self.y), "making": seconds},
                )
        return self.made[key]

    def run(self, kind: str, epsilon: float, model: str, seed: int, treatment: str = "none") -> float:
        """Test accuracy, from the results if it is there."""
        level = 0 if kind == "clean" else round(255 * epsilon)

        def make() -> dict[str, Any]:
            x, y, test = self.treated(kind, epsilon, treatment, seed)
            options: dict[str, Any] = {"seed": seed, "epochs": self.epochs, "batch_size": 64}
            if treatment == "adversarial":
                options["adversarial"] = epsilon
            if treatment == "augment":
                options |= {"augment": True, "flip": self.name != "digits"}
            found = learn(MODELS[model], x, y, test, self.test_y, self.classes, **options)
            return {"accuracy": found}

        return float(self.results.once([self.name, level, kind, model, seed, treatment], make)["accuracy"])

    def treated(self, kind: str, epsilon: float, treatment: str, seed: int) -> tuple[Any, Any, Any]:
        """Training images, labels and test images after what the learner does."""
        x = images(self.data(kind, epsilon), self.y, (0, 1), "auto").planar()
        y, test = torch.from_numpy(self.y), self.test_x
        name, _, number = treatment.partition(":")
        if name == "jpeg":
            return jpeg(x, int(number)), y, jpeg(test, int(number))
        if name == "class_mean":
            clean = images(self.x, self.y, (0, 1), "auto").planar()
            rows = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[: 20 * self.classes]
            return subtract_class_means(x, y, clean[rows], y[rows], (0, 1)), y, test
        if name in ("mix", "part"):
            order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
            count = round(float(number) * len(y))
            if name == "part":
                return x[order[count:]], y[order[count:]], test
            clean = images(self.x, self.y, (0, 1), "auto").planar()
            clean[order[:count]] = x[order[:count]]
            return clean, y, test
        return x, y, test

    def plan(self, budgets: list[float], seeds: int, models: list[str], headline: bool) -> Iterator[tuple[Any, ...]]:
        """Arguments of :meth:`run`, the headline first."""
        first, *others = budgets
        every = list(kinds(self.x, self.y, first, True))
        main = [k for k in every if k not in (*VARIANTS, *UNBOUNDED)]
        rest = [k for k in every if k not in main]
        networks_ = [m for m in models if m != "trees"]
        unseen = [m for m in networks_ if m != "cnn"]
        yield from ((k, first, m, s) for s in range(seeds) for k in main for m in unseen)
        yield from ((k, first, m, s) for s in range(seeds) for k in main for m in networks_)
        if headline:
            return
        yield from self.treatments(first, seeds)
        yield from ((k, first, m, 0) for k in rest for m in networks_)
        if "trees" in models:
            yield from ((k, first, "trees", 0) for k in every)
        for epsilon in others:
            yield from ((k, epsilon, m, 0) for k in (*main, *VARIANTS) if k != "clean" for m in networks_)
        # What is left when the machine has time.
        for epsilon in budgets:
            more = [*networks_, *(m for m in models if m == "trees")]
            yield from ((k, epsilon, m, s) for s in range(seeds) for k in every for m in more)

    def treatments(self, epsilon: float, seeds: int) -> Iterator[tuple[Any, ...]]:
        """Mixes, and what breaks the protection."""
        for model in self.mixers:
            for seed in range(seeds):
                for share in SHARES:
                    yield "clean", epsilon, model, seed, f"part:{share}"
                    yield from ((k, epsilon, model, seed, f"mix:{share}") for k in MIXED)
        for treatment in ("jpeg:50", "jpeg:10", "class_mean", "augment", "adversarial"):
            yield from ((k, epsilon, "cnn", 0, treatment) for k in ("clean", *MIXED))


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")


def report(results: Results, name: str) -> str:
    """Markdown tables of what has been run."""
    lines: list[str] = []
    keys = [line["key"] for line in results.found.values() if line["key"][0] == name]
    runs = [k for k in keys if len(k) == 6]
    for level in sorted({k[1] for k in runs} - {0}):
        models = [m for m in MODELS if any(k[1] == level and k[3] == m for k in runs)]
        lines += [f"\n{name}, L∞ {level}/255 (accuracy on clean test images, mean ± standard deviation over seeds)\n"]
        lines += ["| data | " + " | ".join(models) + " | MLP and residual | PSNR | SSIM | published | clean reading |"]
        lines += ["|---" * (len(models) + 6) + "|"]
        order = dict.fromkeys(k[2] for k in runs if k[1] in (0, level) and k[5] == "none")
        for kind in order:
            at = 0 if kind == "clean" else level
            cells, unseen = [], []
            for model in models:
                own = [k for k in runs if k[1] == at and k[2] == kind and k[3] == model and k[5] == "none"]
                values = [float(results.found[json.dumps(k)]["accuracy"]) for k in own]
                cells.append(f"{spread(values)} ({len(values)})" if values else "–")
                unseen += [values] if model in ("mlp", "resnet") and values else []
            both = f"{np.mean([np.mean(v) for v in unseen]):.3f}" if len(unseen) == 2 else "–"
            about = results.found.get(json.dumps([name, level, kind, "data"]), {})
            seen = [f"{about[k]:.{n}f}" if k in about else "–" for k, n in (("psnr", 1), ("ssim", 3))]
            for reading in ("published plugin", "clean soft"):
                here = reading in about
                seen.append(f"{about[reading + ' before']:.3f} → {about[reading]:.3f}" if here else "–")
            lines.append(f"| {kind} | " + " | ".join([*cells, both, *seen]) + " |")
    mixes = [k for k in runs if k[5].startswith("mix:")]
    if mixes:
        lines += [
            f"\n{name}, mixes (mean over seeds; benefit is what the protected part adds to the clean part alone)\n"
        ]
        lines += ["| protected share | model | clean part alone | all clean | data | mix | benefit |", "|---" * 7 + "|"]
        for share, model, kind in sorted({(k[5][4:], k[3], k[2]) for k in mixes}):
            rows = []
            for k in mixes:
                if (k[5][4:], k[3], k[2]) == (share, model, kind):
                    part = results.accuracy(name, 0, "clean", model, k[4], f"part:{share}")
                    whole = results.accuracy(name, 0, "clean", model, k[4], "none")
                    mix = results.accuracy(*k)
                    if None not in (part, whole, mix):
                        rows.append((part, whole, mix))
            if rows:
                part, whole, mix = np.mean(np.array(rows, dtype=np.float64), axis=0)
                cells = [share, model, f"{part:.3f}", f"{whole:.3f}", kind, f"{mix:.3f}"]
                lines.append("| " + " | ".join([*cells, f"{mix - part:+.3f} ({len(rows)})"]) + " |")
    after = [k for k in runs if k[5].partition(":")[0] in ("jpeg", "class_mean", "augment", "adversarial")]
    if after:
        treatments = list(dict.fromkeys(k[5] for k in after))
        lines += [f"\n{name}, what a learner may do (CNN, one seed)\n"]
        lines += ["| data | none | " + " | ".join(treatments) + " |", "|---" * (len(treatments) + 2) + "|"]
        for kind in dict.fromkeys(k[2] for k in after):
            level = next(k[1] for k in after if k[2] == kind)
            values = [results.accuracy(name, level, kind, "cnn", 0, t) for t in ("none", *treatments)]
            lines.append(f"| {kind} | " + " | ".join("–" if v is None else f"{v:.3f}" for v in values) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> Results:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST's *-ubyte.gz files")
    parser.add_argument("--out", type=Path, help="folder for results.jsonl and the data that were made")
    parser.add_argument("--quick", action="store_true", help="digits, three kinds, one seed")
    parser.add_argument("--report", action="store_true", help="print the tables of what is there, run nothing")
    parser.add_argument("--digits", action="store_true", help="digits at 64/255 in place of Fashion-MNIST")
    parser.add_argument("--rows", type=int, default=10_000, help="training images of Fashion-MNIST")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", default="cnn,mlp,resnet,trees")
    parser.add_argument("--headline", action="store_true", help="the smaller budget and the first kinds, nothing else")
    parser.add_argument("--minutes", type=float, help="stop after the run that ends later than this")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * (given.minutes or 1e9)
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
    results = Results(None if given.out is None else given.out / "results.jsonl")
    if given.report:
        for name in ("fashion", "digits"):
            print(report(results, name))
        return results
    if given.quick:
        run = Evidence("digits", *digits(), results, given.out, 25)
        for kind in ("clean", "random", "class", "class_mean_shift"):
            for model in ("mlp", "cnn"):
                run.run(kind, 64 / 255, model, 0)
        print(report(results, "digits"))
        return results
    if given.digits:
        run, budgets = Evidence("digits", *digits(), results, given.out, 25), [64 / 255]
    else:
        folder = given.data or DEBIAN
        if not (folder / "train-images-idx3-ubyte.gz").exists():
            parser.error(f"--data: no Fashion-MNIST in {folder}; see the top of this file for where it comes from")
        run = Evidence("fashion", *fashion(folder, given.rows), results, given.out, given.epochs)
        budgets = [8 / 255, 16 / 255]
    for job in run.plan(budgets, given.seeds, given.models.split(","), given.headline):
        run.run(*job)
        if time.monotonic() > end:
            break
    print(report(results, run.name))
    return results


if __name__ == "__main__":
    main()
