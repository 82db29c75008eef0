import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses as metric_learning
from sklearn.metrics import log_loss
from sklearn.utils.class_weight import compute_class_weight
from torchvision.ops import sigmoid_focal_loss

from engine.flags import Parser
from losses import (
    CLASSIFICATION_LOSSES,
    CrossEntropyLoss,
    FocalLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    SupConLoss,
    add_loss_flags,
    class_balanced_weights,
    inverse_frequency_weights,
)

COUNTS = [1000, 100, 10]
ANGLES = (0, 30, 90, 180)


def close(value, expected, tolerance=1e-5):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(value).double(), expected, atol=tolerance, rtol=1e-5)


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def scaled_cosines(*rows):
    return 30 * double(*rows)


def loss_and_gradient(loss_fn, rows, *args):
    rows = rows.clone().requires_grad_()
    loss = loss_fn(rows, *args)
    loss.backward()
    return loss.detach(), rows.grad


def default_flags():
    parser = Parser("test")
    add_loss_flags(parser)
    return parser.parse_args([])


def every_loss():
    """name -> a loss of (rows [6, 4], targets [6]); classification losses come with and without class weights."""
    counts, targets = [40, 20, 10, 5], torch.tensor([0, 0, 1, 2, 3, 3])
    for name, (_, build) in CLASSIFICATION_LOSSES.items():
        for weight in (None, inverse_frequency_weights(counts).double()):
            loss_fn = build(default_flags(), counts, weight)
            yield f"{name}{'' if weight is None else '-weighted'}", lambda rows, loss_fn=loss_fn: loss_fn(rows, targets)
    for gamma in (0, 0.5, 5):
        yield f"focal-{gamma}", lambda rows, gamma=gamma: FocalLoss(gamma)(rows, targets)
    yield "supcon", lambda rows: SupConLoss()(rows, targets)
    yield "supcon-views", lambda rows: SupConLoss()(rows.view(3, 2, 4), targets[1:4])
    yield "supcon-anchors", lambda rows: SupConLoss()(rows, targets, num_anchors=3)
    yield "supcon-balanced", lambda rows: SupConLoss()(rows, targets, 5, prototypes=torch.eye(4) - 0.1)


ALL_LOSSES = dict(every_loss())


# Class weights


@pytest.mark.parametrize(
    ("counts", "beta", "expected"),
    [
        (COUNTS, 0.9, (0.848568, 0.848591, 1.302841)),
        (COUNTS, 0.999, (0.042160, 0.280000, 2.677839)),
        (COUNTS, 0.9999, (0.028362, 0.271255, 2.700382)),
        ((5000, 1), 0.9999, (0.000508, 1.999492)),
        (COUNTS, 0, (1, 1, 1)),
    ],
)
def test_class_balanced_weights_are_the_numbers_of_the_hand_cases(counts, beta, expected):
    close(class_balanced_weights(counts, beta), expected)


def test_class_balanced_weights_are_one_over_the_effective_number_of_images():
    weights = class_balanced_weights(COUNTS, 0.999).double() * double(632.304575, 95.207853, 9.955120)
    close(weights / weights[0], (1, 1, 1))


def test_class_balanced_weights_keep_their_digits_when_beta_is_near_one():
    beta, counts = 1 - Fraction(1, 10**6), (3, 3000)
    exact = [(1 - beta) / (1 - beta**n) for n in counts]
    exact = [float(2 * weight / sum(exact)) for weight in exact]
    close(class_balanced_weights(counts, 0.999999), exact, 1e-7)


def test_class_balanced_weights_become_inverse_frequency_weights_as_beta_goes_to_one():
    close(class_balanced_weights(COUNTS, 1 - 1e-9), inverse_frequency_weights(COUNTS))


def test_inverse_frequency_weights_are_the_numbers_of_the_hand_case():
    close(inverse_frequency_weights(COUNTS), (0.027027, 0.270270, 2.702703))


def test_inverse_frequency_weights_point_where_sklearns_balanced_weights_do():
    labels = np.repeat([0, 1, 2], COUNTS)
    theirs = torch.as_tensor(compute_class_weight("balanced", classes=np.array([0, 1, 2]), y=labels))
    close(inverse_frequency_weights(COUNTS), 3 * theirs / theirs.sum(), 1e-6)


