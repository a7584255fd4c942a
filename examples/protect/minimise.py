"""Data minimisation on the breast cancer, wine and digits data of scikit-learn: accuracy against what is given away.

    python examples/protect/minimise.py [--quick]      # minutes on two cores; --quick: one split, fewer settings

Sensitive are columns that adversaries are after: two of the breast cancer features (in quarters), two of wine, and
four pixels of the digits. For every method and setting, averaged over three splits: accuracy of the task, error of the
adversary who sees the release (A1), columns collected, and the smallest group that shares a release.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sklearn.datasets import load_breast_cancer, load_digits, load_wine

from abjure.protect import minimization_front

SETS = {
    "breast cancer": (load_breast_cancer, ["mean texture", "mean symmetry"]),
    "wine": (load_wine, ["malic_acid", "magnesium"]),
    "digits": (load_digits, ["pixel_2_3", "pixel_3_4", "pixel_4_2", "pixel_5_5"]),
}
QUICK = {"tree": [{"alpha": 0.0}, {"alpha": 0.8}], "uniform": [{"buckets": 3}], "feature_selection": [{"keep": 2}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", metavar="DIR", help="write a plot per data set there")
    options = parser.parse_args()
    for name, (load, sensitive) in SETS.items():
        data = load()
        table = {str(n): data.data[:, i] for i, n in enumerate(data.feature_names)}
        if name == "digits" and options.quick:
            continue
        front = minimization_front(
            table,
            data.target,
            sensitive=sensitive,
            grid=QUICK if options.quick else None,
            seeds=(0,) if options.quick else (0, 1, 2),
        )
        print(f"\n{name}\n{front}", flush=True)
        if options.out:
            front.plot().savefig(Path(options.out) / f"{name.replace(' ', '-')}.png", dpi=100)


if __name__ == "__main__":
    main()
