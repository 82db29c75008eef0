"""Metrics as pure functions of logits or predictions (NumPy, float64). Accuracies are fractions.

A class without test images has recall NaN and leaves every mean; a group without such a class is absent.
"""

from collections.abc import Sequence

import numpy as np
from scipy.special import log_softmax, logsumexp, softmax

MANY, FEW = 100, 20  # training images: more than 100 is many, fewer than 20 is few


def confusion_matrix(targets: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts [C, C]: row is the true class, column the predicted one."""
    return np.bincount(targets * num_classes + predicted, minlength=num_classes**2).reshape(num_classes, num_classes)


def per_class(confusion: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Recall, precision and F1 of every class [C]; NaN recall and F1 without test images, precision 0 if never
    predicted."""
    return _per_class(confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0))


def _per_class(
    hits: np.ndarray, actual: np.ndarray, predicted: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    recall = hits / np.where(actual > 0, actual, np.nan)
    precision = hits / np.maximum(predicted, 1)
    f1 = np.where(actual > 0, 2 * hits / np.maximum(actual + predicted, 1), np.nan)
    return recall, precision, f1


def shot_groups(class_counts: Sequence[int], many: int = MANY, few: int = FEW) -> dict[str, np.ndarray]:
    """Bool [C] by name: classes with more than ``many``, up to and fewer than ``few`` training images (Liu et al.,
    OLTR, 2019)."""
    counts = np.asarray(class_counts)
    return {"many": counts > many, "medium": (counts <= many) & (counts >= few), "few": counts < few}


def group_means(class_values: np.ndarray, groups: dict[str, np.ndarray]) -> dict[str, float]:
    """Mean over the classes of each group; a group without tested classes is left out, because a 0 would read as a
    failure."""
    tested = ~np.isnan(class_values)
    return {
        name: float(class_values[tested & group].mean()) for name, group in groups.items() if (tested & group).any()
    }


def top_k_accuracy(logits: np.ndarray, targets: np.ndarray, k: int) -> float:
    """Share of rows whose target is among the ``min(k, C)`` largest logits; among equal logits the lower class wins."""
    own, classes = np.take_along_axis(logits, targets[:, None], axis=1), np.arange(logits.shape[1])
    before = (logits > own) | ((logits == own) & (classes < targets[:, None]))
    return float((before.sum(axis=1) < k).mean())


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """``-log p_y`` of every row [N]."""
    return -np.take_along_axis(log_softmax(logits, axis=1), targets[:, None], axis=1)[:, 0]


def brier_score(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Mean over rows of the squared distance between probabilities and the one-hot target; 0 is best, 2 worst."""
    at_target = np.take_along_axis(probabilities, targets[:, None], axis=1)[:, 0]
    return float((np.square(probabilities).sum(axis=1) - 2 * at_target + 1).mean())


def calibration_bins(
    confidence: np.ndarray, correct: np.ndarray, bins: int = 15
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, mean confidence and accuracy of ``bins`` equally wide bins of confidence [bins]; NaN in empty bins.

    Bin k holds confidences in [k, k + 1) / bins, the last one 1 too.
    """
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    rows = np.bincount(index, minlength=bins)
    size = np.where(rows > 0, rows, np.nan)
    return rows, np.bincount(index, confidence, bins) / size, np.bincount(index, correct, bins) / size


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Mean distance of confidence and accuracy over equally wide bins, weighted by their rows (Guo et al., 2017)."""
    rows, mean_confidence, accuracy = calibration_bins(confidence, correct)
    return float(np.nansum(rows * np.abs(mean_confidence - accuracy)) / len(confidence))


def accuracy_under_prior(logits: np.ndarray, targets: np.ndarray, prior: np.ndarray) -> float:
    """Top-1 accuracy to expect where classes are as frequent as ``prior`` [C] says: the recalls' mean with these
    weights, over the classes that were tested."""
    recall = per_class(confusion_matrix(targets, logits.argmax(axis=1), len(prior)))[0]
    tested = ~np.isnan(recall)
    return float((prior * recall)[tested].sum() / prior[tested].sum())


def calibration_by_group(logits: np.ndarray, targets: np.ndarray, groups: dict[str, np.ndarray]) -> dict[str, float]:
    """Expected calibration error over the rows whose predicted class is in a group; a group without rows is left out.

    By the true class, which no prediction knows, a calibrated model would look underconfident on frequent classes and
    overconfident on rare ones.
    """
    predicted = logits.argmax(axis=1)
    confidence, correct = softmax(logits, axis=1).max(axis=1), predicted == targets
    rows_of = {name: members[predicted] for name, members in groups.items()}
    return {
        name: expected_calibration_error(confidence[rows], correct[rows])
        for name, rows in rows_of.items()
        if rows.any()
    }


def summary(
    logits: np.ndarray, targets: np.ndarray, class_counts: Sequence[int], groups: dict[str, np.ndarray]
) -> dict[str, float]:
    """All scalar metrics of margin-free logits [N, C], by their key in metrics.json."""
    predicted = logits.argmax(axis=1)
    recall, _, f1 = per_class(confusion_matrix(targets, predicted, len(class_counts)))
    log_p = log_softmax(logits, axis=1)
    confidence = np.exp(log_p.max(axis=1))
    tested = recall[~np.isnan(recall)]
    return {
        "n": len(targets),
        "classes_tested": len(tested),
        "top1": float((predicted == targets).mean()),
        "top5": top_k_accuracy(logits, targets, 5),
        "balanced_accuracy": float(tested.mean()),
        "macro_f1": float(np.nanmean(f1)),
        "g_mean": float(np.prod(tested ** (1 / len(tested)))),
        "worst_class": float(tested.min()),
        **group_means(recall, groups),
        "nll": float(negative_log_likelihood(logits, targets).mean()),
        "brier": brier_score(np.exp(log_p), targets),
        "ece": expected_calibration_error(confidence, predicted == targets),
    }


def spread_of_new_rows(drawn: np.ndarray, value: np.ndarray, size: np.ndarray | int) -> np.ndarray:
    """Class means ``drawn`` again with replacement from ``size`` rows whose mean is ``value``, as far from it as means
    of new rows would lie: sqrt(n / (n - 1)) times as far (Rao and Wu, 1988). One row alone shows no spread."""
    return value + np.sqrt(size / np.maximum(np.asarray(size) - 1, 1)) * (drawn - value)


def bootstrap_intervals(
    logits: np.ndarray,
    targets: np.ndarray,
    groups: dict[str, np.ndarray],
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """95 % intervals from rows resampled within their class, see `spread_of_new_rows`: percentiles of metrics that are
    means; of macro F1, which resampling lowers, percentiles of its difference from the value, turned round.

    Too narrow where there is hardly a mistake: of balanced accuracies of 3 classes of 20 images they hold the truth in
    95 % of tests at recalls of 0.7 and 0.95, in 70 % at 0.98, and a flawless test has no width at all. At recalls of
    0.6 they hold it in 94 % with 60 classes of 2 images, those of macro F1 in 93 % (scripts/check_intervals.py).
    """
    num_classes = logits.shape[1]
    by_class = np.argsort(targets, kind="stable")
    guesses, nll = logits.argmax(axis=1)[by_class], negative_log_likelihood(logits, targets)[by_class]
    actual = np.bincount(targets, minlength=num_classes)
    tested = np.flatnonzero(actual)
    images = actual[tested]
    first = np.cumsum(images) - images  # row at which a class begins
    size, start = actual[targets[by_class]], first.repeat(images)  # of the class of each row
    measured = np.add.reduceat([guesses == targets[by_class], nll], first, axis=1) / images  # recall and NLL of classes
    f1_measured = per_class(confusion_matrix(targets, logits.argmax(axis=1), num_classes))[2][tested]
    generator = np.random.default_rng(seed)
    draws: dict[str, list[np.ndarray]] = {}
    present = {name: group[tested] for name, group in groups.items() if actual[group].any()}
    block = max(1, 100_000 // max(len(targets), num_classes))  # resamples at a time, so that they fit into the cache
    for done in range(0, resamples, block):
        number = min(block, resamples - done)
        rows = start + (generator.random((number, len(targets))) * size).astype(np.int64)  # a row of the same class
        guessed = guesses[rows]
        hits = np.zeros((number, num_classes), dtype=np.int64)
        hits[:, tested] = np.add.reduceat(guessed == targets[by_class], first, axis=1, dtype=np.int64)
        cells = guessed + num_classes * np.arange(number)[:, None]
        predicted = np.bincount(cells.ravel(), minlength=number * num_classes).reshape(number, num_classes)
        f1 = spread_of_new_rows(_per_class(hits, actual, predicted)[2][:, tested], f1_measured, images)
        recall = spread_of_new_rows(hits[:, tested] / images, measured[0], images)
        losses = spread_of_new_rows(np.add.reduceat(nll[rows], first, axis=1) / images, measured[1], images)
        values = {
            "top1": recall @ images / len(targets),
            "balanced_accuracy": recall.mean(axis=1),
            "macro_f1": f1.mean(axis=1),
            **{name: recall[:, group].mean(axis=1) for name, group in present.items()},
            "nll": losses @ images / len(targets),
        }
        for name, value in values.items():
            draws.setdefault(name, []).append(value)
    ends = {name: np.percentile(np.concatenate(values), [2.5, 97.5]) for name, values in draws.items()}
    ends["macro_f1"] = 2 * f1_measured.mean() - ends["macro_f1"][::-1]
    return {name: tuple(np.clip(both, 0, None if name == "nll" else 1).tolist()) for name, both in ends.items()}


def class_mean_logits(features: np.ndarray, class_means: np.ndarray, scale: float) -> np.ndarray:
    """Nearest class mean as logits: ``scale`` times the cosines between features [N, D] and class means [C, D]."""
    return scale * unit_rows(features) @ unit_rows(class_means).T


def mean_of_heads(logits: list[np.ndarray]) -> np.ndarray:
    """Logarithm of the mean of the heads' softmax [N, C]; logits of different scales are never averaged."""
    return logsumexp([log_softmax(each, axis=1) for each in logits], axis=0) - np.log(len(logits))


def unit_rows(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
