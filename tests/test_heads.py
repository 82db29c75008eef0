import math

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses as metric_learning

from engine.flags import Parser
from losses import FocalLoss, LDAMLoss
from models.heads import (
    MARGIN_HEADS,
    AMSoftmaxHead,
    ArcFaceHead,
    Linear,
    NormedLinear,
    SphereFaceHead,
    add_head_flags,
    build_heads,
)

COUNTS = [1000, 100, 10]


def sphere(margin=4, weight=0.0):
    """A `SphereFaceHead` whose lambda stays ``weight``."""
    return lambda *sizes: SphereFaceHead(*sizes, margin, lambda_base=0.0, lambda_min=weight)


HEADS = {
    "linear": Linear,
    "normed": NormedLinear,
    "arc": ArcFaceHead,
    "am": AMSoftmaxHead,
    "sphere": sphere(4),
    "sphere m=3": sphere(3, 5.0),
    "sphere m=2": sphere(2),
}
COSINE_HEADS = [name for name in HEADS if name != "linear"]
FIRST = torch.tensor([0])
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__")  # numpy about pytorch-metric-learning's SphereFaceLoss


def close(value, expected, tolerance=1e-5):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(value).double(), expected, atol=tolerance, rtol=0)


def at_cosines(head, *cosines):
    """A float64 ``head`` (made by a function of the sizes) in evaluation mode and one feature (2, 0, 0) with these
    cosines to its class rows."""
    head = head(3, len(cosines)).double().eval()
    with torch.no_grad():
        head.weight.copy_(torch.tensor([(c, math.sqrt(1 - c * c), 0) for c in cosines]))
    return head, torch.tensor([[2.0, 0, 0]], dtype=torch.float64, requires_grad=True)


def target_cosine(head, cosine):
    """What the head makes of the target's cosine, before its scale."""
    head, features = at_cosines(head, cosine, 0.2, -0.1)
    return (head(features, FIRST)[:, :1] / head.scale_of(features)).item()


def loss_and_gradients(head, features, targets):
    features = features.clone().requires_grad_()
    loss = F.cross_entropy(head(features, targets), targets)
    return loss.detach(), *torch.autograd.grad(loss, (features, head.weight))


# Hand cases: cosines (c, .2, -.1), the first class is the target


@pytest.mark.parametrize(
    ("head", "cosine", "expected"),
    [
        (lambda *sizes: ArcFaceHead(*sizes, 30, 0.5), 0.5, 5.297244),
        (lambda *sizes: ArcFaceHead(*sizes, 64, 0.5), 0.5, 11.289830),
        (lambda *sizes: ArcFaceHead(*sizes, 30, 0.5), -0.98, 42.591507),
        (lambda *sizes: ArcFaceHead(*sizes, 30, 0.5), -1, 43.191506),
        (lambda *sizes: ArcFaceHead(*sizes, 30, 0.5), 1, 1.5e-9),
        (lambda *sizes: ArcFaceHead(*sizes, 30, 0.5), -0.5, 31.619703),
        (lambda *sizes: AMSoftmaxHead(*sizes, 30, 0.35), 0.5, 1.701514),
        (lambda *sizes: AMSoftmaxHead(*sizes, 30, 0.40), 0.5, 3.048705),
        (lambda *sizes: AMSoftmaxHead(*sizes, 64, 0.35), 0.5, 3.239953),
        (lambda *sizes: AMSoftmaxHead(*sizes, 30, 0.35), 1, 1.37e-6),
        (lambda *sizes: AMSoftmaxHead(*sizes, 30, 0.35), -1, 46.500123),
        (sphere(weight=0), 0.5, 3.858807),
        (sphere(weight=5), 0.5, 0.976665),
        (sphere(weight=1000 / 1.12), 0.5, 0.617247),
        (sphere(weight=0), -1, 14.837488),
        (sphere(weight=5), -1, 4.845384),
    ],
)
def test_cross_entropy_on_a_margin_head_is_the_number_of_the_hand_case(head, cosine, expected):
    head, features = at_cosines(head, cosine, 0.2, -0.1)
    close(F.cross_entropy(head(features, FIRST), FIRST), expected)


