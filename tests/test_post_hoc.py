"""Corrections after training: against Bayes' rule where it is known, plain loops, and a grid by hand."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss

from engine import post_hoc
from engine.metrics import shot_groups
from engine.post_hoc import (
    Answers,
    best_tau,
    best_temperature,
    compare,
    scores_by_tau,
    tau_normalised,
)
from engine.priors import logit_adjusted, reweighted
from models.heads import Linear, NormedLinear

MEANS = np.array([[0.0, 0.0], [2.0, 0.5], [0.5, 2.0]])
COUNTS = [9000, 900, 100]
PRIOR = np.array(COUNTS) / 10_000


def drawn(counts, seed):
    """Points [N, 2] of three Gaussians with covariance 1, and their classes."""
    targets = np.repeat(np.arange(3), counts)
    return MEANS[targets] + np.random.default_rng(seed).standard_normal((len(targets), 2)), targets


def log_densities(points):
    """Up to a constant: what decides where classes are equally frequent."""
    return -0.5 * np.square(points[:, None] - MEANS).sum(axis=2)


@pytest.fixture(scope="module")
def trained():
    """A classifier of the long-tailed points: cross-entropy without correction."""
    return LogisticRegression(C=1e6, max_iter=1000).fit(*drawn(COUNTS, 0))


def labelled(model, counts, seed) -> Answers:
    points, targets = drawn(counts, seed)
    return Answers(model.decision_function(points), targets)


# --- logit adjustment


def test_adjustment_by_the_true_prior_takes_the_prior_out_of_the_posterior():
    points, _ = drawn([50, 50, 50], 1)
    posterior = log_softmax(log_densities(points) + np.log(PRIOR), axis=1)
    expected = log_softmax(log_densities(points), axis=1)
    np.testing.assert_allclose(log_softmax(logit_adjusted(posterior, PRIOR, 1.0), axis=1), expected, atol=1e-12)


def test_adjustment_of_a_trained_classifier_recovers_the_bayes_decision(trained):
    points, targets = drawn([1000, 1000, 1000], 1)
    bayes, plain = log_densities(points).argmax(axis=1), trained.decision_function(points)
    adjusted = logit_adjusted(plain, PRIOR, 1.0).argmax(axis=1)
    assert (adjusted == bayes).mean() > 0.97
    assert (plain.argmax(axis=1) == bayes).mean() < 0.75
    scores = [balanced_accuracy_score(targets, guesses) for guesses in (adjusted, bayes)]
    assert scores[0] == pytest.approx(scores[1], abs=0.005)


def test_the_fitted_tau_is_near_1_and_gains_on_the_test(trained):
    rows = compare(
        labelled(trained, [300] * 3, 2),
        labelled(trained, [1000] * 3, 3),
        COUNTS,
        shot_groups(COUNTS, 500, 200),
        None,
        PRIOR,
    )
    assert rows["logit_adjustment"]["tau"] == pytest.approx(1, abs=0.35)
    points, targets = drawn([1000] * 3, 3)
    bayes = balanced_accuracy_score(targets, log_densities(points).argmax(axis=1))
    assert rows["logit_adjustment"]["balanced_accuracy"] == pytest.approx(bayes, abs=0.02)
    assert rows["plain"]["balanced_accuracy"] < bayes - 0.15


def test_the_documented_example_picks_the_rarest_class():
    """z = (2, 1, -1) and counts (900, 90, 10)."""
    adjusted = logit_adjusted(np.array([[2.0, 1.0, -1.0]]), np.array([0.9, 0.09, 0.01]), 1.0)
    np.testing.assert_allclose(adjusted[0], [2.1053605, 3.4079456, 3.6051702], atol=1e-6)


# --- the search for tau


def test_tau_is_the_smallest_of_the_best_on_the_grid():
    """Class 1 is right from 0.5 on, and class 0 until 1: equal accuracies in between."""
    val = Answers(np.array([[1.0, 0.0], [0.5, 0.0]]), np.array([0, 1]))
    corrected = lambda logits, tau: logits - tau * np.array([1.0, 0.0]) - 1e-9 * np.array([1.0, 0.0])  # noqa: E731
    scores = scores_by_tau(corrected, val)
    assert (best_tau(scores), scores[0.5]) == (0.5, 1.0)


def test_where_no_tau_helps_it_is_0():
    val = Answers(np.eye(3), np.arange(3))
    assert best_tau(scores_by_tau(lambda logits, tau: logits, val)) == 0.0


def test_tau_is_chosen_by_classes_not_by_images():
    """Fifty images of class 0 are lost for the ten of class 1 that are won: half a class for a whole one."""
    logits = np.array([[0.4, 0.0]] * 50 + [[3.0, 0.0]] * 50 + [[0.4, 0.0]] * 10)
    val = Answers(logits, np.repeat([0, 1], [100, 10]))
    scores = scores_by_tau(lambda logits, tau: logits - tau * np.array([1.0, 0.0]), val)
    tau, score = best_tau(scores), max(scores.values())
    assert (tau, score) == (pytest.approx(0.45), 0.75)


# --- tau-normalised classifier


def head_and_features():
    head = Linear(6, 4).double()
    with torch.no_grad():
        head.weight.mul_(torch.tensor([[3.0], [1.0], [0.5], [0.2]]))
    return head, torch.randn(20, 6, dtype=torch.float64)


@pytest.mark.parametrize("tau", [0.0, 0.7, 1.0])
def test_tau_normalised_logits_are_those_of_the_normalised_weights(tau):
    head, features = head_and_features()
    weight = head.weight.detach()
    norms = weight.norm(dim=1)
    expected = features @ (weight / norms[:, None] ** tau).T
    logits = torch.nn.functional.linear(features, weight, head.bias).detach()
    ours = tau_normalised(logits.numpy(), norms.numpy(), head.bias.detach().numpy(), tau)
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-12)


def test_only_a_linear_head_is_tau_normalised():
    head, features = head_and_features()
    val = Answers(features.numpy() @ head.weight.detach().numpy().T, np.arange(20) % 4)
    for asked, there in ((head, True), (NormedLinear(6, 4), False), (None, False)):
        rows = compare(val, val, [40, 30, 20, 10], {}, asked, np.array([0.4, 0.3, 0.2, 0.1]))
        assert ("tau_normalisation" in rows) is there
        assert ("only a Linear head" in post_hoc.table(rows, val)) is not there
        assert ("their NLL and ECE do not compare" in post_hoc.table(rows, val)) is there


def test_a_tau_at_the_end_of_its_range_is_named(trained):
    val = labelled(trained, COUNTS, 5)
    rows = compare(val, val, COUNTS, {}, None, PRIOR)
    assert "end of its range" not in post_hoc.table(rows, val)
    rows["logit_adjustment"]["tau"] = post_hoc.TAUS[-1]
    assert "tau of the logit adjustment is at the end of its range" in post_hoc.table(rows, val)


# --- temperature


def test_the_temperature_is_the_best_of_a_fine_grid(trained):
    val = labelled(trained, [200] * 3, 4)
    temperature, loss = best_temperature(val)
    grid = np.exp(np.linspace(*np.log([0.2, 5]), 201))
    losses = [log_loss(val.targets, np.exp(log_softmax(val.logits / t, axis=1))) for t in grid]
    assert temperature == pytest.approx(grid[np.argmin(losses)], rel=0.01)
    assert loss <= min(losses) + 1e-9


def test_the_temperature_undoes_a_factor(trained):
    val = labelled(trained, COUNTS, 5)
    first, second = (best_temperature(Answers(factor * val.logits, val.targets))[0] for factor in (1, 7))
    assert first == pytest.approx(1, abs=0.05)
    assert second == pytest.approx(7 * first, rel=1e-3)


def test_the_temperature_changes_no_decision(trained):
    val, test = labelled(trained, [200] * 3, 6), labelled(trained, [200] * 3, 7)
    rows = compare(val, test, COUNTS, {}, None, PRIOR)
    assert rows["temperature"]["top1"] == rows["plain"]["top1"]
    assert rows["temperature"]["nll"] < rows["plain"]["nll"]


def test_a_flawless_val_has_no_best_temperature(trained):
    """However small T is, a smaller one is better, until the loss is 0 in floating point."""
    val = Answers(20 * np.eye(3)[[0, 1, 2, 2]], np.array([0, 1, 2, 2]))
    text = post_hoc.table(compare(val, labelled(trained, COUNTS, 5), COUNTS, {}, None, PRIOR), val)
    assert "val has no mistake" in text
    assert "T is at the end" not in text


# --- what is fitted, and on what


def test_the_test_does_not_change_what_is_fitted(trained):
    val, groups = labelled(trained, [50] * 3, 8), {}
    fitted = [
        [(row.get("tau"), row.get("temperature")) for row in compare(val, test, COUNTS, groups, None, PRIOR).values()]
        for test in (labelled(trained, [30] * 3, 9), Answers(np.eye(3), np.array([2, 0, 1])))
    ]
    assert fitted[0] == fitted[1]


def test_the_table_names_every_value_with_its_unit(trained):
    val = labelled(trained, [20, 10, 5], 10)
    text = post_hoc.table(compare(val, val, COUNTS, shot_groups(COUNTS), None, PRIOR), val).splitlines()
    assert text[0].split() == ["fitted", "top1", "balanced", "many", "medium", "nll", "ece"]
    assert [line.split()[0] for line in text[1:4]] == ["plain", "temperature", "logit"]
    assert "35 val images (20 to 5 a class)" in text[4]


# --- a stated prior


def test_reweighted_logits_are_bayes_rule_for_the_stated_prior():
    points, _ = drawn([40, 40, 40], 11)
    stated = np.array([0.2, 0.3, 0.5])
    posterior = np.exp(log_densities(points)) * PRIOR
    expected = posterior / PRIOR * stated
    expected /= expected.sum(axis=1, keepdims=True)
    ours = reweighted(np.log(posterior), PRIOR, stated)
    np.testing.assert_allclose(log_softmax(ours, axis=1), np.log(expected), atol=1e-12)
