"""The files of a test, and its figures as text."""

import csv
import io
import os
from pathlib import Path

import numpy as np
from scipy.special import softmax

from data.folders import ImageFolders
from engine.console import number_of_classes, printable
from engine.evaluate import head_in_words
from engine.figures import plot_accuracy_by_class, plot_confusion, plot_features, plot_reliability
from engine.files import read_json, write_atomically, write_json
from engine.metrics import confusion_matrix, per_class
from engine.page import FIGURES, NO_PERCENTAGE, JudgedImages, write_page
from engine.record import read_log, real_class_counts

REPORT_FILES = (
    "metrics.json",
    "per_class.csv",
    "predictions.csv",
    "logits.npz",
    "accuracy_by_class.png",
    "confusion.png",
    "reliability.png",
    "features.png",  # when asked for
    "post_hoc.json",  # when asked for
    "report.html",
)
FEW_IMAGES = 10  # of a class in a test: among fewer there may be no mistake, and then no spread, by chance alone


def write_report(
    folder: Path,
    result: dict,
    logits: np.ndarray,
    folders: ImageFolders,
    record: dict,
    groups: dict[str, np.ndarray],
    command: str,
    features: np.ndarray | None = None,
) -> None:
    """All files of a test into ``folder``, which lies in the run's: `REPORT_FILES`, features.png where ``features``
    [N, D] are given. ``command`` is the one that tests like this."""
    earlier, log = read_json(folder / "metrics.json", default=result), read_log(folder.parent)
    folder.mkdir(parents=True, exist_ok=True)
    if any(earlier.get(key) != result[key] for key in ("split_hash", "weights_hash")):
        for name in ("post_hoc.json", "features.png"):  # which this test may not make
            (folder / name).unlink(missing_ok=True)
    paths, targets = folders.splits[result["split"]]
    targets, classes, counts = np.array(targets), record["classes"], record["class_counts"]
    probabilities, predicted = softmax(logits, axis=1), logits.argmax(axis=1)
    confusion = confusion_matrix(targets, predicted, len(classes))
    files = [os.path.relpath(path, folders.root) for path in paths]
    write_atomically(folder / "logits.npz", lambda file: np.savez_compressed(file, logits=logits, targets=targets))
    write_per_class(
        folder / "per_class.csv", confusion, classes, real_class_counts(record), record.get("synthetic_counts")
    )
    write_predictions(folder / "predictions.csv", files, targets, probabilities, classes)
    names = [printable(name) for name in record["readable_names"]]
    plot_accuracy_by_class(folder / "accuracy_by_class.png", per_class(confusion)[0], names, counts, groups)
    plot_confusion(folder / "confusion.png", confusion, names, counts)
    plot_reliability(folder / "reliability.png", probabilities.max(axis=1), predicted == targets)
    if features is not None:
        plot_features(folder / "features.png", features, targets, predicted, names, counts, groups)
    page = folder / "report.html"
    images = JudgedImages(paths, files, targets, predicted, probabilities.max(axis=1), confusion)
    map_of_features = None if features is None else folder / "features.png"
    write_page(page, result, images, record, groups, log, command, map_of_features)
    write_json(folder / "metrics.json", result)


def table(result: dict) -> str:
    """The metrics as text: percentages with their 95 % interval, NLL in nats."""
    lines = [f"{result['n']} {result['split']} images of {number_of_classes(result['classes_tested'])}"]
    by = head_in_words(result["predict_with"])
    lines.append(f"{result['weights']} weights, of epoch {result['epoch']}; predicted by {by}")
    for name in FIGURES:
        if name in result:
            percent = name not in NO_PERCENTAGE
            value = f"{100 * result[name]:6.2f} %" if percent else f"{result[name]:6.3f}  "
            low, high = result["intervals"].get(name, (None, None))
            factor = 100 if percent else 1
            interval = f"  [{factor * low:.2f}, {factor * high:.2f}]" if low is not None else ""
            number = f"  {number_of_classes(result['counts'][name])}" if name in result["counts"] else ""
            lines.append(f"{name:18s} {value}{interval}{number}")
        if name == "ece" and result.get("ece_groups"):
            groups = ", ".join(f"{group} {100 * e:.2f} %" for group, e in result["ece_groups"].items())
            lines.append(f"{'  predicted as':18s} {groups}")
    lines.append("[ ]: 95 % bootstrap intervals, too narrow where recalls are near 0 or 1; nll in nats")
    if result["fewest_images"] < FEW_IMAGES:
        lines.append(f"the intervals can be too narrow: a class has only {result['fewest_images']} of these images")
    if result["weights"] == "best":
        balanced = f"{100 * result['last']['balanced_accuracy']:.2f} %"
        lines.append(f"the last epoch, {result['last']['epoch']}: balanced_accuracy {balanced}")
    if "chosen_on_these_images" in result:
        lines.append("the weights were chosen on these very images: expect less of others")
    if "synthetic" in result:
        images, share, weight = result["synthetic"].values()
        lines.append(f"trained with {images} synthetic images, {share:.1%} of all, of weight {weight:g}")
    if "logit_adjust" in result:
        lines.append(f"predicted with logits less {result['logit_adjust']:g} times the log of the training prior")
    if "test_prior" in result:
        lines.append(f"predicted for the class prior {result['test_prior']}: {100 * result['top1_under_prior']:.2f} % ")
        tested = result["prior_tested"]
        part = "" if tested > 0.9999 else f" on the {100 * tested:.1f} % of images whose classes were tested"
        lines[-1] += f"top1 to expect where it holds{part}; the figures above are of the images as they are"
    return "\n".join(lines)


def write_csv(path: Path, header: list[str], rows: list[list]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_atomically(path, lambda file: file.write(text.getvalue().encode(errors="surrogateescape")))  # names are bytes


def write_per_class(
    path: Path, confusion: np.ndarray, classes: list[str], real: list[int], synthetic: list[int] | None = None
) -> None:
    """per_class.csv; empty where a class has no image of this split. ``real`` and ``synthetic`` training images."""
    recall, precision, f1 = per_class(confusion)
    wrong = confusion - np.diag(confusion.diagonal())
    rows = []
    for index, name in enumerate(classes):
        confused_with = classes[wrong[index].argmax()] if wrong[index].any() else ""
        numbers = [f"{value:.6f}" for value in (recall[index], precision[index], f1[index])]
        numbers = numbers if confusion[index].any() else ["", "", ""]
        rows.append([name, real[index], confusion[index].sum(), *numbers, confused_with])
    header = ["class", "train_images", "test_images", "recall", "precision", "f1", "most_confused_with"]
    if synthetic:
        header, rows = [*header, "synthetic_images"], [[*row, n] for row, n in zip(rows, synthetic, strict=True)]
    write_csv(path, header, rows)


def write_predictions(
    path: Path, files: list[str], targets: np.ndarray, probabilities: np.ndarray, classes: list[str]
) -> None:
    """predictions.csv: the true class, the predicted one and its probability, file by file."""
    predicted = probabilities.argmax(axis=1)
    write_csv(
        path,
        ["file", "true", "predicted", "confidence"],
        [
            [file, classes[target], classes[guess], f"{row[guess]:.6f}"]
            for file, target, guess, row in zip(files, targets, predicted, probabilities, strict=True)
        ],
    )
