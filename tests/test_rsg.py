import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine.flags import Parser
from losses import add_loss_flags, build_objective
from models.backbones import Backbone, torchvision_resnet
from models.classifier import LongTailClassifier
from models.heads import ArcFaceHead, NormedLinear
from rsg import RareSampleGenerator, add_rsg_flags, build_generator, generates, unmoved_centers
from rsg.generator import MeanOfConv2d, head_classes, sample_pairs

COUNTS = [50, 20, 10, 5, 2]  # class 0 is the head class


def generator(channels=4, counts=COUNTS, generating=True, **options):
    """A small one whose centres are somewhere."""
    made = RareSampleGenerator(channels, counts, **{"num_centers": 3, "contrast_dim": 6, **options})
    nn.init.normal_(made.centers)
    nn.init.normal_(made.transform.bias)
    made.generating = generating
    return made


def maps_of(targets, channels=4, size=3):
    return torch.randn(len(targets), channels, size, size).relu(), torch.tensor(targets)


def plain_centre_loss(module, maps, targets):
    """The sum over [N, K, C, H, W], in the dtype of the maps."""
    centers, weight, bias = (
        parameter.to(maps.dtype)[targets]
        for parameter in (module.centers, module.assignment_weight, module.assignment_bias)
    )
    assignments = (torch.einsum("nc,nck->nk", maps.mean((2, 3)), weight) + bias).softmax(1)
    squares = (maps[:, None] - centers[..., None, None]).square()  # [N, K, C, H, W]
    return (assignments * squares.sum((2, 3, 4))).sum() / len(maps)


def nearest_center(module, row, target):
    scores = row.mean((1, 2)) @ module.assignment_weight[target] + module.assignment_bias[target]
    return module.centers[target, scores.argmax()].detach()


def same_or_different(module, first, second):
    """The contrastive module's two logits of a pair of maps [C, H, W], layer by layer."""
    reduce, _, conv, linear = module.contrast
    hidden = F.conv2d(torch.cat([first, second])[None], reduce.weight, reduce.bias).relu()
    hidden = F.conv2d(hidden, conv.weight, conv.bias, padding=1)
    return hidden.mean((2, 3)) @ linear.weight.T + linear.bias


def pairs_in_a_loop(targets, strength, head_class=0):
    """(head row, tail row) of every generated row, block by block."""
    heads = [i for i, target in enumerate(targets) if target == head_class]
    tails = [i for i, target in enumerate(targets) if target != head_class]
    pairs = []
    if heads and tails and len(heads) >= len(tails):
        for block in range(max(1, math.floor(strength * len(heads) / len(tails)))):
            for j, tail in enumerate(tails):
                pairs.append((heads[(block * len(tails) + j) % len(heads)], tail))
    elif heads and tails:
        for block in range(max(1, math.floor(strength * len(tails) / len(heads)))):
            for j, head in enumerate(heads):
                pairs.append((head, tails[(block * len(heads) + j) % len(tails)]))
    return pairs


BATCHES = {
    "more heads": [0, 1, 0, 0, 2, 0, 0, 0, 3, 0],
    "more tails": [1, 0, 2, 3, 4, 4, 0, 1, 2],
    "as many": [0, 3, 0, 0, 1, 4],
    "one tail": [0, 0, 0, 4, 0],
    "one head": [1, 2, 0, 3, 4, 4, 1],
}
ODD_BATCHES = {
    "no head": [1, 2, 2, 4],
    "no tail": [0, 0, 0],
    "one row": [3],
    "one head row": [0],
    "odd": [0, 0, 1, 4, 0],
}


# Centres