@pytest.mark.parametrize("counts", [[5], [7, 7, 7], [1, 900, 12, 50_000], torch.tensor([3, 2])])
def test_both_kinds_of_weights_sum_to_the_number_of_classes(counts):
    close(class_balanced_weights(counts, 0.99).sum(), len(counts))
    close(inverse_frequency_weights(counts).sum(), len(counts))


@pytest.mark.parametrize("weights", [lambda n: class_balanced_weights(n, 0.999), inverse_frequency_weights])
def test_a_rarer_class_never_weighs_less(weights):
    assert (weights([1000, 500, 100, 20, 3, 1]).diff() > 0).all()


@pytest.mark.parametrize("counts", [[3, 0], [5, -1], [2, 0.5]])
@pytest.mark.parametrize("beta", [None, 0, 0.9])
def test_weights_of_a_class_without_images_are_an_error(counts, beta):
    with pytest.raises(ValueError, match="class 1 has"):
        inverse_frequency_weights(counts) if beta is None else class_balanced_weights(counts, beta)


@pytest.mark.parametrize("beta", [1, -0.1, 1.5, float("nan")])
def test_a_beta_outside_its_range_is_an_error(beta):
    with pytest.raises(ValueError, match="beta"):
        class_balanced_weights(COUNTS, beta)


# Cross-entropy, as the flags build it


def cross_entropy(weight=None):
    return CLASSIFICATION_LOSSES["cross_entropy"][1](default_flags(), None, weight)


@pytest.mark.parametrize(
    ("logits", "target", "expected"),
    [((2, 1, -1), 0, 0.349012), ((0.5, 0.2, 0.3), 2, 1.139831), ((1000, 0, 0), 1, 1000)],
)
def test_cross_entropy_of_one_row_is_the_number_of_the_hand_case(logits, target, expected):
    close(cross_entropy()(double(logits), torch.tensor([target])), expected)


def test_weighted_cross_entropy_divides_by_the_weights_of_the_batch():
    logits, targets, weight = double((2, 1, -1), (0.5, 0.2, 0.3)), torch.tensor([0, 2]), double(1, 2, 4)
    close(cross_entropy()(logits, targets), 0.744422)
    close(cross_entropy(weight)(logits, targets), 0.981667)


def test_weighted_cross_entropy_is_sklearns_weighted_log_loss():
    logits, targets, weight = 3 * torch.randn(40, 5).double(), torch.randint(5, (40,)), torch.rand(5).double()
    theirs = log_loss(targets, logits.softmax(1), sample_weight=weight[targets], labels=range(5))
    close(cross_entropy(weight)(logits, targets), theirs, 1e-12)


def test_the_scale_of_the_weights_does_not_matter_to_cross_entropy_but_does_to_focal_loss():
    logits, targets, weight = torch.randn(9, 3), torch.randint(3, (9,)), inverse_frequency_weights(COUNTS)
    close(cross_entropy(7 * weight)(logits, targets), cross_entropy(weight)(logits, targets))
    close(FocalLoss(2, 7 * weight)(logits, targets), 7 * FocalLoss(2, weight)(logits, targets))


@pytest.mark.parametrize("weight", [None, inverse_frequency_weights(COUNTS).double()])
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing_is_torchs(weight, smoothing):
    logits, targets = 3 * torch.randn(9, 3).double(), torch.randint(3, (9,))
    theirs = torch.nn.CrossEntropyLoss(weight, label_smoothing=smoothing)(logits, targets)
    close(CrossEntropyLoss(weight, smoothing)(logits, targets), theirs, 1e-12)


