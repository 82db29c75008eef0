__import__("sys").path.insert(0, str(__import__("pathlib").Path(__file__).resolve().parents[1]))
"""Simulate tests whose true accuracy is known: how often do the 95 % intervals of metrics.json hold it?

    python scripts/check_intervals.py      # 1,000 tests of each kind, about a minute on one core

Exit code 1 when an interval of a test with many images covers in less than 93 % or more than 97 %.
"""

import numpy as np

from engine.console import progress
from engine.errors import Failed, one_line_errors
from engine.flags import Parser, number_in
from engine.metrics import bootstrap_intervals

ALLOWED = (0.93, 0.97)
CASES = {  # name: (metric, true recall of each class, images of each class, whether it must be in `ALLOWED`)
    "top1, 1,000 images": ("top1", [0.7, 0.7], 500, True),
    "balanced accuracy, 10 classes of 100": ("balanced_accuracy", np.linspace(0.95, 0.45, 10), 100, True),
    "macro F1, 10 classes of 100": ("macro_f1", np.linspace(0.95, 0.45, 10), 100, True),
    "macro F1, 200 classes of 5": ("macro_f1", [0.7] * 200, 5, False),
    "macro F1, 60 classes of 2, 0.60": ("macro_f1", [0.6] * 60, 2, False),
    "balanced accuracy, 60 classes of 2, 0.60": ("balanced_accuracy", [0.6] * 60, 2, False),
    "balanced accuracy, 60 classes of 5, 0.60": ("balanced_accuracy", [0.6] * 60, 5, True),
    "balanced accuracy, 3 classes of 20, 0.70": ("balanced_accuracy", [0.7] * 3, 20, False),
    "balanced accuracy, 3 classes of 20, 0.95": ("balanced_accuracy", [0.95] * 3, 20, False),
    "balanced accuracy, 3 classes of 20, 0.98": ("balanced_accuracy", [0.98] * 3, 20, False),
}


def coverage(metric: str, recalls, images: int, simulations: int, resamples: int, seed: int = 0) -> float:
    """Share of simulated tests whose interval holds the truth. What is wrong is any other class."""
    truth = np.mean(macro_f1(np.array(recalls)) if metric == "macro_f1" else recalls)
    random, num_classes, covered = np.random.default_rng(seed), len(recalls), 0
    targets = np.repeat(np.arange(num_classes), images)
    for _ in progress(range(simulations), metric, "test"):
        wrong = (targets + random.integers(1, num_classes, len(targets))) % num_classes
        predicted = np.where(random.random(len(targets)) < np.repeat(recalls, images), targets, wrong)
        low, high = bootstrap_intervals(np.eye(num_classes)[predicted], targets, {}, resamples)[metric]
        covered += low <= truth <= high
    return float(covered / simulations)


def macro_f1(recalls: np.ndarray) -> float:
    """Of classes of one size, in expectation."""
    wrong = (1 - recalls) / (len(recalls) - 1)
    predicted = recalls + wrong.sum() - wrong  # images taken for a class, over those of it
    return float(np.mean(2 * recalls / (1 + predicted)))


def parse_args(argv: list[str] | None = None):
    parser = Parser("How often 95 % intervals hold the truth in simulated tests.")
    count = number_in(1, kind=int)
    parser.add_argument("--simulations", type=count, default=1000, metavar="N", help="tests of each kind")
    parser.add_argument("--resamples", type=count, default=1000, metavar="N", help="of each bootstrap")
    return parser.parse_args(argv)


@one_line_errors
def main(args) -> None:
    outside = []
    for name, (metric, recalls, images, must_hold) in CASES.items():
        share = coverage(metric, recalls, images, args.simulations, args.resamples)
        print(f"{name:42s} {share:6.1%} of {args.simulations} intervals hold the truth", flush=True)
        if must_hold and not ALLOWED[0] <= share <= ALLOWED[1]:
            outside.append(name)
    if outside:
        raise Failed(f"outside of {ALLOWED[0]:.0%} to {ALLOWED[1]:.0%}: {', '.join(outside)}")


if __name__ == "__main__":
    main(parse_args())