@pytest.mark.parametrize(("channels", "size"), [(4, 3), (64, 7), (16, 21), (128, 1)])
def test_the_centre_loss_is_the_plain_sum_over_centres_and_positions(channels, size):
    module, (maps, targets) = generator(channels), maps_of(BATCHES["more tails"], channels, size)
    loss, _ = module.estimate_centers(maps, targets)
    expected = plain_centre_loss(module, maps.double(), targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("distance", [1, 1e-2, 1e-3])
def test_the_centre_loss_keeps_its_digits_with_the_centres_on_the_features(distance):
    module, targets = generator(32), torch.tensor(BATCHES["as many"])
    centers = torch.rand(5, 32)  # one for each class, of a size at which an expanded square would cancel
    maps = centers[targets][..., None, None] + distance * torch.randn(6, 32, 7, 7)
    with torch.no_grad():
        module.centers.copy_(centers[:, None].expand(-1, 3, -1))
    loss, _ = module.estimate_centers(maps, targets)
    torch.testing.assert_close(loss.double(), plain_centre_loss(module, maps.double(), targets), rtol=1e-5, atol=0)


def test_the_centre_loss_is_zero_when_every_position_is_its_centre():
    module, targets = generator(8), torch.tensor([0, 1, 2])
    with torch.no_grad():
        module.centers.copy_(module.centers[:, :1].expand(-1, 3, -1))
    loss, _ = module.estimate_centers(module.centers[targets, 0, :, None, None].expand(-1, -1, 4, 4), targets)
    assert loss == 0


def test_the_gradient_of_the_centre_loss_is_that_of_the_plain_sum():
    module, (maps, targets) = generator(16), maps_of(BATCHES["more heads"], 16)
    parameters = (module.centers, module.assignment_weight, module.assignment_bias)
    ours = torch.autograd.grad(module.estimate_centers(maps, targets)[0], parameters)
    plain = torch.autograd.grad(plain_centre_loss(module, maps, targets), parameters)
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def test_the_nearest_centre_is_the_one_with_the_largest_assignment():
    module, (maps, targets) = generator(), maps_of(BATCHES["more tails"])
    _, nearest = module.estimate_centers(maps, targets)
    for row, target, center in zip(maps, targets, nearest, strict=True):
        torch.testing.assert_close(center, nearest_center(module, row, target))


def test_the_centre_distance_is_the_mean_share_of_a_row_that_its_nearest_centre_leaves():
    module, (maps, targets) = generator(), maps_of(BATCHES["more tails"])
    module(maps, targets)
    shares = [
        (row - nearest_center(module, row, target)[:, None, None]).norm() / row.norm()
        for row, target in zip(maps, targets, strict=True)
    ]
    torch.testing.assert_close(module.center_distance, torch.stack(shares).mean())


def test_centres_at_zero_have_a_distance_of_one():
    module, (maps, targets) = RareSampleGenerator(4, COUNTS), maps_of([0, 1, 2, 3])
    module(maps, targets)
    torch.testing.assert_close(module.center_distance, torch.tensor(1.0))


# Head classes


@pytest.mark.parametrize(
    ("counts", "ratio", "expected"),
    [
        ([50, 20, 10, 5, 2], 0.2, [0]),
        ([2, 5, 10, 20, 50], 0.4, [3, 4]),
        ([10, 30, 30, 30, 1], 0.4, [1, 2]),  # ties go to the lower index
        ([9, 9, 9], 0.2, [0]),
        ([5, 4, 3, 2, 1, 1, 1, 1, 1, 1], 0.3, [0, 1, 2]),
        ([5, 4, 3], 0.0, [0]),  # at least one
        ([5, 4, 3], 1.0, [0, 1]),  # at most C - 1
        ([5, 4, 3, 2], 0.49, [0]),
        (list(range(100, 0, -1)), 0.29, list(range(29))),  # 0.29 * 100 is 28.999999999999996
        ([7] * 1000, 0.3, list(range(300))),
    ],
)
def test_the_share_of_classes_with_most_images_is_head(counts, ratio, expected):
    assert head_classes(counts, ratio).nonzero().flatten().tolist() == expected


def test_it_begins_with_zero_centres_and_the_deviations_of_he_et_al():
    module = RareSampleGenerator(64, COUNTS * 4, contrast_dim=64)
    assert not module.centers.any()
    assert (module.assignment_bias == 1).all()
    assert module.assignment_weight.std().item() == pytest.approx(1, rel=0.05)
    for layer in (module.transform, module.contrast[0], module.contrast[2]):
        assert not layer.bias.any()
        assert layer.weight.std().item() == pytest.approx((2 / layer.weight[0].numel()) ** 0.5, rel=0.05)


# Sample contrast


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("targets", [[0, 1, 0, 2, 0, 1, 1, 2], [3, 0, 1, 3, 0, 0, 2], [0, 0]])
def test_the_contrast_loss_is_a_loop_over_pairs_of_the_two_halves(targets, shift):
    module, (maps, targets) = generator(generating=False), maps_of(targets)
    module.pair_shift = shift
    half, losses = len(targets) // 2, []
    for i in range(half):
        partner = half + (i - shift) % half
        answer = same_or_different(module, maps[i], maps[partner])
        losses.append(F.cross_entropy(answer, (targets[i] == targets[partner]).long()[None]))
    torch.testing.assert_close(module.contrast_loss(maps, targets), torch.stack(losses).mean())


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (2, 1), (3, 2), (5, 7)])
def test_the_mean_of_a_convolution_is_that_of_its_output_with_the_same_gradients(size):
    layer = MeanOfConv2d(4, 6).double()
    maps = torch.randn(3, 4, *size, dtype=torch.double, requires_grad=True)
    plain = F.conv2d(maps, layer.weight, layer.bias, padding=1).mean((2, 3))
    direction, inputs = torch.randn_like(plain), (maps, layer.weight, layer.bias)
    torch.testing.assert_close(layer(maps), plain)
    gradients = [torch.autograd.grad(output, inputs, direction) for output in (layer(maps), plain)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("seed", range(3))
def test_the_contrastive_module_does_not_run_away_at_the_usual_learning_rate(seed):
    torch.manual_seed(seed)
    targets = torch.randint(3, (64,))
    maps = (4 * torch.randn(3, 32, 1, 1)[targets] + 2 * torch.randn(64, 32, 8, 8)).relu()  # |F| of a trained ResNet-32
    module = RareSampleGenerator(32, COUNTS)
    optimizer = torch.optim.SGD(module.contrast.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(30):
        loss = module.contrast_loss(maps, targets)
        optimizer.zero_grad()
        (0.1 * loss).backward()
        optimizer.step()
        losses.append(loss.item())
    assert max(losses) < 500  # above 4,000 with N(0, 1) weights in its last layer
    assert losses[-1] < 1


def test_two_views_of_the_same_images_are_not_paired_with_each_other():
    parser = Parser("test")
    add_rsg_flags(parser)
    add_loss_flags(parser)
    module = build_generator(parser.parse_args(["--supcon_views", "2"]), 4, COUNTS)
    maps, targets = maps_of([0, 1, 2, 3])
    asked = []
    module.contrast.register_forward_hook(lambda _, inputs, __: asked.append(inputs[0]))
    module.contrast_loss(torch.cat([maps, maps]), torch.cat([targets, targets]))  # view by view
    assert all((first != second).any() for first, second in zip(asked[0][:, :4], asked[0][:, 4:], strict=True))


# Generation


@pytest.mark.parametrize("strength", [0.5, 1, 3])
@pytest.mark.parametrize("targets", {**BATCHES, **ODD_BATCHES}.values(), ids={**BATCHES, **ODD_BATCHES})
def test_generated_rows_are_those_of_a_loop_over_pairs(targets, strength):
    module, (maps, targets) = generator(strength=strength), maps_of(targets)
    new_maps, new_targets, _ = module(maps, targets)
    pairs = pairs_in_a_loop(targets.tolist(), strength)
    assert len(new_maps) == len(new_targets) == len(maps) + len(pairs)
    for row, target, (head, tail) in zip(new_maps[len(maps) :], new_targets[len(maps) :], pairs, strict=True):
        variation = maps[head] - nearest_center(module, maps[head], targets[head])[:, None, None]
        torch.testing.assert_close(row, maps[tail] + module.transform(variation[None])[0])
        assert target == targets[tail]


@pytest.mark.parametrize(
    ("heads", "tails", "strength", "expected"),
    [
        (6, 2, 1, [(0, 10), (1, 11), (2, 10), (3, 11), (4, 10), (5, 11)]),
        (5, 2, 1, [(0, 10), (1, 11), (2, 10), (3, 11)]),
        (4, 2, 0.5, [(0, 10), (1, 11)]),
        (2, 2, 2, [(0, 10), (1, 11), (0, 10), (1, 11)]),  # wraps around
        (2, 5, 1, [(0, 10), (1, 11), (0, 12), (1, 13)]),
        (2, 3, 0.1, [(0, 10), (1, 11)]),  # at least one block
        (1, 2, 2, [(0, 10), (0, 11), (0, 10), (0, 11)]),
        (100, 1, 0.29, [(head, 10) for head in range(29)]),  # 0.29 * 100 is 28.999999999999996
        (3, 0, 1, []),
        (0, 3, 1, []),
    ],
)
def test_pairs_written_out_by_hand(heads, tails, strength, expected):
    head_rows, tail_rows = sample_pairs(torch.arange(heads), 10 + torch.arange(tails), strength)
    assert list(zip(head_rows.tolist(), tail_rows.tolist(), strict=True)) == expected


@pytest.mark.parametrize("targets", BATCHES.values(), ids=BATCHES)
def test_real_rows_come_first_unchanged_and_only_tail_targets_are_added(targets):
    module, (maps, targets) = generator(head_tail_ratio=0.4), maps_of(targets)
    new_maps, new_targets, _ = module(maps, targets)
    assert torch.equal(new_maps[: len(maps)], maps)
    assert torch.equal(new_targets[: len(maps)], targets)
    assert set(new_targets[len(maps) :].tolist()) <= set(targets.tolist()) & {2, 3, 4}
    assert len(new_targets) > len(targets)


def test_before_generating_maps_and_targets_pass_as_they_are():
    module, (maps, targets) = generator(generating=False), maps_of(BATCHES["more heads"])
    new_maps, new_targets, _ = module(maps, targets)
    assert new_maps is maps
    assert new_targets is targets


@pytest.mark.parametrize("generating", [False, True])
@pytest.mark.parametrize("targets", ODD_BATCHES.values(), ids=ODD_BATCHES)
def test_losses_and_gradients_of_an_odd_batch_are_finite(targets, generating):
    module, (maps, targets) = generator(generating=generating), maps_of(targets)
    _, _, losses = module(maps, targets)
    sum(losses.values()).backward()
    gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
    assert all(value.isfinite().all() for value in (*losses.values(), *gradients))


# Maximised vector loss


@pytest.mark.parametrize("targets", BATCHES.values(), ids=BATCHES)
def test_the_mv_loss_is_a_loop_over_pairs_and_positions(targets):
    module, (maps, targets) = generator(), maps_of(targets, size=2)
    pairs, total = pairs_in_a_loop(targets.tolist(), 1), 0
    for head, tail in pairs:
        variation = maps[head] - nearest_center(module, maps[head], targets[head])[:, None, None]
        tail_variation = maps[tail] - nearest_center(module, maps[tail], targets[tail])[:, None, None]
        made = module.transform(variation[None])[0]
        answer = same_or_different(module, maps[head], made)
        total += F.cross_entropy(answer, torch.tensor([0]))  # "different"
        for y in range(2):
            for x in range(2):
                total += (made[:, y, x].norm() - variation[:, y, x].norm()).abs()
                total += (F.cosine_similarity(tail_variation[:, y, x], made[:, y, x], dim=0) - 1).abs()
    mv, leaves = module(maps, targets)[2]["mv"], list(module.transform.parameters())
    torch.testing.assert_close(mv, total / len(pairs))
    gradients = (torch.autograd.grad(loss, leaves) for loss in (mv, total / len(pairs)))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def test_the_mv_loss_trains_the_transform_alone():
    module, (maps, targets) = generator(), maps_of(BATCHES["more heads"])
    module(maps, targets)[2]["mv"].backward()
    trained = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert trained == {"transform.weight", "transform.bias"}
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_the_mv_loss_has_a_gradient_of_ordinary_size_where_the_variation_is_zero():
    module, (maps, targets) = RareSampleGenerator(4, COUNTS), maps_of(BATCHES["more heads"])
    maps[targets == 0] = 0  # dead positions; centres and the bias of the transform start at zero too
    module.generating = True
    module(maps, targets)[2]["mv"].backward()
    assert module.transform.bias.grad.abs().max() < 100


# Who trains whom


@pytest.mark.parametrize("generating", [False, True])
def test_its_own_losses_send_no_gradient_to_the_stages_before(generating):
    module, (maps, targets) = generator(generating=generating), maps_of(BATCHES["more heads"])
    sum(module(maps.requires_grad_(), targets)[2].values()).backward()
    assert maps.grad is None


def test_generated_rows_send_no_gradient_to_the_stages_before_but_to_the_transform():
    module, (maps, targets) = generator(), maps_of(BATCHES["more heads"])
    new_maps, _, _ = module(maps.requires_grad_(), targets)
    new_maps[len(maps) :].square().sum().backward()
    assert not maps.grad.any()
    assert module.transform.weight.grad.any()


def test_real_rows_send_their_gradient_through_as_it_is():
    module, (maps, targets) = generator(), maps_of(BATCHES["more heads"])
    new_maps, _, _ = module(maps.requires_grad_(), targets)
    gradient = torch.randn_like(maps)
    (new_maps[: len(maps)] * gradient).sum().backward()
    assert torch.equal(maps.grad, gradient)


@pytest.mark.parametrize(("generating", "untouched"), [(False, "transform"), (True, "contrast")])
def test_parameters_out_of_their_phase_have_no_gradient(generating, untouched):
    module, (maps, targets) = generator(generating=generating), maps_of(BATCHES["more heads"])
    new_maps, _, losses = module(maps.requires_grad_(), targets)
    (new_maps.sum() + sum(losses.values())).backward()
    without = {name.split(".")[0] for name, parameter in module.named_parameters() if parameter.grad is None}
    assert without == {untouched}


# In the model


@pytest.mark.parametrize(("epochs", "first"), [(200, 160), (20, 16), (3, 2), (1, 0)])
def test_by_default_the_last_fifth_of_the_epochs_generates(epochs, first):
    parser = Parser("test")
    add_rsg_flags(parser)
    args = parser.parse_args([])
    args.epochs = epochs
    assert [epoch for epoch in range(epochs) if generates(args, epoch)] == list(range(first, epochs))


def tiny_model(with_generator=True, generating=True, channels=4, **options):
    """The same weights whenever it is called: a convolution before the generator, one behind it, two heads."""
    torch.manual_seed(0)
    lower = [nn.Conv2d(3, channels, 3, 2, 1), nn.BatchNorm2d(channels), nn.ReLU()]
    upper = [nn.Conv2d(channels, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    layers = nn.Sequential(*lower, *upper)
    heads = nn.ModuleDict({"main": NormedLinear(6, 5), "arc": ArcFaceHead(6, 5)})
    made = generator(channels, generating=generating, **options) if with_generator else None
    return LongTailClassifier(Backbone(layers[:3], layers[3:], channels, 6), heads, None, made)


def objective_of(*words):
    parser = Parser("test")
    for add_flags in (add_rsg_flags, add_loss_flags):
        add_flags(parser)
    args = parser.parse_args(words)
    for name, value in {"norm_out": True, "add_arc_margin_loss": True}.items():
        setattr(args, name, value)
    args.add_add_margin_loss = args.add_sphere_loss = False
    return build_objective(args, COUNTS)


def batch(number=9, size=8):
    """The same images and targets whenever it is called."""
    images = torch.randn(number, 3, size, size, generator=torch.Generator().manual_seed(1))
    return images, torch.tensor([0, 1, 2, 3, 4, 0, 0, 1, 2] * 8)[:number]


def test_evaluation_is_unchanged_by_its_presence():
    with_it, without = tiny_model(), tiny_model(with_generator=False)
    images, targets = batch()
    without.load_state_dict(with_it.state_dict(), strict=False)
    for model in (with_it, without):
        model.eval()
    ours, plain = with_it(images, targets), without(images, targets)
    assert torch.equal(ours.logits["main"], plain.logits["main"])
    assert torch.equal(ours.logits["arc"], plain.logits["arc"])
    assert torch.equal(ours.targets, targets)
    assert ours.auxiliary == {}


@pytest.mark.parametrize(("rows", "distance", "warns"), [(5, 0.991, True), (5, 0.989, False), (0, 1.0, False)])
def test_centres_that_have_not_moved_are_a_warning_where_rows_are_generated(rows, distance, warns):
    assert bool(unmoved_centers({"generated_rows": rows, "rsg_center_distance": distance})) is warns


def test_training_without_targets_generates_nothing():
    assert len(tiny_model()(batch()[0]).features) == 9


def test_the_model_appends_generated_rows_behind_the_images_rows():
    output = tiny_model()(*batch())
    assert len(output.features) == len(output.targets) == len(output.logits["arc"]) == len(output.auxiliary["maps"])
    assert len(output.targets) == 9 + len(pairs_in_a_loop(batch()[1].tolist(), 1))
    assert torch.equal(output.targets[:9], batch()[1])


@pytest.mark.parametrize("generating", [False, True])
def test_the_losses_of_the_generator_reach_no_other_part_of_the_model(generating):
    model = tiny_model(generating=generating)
    auxiliary = model(*batch()).auxiliary
    sum(auxiliary[name] for name in ("centre", "contrast", "mv")).backward()
    touched = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert touched == {"generator"}


@pytest.mark.parametrize("size", [32, 64, 84, 224])
@pytest.mark.parametrize("generating", [False, True])
def test_it_works_on_the_maps_of_images_of_any_size(size, generating):
    backbone = torchvision_resnet("resnet18").eval()
    module = generator(backbone.map_channels, generating=generating, contrast_dim=8)
    with torch.no_grad():
        maps = backbone.lower(torch.randn(3, 3, size, size))
    new_maps, _, losses = module(maps, torch.tensor([0, 1, 0]))
    assert new_maps.shape == (5 if generating else 3, 256, math.ceil(size / 16), math.ceil(size / 16))
    assert all(loss.isfinite() for loss in losses.values())


def test_under_bfloat16_autocast_the_centre_loss_is_the_float32_one_of_the_same_maps():
    module, (maps, targets) = generator(64), maps_of(BATCHES["more heads"], 64, 7)
    maps = maps.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        new_maps, _, losses = module(maps, targets)
    assert new_maps.dtype == torch.bfloat16
    assert torch.equal(losses["centre"], module.estimate_centers(maps.float(), targets)[0])
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


# Generated rows in SupCon


def gradients_by_name(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


SUPCON_ALONE = ("--add_ldam_loss", "0", "--rsg_cesc_weight", "0", "--rsg_mv_weight", "0", "--supcon_loss_weight", "1")


def supcon_gradients(generated):
    model = tiny_model()
    output = model(*batch())
    objective = objective_of(*SUPCON_ALONE, "--supcon_generated", generated)
    return gradients_by_name(model, objective.supcon_loss(output, 9)), output


def test_generated_keys_give_the_generator_no_supcon_gradient_but_the_upper_stage():
    gradients, _ = supcon_gradients("keys")
    assert not gradients["generator.transform.weight"].any()
    assert not gradients["generator.transform.bias"].any()
    assert gradients["backbone.upper.3.weight"].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_generated_keys_give_the_generator_next_to_no_gradient_in_half_precision_with_a_scaled_loss(dtype):
    words = ("--supcon_generated", "keys", "--supcon_temperature", "1")
    model, objective = tiny_model(), objective_of(*SUPCON_ALONE, *words)
    nn.init.constant_(model.backbone.lower[1].weight, 300)  # large maps, whose gradient is small
    with torch.autocast("cpu", dtype):
        output = model(*batch())
    (65536 * objective.supcon_loss(output, 9)).backward()
    trained, other = model.backbone.upper[0].weight.grad, model.generator.transform.weight.grad
    assert trained.isfinite().all()
    assert other.norm() < 1e-5 * trained.norm()


def test_generated_keys_whose_gradient_overflows_leave_the_loss_as_it_is():
    words = ("--supcon_generated", "keys", "--supcon_temperature", "0.002")
    model, objective = tiny_model(), objective_of(*SUPCON_ALONE, *words)
    nn.init.normal_(model.backbone.upper[0].weight, std=1e-4)  # batch normalisation multiplies what comes back
    with torch.autocast("cpu", torch.float16):
        output = model(*batch())
    expected = objective.supcon(output.features, output.targets, num_anchors=9)
    torch.testing.assert_close(objective.supcon_loss(output, 9), expected)


def test_with_all_generated_rows_supcon_trains_the_generator():
    assert supcon_gradients("all")[0]["generator.transform.weight"].any()


def test_generated_keys_change_what_supcon_teaches_the_upper_stage():
    name = "backbone.upper.3.weight"
    kinds = [supcon_gradients(generated)[0][name] for generated in ("all", "keys", "none")]
    assert not torch.allclose(kinds[0], kinds[1])
    assert not torch.allclose(kinds[1], kinds[2])


@pytest.mark.parametrize(("generated", "anchors", "keys"), [("all", 15, 15), ("keys", 9, 15), ("none", 9, 9)])
def test_supcon_has_the_anchors_and_keys_that_the_flag_says(generated, anchors, keys):
    model, objective = tiny_model(), objective_of(*SUPCON_ALONE, "--supcon_generated", generated)
    output = model(*batch())
    assert len(output.features) == 15
    expected = objective.supcon(output.features[:keys], output.targets[:keys], num_anchors=anchors)
    torch.testing.assert_close(objective.supcon_loss(output, 9), expected)


def test_generated_keys_have_the_gradients_of_two_passes_one_with_generated_maps_as_constants():
    model, images, targets = tiny_model(), *batch()
    objective = objective_of("--supcon_generated", "keys", "--add_cross_entropy_loss")
    ours = gradients_by_name(model, objective(model(images, targets), 9)[0])

    others = objective_of("--add_supcon_loss", "0", "--add_cross_entropy_loss")
    by_others = gradients_by_name(model, others(model(images, targets), 9)[0])
    maps = model.backbone.lower(images)
    new_maps, new_targets, _ = model.generator(maps, targets)
    features = model.backbone.upper(torch.cat([maps, new_maps[9:].detach()]))
    by_supcon = gradients_by_name(model, 0.9 * objective.supcon(features, new_targets, num_anchors=9))
    for name, gradient in ours.items():
        parts = [part for part in (by_others[name], by_supcon[name]) if part is not None]
        if gradient is None:
            assert parts == []
        else:
            torch.testing.assert_close(gradient, sum(parts), rtol=1e-4, atol=1e-5)


# Determinism


def weights_after_training(steps):
    """Half of the steps before generating, half generating; tensors large enough for several threads."""
    model, objective = tiny_model(channels=64, num_centers=15), objective_of("--supcon_generated", "keys")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images, targets = batch(64, 8)
    for step in range(steps):
        model.generator.generating = step >= steps // 2
        loss, _ = objective(model(images, targets), len(images))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.state_dict()


def test_two_runs_of_50_steps_with_2_threads_give_the_same_bits():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first, second = weights_after_training(50), weights_after_training(50)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(value.isfinite().all() for value in first.values())