def test_label_smoothing_goes_through_ldam_and_the_logit_adjusted_loss():
    logits, targets = 30 * torch.rand(9, 3).double(), torch.randint(3, (9,))
    shifted = logits - 30 * F.one_hot(targets, 3) * LDAMLoss(COUNTS).margins
    expected = F.cross_entropy(shifted, targets, label_smoothing=0.2)
    close(LDAMLoss(COUNTS, label_smoothing=0.2)(logits, targets), expected)
    adjusted = logits + (torch.tensor(COUNTS).double() / 1110).log()
    expected = F.cross_entropy(adjusted, targets, label_smoothing=0.2)
    close(LogitAdjustedLoss(COUNTS, label_smoothing=0.2)(logits, targets), expected)


# Logit-adjusted loss


@pytest.mark.parametrize(("target", "expected"), [(0, 0.036608), (2, 7.641778)])
def test_the_logit_adjusted_loss_of_one_row_is_the_number_of_the_hand_case(target, expected):
    close(LogitAdjustedLoss(COUNTS)(double((2, 1, -1)), torch.tensor([target])), expected)


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("weight", [None, class_balanced_weights(COUNTS, 0.99).double()])
def test_the_logit_adjusted_loss_is_cross_entropy_with_the_log_prior_added(tau, weight):
    logits, targets, priors = 5 * torch.randn(12, 3).double(), torch.randint(3, (12,)), [n / 1110 for n in COUNTS]
    for j, prior in enumerate(priors):
        assert LogitAdjustedLoss(COUNTS, tau).adjustments[j].item() == pytest.approx(tau * math.log(prior), rel=1e-6)
    adjusted = logits + tau * double(*(math.log(prior) for prior in priors))
    ours = loss_and_gradient(LogitAdjustedLoss(COUNTS, tau, weight), logits, targets)
    theirs = loss_and_gradient(lambda z: F.cross_entropy(z, targets, weight), adjusted)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_the_logit_adjusted_loss_is_cross_entropy_without_tau_or_with_equal_counts():
    logits, targets = torch.randn(9, 3).double(), torch.randint(3, (9,))
    for loss_fn in (LogitAdjustedLoss(COUNTS, 0.0), LogitAdjustedLoss([7, 7, 7])):
        close(loss_fn(logits, targets), F.cross_entropy(logits, targets), 1e-6)


# LDAM


@pytest.mark.parametrize(
    ("max_margin", "expected"), [(0.5, (0.158114, 0.281171, 0.5)), (0.3, (0.094868, 0.168702, 0.3))]
)
def test_ldam_margins_are_the_numbers_of_the_hand_cases(max_margin, expected):
    close(LDAMLoss(COUNTS, max_margin).margins, expected)


@pytest.mark.parametrize(
    ("max_margin", "cosines", "target", "expected"),
    [
        (0.5, (0.6, 0.5, 0.1), 0, 1.904623),
        (0.5, (0.6, 0.5, 0.1), 2, 30.048587),
        (0.3, (0.6, 0.5, 0.1), 0, 0.619135),
        (0.3, (0.6, 0.5, 0.1), 2, 24.048587),
        (0.5, (0.2, 0.2, 0.2), 2, 15.693147),
        (0.3, (0.5, 0.2, -0.1), 0, 0.002123),
    ],
)
def test_ldam_of_one_row_is_the_number_of_the_hand_case(max_margin, cosines, target, expected):
    close(LDAMLoss(COUNTS, max_margin)(scaled_cosines(cosines), torch.tensor([target])), expected)


@pytest.mark.parametrize(
    ("max_margin", "weight", "expected"),
    [
        (0.5, None, 15.976605),
        (0.5, class_balanced_weights(COUNTS, 0.999), 29.612352),
        (0.5, inverse_frequency_weights(COUNTS), 29.769934),
        (0.3, None, 12.333861),
        (0.3, class_balanced_weights(COUNTS, 0.999), 23.685427),
        (0.3, inverse_frequency_weights(COUNTS), 23.816613),
    ],
)
def test_ldam_of_two_rows_is_the_number_of_the_hand_case(max_margin, weight, expected):
    logits = scaled_cosines((0.6, 0.5, 0.1), (0.6, 0.5, 0.1))
    close(LDAMLoss(COUNTS, max_margin, weight)(logits, torch.tensor([0, 2])), expected)


