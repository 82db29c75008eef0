"""Learning rates, updates and the limits that keep them sane, by numbers worked out by hand."""

import math

import pytest
import torch
from torch import nn

import imagenet_lt_train
from engine.optim import (
    build_average,
    build_clip,
    build_optimizer,
    check_average,
    check_optimizer_flags,
    learning_rate,
    map_positions,
    rates_in_force,
    set_learning_rate,
    steps_in_epoch,
)
from models import build_model


def flags(words=""):
    return imagenet_lt_train.parse_args(["--arch", "resnet32", *words.split()])


def rates(words, epochs):
    args = flags(words)
    return [learning_rate(args, epoch) for epoch in epochs]


# --- schedules


def test_the_exponential_schedule_multiplies_by_the_decay_every_epoch():
    assert rates("--lr 1", range(4)) == pytest.approx([1, 0.9, 0.81, 0.729])
    assert rates("--lr 2 --lr_decay 0.5", [0, 3]) == pytest.approx([2, 0.25])


def test_the_constant_schedule_is_constant():
    assert rates("--lr 0.3 --lr_schedule constant", range(20)) == [0.3] * 20


def test_the_cosine_schedule_goes_from_the_rate_to_almost_0():
    expected = [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]
    assert rates("--lr 1 --lr_schedule cosine --epochs 4", range(4)) == pytest.approx(expected)


def test_the_step_schedule_is_ldam_drws():
    """Cao et al., 2019: 200 epochs, warm-up of 5, a hundredth at 160 and again at 180."""
    words = "--lr 0.1 --lr_schedule step --epochs 200 --warmup_epochs 5"
    assert rates(words, range(7)) == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1, 0.1])
    assert rates(words, [159, 160, 179, 180, 199]) == pytest.approx([0.1, 1e-3, 1e-3, 1e-5, 1e-5])


def test_milestones_are_fractions_of_the_epochs():
    words = "--lr 1 --lr_schedule step --epochs 10 --lr_milestones 0.3 0.5 0.7 --lr_factor 0.1"
    assert rates(words, range(10)) == pytest.approx([1, 1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001, 0.001])


@pytest.mark.parametrize("schedule", ["exponential", "step", "cosine", "constant"])
def test_warm_up_is_linear_and_leaves_the_rest_as_it_is(schedule):
    words = f"--lr 1 --lr_schedule {schedule} --epochs 20"
    assert rates(f"{words} --warmup_epochs 4", range(4)) == [0.25, 0.5, 0.75, 1]
    assert rates(f"{words} --warmup_epochs 4", range(4, 20)) == rates(words, range(4, 20))


@pytest.mark.parametrize(("epochs", "warmup"), [(200, 5), (60, 2)])
def test_a_warm_up_with_a_point_is_a_share_of_the_epochs(epochs, warmup):
    words = f"--lr 1 --lr_schedule constant --epochs {epochs} --warmup_epochs"
    assert rates(f"{words} 0.025", range(12)) == rates(f"{words} {warmup}", range(12))


# --- steps of an epoch


def steps(words, num_batches, epochs):
    args = flags(words)
    return [steps_in_epoch(args, epoch, num_batches) for epoch in epochs]


def test_without_a_limit_every_batch_of_every_epoch_is_a_step():
    assert steps("--epochs 3", 5, range(5)) == [5, 5, 5, 0, 0]


def test_max_steps_ends_the_run_inside_an_epoch_or_between_two():
    assert steps("--epochs 9 --max_steps 12", 5, range(5)) == [5, 5, 2, 0, 0]
    assert steps("--epochs 9 --max_steps 10", 5, range(4)) == [5, 5, 0, 0]
    assert steps("--epochs 2 --max_steps 12", 5, range(3)) == [5, 5, 0]


def test_max_steps_counts_from_the_first_epoch_of_the_run():
    assert steps("--epochs 9 --start_epoch 3 --max_steps 7", 5, range(3, 6)) == [5, 2, 0]


def test_max_steps_counts_updates_of_several_batches():
    """Five batches are three updates of two, the last one of a single batch; the second epoch has two updates left."""
    assert steps("--epochs 9 --accumulate_steps 2 --max_steps 5", 5, range(3)) == [5, 4, 0]


@pytest.mark.parametrize("accumulate", [1, 2, 3, 7])
@pytest.mark.parametrize("max_steps", [1, 4, 11])
def test_the_updates_of_all_epochs_are_max_steps(accumulate, max_steps):
    words = f"--epochs 50 --start_epoch 2 --accumulate_steps {accumulate} --max_steps {max_steps}"
    assert sum(math.ceil(number / accumulate) for number in steps(words, 5, range(2, 50))) == max_steps