@pytest.mark.parametrize(
    ("loss_fn", "head", "expected"),
    [
        (FocalLoss(2), ArcFaceHead, 5.244347),
        (FocalLoss(2), AMSoftmaxHead, 1.137391),
        (LDAMLoss(COUNTS, 0.3), ArcFaceHead, 8.138568),  # not 161.609123, scaled twice
        (LDAMLoss(COUNTS, 0.3), NormedLinear, 0.002123),
    ],
)
def test_other_losses_on_a_head_are_the_numbers_of_the_hand_cases(loss_fn, head, expected):
    head, features = at_cosines(head, 0.5, 0.2, -0.1)
    scale = (head.scale_of(features),) if isinstance(loss_fn, LDAMLoss) else ()
    close(loss_fn(head(features, FIRST), FIRST, *scale), expected)


@pytest.mark.parametrize(
    ("cosine", "expected", "tolerance"),
    [
        (0.5, 0.023597, 1e-5),
        (-0.5, -0.853986, 1e-5),
        (-0.98, -1.219713, 1e-5),
        (-1, -1.239713, 1e-5),
        (1, 0.877583, 5e-4),  # the sine is bounded there, so that its derivative is
    ],
)
def test_the_cosine_that_arcface_makes_is_the_number_of_the_hand_case(cosine, expected, tolerance):
    close(target_cosine(ArcFaceHead, cosine), expected, tolerance)


@pytest.mark.parametrize(
    ("margin", "expected"),
    [(4, (1, -0.2312, -1.5, -3, -4.5, -7)), (3, (1, 0.216, -1, -2, -3, -5)), (2, (1, 0.62, -0.5, -1, -1.5, -3))],
)
def test_psi_of_sphereface_is_the_number_of_the_hand_case(margin, expected):
    for cosine, psi in zip((1, 0.9, 0.5, 0, -0.5, -1), expected, strict=True):
        close(target_cosine(sphere(margin), cosine), psi)


def test_the_cosine_that_sphereface_makes_with_lambda_5_is_the_number_of_the_hand_case():
    close(target_cosine(sphere(weight=5), 0.5), 0.166667)


@pytest.mark.parametrize(("num_classes", "floor"), [(10, 0.796614), (100, 2.667103), (1000, 4.914124)])
def test_cosines_without_a_scale_cannot_push_cross_entropy_below_a_floor(num_classes, floor):
    unscaled, features = at_cosines(lambda *sizes: NormedLinear(*sizes, 1.0), 1, *[-1] * (num_classes - 1))
    close(F.cross_entropy(unscaled(features), FIRST), floor)
    scaled, _ = at_cosines(NormedLinear, 1, *[-1] * (num_classes - 1))
    close(F.cross_entropy(scaled(features), FIRST), 0)


@pytest.mark.parametrize(("num_classes", "scale"), [(10, 3.955), (100, 6.724), (1000, 9.095)])
def test_the_smallest_scale_that_reaches_a_probability_of_90_percent_is_the_hand_computed_one(num_classes, scale):
    cosines = [1] + [-1 / (num_classes - 1)] * (num_classes - 1)  # classes as far apart as they can be
    head, features = at_cosines(lambda *sizes: NormedLinear(*sizes, scale), *cosines)
    close(head(features).softmax(1)[0, 0], 0.9, 1e-4)


@pytest.mark.parametrize(
    ("degrees", "factor"), [(5, 6.36), (20, 2.19), (60, 1.154379), (90, 0.878), (120, 0.60), (150, 0.047)]
)
def test_the_gradient_of_arcface_is_steeper_than_the_cosines_by_the_hand_computed_factor(degrees, factor):
    with_margin, features = at_cosines(ArcFaceHead, math.cos(math.radians(degrees)), 0.2)
    plain, _ = at_cosines(NormedLinear, math.cos(math.radians(degrees)), 0.2)
    gradients = [
        torch.autograd.grad(head(features, FIRST)[0, 0], head.weight)[0][0, 1] for head in (with_margin, plain)
    ]
    close(gradients[0] / gradients[1], factor, 0.005)


def slopes(head, cosines):
    """The derivative of what the head makes of the target's cosine, at each of ``cosines``."""
    cosines = torch.as_tensor(cosines, dtype=torch.float64)[:, None].requires_grad_()
    made = cosines + head.margin_shift(cosines, torch.ones_like(cosines))
    return torch.autograd.grad(made.sum(), cosines)[0].squeeze(1)