def test_ldam_is_cross_entropy_on_logits_shifted_by_hand():
    logits, targets = scaled_cosines(*torch.rand(8, 3).tolist()), torch.randint(3, (8,))
    weight, shifted = inverse_frequency_weights(COUNTS).double(), logits.clone()
    for row, target in enumerate(targets):
        shifted[row, target] -= 30 * 0.3 * (10 / COUNTS[target]) ** 0.25
    close(LDAMLoss(COUNTS, 0.3, weight)(logits, targets), F.cross_entropy(shifted, targets, weight), 1e-6)


def test_ldam_with_equal_counts_is_additive_margin_softmax():
    features, targets = torch.randn(12, 8).double(), torch.randint(3, (12,))
    theirs = metric_learning.CosFaceLoss(3, 8, margin=0.3, scale=30).double()
    logits = 30 * F.normalize(features) @ F.normalize(theirs.W.detach(), dim=0)
    close(LDAMLoss([50, 50, 50], 0.3)(logits, targets), theirs(features, targets).detach(), 1e-6)


def test_ldam_multiplies_its_margin_by_the_scale_of_every_row():
    logits, scale = torch.randn(3, 3).double(), double([1.0], [5.0], [64.0])
    shifted = logits - scale * torch.diag(LDAMLoss(COUNTS).margins)
    targets = torch.tensor([0, 1, 2])
    close(LDAMLoss(COUNTS)(logits, targets, scale), F.cross_entropy(shifted, targets), 1e-6)
    close(LDAMLoss(COUNTS)(logits[2:], targets[2:], 64), F.cross_entropy(shifted[2:], targets[2:]), 1e-5)


def test_ldam_does_not_change_the_logits_it_is_given():
    logits = torch.randn(2, 3)
    before = logits.clone()
    LDAMLoss(COUNTS)(logits, torch.tensor([0, 2]))
    assert torch.equal(logits, before)


# Focal loss


@pytest.mark.parametrize(
    ("target", "gamma", "expected"),
    [
        (0, 0, 0.349012),
        (0, 0.5, 0.189439),
        (0, 1, 0.102824),
        (0, 2, 0.030294),
        (0, 5, 0.000775),
        (1, 2, 0.739725),
        (2, 2, 3.117915),
    ],
)
def test_focal_loss_of_one_row_is_the_number_of_the_hand_case(target, gamma, expected):
    close(FocalLoss(gamma)(double((2, 1, -1)), torch.tensor([target])), expected)


@pytest.mark.parametrize(
    ("logits", "target", "gamma", "weight", "expected"),
    [
        ((2, 1, -1), 0, 2, (0.25, 1, 1), 0.007573),
        ((2, 1, -1), 1, 1, (1, 2, 1), 1.997897),  # not 2.516344, whose p is exp(-w CE)
        ((0, 1.5), 1, 2, (0.75, 0.25), 0.001676),
        ((0, 1.5), 0, 2, (0.75, 0.25), 0.852954),
    ],
)
def test_weighted_focal_loss_is_the_number_of_the_hand_case(logits, target, gamma, weight, expected):
    close(FocalLoss(gamma, double(*weight))(double(logits), torch.tensor([target])), expected)


def test_focal_loss_averages_after_focusing():
    logits = double((2, 1, -1), (0.5, 0.2, 0.3))
    close(FocalLoss(2)(logits, torch.tensor([0, 2])), 0.278774)  # not 0.205174, the focal loss of the mean


def test_weighted_focal_loss_divides_by_the_rows_of_the_batch():
    logits, targets, weight = torch.randn(7, 3).double(), torch.randint(3, (7,)), double(0.2, 0.8, 2.0)
    total = sum(
        weight[y] * (1 - z.softmax(0)[y]) ** 2 * -z.softmax(0)[y].log() for z, y in zip(logits, targets, strict=True)
    )
    close(FocalLoss(2, weight)(logits, targets), total / 7, 1e-12)


@pytest.mark.parametrize(("target", "expected"), [(0, 0), (1, 50)])
def test_focal_loss_of_a_row_that_is_learnt_or_hopeless_has_a_finite_gradient(target, expected):
    loss, gradient = loss_and_gradient(FocalLoss(2), torch.tensor([[50.0, 0, 0]]), torch.tensor([target]))
    close(loss, expected)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("gap", [20.0, 50.0, 120.0])
