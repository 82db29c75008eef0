"""What a person looks at first: the tables against loops, and figures that are whole for few and for many classes."""

import csv
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from engine.figures import (
    evenly_spaced,
    feature_map,
    plot_accuracy_by_class,
    plot_confusion,
    plot_features,
    plot_reliability,
)
from engine.metrics import confusion_matrix, per_class, shot_groups
from engine.report import table, write_csv, write_per_class, write_predictions

CLASSES = ["common", "odd, with a comma", 'a "quoted" one', "never tested"]
COUNTS = [200, 50, 20, 7]


def read(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def random_test():
    """Targets of the first three classes and predictions of all four, the third class never right."""
    random = np.random.default_rng(0)
    targets = np.repeat([0, 1, 2], [12, 8, 5])
    predicted = np.where(random.random(25) < 0.5, targets, random.integers(0, 4, 25))
    return targets, np.where(targets == 2, 0, predicted)


# --- per_class.csv


def test_per_class_is_a_loop_over_the_predictions(tmp_path):
    targets, predicted = random_test()
    write_per_class(tmp_path / "per_class.csv", confusion_matrix(targets, predicted, 4), CLASSES, COUNTS)
    rows = read(tmp_path / "per_class.csv")
    assert [row["class"] for row in rows] == CLASSES
    for label, row in enumerate(rows[:3]):
        hits = sum(t == label == p for t, p in zip(targets, predicted, strict=True))
        actual, said = sum(targets == label), sum(predicted == label)
        wrong = [p for t, p in zip(targets, predicted, strict=True) if t == label != p]
        assert (int(row["train_images"]), int(row["test_images"])) == (COUNTS[label], actual)
        assert float(row["recall"]) == pytest.approx(hits / actual, abs=1e-6)
        assert float(row["precision"]) == pytest.approx(hits / said if said else 0, abs=1e-6)
        assert float(row["f1"]) == pytest.approx(2 * hits / (actual + said), abs=1e-6)
        assert row["most_confused_with"] == CLASSES[max(range(4), key=wrong.count)]


def test_the_columns_of_per_class_are_those_of_the_contract(tmp_path):
    write_per_class(tmp_path / "per_class.csv", np.eye(4, dtype=int), CLASSES, COUNTS)
    header = (tmp_path / "per_class.csv").read_text().splitlines()[0]
    assert header == "class,train_images,test_images,recall,precision,f1,most_confused_with"


def test_a_class_without_test_images_has_no_recall_and_no_f1(tmp_path):
    targets, predicted = random_test()
    write_per_class(tmp_path / "per_class.csv", confusion_matrix(targets, predicted, 4), CLASSES, COUNTS)
    row = read(tmp_path / "per_class.csv")[3]
    assert (row["test_images"], row["recall"], row["f1"], row["most_confused_with"]) == ("0", "", "", "")


def test_a_flawless_class_is_confused_with_none(tmp_path):
    write_per_class(tmp_path / "per_class.csv", np.diag([3, 2, 1, 1]), CLASSES, COUNTS)
    assert [row["most_confused_with"] for row in read(tmp_path / "per_class.csv")] == [""] * 4


# --- predictions.csv


def test_predictions_are_a_loop_over_the_files(tmp_path):
    random = np.random.default_rng(0)
    probabilities, targets = random.dirichlet(np.ones(4), 9), random.integers(0, 4, 9)
    files = [f"test/{CLASSES[target]}/ünï,{index}.png" for index, target in enumerate(targets)]
    write_predictions(tmp_path / "predictions.csv", files, targets, probabilities, CLASSES)
    rows = read(tmp_path / "predictions.csv")
    assert list(rows[0]) == ["file", "true", "predicted", "confidence"]
    for row, file, target, chances in zip(rows, files, targets, probabilities, strict=True):
        assert (row["file"], row["true"]) == (file, CLASSES[target])
        assert row["predicted"] == CLASSES[list(chances).index(max(chances))]
        assert float(row["confidence"]) == pytest.approx(max(chances), abs=1e-6)


def test_a_table_is_utf_8_with_plain_line_ends(tmp_path):
    write_csv(tmp_path / "a.csv", ["name", "number"], [["größe", 1], ["two\nlines", 2]])
    assert (tmp_path / "a.csv").read_bytes() == 'name,number\ngröße,1\n"two\nlines",2\n'.encode()


# --- the table on the terminal


RESULT = {
    "split": "test",
    "n": 300,
    "classes_tested": 10,
    "weights": "best",
    "epoch": 3,
    "predict_with": "main",
    "last": {"epoch": 7, "balanced_accuracy": 0.8125},
    "top1": 0.8765,
    "few": 0.5,
    "nll": 0.51234,
    "brier": 0.2,
    "intervals": {"top1": (0.85, 0.9), "few": (0.4, 0.6), "nll": (0.45, 0.57)},
    "counts": {"few": 4},
    "fewest_images": 30,
}


def test_the_table_gives_percentages_with_their_intervals_and_nats():
    assert table(RESULT).splitlines() == [
        "300 test images of 10 classes",
        "best weights, of epoch 3; predicted by the main head",
        "top1                87.65 %  [85.00, 90.00]",
        "few                 50.00 %  [40.00, 60.00]  4 classes",
        "nll                 0.512    [0.45, 0.57]",
        "brier               0.200  ",
        "[ ]: 95 % bootstrap intervals, too narrow where recalls are near 0 or 1; nll in nats",
        "the last epoch, 7: balanced_accuracy 81.25 %",
    ]


@pytest.mark.parametrize(
    ("head", "words"), [("ncm", "nearest class mean"), ("mean", "mean of all"), ("arc", "arc head")]
)
def test_the_table_says_which_weights_predict_by_what(head, words):
    text = table(RESULT | {"predict_with": head, "weights": "last"})
    assert f"last weights, of epoch 3; predicted by the {words}" in text
    assert "the last epoch" not in text


def test_the_table_says_where_intervals_mean_little():
    assert table(RESULT | {"fewest_images": 10}) == table(RESULT)
    (line,) = set(table(RESULT | {"fewest_images": 9}).splitlines()) - set(table(RESULT).splitlines())
    assert line == "the intervals can be too narrow: a class has only 9 of these images"


def test_the_table_says_that_weights_were_chosen_on_the_images():
    (line,) = set(table(RESULT | {"chosen_on_these_images": True}).splitlines()) - set(table(RESULT).splitlines())
    assert "chosen on these very images" in line


def test_the_table_leaves_out_what_is_absent():
    assert "many" not in table(RESULT)
    assert "medium" not in table(RESULT)


# --- figures


NAMES = {  # number of classes: names
    3: ["common", "medium", "rare"],
    10: ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    12: ["house finch", "robin", "green mamba", "jellyfish"] * 3,
    100: [f"class {index}" for index in range(100)],
}


def long_tail(num_classes: int) -> list[int]:
    return [max(1, int(500 * 0.01 ** (index / (num_classes - 1)))) for index in range(num_classes)]


def figures(folder: Path, names: list[str], counts: list[int]) -> list[Path]:
    """All figures of random predictions, the last class never tested; any warning is an error."""
    random, num_classes = np.random.default_rng(0), len(names)
    targets = np.arange(num_classes - 1).repeat(5)
    predicted = np.where(random.random(len(targets)) < 0.6, targets, random.integers(0, num_classes, len(targets)))
    confusion = confusion_matrix(targets, predicted, num_classes)
    features = np.eye(num_classes)[targets] + 0.1 * random.standard_normal((len(targets), num_classes))
    paths = [folder / f"{name}.png" for name in ("accuracy_by_class", "confusion", "reliability", "features")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_accuracy_by_class(paths[0], per_class(confusion)[0], names, counts, shot_groups(counts))
        plot_confusion(paths[1], confusion, names, counts)
        plot_reliability(paths[2], random.random(len(targets)), targets == predicted)
        part = slice(None, None, 1 + len(targets) // 60)  # t-SNE of many rows takes seconds
        plot_features(paths[3], features[part], targets[part], predicted[part], names, counts, shot_groups(counts))
    return paths


@pytest.mark.parametrize("num_classes", NAMES)
def test_figures_are_whole_with_nothing_cut_off_at_the_border(tmp_path, num_classes):
    for path in figures(tmp_path, NAMES[num_classes], long_tail(num_classes)):
        with Image.open(path) as image:
            grey = np.asarray(image.convert("L"))
        assert min(grey.shape) >= 480
        assert grey.min() < 50
        for border in (grey[0], grey[-1], grey[:, 0], grey[:, -1]):
            assert border.min() == 255


def colours_in(path: Path) -> set[str]:
    with Image.open(path) as image:
        return {f"#{r:02x}{g:02x}{b:02x}" for _, (r, g, b) in image.convert("RGB").getcolors(2**24)}


@pytest.mark.parametrize(
    ("counts", "present"), [([500, 90, 3], "many medium few"), ([500, 101, 30], "many medium"), ([9, 4, 2], "few")]
)
def test_absent_groups_are_not_drawn(tmp_path, counts, present):
    plot_accuracy_by_class(tmp_path / "a.png", np.array([0.9, 0.6, 0.3]), NAMES[3], counts, shot_groups(counts))
    colours = {"many": "#1b6ca8", "medium": "#e0a100", "few": "#c8402f"}
    drawn = colours_in(tmp_path / "a.png")
    assert {name for name, colour in colours.items() if colour in drawn} == set(present.split())


def test_the_bars_are_as_high_as_the_recalls_from_head_to_tail(tmp_path):
    """Red pixels of the rightmost bar over blue ones of the leftmost, both 1 class wide."""
    counts, recall = [3, 500], np.array([0.25, 0.75])
    plot_accuracy_by_class(tmp_path / "a.png", recall, ["rare", "common"], counts, shot_groups(counts))
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("RGB"))[80:]  # below the legend
    heights = []
    for colour in ((0x1B, 0x6C, 0xA8), (0xC8, 0x40, 0x2F)):
        columns = (pixels == colour).all(axis=2).sum(axis=0)
        heights.append((columns.max(), np.flatnonzero(columns).mean()))
    assert heights[0][0] / heights[1][0] == pytest.approx(3, rel=0.05)
    assert heights[0][1] < heights[1][1]


@pytest.mark.parametrize("names", [["$\\frac$", "a_b", "5$"], ["100%", "{x}", "\\alpha"]])
def test_class_names_are_not_read_as_formulas(tmp_path, names):
    assert all(path.stat().st_size > 1000 for path in figures(tmp_path, names, [9, 4, 2]))


def test_a_group_that_nobody_tested_is_not_drawn(tmp_path):
    counts = [500, 50, 3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recall = np.array([0.5, math.nan, 0.25])
        plot_accuracy_by_class(tmp_path / "a.png", recall, NAMES[3], counts, shot_groups(counts))
    assert {"#1b6ca8", "#e0a100", "#c8402f"} & colours_in(tmp_path / "a.png") == {"#1b6ca8", "#c8402f"}


def test_the_bars_of_the_reliability_diagram_are_as_high_as_the_accuracies(tmp_path):
    """Bins of 1 and 4 images with accuracy 1 and 0.5, confident as they are right: no gap is drawn."""
    plot_reliability(tmp_path / "a.png", np.array([0.5] * 4 + [1.0]), np.array([1, 1, 0, 0, 1]))
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    heights = [
        (pixels == colour).all(axis=2).sum(axis=0)[part].max()
        for part in (slice(300, 400), slice(520, None))
        for colour in ((0x9C, 0xC3, 0xE0), (0x8C, 0x8C, 0x8C))
    ]
    assert heights[0] / heights[2] == pytest.approx(0.5, rel=0.05)
    assert heights[1] / heights[3] == pytest.approx(4, rel=0.1)


def test_the_map_of_features_is_the_same_every_time_and_keeps_neighbours():
    random, targets = np.random.default_rng(0), np.arange(3).repeat(8)
    features = 5 * np.eye(3, 16)[targets] + random.standard_normal((24, 16))
    points = feature_map(features)
    np.testing.assert_array_equal(points, feature_map(features))
    distances = np.linalg.norm(points[:, None] - points[None], axis=2) + 1e9 * np.eye(24)
    assert (targets[distances.argmin(axis=1)] == targets).mean() > 0.9


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_few_features_have_a_map(number):
    assert np.isfinite(feature_map(np.random.default_rng(0).standard_normal((number, 16)))).all()


def test_features_that_are_all_alike_have_a_map():
    assert not feature_map(np.ones((6, 16))).any()


def test_rows_are_taken_evenly_up_to_the_limit():
    assert evenly_spaced(5, 10).tolist() == [0, 1, 2, 3, 4]
    assert evenly_spaced(9, 5).tolist() == [0, 2, 4, 6, 8]


def test_the_table_gives_calibration_by_group_and_what_a_prior_means():
    result = RESULT | {"ece": 0.1, "ece_groups": {"few": 0.25}, "test_prior": "train", "top1_under_prior": 0.9}
    text = table(result | {"prior_tested": 1.0})
    assert "ece                 10.00 %\n  predicted as     few 25.00 %\n" in text
    assert "predicted for the class prior train: 90.00 % top1 to expect where it holds;" in text
    assert "on the 20.0 % of images whose classes were tested;" in table(result | {"prior_tested": 0.2})