# --- clipping


class WithGenerator(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.generator = nn.Linear(3, 4), nn.Linear(5, 6)
        for parameter in self.parameters():
            parameter.grad = torch.randn_like(parameter)


def norm_of(module: nn.Module) -> float:
    return math.sqrt(sum((parameter.grad**2).sum().item() for parameter in module.parameters()))


def test_clipping_bounds_the_norm_of_all_gradients_but_the_generators():
    model = WithGenerator()
    direction, others = model.backbone.weight.grad / norm_of(model.backbone), norm_of(model.generator)
    build_clip(model, 0.5)()
    assert norm_of(model.backbone) == pytest.approx(0.5, rel=1e-4)
    torch.testing.assert_close(model.backbone.weight.grad / norm_of(model.backbone), direction)
    assert norm_of(model.generator) == others


@pytest.mark.parametrize("max_norm", [None, 1e6])
def test_clipping_leaves_small_gradients_alone(max_norm):
    model = WithGenerator()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    build_clip(model, max_norm)()
    assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(model.parameters(), before, strict=True))


# --- the optimiser


def model_and_optimizer(words="", img_size=32):
    args = flags(words)
    model = build_model(args, [40, 9, 4], with_generator=args.add_rsg)
    return model, build_optimizer(args, model, img_size)


def group_of(optimizer, parameter) -> dict:
    (group,) = [group for group in optimizer.param_groups if any(parameter is each for each in group["params"])]
    return group


def test_every_parameter_is_in_one_group_with_the_flags_of_sgd():
    model, optimizer = model_and_optimizer("--lr 0.2 --momentum 0.8 --wd 0.01 --add_arc_margin_loss")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert {id(each) for each in parameters} == {id(each) for each in model.parameters()}
    assert len(parameters) == len(list(model.parameters()))
    for group in optimizer.param_groups:
        assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.2, 0.8, 0.01)


def test_a_step_is_sgd_with_momentum_and_decay_by_hand():
    model, optimizer = model_and_optimizer("--lr 0.1 --momentum 0.5 --wd 0.01 --add_rsg False")
    weight = model.heads["main"].weight
    expected, velocity = weight.detach().clone(), 0.0
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        velocity = 0.5 * velocity + weight.grad + 0.01 * expected
        expected = expected - 0.1 * velocity
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected)


@pytest.mark.parametrize(
    ("words", "theirs"),
    [
        ("--nesterov", lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01, nesterov=True)),
        ("--optimizer adamw", lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.01)),
    ],
)
def test_steps_with_nesterov_and_adamw_are_torchs(words, theirs):
    model, optimizer = model_and_optimizer(f"--lr 0.1 --wd 0.01 --add_rsg False {words}")
    weight = model.heads["main"].weight
    expected = weight.detach().clone().requires_grad_()
    reference = theirs([expected])
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        expected.grad = weight.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(weight.detach(), expected.detach())


def test_the_backbone_may_have_a_lower_rate_that_follows_the_schedule():
    args = flags("--lr 0.2 --backbone_lr 0.01 --lr_schedule exponential")
    model, optimizer = model_and_optimizer("--lr 0.2 --backbone_lr 0.01 --neck bn")
    set_learning_rate(optimizer, learning_rate(args, 1))
    assert group_of(optimizer, model.backbone.lower[0].weight)["lr"] == pytest.approx(0.009)
    for new in (model.heads["main"].weight, model.backbone.upper.neck[0].weight):
        assert group_of(optimizer, new)["lr"] == pytest.approx(0.18)
    assert rates_in_force(args, 1) == pytest.approx({"lr": 0.18, "backbone_lr": 0.009})
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def test_the_average_is_the_exponential_mean_of_weights_and_running_statistics():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    averaged, expected = build_average(model, 0.7), None
    for _ in range(4):
        model(torch.randn(5, 2))
        with torch.no_grad():
            model[0].weight += torch.randn(3, 2)
        now = [model[0].weight.detach().clone(), model[1].running_mean.clone(), model[1].running_var.clone()]
        expected = now if expected is None else [0.7 * e + 0.3 * n for e, n in zip(expected, now, strict=True)]
        averaged.update_parameters(model)
    own = averaged.module
    torch.testing.assert_close([own[0].weight.detach(), own[1].running_mean, own[1].running_var], expected)
    assert build_average(model, None) is None


def test_the_average_takes_counts_as_they_are():
    """0.999 of an int64 is cut to 0 until the 1,000th update."""
    model = nn.BatchNorm1d(3)
    averaged = build_average(model, 0.999)
    for _ in range(4):
        model(torch.randn(5, 3))
        averaged.update_parameters(model)
    assert averaged.module.num_batches_tracked == model.num_batches_tracked == 4