def test_the_slope_of_arcface_is_bounded_near_cosines_of_one():
    near_one = 1 - torch.logspace(-16, -3, 200, dtype=torch.float64)
    both_ends = slopes(ArcFaceHead(3, 2), torch.cat([near_one, -near_one, torch.tensor([1.0, -1.0])]))
    assert both_ends.abs().max() < 480.4
    close(both_ends[-2], math.cos(0.5))


@pytest.mark.parametrize("margin", [2, 3, 4])
def test_the_slope_of_sphereface_is_positive_up_to_both_ends(margin):
    head, ends = sphere(margin)(3, 2).eval(), [1.0, -1.0]
    close(slopes(head, ends), [margin**2, margin**2])


# The lambda of SphereFace


def lambda_of(head):
    """Lambda of the last forward pass, solved from what the head made of the target's cosine .5, where psi is -1.5."""
    features = torch.tensor([[2.0, 0, 0]], dtype=torch.float64)
    made = head(features, FIRST)[0, 0].item() / 2
    return (made + 1.5) / (0.5 - made)


@pytest.mark.parametrize(("step", "expected"), [(1, 892.857), (100, 76.923), (1658, 5.001), (1659, 5), (10**6, 5)])
def test_lambda_falls_with_training_steps_to_its_floor(step, expected):
    head = at_cosines(SphereFaceHead, 0.5, 0.2, -0.1)[0].train()
    head.step.fill_(step - 1)
    assert lambda_of(head) == pytest.approx(expected, rel=1e-5)


def test_sphereface_counts_the_forward_passes_of_training_that_have_targets():
    head, features = SphereFaceHead(4, 3), torch.randn(5, 4)
    for _ in range(3):
        head(features, torch.zeros(5, dtype=torch.long))
        head(features)
    head.eval()(features, torch.zeros(5, dtype=torch.long))
    assert head.step == 3


@pytest.mark.parametrize("name", HEADS)
def test_logits_of_mixed_images_are_those_of_two_passes_and_the_training_step_counts_once(name):
    head, again = HEADS[name](5, 3), HEADS[name](5, 3)
    again.load_state_dict(head.state_dict())
    features, targets, others = torch.randn(4, 5), torch.tensor([0, 1, 2, 0]), torch.tensor([1, 1, 0, 2])
    leaves = [features.clone().requires_grad_() for _ in range(2)]
    first, second = head.for_mixed(leaves[0], targets, others)
    step = getattr(head, "step", None)
    assert step is None or step == 1
    again.eval()  # so that the step does not go on between the two
    if step is not None:
        again.step += 1
    expected = again(leaves[1], targets), again(leaves[1], others)
    torch.testing.assert_close((first, second), expected)
    (0.3 * first.sin() + 0.7 * second.cos()).sum().backward()
    (0.3 * expected[0].sin() + 0.7 * expected[1].cos()).sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    torch.testing.assert_close(head.weight.grad, again.weight.grad)


def test_the_step_of_sphereface_is_saved_with_the_weights():
    head, other = SphereFaceHead(4, 3), SphereFaceHead(4, 3)
    for _ in range(7):
        head(torch.randn(2, 4), torch.zeros(2, dtype=torch.long))
    other.load_state_dict(head.state_dict())
    features, targets = torch.randn(2, 4), torch.tensor([0, 2])
    assert torch.equal(other(features, targets), head(features, targets))
    assert other.step == 8


# Oracle: pytorch-metric-learning, in loss and gradients, float64


def same_as_theirs(head, theirs, features, targets):
    """Assert that loss and gradients (features, weights) agree to 1e-9."""
    head, theirs = head.double().eval(), theirs.double()
    theirs.W.data.copy_(head.weight.T)
    their_features = features.clone().requires_grad_()
    their_loss = theirs(their_features, targets)
    gradients = torch.autograd.grad(their_loss, (their_features, theirs.W))
    ours = loss_and_gradients(head, features, targets)
    torch.testing.assert_close(ours, (their_loss.detach(), gradients[0], gradients[1].T), atol=1e-9, rtol=0)