@pytest.mark.parametrize("gamma", [0.1, 0.5, 0.9])
def test_focal_loss_with_gamma_below_one_has_a_finite_gradient_where_p_is_one(gamma, gap):
    _, gradient = loss_and_gradient(FocalLoss(gamma), torch.tensor([[gap, 0, 0]]), torch.tensor([0]))
    assert gradient.isfinite().all()


def test_focal_loss_without_gamma_is_cross_entropy_in_value_and_gradient():
    logits, targets = 5 * torch.randn(9, 4), torch.randint(4, (9,))
    ours = loss_and_gradient(FocalLoss(0), logits, targets)
    theirs = loss_and_gradient(F.cross_entropy, logits, targets)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("gamma", [0.5, 1, 2, 5])
def test_focal_loss_of_two_classes_is_torchvisions_sigmoid_focal_loss(gamma):
    logits, targets, alpha = 3 * torch.randn(20, 2).double(), torch.randint(2, (20,)), 0.3
    ours = loss_and_gradient(FocalLoss(gamma, double(1 - alpha, alpha)), logits, targets)
    theirs = loss_and_gradient(
        lambda z: sigmoid_focal_loss(z[:, 1] - z[:, 0], targets.double(), alpha, gamma, "mean"), logits
    )
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


@pytest.mark.parametrize("gamma", [0.5, 1, 2, 5])
def test_focal_loss_of_many_classes_is_torchvisions_of_the_target_against_the_rest(gamma):
    logits, targets = 3 * torch.randn(20, 6).double(), torch.randint(6, (20,))

    def target_against_the_rest(z):
        is_target = F.one_hot(targets, 6).bool()
        rest = z.masked_fill(is_target, -math.inf).logsumexp(1)
        return sigmoid_focal_loss(z[is_target] - rest, torch.ones(20).double(), alpha=-1, gamma=gamma, reduction="mean")

    ours, theirs = (
        loss_and_gradient(FocalLoss(gamma), logits, targets),
        loss_and_gradient(target_against_the_rest, logits),
    )
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


# SupCon


def on_circle(angles, length=1.0):
    radians = torch.deg2rad(torch.tensor(angles, dtype=torch.float64))
    return length * torch.stack([radians.cos(), radians.sin()], dim=1)


def supcon_row_by_row(rows, targets, temperature, num_anchors=None):
    """Eq. 2 of the paper with loops; a list with one loss per anchor that has a positive."""
    rows, losses = F.normalize(rows.double()), []
    for i in range(num_anchors or len(rows)):
        others = [a for a in range(len(rows)) if a != i]
        positives = [p for p in others if targets[p] == targets[i]]
        denominator = sum((rows[i] @ rows[a] / temperature).exp() for a in others)
        terms = [rows[i] @ rows[p] / temperature - denominator.log() for p in positives]
        losses += [-sum(terms) / len(terms)] if terms else []
    return losses


@pytest.mark.parametrize(
    ("labels", "temperature", "expected"),
    [
        ((0, 0, 1, 1), 0.1, 1.259795),
        ((0, 0, 1, 1), 0.07, 1.787447),
        ((0, 0, 1, 2), 0.1, 0.012787),
        ((0, 0, 1, 2), 0.07, 0.002675),
        ((0, 0, 0, 1), 0.1, 2.899738),
        ((0, 0, 0, 0), 0.1, 6.423255),
    ],
)
@pytest.mark.parametrize("length", [1.0, 250.0])
def test_supcon_is_the_number_of_the_hand_case(labels, temperature, expected, length):
    close(SupConLoss(temperature)(on_circle(ANGLES, length), torch.tensor(labels)), expected)


def test_supcon_of_each_anchor_is_the_number_of_the_hand_case():
    rows, targets = on_circle(ANGLES), torch.tensor([0, 0, 1, 1])
    expected = (0.000173, 0.025401, 5.013386, 0.000219)
    for number in (1, 2, 3, 4):  # the mean over the first anchors
        close(SupConLoss(0.1)(rows, targets, num_anchors=number), sum(expected[:number]) / number)


