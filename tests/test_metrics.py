"""Every figure of a test against scikit-learn, a slow loop or a number by hand."""

import math
import warnings

import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn import metrics as sk

from engine.evaluate import Predictions, chosen_logits, class_means, validation_row
from engine.metrics import (
    accuracy_under_prior,
    bootstrap_intervals,
    brier_score,
    calibration_bins,
    calibration_by_group,
    class_mean_logits,
    confusion_matrix,
    expected_calibration_error,
    group_means,
    mean_of_heads,
    negative_log_likelihood,
    per_class,
    shot_groups,
    summary,
    top_k_accuracy,
)
from scripts import check_intervals

COUNTS = [500, 101, 100, 60, 20, 19, 3]  # many 2, medium 3, few 2
TESTED = [0, 1, 2, 3, 4, 5, 6]
EXACT = {"rel": 0, "abs": 1e-12}


def random_test(classes=TESTED, size=300, seed=0):
    """Logits [size, 7] that are right about half of the time, and targets among ``classes``."""
    random = np.random.default_rng(seed)
    targets = random.choice(classes, size)
    logits = 2 * random.standard_normal((size, len(COUNTS)))
    logits[np.arange(size), targets] += 2
    return logits, targets


def all_metrics(classes=TESTED, seed=0):
    logits, targets = random_test(classes, seed=seed)
    return logits, targets, summary(logits, targets, COUNTS, shot_groups(COUNTS))


# --- the same as scikit-learn


