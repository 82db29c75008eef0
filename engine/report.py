"""Figures and tables of a test: what a person looks at first."""

import csv
import io
import os
import warnings
from pathlib import Path

import numpy as np
from scipy.special import softmax

from data.folders import ImageFolders
from engine.console import printable
from engine.files import read_json, write_atomically, write_json
from engine.metrics import calibration_bins, confusion_matrix, expected_calibration_error, per_class, unit_rows
from engine.page import Predictions, write_page
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
GROUP_COLOURS = {"many": "#1b6ca8", "medium": "#e0a100", "few": "#c8402f"}
PERCENT = ("top1", "top5", "balanced_accuracy", "macro_f1", "g_mean", "worst_class", "many", "medium", "few")
PERCENT += ("head", "tail", "ece")
FEW_IMAGES = 10  # of a class in a test: the bootstrap sees next to no spread in fewer
MAPPED = 2000  # images in features.png at most


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
    folder.mkdir(parents=True, exist_ok=True)
    earlier = read_json(folder / "metrics.json", default=result)
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
    predictions = Predictions(paths, files, targets, predicted, probabilities.max(axis=1))
    feature_map = None if features is None else folder / "features.png"
    write_page(page, result, predictions, record, groups, read_log(folder.parent), command, feature_map)
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
        if name == "ece" and result.get("ece_groups"):
            groups = ", ".join(f"{group} {100 * e:.2f} %" for group, e in result["ece_groups"].items())
            lines.append(f"{'  predicted as':18s} {groups}")
    lines.append("[ ]: 95 % bootstrap intervals, too narrow where recalls are near 0 or 1; nll in nats")
    if result["fewest_images"] < FEW_IMAGES:
        lines.append(f"the intervals are too narrow: a class has only {result['fewest_images']} of these images")
    if "chosen_on_these_images" in result:
        lines.append("the weights were chosen on these very images: expect less of others")
    if "synthetic" in result:
        images, share, weight = result["synthetic"].values()
        lines.append(f"trained with {images} synthetic images, {share:.1%} of all, of weight {weight:g}")
    if "test_prior" in result:
        lines.append(f"predicted for the class prior {result['test_prior']}: {100 * result['top1_under_prior']:.2f} % ")
        tested = result["prior_tested"]
        part = "" if tested > 0.9999 else f" on the {100 * tested:.1f} % of images whose classes were tested"
        lines[-1] += f"top1 to expect where it holds{part}; the figures above are of the images as they are"
    return "\n".join(lines)


def number_of_classes(number: int) -> str:
    return f"{number} class{'' if number == 1 else 'es'}"


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


def plot_reliability(path: Path, confidence: np.ndarray, correct: np.ndarray) -> None:
    """Accuracy over mean confidence in equally wide bins, and how many images each bin holds."""
    rows, mean_confidence, accuracy = calibration_bins(confidence, correct)
    bins, filled = len(rows), rows > 0
    left = np.arange(bins)[filled] / bins
    rows, mean_confidence, accuracy = rows[filled], mean_confidence[filled], accuracy[filled]
    figure, (axes, size_axes) = _figure(5.2, 6.2, nrows=2, sharex=True, height_ratios=[3, 1])
    bar = {"width": 1 / bins, "align": "edge"}
    gap = {"bottom": accuracy, "facecolor": "none", "edgecolor": "#c8402f", "hatch": "////", "linewidth": 1}
    axes.bar(left, accuracy, color="#9cc3e0", edgecolor="white", label="accuracy", **bar)
    axes.bar(left, mean_confidence - accuracy, label="gap to the mean confidence", **gap, **bar)
    axes.plot([0, 1], [0, 1], color="0.5", linewidth=1, linestyle="--", label="calibrated")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy")
    size_axes.bar(left, rows, color="0.55", edgecolor="white", **bar)
    for edge, number in zip(left, rows, strict=True):
        middle = edge + 0.5 / bins
        size_axes.annotate(f"{number}", (middle, number), (0, 2), textcoords="offset points", ha="center", fontsize=7)
    error = expected_calibration_error(confidence, correct)
    size_axes.set(xlabel=f"confidence; expected calibration error {error:.1%}", ylabel="images")
    size_axes.margins(y=0.2)
    for each in (axes.xaxis, axes.yaxis):
        each.set_major_formatter(lambda value, _: f"{value:.0%}")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    _save(figure, path)


def plot_features(
    path: Path,
    features: np.ndarray,
    targets: np.ndarray,
    predicted: np.ndarray,
    names: list[str],
    class_counts: list[int],
    groups: dict[str, np.ndarray],
) -> None:
    """Map of the images by their features: coloured by class up to 10 classes, else by many, medium and few."""
    shown = evenly_spaced(len(features), MAPPED)
    points, targets, wrong = feature_map(features[shown]), targets[shown], (predicted != targets)[shown]
    if len(names) <= 10:
        order = np.argsort(-np.asarray(class_counts), kind="stable")
        parts = [(names[index], f"C{place}", targets == index) for place, index in enumerate(order)]
    else:
        parts = [(group, GROUP_COLOURS[group], members[targets]) for group, members in groups.items()]
    figure, axes = _figure(7.0, 7.0)
    for label, colour, rows in parts:
        if rows.any():
            axes.scatter(*points[rows & ~wrong].T, s=12, color=colour, linewidths=0)
            axes.scatter(*points[rows & wrong].T, s=18, color=colour, marker="x", linewidths=1)
            axes.scatter([], [], s=30, color=colour, label=label)
    axes.scatter([], [], s=30, color="0.3", marker="x", label="taken for another class")
    axes.set(
        xticks=[],
        yticks=[],
        xlabel=f"{len(points)} of {len(features)} images by the likeness of their features (t-SNE)",
    )
    legend = figure.legend(loc="outside upper center", ncols=4, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)
    _save(figure, path)


def evenly_spaced(number: int, limit: int) -> np.ndarray:
    """``limit`` rows of ``number``, or all: of splits in class order, each class by its share."""
    return np.linspace(0, number - 1, min(number, limit)).round().astype(int)


def feature_map(features: np.ndarray) -> np.ndarray:
    """Rows [N, D] as points [N, 2] that keep neighbours by angle together; the same every time.

    t-SNE (van der Maaten and Hinton, 2008) of the 50 first principal components of the normalised rows. Distances
    between clusters and their sizes mean little.
    """
    from sklearn.decomposition import PCA  # takes seconds to import
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    unit = unit_rows(features)
    if not np.ptp(unit, axis=0).any():  # all alike, or a single row
        return np.zeros((len(unit), 2))
    components = PCA(min(50, *unit.shape), svd_solver="full").fit_transform(unit)
    with threadpool_limits(1):  # sums in another order would end elsewhere
        return TSNE(perplexity=min(30, (len(unit) - 1) / 3), init="pca", random_state=0).fit_transform(components)


def _figure(width: float, height: float, **grid):
    """A figure and its axes, one or as `Figure.subplots` arranges them by ``grid``."""
    from matplotlib.figure import Figure  # imported when something is drawn: it takes half a second

    figure = Figure(figsize=(width, height), layout="compressed")
    axes = figure.subplots(**grid)
    for each in np.atleast_1d(axes):
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # that the font has none for: a box stands there
        write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))