def random_rows(sign=1):
    """Features [40, 6] and targets of 5 classes."""
    return sign * 3 * torch.randn(40, 6).double(), torch.randint(5, (40,))


@pytest.mark.parametrize(("scale", "margin"), [(30, 0.5), (64, 0.5), (10, 0.1), (30, 1.2), (30, 0.0)])
def test_arcface_with_its_margin_in_radians_is_that_of_pytorch_metric_learning_in_degrees(scale, margin):
    theirs = metric_learning.ArcFaceLoss(5, 6, margin=math.degrees(margin), scale=scale)
    assert theirs.margin == pytest.approx(margin)  # it keeps radians inside
    same_as_theirs(ArcFaceHead(6, 5, scale, margin), theirs, *random_rows())


def test_arcface_beyond_pi_minus_margin_is_that_of_pytorch_metric_learning():
    head, (features, targets) = ArcFaceHead(6, 5), random_rows()
    features = -head.weight.detach().double()[targets] + 0.05 * features  # nearly opposite the target
    assert (F.cosine_similarity(features, head.weight.double()[targets]) < -math.cos(0.5)).sum() > 10
    same_as_theirs(head, metric_learning.ArcFaceLoss(5, 6, margin=math.degrees(0.5), scale=30), features, targets)


@pytest.mark.parametrize(("scale", "margin"), [(30, 0.35), (64, 0.4), (30, 0.0)])
def test_am_softmax_is_the_cosface_of_pytorch_metric_learning(scale, margin):
    theirs = metric_learning.CosFaceLoss(5, 6, margin=margin, scale=scale)
    same_as_theirs(AMSoftmaxHead(6, 5, scale, margin), theirs, *random_rows())


@pytest.mark.parametrize("margin", [1, 2, 3, 4])
def test_sphereface_with_lambda_0_is_that_of_pytorch_metric_learning(margin):
    theirs = metric_learning.SphereFaceLoss(5, 6, margin=margin, scale=1)
    same_as_theirs(sphere(margin)(6, 5), theirs, *random_rows())


@pytest.mark.parametrize("weight", [0.5, 5, 892.875])
def test_sphereface_mixes_its_margin_with_the_plain_cosines_by_lambda(weight):
    (features, targets), mixed, margin_only = random_rows(), sphere(4, weight)(6, 5).double(), sphere(4, 0)(6, 5)
    margin_only.weight = mixed.weight

    def mixed_by_hand(features, targets):
        return (weight * margin_only(features) + margin_only(features, targets)) / (1 + weight)

    mixed_by_hand.weight = mixed.weight
    ours, by_hand = (loss_and_gradients(head, features, targets) for head in (mixed, mixed_by_hand))
    torch.testing.assert_close(ours, by_hand, atol=1e-9, rtol=0)


def test_normed_linear_is_the_normalised_softmax_of_pytorch_metric_learning():
    same_as_theirs(
        NormedLinear(6, 5, 30), metric_learning.NormalizedSoftmaxLoss(5, 6, temperature=1 / 30), *random_rows()
    )


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("arc", lambda *sizes: metric_learning.ArcFaceLoss(*sizes, scale=30)),
        ("am", lambda *sizes: metric_learning.CosFaceLoss(*sizes, scale=30)),
        ("sphere", lambda *sizes: metric_learning.SphereFaceLoss(*sizes, scale=1)),
        ("normed", lambda *sizes: metric_learning.NormalizedSoftmaxLoss(*sizes, temperature=1 / 30)),
    ],
)
def test_without_targets_the_logits_are_those_of_pytorch_metric_learning(name, theirs):
    head, theirs, (features, _) = HEADS[name](6, 5).double(), theirs(5, 6).double(), random_rows()
    theirs.W.data.copy_(head.weight.T)
    close(head(features), theirs.get_logits(features).detach(), 1e-9)


# Degenerate cases


@pytest.mark.parametrize(
    "head",
    [lambda *s: ArcFaceHead(*s, margin=0.0), lambda *s: AMSoftmaxHead(*s, margin=0.0), sphere(1)],
    ids=["arc", "am", "sphere"],
)
def test_without_margin_a_head_gives_the_plain_cosines(head):
    head, features = head(6, 5).double(), torch.randn(40, 6).double()
    close(head(features, torch.randint(5, (40,))), head(features), 1e-12)