def test_supcon_of_identical_rows_is_the_logarithm_of_the_number_of_keys():
    close(SupConLoss(0.1)(torch.ones(8, 3), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])), math.log(7))


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_supcon_is_that_of_pytorch_metric_learning(temperature):
    rows, targets = torch.randn(24, 5).double(), torch.randint(6, (24,))
    ours = loss_and_gradient(SupConLoss(temperature), rows, targets)
    theirs = loss_and_gradient(metric_learning.SupConLoss(temperature), rows, targets)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


def test_supcon_of_two_views_is_that_of_pytorch_metric_learning_on_all_rows():
    rows, targets = torch.randn(9, 2, 5).double(), torch.randint(4, (9,))
    ours = loss_and_gradient(SupConLoss(), rows, targets)
    theirs = loss_and_gradient(
        lambda z: metric_learning.SupConLoss(0.07)(z.flatten(0, 1), targets.repeat_interleave(2)), rows
    )
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


@pytest.mark.parametrize("num_anchors", [None, 3, 7])
def test_supcon_is_the_mean_of_a_loop_over_anchors(num_anchors):
    rows, targets = torch.randn(10, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2, 0, 3, 3, 4])
    expected = torch.stack(supcon_row_by_row(rows, targets, 0.07, num_anchors)).mean()
    close(SupConLoss()(rows, targets, num_anchors), expected, 1e-9)


def test_supcon_with_first_anchors_still_trains_the_other_rows():
    rows, targets = torch.randn(6, 4), torch.tensor([0, 1, 0, 0, 1, 1])
    _, gradient = loss_and_gradient(lambda z: SupConLoss()(z, targets, num_anchors=2), rows)
    assert (gradient.abs().sum(1) > 0).all()


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_supcon_without_any_positive_is_zero_with_gradient_zero(rows):
    loss, gradient = loss_and_gradient(SupConLoss(), torch.randn(rows, 4), torch.arange(rows))
    assert loss == 0
    assert torch.equal(gradient, torch.zeros(rows, 4))


def test_supcon_of_two_views_of_one_image_is_zero_since_the_only_key_is_the_positive():
    close(SupConLoss()(torch.randn(1, 2, 4), torch.tensor([3])), 0)


def test_a_row_without_positive_is_still_a_key():
    rows = on_circle((0, 30, 15))
    alone, beside = SupConLoss(0.1)(rows[:2], torch.tensor([0, 0])), SupConLoss(0.1)(rows, torch.tensor([0, 0, 1]))
    close(alone, 0)
    assert beside > 0.5


def test_supcon_does_not_change_when_rows_are_multiplied_or_permuted():
    rows, targets, order = torch.randn(8, 3).double(), torch.randint(3, (8,)), torch.randperm(8)
    expected = SupConLoss()(rows, targets)
    close(SupConLoss()((rows * (0.1 + torch.rand(8, 1)))[order], targets[order]), expected, 1e-12)


# SupCon, balanced


def balanced_supcon_row_by_row(rows, targets, prototypes, temperature, num_anchors=None):
    """Eq. 6 and 7 of BCL with loops over anchors, classes and keys."""
    num_rows, num_classes = len(rows), len(prototypes)
    keys = F.normalize(torch.cat([rows, prototypes]))
    labels, losses = targets.tolist() + list(range(num_classes)), []
    for i in range(num_anchors or num_rows):
        denominator = 0
        for j in range(num_classes):
            members = [k for k in range(len(keys)) if labels[k] == j and k != i]
            denominator += sum((keys[i] @ keys[k] / temperature).exp() for k in members) / len(members)
        positives = [p for p in range(len(keys)) if labels[p] == labels[i] and p != i]
        terms = [keys[i] @ keys[p] / temperature - denominator.log() for p in positives]
        losses.append(-sum(terms) / len(terms))
    return torch.stack(losses)


