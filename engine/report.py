"""Figures and tables of a test: what a person looks at first."""

import csv
import io
import os
from pathlib import Path

import numpy as np
from scipy.special import softmax

from data.folders import ImageFolders
from engine.files import write_atomically, write_json
from engine.metrics import confusion_matrix, per_class
from engine.page import Predictions, write_page
from engine.record import read_log

REPORT_FILES = (
    "metrics.json",
    "per_class.csv",
    "predictions.csv",
    "logits.npz",
    "accuracy_by_class.png",
    "confusion.png",
    "report.html",
)
GROUP_COLOURS = {"many": "#1b6ca8", "medium": "#e0a100", "few": "#c8402f"}
PERCENT = ("top1", "top5", "balanced_accuracy", "macro_f1", "g_mean", "worst_class", "many", "medium", "few")
PERCENT += ("head", "tail", "ece")


def write_report(
    folder: Path,
    result: dict,
    logits: np.ndarray,
    folders: ImageFolders,
    record: dict,
    groups: dict[str, np.ndarray],
    command: str,
) -> None:
    """All files of a test into ``folder``, which lies in the run's: `REPORT_FILES`. ``command`` is that of the test."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, targets = folders.splits[result["split"]]
    targets, classes, counts = np.array(targets), record["classes"], record["class_counts"]
    confusion = confusion_matrix(targets, logits.argmax(axis=1), len(classes))
    files = [os.path.relpath(path, folders.root) for path in paths]
    write_atomically(folder / "logits.npz", lambda file: np.savez_compressed(file, logits=logits, targets=targets))
    write_per_class(folder / "per_class.csv", confusion, classes, counts)
    write_predictions(folder / "predictions.csv", files, targets, softmax(logits, axis=1), classes)
    names = record["readable_names"]
    plot_accuracy_by_class(folder / "accuracy_by_class.png", per_class(confusion)[0], names, counts, groups)
    plot_confusion(folder / "confusion.png", confusion, names, counts)
    predictions = Predictions(paths, files, targets, logits.argmax(axis=1), softmax(logits, axis=1).max(axis=1))
    write_page(folder / "report.html", result, predictions, record, groups, read_log(folder.parent), command)
    write_json(folder / "metrics.json", result)


def table(result: dict) -> str:
    """The metrics as text: percentages with their 95 % interval, NLL in nats."""
    lines = [f"{result['n']} {result['split']} images of {result['classes_tested']} classes"]
    for name in (*PERCENT, "nll", "brier"):
        if name in result:
            percent = name in PERCENT
            value = f"{100 * result[name]:6.2f} %" if percent else f"{result[name]:6.3f}  "
            low, high = result["intervals"].get(name, (None, None))
            factor = 100 if percent else 1
            interval = f"  [{factor * low:.2f}, {factor * high:.2f}]" if low is not None else ""
            number = f"  {number_of_classes(result['counts'][name])}" if name in result["counts"] else ""
            lines.append(f"{name:18s} {value}{interval}{number}")
    return "\n".join(lines)


def number_of_classes(number: int) -> str:
    return f"{number} class{'' if number == 1 else 'es'}"


def write_csv(path: Path, header: list[str], rows: list[list]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_atomically(path, lambda file: file.write(text.getvalue().encode(errors="surrogateescape")))  # names are bytes


def write_per_class(path: Path, confusion: np.ndarray, classes: list[str], class_counts: list[int]) -> None:
    """per_class.csv; empty where a class has no image of this split."""
    recall, precision, f1 = per_class(confusion)
    wrong = confusion - np.diag(confusion.diagonal())
    rows = []
    for index, name in enumerate(classes):
        confused_with = classes[wrong[index].argmax()] if wrong[index].any() else ""
        numbers = [f"{value:.6f}" for value in (recall[index], precision[index], f1[index])]
        numbers = numbers if confusion[index].any() else ["", "", ""]
        rows.append([name, class_counts[index], confusion[index].sum(), *numbers, confused_with])
    header = ["class", "train_images", "test_images", "recall", "precision", "f1", "most_confused_with"]
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


def plot_accuracy_by_class(
    path: Path, recall: np.ndarray, names: list[str], class_counts: list[int], groups: dict[str, np.ndarray]
) -> None:
    """Recall of each class over its training images, classes sorted from head to tail."""
    order = np.argsort(-np.asarray(class_counts), kind="stable")
    counts = np.asarray(class_counts)[order]
    figure, axes = _figure(width=max(7.0, min(16.0, 0.25 * len(order) + 4)), height=4.2)
    positions = np.arange(len(order))
    for group, members in groups.items():
        tested = members & ~np.isnan(recall)
        if tested.any():
            label = f"{group}: {number_of_classes(tested.sum())}, mean {recall[tested].mean():.1%}"
            inside = tested[order]
            axes.bar(positions[inside], recall[order][inside], color=GROUP_COLOURS[group], label=label)
    axes.set(ylim=(0, 1), xlim=(-0.7, len(order) - 0.3), ylabel="recall")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if len(order) <= 40:
        labels = [names[index] for index in order]
        tilt = (
            {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
            if len(order) * max(map(len, labels)) > 60
            else {}
        )
        axes.set_xticks(positions, labels, parse_math=False, **tilt)
    else:
        axes.set_xlabel("classes, from most to fewest training images")
    size_axes = axes.twinx()
    size_axes.plot(positions, counts, color="0.25", marker=".", linewidth=1, label="training images")
    size_axes.set(yscale="log", ylabel="training images")
    size_axes.spines["right"].set_visible(True)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    _save(figure, path)


def plot_confusion(path: Path, confusion: np.ndarray, names: list[str], class_counts: list[int]) -> None:
    """Share of each true class that was taken for each class, classes sorted from head to tail."""
    order = np.argsort(-np.asarray(class_counts), kind="stable")
    shares = confusion[order][:, order] / np.maximum(confusion[order].sum(axis=1, keepdims=True), 1)
    side = max(5.0, min(14.0, 0.32 * len(order) + 2.5))
    figure, axes = _figure(width=side + 1, height=side)
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    axes.set(xlabel="predicted class; both from most to fewest training images", ylabel="true class")
    if len(order) <= 40:
        labels = [names[index] for index in order]
        axes.set_xticks(range(len(order)), labels, rotation=90 if max(map(len, labels)) > 2 else 0, parse_math=False)
        axes.set_yticks(range(len(order)), labels, parse_math=False)
    if len(order) <= 15:
        for row, column in np.argwhere(shares >= 0.005):
            colour = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, f"{shares[row, column]:.0%}", ha="center", va="center", fontsize=7, color=colour)
    bar = figure.colorbar(image, fraction=0.046, pad=0.03, label="share of the true class")
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _save(figure, path)


def _figure(width: float, height: float):
    from matplotlib.figure import Figure  # imported when something is drawn: it takes half a second

    figure = Figure(figsize=(width, height), layout="compressed")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure, path: Path) -> None:
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
