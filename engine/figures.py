"""The figures of a test, and what all figures share."""

import io
import warnings
from pathlib import Path

import numpy as np

from engine.console import number_of_classes
from engine.files import write_atomically
from engine.metrics import calibration_bins, expected_calibration_error, unit_rows

GROUP_COLOURS = {"many": "#1b6ca8", "medium": "#e0a100", "few": "#c8402f"}
MAPPED = 2000  # images in features.png at most


def plot_accuracy_by_class(
    path: Path, recall: np.ndarray, names: list[str], class_counts: list[int], groups: dict[str, np.ndarray]
) -> None:
    """Recall of each class over its training images, classes sorted from head to tail."""
    order = np.argsort(-np.asarray(class_counts), kind="stable")
    counts = np.asarray(class_counts)[order]
    figure, axes = new_figure(width=max(7.0, min(16.0, 0.25 * len(order) + 4)), height=4.2)
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
    save_figure(figure, path)


def plot_confusion(path: Path, confusion: np.ndarray, names: list[str], class_counts: list[int]) -> None:
    """Share of each true class that was taken for each class, classes sorted from head to tail."""
    order = np.argsort(-np.asarray(class_counts), kind="stable")
    shares = confusion[order][:, order] / np.maximum(confusion[order].sum(axis=1, keepdims=True), 1)
    side = max(5.0, min(14.0, 0.32 * len(order) + 2.5))
    figure, axes = new_figure(width=side + 1, height=side)
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
    save_figure(figure, path)


def plot_reliability(path: Path, confidence: np.ndarray, correct: np.ndarray) -> None:
    """Accuracy over mean confidence in equally wide bins, and how many images each bin holds."""
    rows, mean_confidence, accuracy = calibration_bins(confidence, correct)
    bins, filled = len(rows), rows > 0
    left = np.arange(bins)[filled] / bins
    rows, mean_confidence, accuracy = rows[filled], mean_confidence[filled], accuracy[filled]
    figure, (axes, size_axes) = new_figure(5.2, 6.2, nrows=2, sharex=True, height_ratios=[3, 1])
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
    save_figure(figure, path)


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
    figure, axes = new_figure(7.0, 7.0)
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
    save_figure(figure, path)


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


def new_figure(width: float, height: float, **grid):
    """A figure and its axes, one or as `Figure.subplots` arranges them by ``grid``."""
    from matplotlib.figure import Figure  # imported when something is drawn: it takes half a second

    figure = Figure(figsize=(width, height), layout="compressed")
    axes = figure.subplots(**grid)
    for each in np.ravel(axes):
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(figure, path: Path) -> None:
    content = png_of(figure)
    write_atomically(path, lambda file: file.write(content))


def png_of(figure) -> bytes:
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # that the font has none for: a box stands there
        figure.savefig(content, format="png", dpi=120)
    return content.getvalue()