@pytest.mark.parametrize("name", [name for name in COSINE_HEADS if name != "normed"])
def test_a_margin_lowers_the_logit_of_the_target_and_no_other(name):
    head, features, targets = HEADS[name](6, 5), torch.randn(200, 6), torch.randint(5, (200,))
    change = head(features, targets) - head(features)
    is_target = F.one_hot(targets, 5).bool()
    assert (change[is_target] <= 1e-5).all()
    assert change[is_target].mean() < -1e-3
    assert (change[~is_target] == 0).all()


@pytest.mark.parametrize("head", [ArcFaceHead, AMSoftmaxHead, sphere(2), sphere(3), sphere(4), sphere(4, 5)])
def test_a_smaller_angle_always_gives_a_larger_target_logit(head):
    made = [target_cosine(head, math.cos(math.radians(degrees))) for degrees in range(0, 181, 2)]
    assert all(nearer > farther for nearer, farther in zip(made, made[1:], strict=False))


@pytest.mark.parametrize("name", COSINE_HEADS)
def test_the_length_of_a_class_row_does_not_matter(name):
    head, features, targets = HEADS[name](6, 5).double().eval(), torch.randn(9, 6).double(), torch.randint(5, (9,))
    before = head(features, targets)
    with torch.no_grad():
        head.weight.mul_(0.01 + 100 * torch.rand(5, 1))
    close(head(features, targets), before, 1e-9)


@pytest.mark.parametrize("name", COSINE_HEADS)
def test_the_gradient_of_a_class_row_is_orthogonal_to_it(name):
    head, features, targets = HEADS[name](6, 5).double().eval(), torch.randn(9, 6).double(), torch.randint(5, (9,))
    gradient = loss_and_gradients(head, features, targets)[2]
    close(F.cosine_similarity(gradient, head.weight.detach(), dim=1), torch.zeros(5), 1e-9)


@pytest.mark.parametrize("name", ["normed", "arc", "am"])
def test_the_length_of_a_feature_matters_to_sphereface_only(name):
    features, targets = torch.randn(9, 6).double(), torch.randint(5, (9,))
    head, sphere_face = HEADS[name](6, 5).double(), HEADS["sphere"](6, 5).double().eval()
    close(head(7 * features, targets), head(features, targets), 1e-9)
    close(sphere_face(7 * features, targets), 7 * sphere_face(features, targets), 1e-9)


@pytest.mark.parametrize("name", HEADS)
def test_permuted_rows_give_permuted_logits(name):
    head, features, targets = HEADS[name](6, 5).eval(), torch.randn(9, 6), torch.randint(5, (9,))
    order = torch.randperm(9)
    close(head(features[order], targets[order]), head(features, targets)[order])


@pytest.mark.parametrize("name", HEADS)
def test_logits_are_the_scale_of_the_head_times_its_cosines(name):
    head, features = HEADS[name](6, 5), torch.randn(9, 6)
    scale = head.scale_of(features)
    if name == "linear":
        assert scale == 1
        close(head(features), features @ head.weight.T + head.bias)
    else:
        close(head(features), scale * F.cosine_similarity(features[:, None], head.weight[None], dim=2), 1e-4)


@pytest.mark.parametrize("name", HEADS)
def test_a_class_is_a_row_of_the_weights(name):
    assert HEADS[name](6, 5).weight.shape == (5, 6)


@pytest.mark.parametrize("name", COSINE_HEADS)
def test_class_rows_start_with_length_one(name):
    close(HEADS[name](64, 20).weight.norm(dim=1), torch.ones(20))


# Gradients and extreme input