@pytest.mark.parametrize("seed", range(3))
def test_accuracies_losses_and_f1_are_scikit_learns(seed):
    logits, targets, result = all_metrics(seed=seed)
    predicted = logits.argmax(axis=1)
    assert result["top1"] == pytest.approx(sk.accuracy_score(targets, predicted), **EXACT)
    assert result["top5"] == pytest.approx(sk.top_k_accuracy_score(targets, logits, k=5), **EXACT)
    assert result["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(targets, predicted), **EXACT)
    assert result["macro_f1"] == pytest.approx(sk.f1_score(targets, predicted, average="macro"), **EXACT)
    assert result["nll"] == pytest.approx(sk.log_loss(targets, softmax(logits, axis=1), labels=TESTED), **EXACT)


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_top_k_is_scikit_learns(k):
    logits, targets = random_test()
    assert top_k_accuracy(logits, targets, k) == pytest.approx(sk.top_k_accuracy_score(targets, logits, k=k), **EXACT)


def test_top_k_of_fewer_classes_than_k_is_all_of_them():
    logits, targets = random_test()
    assert top_k_accuracy(logits[:, :3], targets % 3, 5) == 1


def test_the_confusion_matrix_is_scikit_learns():
    logits, targets = random_test([0, 2, 5])
    ours = confusion_matrix(targets, logits.argmax(axis=1), len(COUNTS))
    np.testing.assert_array_equal(ours, sk.confusion_matrix(targets, logits.argmax(axis=1), labels=TESTED))


@pytest.mark.parametrize("tested", [TESTED, [1, 3, 4]])
def test_recall_precision_and_f1_of_every_class_are_scikit_learns(tested):
    logits, targets = random_test(tested)
    predicted = logits.argmax(axis=1)
    recall, precision, f1 = per_class(confusion_matrix(targets, predicted, len(COUNTS)))
    theirs = sk.precision_recall_fscore_support(targets, predicted, labels=TESTED, zero_division=0)
    np.testing.assert_allclose(precision, theirs[0], rtol=0, atol=1e-12)
    np.testing.assert_allclose(recall[tested], theirs[1][tested], rtol=0, atol=1e-12)
    np.testing.assert_allclose(f1[tested], theirs[2][tested], rtol=0, atol=1e-12)


# --- the same as a loop


def test_the_brier_score_is_a_loops():
    logits, targets, result = all_metrics()
    total = 0.0
    for row, target in zip(softmax(logits, axis=1), targets, strict=True):
        total += sum((p - (label == target)) ** 2 for label, p in enumerate(row))
    assert result["brier"] == pytest.approx(total / len(targets), **EXACT)


def test_the_brier_score_of_certainty_is_0_when_right_and_2_when_wrong():
    certain = np.array([[1.0, 0.0, 0.0]])
    assert brier_score(certain, np.array([0])) == 0
    assert brier_score(certain, np.array([2])) == 2


def slow_calibration_error(confidence, correct, bins=15):
    error = 0.0
    for index in range(bins):
        inside = [
            row
            for row, value in enumerate(confidence)
            if math.floor(value * bins) == index or (index == bins - 1 and value == 1)
        ]
        if inside:
            mean_confidence = sum(confidence[row] for row in inside) / len(inside)
            accuracy = sum(bool(correct[row]) for row in inside) / len(inside)
            error += len(inside) / len(confidence) * abs(accuracy - mean_confidence)
    return error


def test_the_calibration_error_is_a_loops():
    logits, targets, result = all_metrics()
    confidence, correct = softmax(logits, axis=1).max(axis=1), logits.argmax(axis=1) == targets
    assert result["ece"] == pytest.approx(slow_calibration_error(confidence, correct), **EXACT)


def test_the_calibration_error_counts_full_confidence_in_the_last_bin():
    confidence, correct = np.array([1.0, 1.0, 0.95, 0.3]), np.array([True, False, True, False])
    error = expected_calibration_error(confidence, correct)
    assert error == pytest.approx((abs(2 - 2.95) + 0.3) / 4, **EXACT)
    assert error == pytest.approx(slow_calibration_error(confidence, correct), **EXACT)


def test_calibration_bins_hold_nan_where_they_are_empty():
    rows, mean_confidence, accuracy = calibration_bins(np.array([0.1, 0.6, 0.9, 1.0]), np.array([1, 0, 1, 1]), bins=4)
    assert rows.tolist() == [1, 0, 1, 2]
    np.testing.assert_allclose(mean_confidence, [0.1, math.nan, 0.6, 0.95])
    np.testing.assert_array_equal(accuracy, [1, math.nan, 0, 1])


def test_the_calibration_error_of_a_group_is_that_of_its_rows_alone():
    logits, targets = random_test()
    confidence, correct = softmax(logits, axis=1).max(axis=1), logits.argmax(axis=1) == targets
    errors = calibration_by_group(logits, targets, shot_groups(COUNTS))
    assert list(errors) == ["many", "medium", "few"]
    for name, classes in (("many", {0, 1}), ("medium", {2, 3, 4}), ("few", {5, 6})):
        rows = [row for row, guess in enumerate(logits.argmax(axis=1)) if guess in classes]
        expected = slow_calibration_error([confidence[row] for row in rows], [correct[row] for row in rows])
        assert errors[name] == pytest.approx(expected, **EXACT)


def test_a_group_without_rows_has_no_calibration_error():
    logits, targets = random_test()
    logits[:, [5, 6]] = -100  # never predicted
    assert list(calibration_by_group(logits, targets, shot_groups(COUNTS))) == ["many", "medium"]


def test_a_calibrated_model_is_calibrated_in_every_group():
    """It knows nothing but the frequencies, 9 to 1: by the true class it would be 0.1 and 0.9 off."""
    targets = np.array([0] * 9 + [1])
    logits = np.log([[0.9, 0.1]] * 10)
    errors = calibration_by_group(logits, targets, {"many": np.array([True, False]), "few": np.array([False, True])})
    assert errors == {"many": pytest.approx(0, abs=1e-12)}


def test_the_accuracy_under_a_prior_is_that_of_a_test_drawn_from_it():
    """Every row counts as often as its class shall be there: scikit-learn's accuracy with such weights."""
    logits, targets = random_test([0, 2, 5])
    prior = np.array([0.5, 0.1, 0.2, 0, 0.1, 0.1, 0])
    weights = prior[targets] / np.bincount(targets, minlength=7)[targets]
    expected = sk.accuracy_score(targets, logits.argmax(axis=1), sample_weight=weights)
    assert accuracy_under_prior(logits, targets, prior) == pytest.approx(expected, **EXACT)


def test_certain_logits_have_a_calibration_error_of_one_minus_accuracy():
    logits, targets = 1e6 * np.eye(4), np.array([0, 1, 2, 0])
    assert summary(logits, targets, [9] * 4, {})["ece"] == pytest.approx(0.25, **EXACT)


def test_g_mean_and_worst_class_are_loops():
    logits, targets, result = all_metrics()
    recalls = [np.mean(logits[targets == label].argmax(axis=1) == label) for label in TESTED]
    product = 1.0
    for recall in recalls:
        product *= recall
    assert result["g_mean"] == pytest.approx(product ** (1 / len(recalls)), **EXACT)
    assert result["worst_class"] == min(recalls)


def test_a_class_that_is_never_right_makes_the_g_mean_0():
    result = summary(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([0, 1]), [5, 5], {})
    assert result["g_mean"] == 0


def test_the_g_mean_of_a_thousand_classes_does_not_underflow():
    """Each recall is 1/3: their product is 1e-477."""
    targets = np.repeat(np.arange(1000), 3)
    guesses = np.where(np.arange(3000) % 3 == 0, targets, (targets + 1) % 1000)
    assert summary(np.eye(1000)[guesses], targets, [3] * 1000, {})["g_mean"] == pytest.approx(1 / 3)


def test_the_loss_of_a_certain_mistake_is_finite():
    assert negative_log_likelihood(np.array([[1e4, 0.0]]), np.array([1]))[0] == pytest.approx(1e4)


# --- groups, and classes that nobody tests


def test_groups_have_their_published_edges():
    groups = shot_groups([101, 100, 20, 19])
    assert groups["many"].tolist() == [True, False, False, False]
    assert groups["medium"].tolist() == [False, True, True, False]
    assert groups["few"].tolist() == [False, False, False, True]


def test_group_edges_can_be_moved():
    groups = shot_groups([101, 100, 20, 19], many=50, few=101)
    assert groups["many"].tolist() == [True, True, False, False]
    assert groups["few"].tolist() == [False, True, True, True]


def test_group_means_are_loops_over_the_classes():
    logits, targets, result = all_metrics()
    recalls = [np.mean(logits[targets == label].argmax(axis=1) == label) for label in TESTED]
    assert result["many"] == pytest.approx(np.mean(recalls[:2]), **EXACT)
    assert result["medium"] == pytest.approx(np.mean(recalls[2:5]), **EXACT)
    assert result["few"] == pytest.approx(np.mean(recalls[5:]), **EXACT)


def test_a_group_without_tested_classes_is_absent():
    groups = {"many": np.array([True, False, False]), "few": np.array([False, True, False]), "none": np.zeros(3, bool)}
    assert group_means(np.array([0.5, np.nan, 0.25]), groups) == {"many": 0.5}


def test_classes_without_test_images_leave_every_mean():
    """Class 6 is predicted but never tested: it is in no mean, and its group, few, is left with class 5."""
    tested = [0, 1, 3, 5]
    logits, targets, result = all_metrics(tested)
    predicted = logits.argmax(axis=1)
    recalls = {label: np.mean(predicted[targets == label] == label) for label in tested}
    assert 6 in predicted
    assert result["classes_tested"] == 4
    assert result["balanced_accuracy"] == pytest.approx(np.mean(list(recalls.values())), **EXACT)
    expected_f1 = sk.f1_score(targets, predicted, labels=tested, average="macro")
    assert result["macro_f1"] == pytest.approx(expected_f1, **EXACT)
    assert result["g_mean"] == pytest.approx(np.prod(list(recalls.values())) ** 0.25, **EXACT)
    assert (result["medium"], result["few"]) == (recalls[3], recalls[5])


@pytest.mark.parametrize("tested", [TESTED, [0, 3], [6]])
def test_nothing_is_nan_and_nothing_warns(tested):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits, targets, result = all_metrics(tested)
        intervals = bootstrap_intervals(logits, targets, shot_groups(COUNTS), resamples=20)
    assert all(math.isfinite(value) for value in result.values())
    assert all(math.isfinite(bound) for interval in intervals.values() for bound in interval)


def test_the_keys_are_those_of_the_contract():
    groups = shot_groups(COUNTS) | {"head": np.arange(7) < 1, "tail": np.arange(7) >= 1}
    logits, targets = random_test()
    scalars = "n classes_tested top1 top5 balanced_accuracy macro_f1 g_mean worst_class many medium few head tail"
    assert list(summary(logits, targets, COUNTS, groups)) == [*scalars.split(), "nll", "brier", "ece"]
    with_interval = {"top1", "balanced_accuracy", "macro_f1", "many", "medium", "few", "head", "tail", "nll"}
    assert bootstrap_intervals(logits, targets, groups, resamples=2).keys() == with_interval


# --- intervals


def test_intervals_are_the_same_every_time():
    logits, targets = random_test()
    first, second, other = (bootstrap_intervals(logits, targets, {}, resamples=50, seed=seed) for seed in (0, 0, 1))
    assert first == second
    assert first != other


def test_the_interval_of_macro_f1_holds_its_value_where_classes_are_many_and_small():
    random, targets = np.random.default_rng(0), np.repeat(np.arange(300), 3)
    predicted = np.where(random.random(900) < 0.7, targets, random.integers(0, 300, 900))
    low, high = bootstrap_intervals(np.eye(300)[predicted], targets, {}, resamples=100)["macro_f1"]
    assert low < sk.f1_score(targets, predicted, average="macro") < high


def test_intervals_hold_the_value_that_they_belong_to():
    logits, targets, result = all_metrics()
    for name, (low, high) in bootstrap_intervals(logits, targets, shot_groups(COUNTS), resamples=200).items():
        assert low < result[name] < high, name


def test_intervals_of_flawless_predictions_have_no_width():
    targets = np.arange(4).repeat(5)
    intervals = bootstrap_intervals(np.eye(4)[targets], targets, {}, resamples=20)
    assert intervals["top1"] == intervals["balanced_accuracy"] == intervals["macro_f1"] == (1, 1)


def test_rows_are_drawn_within_their_class():
    """Class 0 is always right and class 1 never: however the rows fall, half of them are right."""
    targets = np.array([0, 0, 0, 1, 1, 1])
    assert bootstrap_intervals(np.tile([1.0, 0.0], (6, 1)), targets, {}, resamples=50)["top1"] == (0.5, 0.5)


def test_intervals_agree_with_a_slow_bootstrap():
    logits, targets = random_test(size=120)
    predicted, random = logits.argmax(axis=1), np.random.default_rng(7)
    values = []
    for _ in range(2000):
        recalls = []
        for label in TESTED:
            rows = np.flatnonzero(targets == label)
            recalls.append(np.mean(predicted[random.choice(rows, len(rows))] == label))
        values.append(np.mean(recalls))
    ours = bootstrap_intervals(logits, targets, {})["balanced_accuracy"]
    assert ours == pytest.approx(np.percentile(values, [2.5, 97.5]), abs=0.01)


def test_the_interval_of_macro_f1_is_that_of_a_slow_bootstrap_turned_round():
    """Of 60 classes of 4 images: resampling lowers F1, so that its percentiles as they are would lie too low."""
    random, targets = np.random.default_rng(0), np.arange(60).repeat(4)
    predicted = np.where(random.random(240) < 0.7, targets, random.integers(0, 60, 240))
    measured, values = sk.f1_score(targets, predicted, average=None), []
    for _ in range(400):
        rows = (targets * 4) + random.integers(0, 4, 240)
        drawn = sk.f1_score(targets, predicted[rows], average=None)
        values.append(np.mean(measured + np.sqrt(4 / 3) * (drawn - measured)))
    low, high = np.percentile(values, [2.5, 97.5])
    expected = 2 * measured.mean() - high, 2 * measured.mean() - low
    ours = bootstrap_intervals(np.eye(60)[predicted], targets, {})["macro_f1"]
    assert ours == pytest.approx(expected, abs=0.01)
    assert abs(low - expected[0]) > 0.02


def test_the_spread_of_small_classes_is_that_of_new_rows():
    """Of two rows one is right, in each class: the variance of such a class's mean is 1/2 over 2, where rows that are
    drawn again have half of it."""
    targets = np.arange(300).repeat(2)
    logits = np.eye(300)[targets]
    logits[1::2] = np.roll(logits[1::2], 1, axis=1)
    low, high = bootstrap_intervals(logits, targets, {})["balanced_accuracy"]
    assert (high - low) / 2 == pytest.approx(1.96 * (1 / 4 / 300) ** 0.5, rel=0.1)


@pytest.mark.parametrize(
    "case",
    ["top1, 1,000 images", "balanced accuracy, 10 classes of 100", "balanced accuracy, 60 classes of 5, 0.60"],
)
def test_intervals_cover_the_truth_about_95_times_in_100(case):
    """scripts/check_intervals.py does it with 1,000 simulations of 1,000 resamples."""
    metric, recalls, images, _ = check_intervals.CASES[case]
    assert 0.91 <= check_intervals.coverage(metric, recalls, images, simulations=200, resamples=200) <= 0.99


def test_blocks_of_resamples_are_as_many_as_asked_for():
    """More images than a block holds: one resample at a time, and none left out."""
    targets = np.zeros(60_000, int)
    logits = np.eye(2)[(np.arange(60_000) % 2)]
    low, high = bootstrap_intervals(logits, targets, {}, resamples=40)["top1"]
    assert (low, high) == pytest.approx((0.496, 0.504), abs=0.002)


# --- which head answers


def test_the_mean_of_heads_is_the_mean_of_their_softmax():
    a, b = random_test(seed=1)[0], 30 * random_test(seed=2)[0]
    expected = np.log((softmax(a, axis=1) + softmax(b, axis=1)) / 2)
    np.testing.assert_allclose(mean_of_heads([a, b]), expected, rtol=1e-9)


def test_the_mean_of_one_head_is_that_head():
    logits, _ = random_test()
    np.testing.assert_allclose(mean_of_heads([logits]), log_softmax(logits, axis=1), atol=1e-12)


def test_class_mean_logits_are_scaled_cosines():
    features, means = np.array([[3.0, 4.0], [0.0, 2.0]]), np.array([[5.0, 0.0], [0.0, 0.1], [-1.0, -1.0]])
    expected = [[18, 24, -30 * 7 / 50**0.5], [0, 30, -30 / 2**0.5]]
    np.testing.assert_allclose(class_mean_logits(features, means, 30.0), expected, atol=1e-12)


def test_a_zero_feature_is_equally_near_to_all_class_means():
    assert not class_mean_logits(np.zeros((1, 2)), np.eye(2), 30.0).any()


def test_class_means_are_loops_over_normalised_features():
    random = np.random.default_rng(0)
    features, targets = random.standard_normal((20, 4)), np.array([0, 1, 2, 2] * 5)
    expected = np.zeros((3, 4))
    for label in range(3):
        rows = [row / math.sqrt(sum(x * x for x in row)) for row in features[targets == label]]
        expected[label] = sum(rows) / len(rows)
    np.testing.assert_allclose(class_means(Predictions(features, {}, targets), 3), expected, atol=1e-12)


def test_the_chosen_logits_are_those_of_the_head_asked_for():
    main, arc = random_test(seed=1)[0], random_test(seed=2)[0]
    features, means = np.random.default_rng(3).standard_normal((300, 4)), np.eye(7, 4)
    predictions = Predictions(features, {"main": main, "arc": arc}, np.zeros(300, int))
    assert chosen_logits(predictions, "arc", None, 30.0) is arc
    np.testing.assert_array_equal(chosen_logits(predictions, "mean", None, 30.0), mean_of_heads([main, arc]))
    expected = class_mean_logits(features, means, 16.0)
    np.testing.assert_array_equal(chosen_logits(predictions, "ncm", means, 16.0), expected)


def test_the_validation_row_has_the_keys_of_the_contract():
    logits, targets, result = all_metrics()
    row = validation_row(logits, targets, COUNTS)
    assert row.keys() == {f"val_{key}" for key in ("loss", "accuracy", "balanced_accuracy", "many", "medium", "few")}
    assert (row["val_loss"], row["val_accuracy"], row["val_few"]) == (result["nll"], result["top1"], result["few"])


def test_the_validation_row_has_no_key_for_an_absent_group():
    logits, targets = random_test()
    assert not {"val_medium", "val_few"} & validation_row(logits, targets, [500] * 7).keys()