@pytest.mark.parametrize("num_anchors", [None, 4])
@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_balanced_supcon_is_the_mean_of_a_loop_in_value_and_gradients(temperature, num_anchors):
    rows, prototypes = 3 * torch.randn(9, 4).double(), torch.randn(5, 4).double()
    targets = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2, 4])  # a singleton, and a class with a prototype only
    both = []
    for loss_fn in (
        lambda z, c: SupConLoss(temperature)(z, targets, num_anchors, prototypes=c),
        lambda z, c: balanced_supcon_row_by_row(z, targets, c, temperature, num_anchors).mean(),
    ):
        leaves = [rows.clone().requires_grad_(), prototypes.clone().requires_grad_()]
        loss = loss_fn(*leaves)
        both.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(*both, atol=1e-9, rtol=0)


def test_balanced_supcon_of_two_views_is_that_of_all_rows():
    rows, prototypes, targets = torch.randn(6, 2, 4).double(), torch.randn(3, 4).double(), torch.randint(3, (6,))
    flat = torch.cat([rows[:, 0], rows[:, 1]])
    expected = balanced_supcon_row_by_row(flat, targets.repeat(2), prototypes, 0.07).mean()
    close(SupConLoss()(rows, targets, prototypes=prototypes), expected, 1e-9)


def test_balanced_supcon_of_identical_keys_is_the_logarithm_of_the_number_of_classes_however_they_are_filled():
    for targets in ([0, 1, 2], [0, 0, 0, 0, 1], [2]):
        loss = SupConLoss(0.1)(torch.ones(len(targets), 3), torch.tensor(targets), prototypes=torch.ones(3, 3))
        close(loss, math.log(3))


# All losses


@pytest.mark.parametrize("name", ALL_LOSSES)
def test_the_gradient_is_the_one_of_finite_differences(name):
    assert torch.autograd.gradcheck(ALL_LOSSES[name], torch.randn(6, 4).double().requires_grad_())


@pytest.mark.parametrize("name", [name for name in ALL_LOSSES if "weighted" not in name])
@pytest.mark.parametrize(
    "rows",
    [
        1e4 * torch.eye(4)[[0, 0, 1, 2, 3, 3]],
        -1e4 * torch.eye(4)[[0, 0, 1, 2, 3, 3]],
        torch.zeros(6, 4),
        1e4 * torch.ones(6, 4),
        1e4 * torch.tensor([-1.0, 1.0]).repeat(12).view(6, 4),
    ],
    ids=["targets at 1e4", "targets at -1e4", "zero", "all 1e4", "signs"],
)
def test_loss_and_gradient_are_finite_on_extreme_rows(name, rows):
    loss, gradient = loss_and_gradient(ALL_LOSSES[name], rows)
    assert loss.isfinite()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", [name for name in ALL_LOSSES if "weighted" not in name])
def test_under_bfloat16_autocast_a_loss_is_the_float32_one_of_the_same_rows(name):
    rows = (4 * torch.randn(6, 4)).bfloat16().requires_grad_()
    expected, expected_gradient = loss_and_gradient(ALL_LOSSES[name], rows.detach().float())
    with torch.autocast("cpu", torch.bfloat16):
        loss = ALL_LOSSES[name](rows)
    loss.backward()
    torch.testing.assert_close(loss, expected)  # and float32
    torch.testing.assert_close(rows.grad, expected_gradient.bfloat16())


@pytest.mark.parametrize("name", CLASSIFICATION_LOSSES)
def test_a_classification_loss_does_not_change_when_rows_are_permuted(name):
    loss_fn = CLASSIFICATION_LOSSES[name][1](default_flags(), COUNTS, inverse_frequency_weights(COUNTS))
    logits, targets, order = torch.randn(9, 3), torch.randint(3, (9,)), torch.randperm(9)
    close(loss_fn(logits[order], targets[order]), loss_fn(logits, targets))


@pytest.mark.parametrize("name", CLASSIFICATION_LOSSES)
def test_a_classification_loss_has_no_parameters_and_saves_nothing_that_a_folder_already_says(name):
    loss_fn = CLASSIFICATION_LOSSES[name][1](default_flags(), COUNTS, inverse_frequency_weights(COUNTS))
    assert list(loss_fn.parameters()) == []
    assert loss_fn.state_dict() == {}