def test_an_average_that_keeps_much_of_the_first_weights_is_a_warning():
    args = flags("--epochs 30 --ema_decay 0.999 --accumulate_steps 2 --start_epoch 10")
    (warning,) = check_average(args, num_batches=9)
    assert "after 100 updates" in warning
    assert "leaves 91% of the first weights" in warning  # 0.999 ** 99
    assert "0.9545 leaves 1 %" in warning  # 0.9545 ** 99 = 0.01
    assert check_average(args, num_batches=1000) == []
    assert check_average(flags("--ema_decay 0.9 --start_epoch 10"), num_batches=9) == []
    assert check_average(flags("--epochs 1 --ema_decay 0.9"), num_batches=1) == []  # all there is
    assert check_average(flags(""), num_batches=1) == []


def test_steps_of_the_rate_that_coincide_are_a_warning():
    (warning,) = check_optimizer_flags(flags("--lr_schedule step --epochs 5"))
    assert "fall on epochs [4, 4]" in warning
    assert check_optimizer_flags(flags("--lr_schedule step --epochs 8")) == []
    assert check_optimizer_flags(flags("--epochs 5")) == []


@pytest.mark.parametrize("words", ["--nesterov --momentum 0", "--nesterov --optimizer adamw"])
def test_settings_that_cannot_be_are_refused(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        flags(words)
    assert words.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize(("img_size", "positions"), [(32, 16 * 16), (28, 14 * 14), (9, 5 * 5)])
def test_map_positions_are_those_the_generator_sees(img_size, positions):
    model, _ = model_and_optimizer()
    model.train()
    assert map_positions(model, img_size) == positions
    assert model.training
    assert model.backbone.lower(torch.zeros(2, 3, img_size, img_size)).shape[2:].numel() == positions


def test_only_the_centres_have_a_limit_and_it_is_half_of_where_momentum_diverges():
    """SGD with momentum m diverges on curvature c above 2 (1 + m) / c; here c = 2 * 0.05 * 14 * 14 = 19.6."""
    model, optimizer = model_and_optimizer("--momentum 0.8 --rsg_cesc_weight 0.05", img_size=28)
    limits = {group["lr_limit"] for group in optimizer.param_groups}
    centers = group_of(optimizer, model.generator.centers)
    assert centers["params"] == [model.generator.centers]
    assert limits == {math.inf, centers["lr_limit"]}
    assert centers["lr_limit"] == pytest.approx(0.5 * 2 * 1.8 / 19.6)
    model, optimizer = model_and_optimizer("--rsg_center_lr 0.1")
    assert group_of(optimizer, model.generator.centers)["lr_limit"] == 0.1


def test_a_learning_rate_is_kept_to_the_limit_of_its_group():
    model, optimizer = model_and_optimizer()
    centers, others = (group_of(optimizer, each) for each in (model.generator.centers, model.heads["main"].weight))
    set_learning_rate(optimizer, 0.5)
    assert (centers["lr"], others["lr"]) == (pytest.approx(1.9 / (2 * 0.1 * 256)), 0.5)
    set_learning_rate(optimizer, 0.01)
    assert (centers["lr"], others["lr"]) == (0.01, 0.01)


@pytest.mark.parametrize("words", ["--rsg_cesc_weight 0", "--add_rsg False", "--optimizer adamw"])
def test_without_a_centre_loss_there_is_no_limit(words):
    _, optimizer = model_and_optimizer(words)
    assert all(group["lr_limit"] == math.inf for group in optimizer.param_groups)


@pytest.mark.parametrize("nesterov", ["", "--nesterov"])
@pytest.mark.parametrize("ours", [True, False])
def test_centres_stay_with_the_maps_where_plain_sgd_loses_them(ours, nesterov):
    """16x16 maps, every row of the batch in one class, one centre, 60 steps at the usual 0.1."""
    model, optimizer = model_and_optimizer(f"--rsg_centers 1 {nesterov}")
    generator = model.generator
    if ours:
        set_learning_rate(optimizer, 0.1)
    else:
        optimizer = torch.optim.SGD(generator.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=bool(nesterov))
    maps, targets = 1 + 0.1 * torch.randn(8, 32, 16, 16), torch.zeros(8, dtype=torch.long)
    for _ in range(60):
        optimizer.zero_grad()
        loss, _ = generator.estimate_centers(maps, targets)
        (0.1 * loss).backward()
        optimizer.step()
    distance = (generator.centers[0, 0] - maps.mean(dim=(0, 2, 3))).norm().item()
    assert distance < 0.5 if ours else not distance < 1e6  # at first 5.7
