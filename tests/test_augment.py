"""Policies, cutout and mixing: against torchvision, Pillow-free loops and the distributions they promise."""

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import beta, kstest
from torchvision.transforms import v2

import imagenet_lt_train
from data.augment import NOTHING, POLICIES, Policy
from data.samplers import epoch_draws, epoch_mixings, policy_draws
from data.transforms import (
    DRAWS,
    HOLE_LEFT,
    HOLE_TOP,
    POLICY_DRAWS,
    cutmix_box,
    cutout,
    mirrored,
    mixed,
    random_resized_crop,
)
from tests.test_loading import SIZES, equal, training, write_split

COLUMNS = (*DRAWS, *POLICY_DRAWS)
IMAGES = torch.randint(256, (32, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def draws_of(**values) -> list[float]:
    return [values.get(name, 0.5) for name in COLUMNS]


def random_draws(number: int) -> torch.Tensor:
    return torch.cat([epoch_draws(number, 0, 0), policy_draws(number, 0, 0)], dim=1)


# --- policies


def torchvisions(policy: Policy, image: torch.Tensor, choices: list[float], answer: float, monkeypatch):
    """torchvision's own forward pass, with its choices and its yes-or-no draws put into its mouth."""
    queue = iter(choices)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randint", lambda high, size: torch.tensor(int(next(queue) * high)))
        patch.setattr(torch, "rand", lambda size: torch.tensor(answer))
        return policy.theirs(image)


@pytest.mark.parametrize("size", [24, 72])  # the policy found on CIFAR-10, and that found on ImageNet
@pytest.mark.parametrize("answer", [0.05, 0.35, 0.55, 0.85])
def test_autoaugment_is_torchvisions(size, answer, monkeypatch):
    policy = Policy("autoaugment", size)
    image = torch.randint(256, (3, size, size), dtype=torch.uint8)
    for number in range(25):
        choice = (number + 0.5) / 25
        row = draws_of(operation=choice, first=answer, second=answer, first_sign=answer, second_sign=answer)
        expected = torchvisions(policy, image, [choice], answer, monkeypatch)
        assert torch.equal(policy.on_batch(image[None], torch.tensor([row]))[0], expected)


@pytest.mark.parametrize("answer", [0.2, 0.7])
def test_randaugment_is_torchvisions(answer, monkeypatch):
    policy = Policy("randaugment", 24)
    for first, second in itertools.product(range(0, 14), (3, 13)):
        choices = [(first + 0.5) / 14, (second + 0.5) / 14]
        row = draws_of(first=choices[0], second=choices[1], first_sign=answer, second_sign=answer)
        expected = torchvisions(policy, IMAGES[0], choices, answer, monkeypatch)
        assert torch.equal(policy.on_batch(IMAGES[:1], torch.tensor([row]))[0], expected)


@pytest.mark.parametrize("answer", [0.2, 0.7])
def test_trivialaugment_is_torchvisions(answer, monkeypatch):
    policy = Policy("trivialaugment", 24)
    for operation, level in itertools.product(range(14), (0, 11, 30)):
        choices = [(operation + 0.5) / 14, (level + 0.5) / 31]
        row = draws_of(operation=choices[0], first=choices[1], first_sign=answer)
        expected = torchvisions(policy, IMAGES[0], choices, answer, monkeypatch)
        assert torch.equal(policy.on_batch(IMAGES[:1], torch.tensor([row]))[0], expected)


def test_up_to_64_px_autoaugment_is_the_one_found_on_cifar10():
    found_on = [Policy("autoaugment", size).theirs.policy for size in (64, 65)]
    assert found_on == [v2.AutoAugmentPolicy.CIFAR10, v2.AutoAugmentPolicy.IMAGENET]


def test_the_two_operations_of_autoaugment_have_draws_of_their_own():
    policy = Policy("autoaugment", 32)
    row = draws_of(operation=1.5 / 25, first=0.6, second=0.2, first_sign=0.1, second_sign=0.9)  # Rotate, TranslateX
    (rotate, degrees), (translate, pixels) = policy.plan(row)
    assert (rotate, translate) == ("Rotate", "TranslateX")
    assert degrees == pytest.approx(-30 * 2 / 9)
    assert pixels == pytest.approx(150 / 331 * 32)
    assert policy.plan(draws_of(operation=1.5 / 25, first=0.71, second=0.31)) == [NOTHING, NOTHING]


@pytest.mark.parametrize("name", POLICIES)
def test_what_becomes_of_an_image_does_not_depend_on_the_others(name):
    policy, draws = Policy(name, 24), random_draws(32)
    together = policy.on_batch(IMAGES, draws)
    assert torch.equal(together, torch.cat([policy.on_batch(IMAGES[i : i + 1], draws[i : i + 1]) for i in range(32)]))
    assert (together != IMAGES).flatten(1).any(dim=1).sum() > 8


@pytest.mark.parametrize("name", POLICIES)
def test_all_operations_are_drawn(name):
    policy = Policy(name, 32)
    plans = [policy.plan(row) for row in random_draws(4000).tolist()]
    drawn = {operation for plan in plans for operation, _ in plan}
    listed = {step[0] for pair in policy.theirs._policies for step in pair} if name == "autoaugment" else None
    assert drawn - {"Identity"} == (listed or set(policy.operations)) - {"Identity"}


# --- cutout


@pytest.mark.parametrize("size", [8, 32])
def test_cutout_is_a_loop_over_pixels(size):
    images, draws = 0.1 + torch.rand(9, 3, size, size), random_draws(9)
    draws[0, [HOLE_TOP, HOLE_LEFT]], draws[1, [HOLE_TOP, HOLE_LEFT]] = 0.0, 1 - 2**-24
    for image, row, cut in zip(images, draws.tolist(), cutout(images, draws), strict=True):
        y, x = int(row[HOLE_TOP] * size), int(row[HOLE_LEFT] * size)
        expected = image.clone()
        half = size // 4
        expected[:, max(0, y - half) : y + half, max(0, x - half) : x + half] = 0
        assert torch.equal(cut, expected)


# --- mixing


def test_mixup_blends_each_image_with_the_next():
    images = torch.rand(4, 3, 5, 5)
    (mixing,) = epoch_mixings(1, 0, 0, 1.0, 0.0, 5)
    for i, image in enumerate(mixed(images, mixing)):
        expected = mixing.share * images[i] + (1 - mixing.share) * images[(i + 1) % 4]
        torch.testing.assert_close(image, expected)


@pytest.mark.parametrize("center", [(0.5, 0.5), (0.0, 0.9), (0.99, 0.99)])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.75, 1.0])
def test_cutmix_pastes_a_box_and_its_share_is_that_of_the_pixels_left(share, center):
    images = torch.arange(3.0)[:, None, None, None].expand(3, 3, 16, 16)
    mixing = cutmix_box(share, 16, center)
    out = mixed(images, mixing)
    own = out == images
    assert (own[:, 0].float().mean(dim=(1, 2)) == mixing.share).all()
    for i in range(3):
        assert out[i][~own[i]].unique().tolist() in ([], [(i + 1) % 3])
    rows, columns = (~own[0, 0]).nonzero().T if mixing.share < 1 else (torch.zeros(1), torch.zeros(1))
    side = 2 * (int(16 * math.sqrt(1 - share)) // 2)
    assert max(np.ptp(rows.numpy()), np.ptp(columns.numpy())) < max(1, side)
    if center == (0.5, 0.5):
        assert mixing.share == 1 - side**2 / 256


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_are_of_the_beta_distribution(alpha):
    shares = [mixing.share for epoch in range(4) for mixing in epoch_mixings(500, 3, epoch, alpha, 0.0, 32)]
    assert kstest(shares, beta(alpha, alpha).cdf).pvalue > 0.01


def test_with_both_kinds_half_of_the_batches_are_of_each_with_shares_of_its_own():
    """CutMix's are all but 1/2: boxes of 22 px, of which half at least lies inside."""
    mixings = epoch_mixings(1000, 0, 0, 0.2, 1e6, 32)
    boxes = [mixing.box for mixing in mixings if mixing.box]
    assert 440 < len(boxes) < 560
    assert all(11 <= stop - start <= 22 for top, bottom, *sides in boxes for start, stop in ((top, bottom), sides))
    assert kstest([mixing.share for mixing in mixings if not mixing.box], beta(0.2, 0.2).cdf).pvalue > 0.01


# --- loaders


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("more", [{"views": 2}, {"mixup": 1.0, "cutmix": 0.5}])
def test_augmented_batches_have_the_same_bits_with_workers_and_can_be_entered_anywhere(tmp_path, size, more):
    split, more = write_split(tmp_path, 11, size + 8 * (size > 64)), more | {"augment": ("autoaugment", "cutout")}
    expected = list(training(split, size, **more).epoch(1))
    loader = training(split, size, workers=1, cache_limit=0, **more)
    assert equal(list(loader.epoch(1)), expected)
    assert equal(list(loader.epoch(1, first_batch=2)), expected[2:])
    assert not equal(list(loader.epoch(2)), expected)


def test_mixed_batches_are_the_unmixed_ones_blended_with_the_targets_that_belong_to_them(tmp_path):
    split = write_split(tmp_path, 11, 16)
    plain = training(split, 16).epoch(3)
    mixings = epoch_mixings(3, 0, 3, 1.0, 0.0, 16)
    for batch, other, mixing in zip(plain, training(split, 16, mixup=1.0).epoch(3), mixings, strict=True):
        assert torch.equal(batch.targets, other.targets)
        assert other.share == mixing.share
        for row in range(len(batch.images)):
            partner = (row + 1) % len(batch.images)
            blend = mixing.share * batch.images[row] + (1 - mixing.share) * batch.images[partner]
            torch.testing.assert_close(other.images[row], blend)
            assert other.mixed_targets[row] == batch.targets[partner]


def test_a_part_of_the_batches_can_be_had_unmixed(tmp_path):
    split = write_split(tmp_path, 11, 16)
    plain = list(training(split, 16, augment=("autoaugment",)).epoch(2))
    loader = training(split, 16, augment=("autoaugment",), mixup=1.0)
    assert equal(list(loader.unmixed(2, "uniform", slice(2))), plain[:2])
    assert equal(list(loader.unmixed(2, "uniform", slice(1, None))), plain[1:])


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_comes_after_crop_and_flip_and_leaves_their_draws_alone(tmp_path, name):
    split = write_split(tmp_path, 11, 16)
    loader = training(split, 16, augment=(name,))
    numbers = torch.cat([epoch_draws(11, 0, 0), policy_draws(11, 0, 0)], dim=1)
    start = 0
    for batch in loader.epoch(0):
        rows = numbers[start : (start := start + len(batch.images))]
        images = loader.cropped(loader.source.views[batch.indices], rows)
        assert torch.equal(batch.images, loader.coloured(loader.policy.on_batch(images, rows), rows))


def test_a_policy_on_large_images_comes_between_crop_and_flip(tmp_path):
    split = write_split(tmp_path, 4, 100)
    loader = training(split, 72, augment=("randaugment",))
    (batch,) = loader.epoch(0)
    numbers = torch.cat([epoch_draws(4, 0, 0), policy_draws(4, 0, 0)], dim=1)
    for image, index, row in zip(batch.images, batch.indices, numbers, strict=True):
        crop = random_resized_crop(Image.open(split.paths[index]), 72, row.tolist())
        pixels = np.array(loader.policy.on_image(crop, row.tolist()))
        pixels = mirrored(torch.from_numpy(pixels).permute(2, 0, 1)[None], row[None])
        assert torch.equal(image, loader.coloured(pixels, row[None])[0])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--mixup 1", "--add_supcon_loss False --add_rsg False"),
        ("--cutmix 1 --add_rsg False", "add --add_supcon_loss False"),
        ("--augment autoaugment randaugment", "give one of them"),
        ("--augment cut", "--augment"),
        ("--mixup -1", "--mixup"),
    ],
)
def test_augmentations_that_cannot_go_together_are_refused_in_one_line(words, reason, capsys):
    with pytest.raises(SystemExit, match="2"):
        imagenet_lt_train.parse_args(words.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