@pytest.mark.parametrize("name", HEADS)
def test_the_gradient_is_the_one_of_finite_differences(name):
    head = HEADS[name](4, 3).double().eval()
    features, targets = torch.randn(6, 4).double().requires_grad_(), torch.tensor([0, 1, 2, 0, 1, 2])

    def logits(features, weight):
        return torch.func.functional_call(head, {"weight": weight}, (features, targets))

    assert torch.autograd.gradcheck(logits, (features, head.weight))


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "features_of",
    [
        lambda weight, targets: weight[targets],
        lambda weight, targets: -weight[targets],
        lambda weight, targets: 3000 * weight[targets],
        lambda weight, targets: -3000 * weight[targets],
        lambda weight, targets: 1e-4 * weight[targets],
        lambda weight, targets: 0 * weight[targets],
    ],
    ids=["cos = 1", "cos = -1", "cos = 1, long", "cos = -1, long", "cos = 1, short", "zero"],
)
def test_loss_and_gradients_are_finite_on_extreme_features(name, dtype, features_of):
    head, targets = HEADS[name](512, 5), torch.arange(5).repeat(40)
    features = features_of(head.weight.detach(), targets).to(dtype)
    assert all(value.isfinite().all() for value in loss_and_gradients(head, features, targets))


@pytest.mark.parametrize("name", COSINE_HEADS)
def test_a_zero_feature_has_cosines_of_zero_and_a_gradient_only_where_logits_grow_with_it(name):
    head, features = HEADS[name](4, 3).eval(), torch.zeros(1, 4, requires_grad=True)
    logits = head(features)
    logits.sum().backward()
    assert not logits.any()
    # |x| cos is linear in x, which has a gradient at 0 as everywhere
    expected = F.normalize(head.weight.detach()).sum(dim=0) if "sphere" in name else torch.zeros(4)
    torch.testing.assert_close(features.grad[0], expected)


@pytest.mark.parametrize("name", COSINE_HEADS)
def test_a_class_row_of_zeros_leaves_everything_finite(name):
    head = HEADS[name](4, 3)
    with torch.no_grad():
        head.weight[1] = 0
    values = loss_and_gradients(head, torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
    assert all(value.isfinite().all() for value in values)


@pytest.mark.parametrize("name", HEADS)
def test_under_bfloat16_autocast_logits_are_the_float32_ones_of_the_same_features(name):
    head, features, targets = HEADS[name](256, 50).eval(), torch.randn(20, 256).bfloat16(), torch.randint(50, (20,))
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast, scale = head(features, targets), head.scale_of(features)
    assert torch.equal(under_autocast, head(features.float(), targets))
    assert torch.equal(torch.as_tensor(scale), torch.as_tensor(head.scale_of(features.float())))


def test_bfloat16_does_not_blur_a_margin():
    head, features = at_cosines(ArcFaceHead, 0.5, 0.2, -0.1)
    with torch.autocast("cpu", torch.bfloat16):
        close(F.cross_entropy(head.float()(features.detach().bfloat16(), FIRST), FIRST), 5.297244)


# From flags


def heads_from(words=""):
    parser = Parser("test")
    add_head_flags(parser)
    return build_heads(parser.parse_args(words.split()), 6, 5)


@pytest.mark.parametrize("name", MARGIN_HEADS)
def test_every_margin_head_builds_from_default_flags_beside_the_main_one(name):
    heads = heads_from(f"--{MARGIN_HEADS[name][0]}")
    assert list(heads) == ["main", name]
    logits = heads[name](torch.randn(4, 6), torch.tensor([0, 1, 2, 3]))
    F.cross_entropy(logits, torch.tensor([0, 1, 2, 3])).backward()
    assert logits.shape == (4, 5)
    assert heads[name].weight.grad.any()


def test_without_flags_the_only_head_is_normed_linear_with_scale_30():
    heads = heads_from()
    assert list(heads) == ["main"]
    assert type(heads["main"]) is NormedLinear
    assert heads["main"].scale == 30


def test_flags_reach_every_head():
    heads = heads_from(
        "--norm_scale 20 --add_arc_margin_loss --arc_scale 16 --arc_margin .2 --add_add_margin_loss --am_scale 64 "
        "--am_margin .4 --add_sphere_loss --sphere_margin 3 --sphere_lambda_min 2"
    )
    assert heads["main"].scale == 20
    assert (heads["arc"].scale, heads["arc"].margin) == (16, 0.2)
    assert (heads["add"].scale, heads["add"].margin) == (64, 0.4)
    assert (heads["sphere"].margin, heads["sphere"].lambda_min) == (3, 2)


def test_norm_out_false_gives_a_linear_main_head_with_a_bias():
    main = heads_from("--norm_out False")["main"]
    assert type(main) is Linear
    assert main.bias.shape == (5,)
