"""From files to batches: augmentation, sampling and loaders, against slow loops, Pillow and torchvision."""

import math
import multiprocessing
import threading
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as tvf
from PIL import Image
from scipy.stats import binom, kstest

from data import pixel_sources, transforms
from data.build import build_pixels, build_training_loader, read_data
from data.folders import Split
from data.images import read_image
from data.loaders import Batch, EvaluationLoader, Pixels, TrainingLoader
from data.pixel_sources import DecodedImages, FixedViews, WorkerPool, decode_all, decoded_bytes, own_size
from data.samplers import SAMPLERS, batch_bounds, epoch_draws, epoch_order, policy_draws
from data.transforms import (
    BRIGHTNESS,
    CONTRAST,
    DRAWS,
    FLIP,
    LEFT,
    SATURATION,
    TOP,
    colour_jitter_,
    crop_shape,
    fixed_view,
    mirrored,
    padded_crop,
    random_resized_crop,
    smallest_useful_side,
)
from engine.errors import Failed, Refused
from engine.options import train_parser

CPU = torch.device("cpu")
ALMOST_1 = 1 - 2**-24  # the largest number that torch.rand draws


def noise(width, height, seed=0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def smooth(width, height, seed=0) -> Image.Image:
    return noise(3, 3, seed).resize((width, height), Image.Resampling.BICUBIC)


def draws_of(**values) -> list[float]:
    return [values.get(name, 0.5) for name in DRAWS]


# --- random crops with padding


@pytest.mark.parametrize("size", [8, 28, 32])
def test_a_padded_crop_is_a_loop_over_pixels(size):
    images, draws = torch.randint(1, 256, (6, 3, size, size), dtype=torch.uint8), torch.rand(6, len(DRAWS))
    margin = size // 8
    for image, row, cropped in zip(images, draws.tolist(), padded_crop(images, draws), strict=True):
        down, right = int(row[TOP] * (2 * margin + 1)) - margin, int(row[LEFT] * (2 * margin + 1)) - margin
        for y in range(size):
            for x in range(size):
                inside = 0 <= y + down < size and 0 <= x + right < size
                expected = image[:, y + down, x + right] if inside else torch.zeros(3, dtype=torch.uint8)
                assert torch.equal(cropped[:, y, x], expected)


def test_every_offset_of_a_padded_crop_is_about_equally_frequent():
    """One white pixel in the middle of 16x16 lands on the 5x5 positions around it."""
    images, count = torch.zeros(1, 3, 16, 16, dtype=torch.uint8), 5000
    images[:, :, 8, 8] = 255
    landed = padded_crop(images.expand(count, -1, -1, -1), torch.rand(count, len(DRAWS)))[:, 0].float().mean(0) / 255
    assert landed[6:11, 6:11].sum() == pytest.approx(1)
    assert 0.02 < landed[6:11, 6:11].min() <= landed.max() < 0.06


@pytest.mark.parametrize("size", [8, 16, 33, 64])
def test_the_extreme_draws_are_the_extreme_offsets(size):
    """The row and column numbers of the pixels as colours show where a crop begins and ends."""
    rows = torch.arange(1, size + 1, dtype=torch.uint8)[:, None].expand(3, size, size)
    first, last = padded_crop(torch.stack([rows, rows]), torch.tensor([[0.0] * 8, [ALMOST_1] * 8]))
    margin = size // 8
    assert first[0, :, -1].tolist() == [0] * margin + list(range(1, size - margin + 1))
    assert last[0, :, 0].tolist() == list(range(margin + 1, size + 1)) + [0] * margin


def test_mirroring_turns_the_images_drawn_below_one_half():
    images = torch.randint(256, (3, 3, 4, 5), dtype=torch.uint8)
    draws = torch.tensor([draws_of(flip=value) for value in (0.0, 0.5, 0.49)])
    expected = [images[0].numpy()[:, :, ::-1], images[1].numpy(), images[2].numpy()[:, :, ::-1]]
    np.testing.assert_array_equal(mirrored(images, draws), np.stack(expected))


def test_colour_jitter_is_torchvisions_image_by_image():
    images, draws = torch.rand(8, 3, 9, 7), torch.rand(8, len(DRAWS))
    for image, row, ours in zip(images, draws.tolist(), colour_jitter_(images.clone(), draws), strict=True):
        image = tvf.adjust_brightness(image, 0.6 + 0.8 * row[BRIGHTNESS])
        image = tvf.adjust_contrast(image, 0.6 + 0.8 * row[CONTRAST])
        torch.testing.assert_close(ours, tvf.adjust_saturation(image, 0.6 + 0.8 * row[SATURATION]))


def test_colour_jitter_with_middle_draws_changes_nothing():
    images = torch.rand(2, 3, 5, 5)
    torch.testing.assert_close(colour_jitter_(images.clone(), torch.full((2, len(DRAWS)), 0.5)), images)


# --- the fixed view


@pytest.mark.parametrize("size", [8, 32, 64])
def test_a_small_square_is_left_untouched(size):
    np.testing.assert_array_equal(fixed_view(noise(size, size), size), noise(size, size))


@pytest.mark.parametrize(
    ("width", "height", "size"), [(512, 384, 224), (300, 400, 168), (256, 256, 224), (64, 96, 112)]
)
def test_the_fixed_view_of_a_large_image_is_torchvisions(width, height, size):
    """Sides that come out whole, so that nothing is rounded."""
    image = noise(width, height)
    expected = tvf.center_crop(tvf.resize(image, size * 256 // 224), [size, size])
    np.testing.assert_array_equal(fixed_view(image, size), expected)


@pytest.mark.parametrize(("width", "height"), [(333, 217), (100, 131), (75, 640), (641, 479)])
@pytest.mark.parametrize("size", [72, 100, 224])
def test_the_fixed_view_of_any_shape_is_within_a_pixel_of_torchvisions(width, height, size):
    """Where the long side does not come out whole, the two round it differently."""
    image = smooth(width, height)
    resized = tvf.resize(image, round(size * 256 / 224))
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    right, down = width > height, width <= height  # one pixel along the long side
    expected, shifted = (
        np.array(resized.crop((left + x, top + y, left + x + size, top + y + size)), dtype=int)
        for x, y in ((0, 0), (right, down))
    )
    ours = np.array(fixed_view(image, size), dtype=int)
    assert ours.shape == (size, size, 3)
    assert np.abs(ours - expected).mean() < 0.7 * np.abs(shifted - expected).mean()


def test_a_small_view_of_an_oblong_is_the_middle_of_its_long_side():
    image = noise(32, 48)
    np.testing.assert_array_equal(fixed_view(image, 32), image.crop((0, 8, 32, 40)))


# --- random resized crops


def test_crops_have_uniform_areas_and_log_uniform_ratios():
    shapes = [crop_shape(row) for row in torch.rand(4000, len(DRAWS)).tolist()]
    areas, ratios = np.array(shapes).T
    assert kstest(areas, "uniform", (0.08, 0.92)).pvalue > 0.01
    assert kstest(np.log(ratios), "uniform", (math.log(3 / 4), 2 * math.log(4 / 3))).pvalue > 0.01


def box_of(width, height, size, draws):
    """Left, top, width and height of a crop, read off images whose values are their own coordinates."""
    x = Image.fromarray(np.tile(np.arange(width, dtype=np.float32), (height, 1)))
    y = Image.fromarray(np.tile(np.arange(height, dtype=np.float32)[:, None], (1, width)))
    columns = np.asarray(random_resized_crop(x, size, draws))[size // 2]
    rows = np.asarray(random_resized_crop(y, size, draws))[:, size // 2]
    middle = slice(size // 4, 3 * size // 4)  # away from the border, where resizing has nothing to average with
    box = []
    for values in (columns, rows):
        slope, start = np.polyfit(np.arange(size)[middle], values[middle], 1)
        box.append((start - slope / 2 + 0.5, slope * size))
    return box[0][0], box[1][0], box[0][1], box[1][1]


def test_a_crop_is_where_its_draws_say():
    for row in torch.rand(60, len(DRAWS)).tolist():
        left, top, width, height = box_of(120, 90, 32, row)
        area, ratio = crop_shape(row)
        expected_width = min(math.sqrt(area * ratio * 120 * 90), 120)
        expected_height = min(math.sqrt(area / ratio * 120 * 90), 90)
        assert (width, height) == pytest.approx((expected_width, expected_height), abs=0.1)
        expected_corner = (row[LEFT] * (120 - expected_width), row[TOP] * (90 - expected_height))
        assert (left, top) == pytest.approx(expected_corner, abs=0.1)


def test_a_crop_of_everything_is_the_resized_image():
    image = noise(60, 60)
    expected = image.resize((72, 72), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(random_resized_crop(image, 72, draws_of(area=1.0)), expected)


def test_an_image_of_the_smallest_useful_side_need_not_be_enlarged_and_a_smaller_one_may_need_it():
    enlarged = 0
    for row in torch.rand(200, len(DRAWS)).tolist():
        side, (area, ratio) = smallest_useful_side(72, row), crop_shape(row)
        assert min(side, side * math.sqrt(area * ratio), side * math.sqrt(area / ratio)) >= 72
        enlarged += min(math.sqrt(area * ratio), math.sqrt(area / ratio)) * (side - 1) < 72
    assert enlarged == 200


def test_a_jpeg_is_decoded_at_reduced_scale_only_as_far_as_the_crop_allows(tmp_path):
    smooth(800, 640).save(tmp_path / "large.jpg")
    sides = []
    for area in (0.0, 0.3, 1.0):
        row = draws_of(area=area)
        image = read_image(tmp_path / "large.jpg", smallest_useful_side(72, row))
        sides.append(image.size)
        assert min(math.sqrt(crop_shape(row)[0] * image.width * image.height), *image.size) >= 72
    assert sides == [(400, 320), (200, 160), (100, 80)]


# --- which images an epoch shows


def test_the_uniform_sampler_shows_every_image_once():
    order = epoch_order(torch.arange(50) % 3, "uniform", 0, 0)
    assert sorted(order.tolist()) == list(range(50))
    assert order.tolist() != list(range(50))


@pytest.mark.parametrize(("sampler", "power"), [("balanced", 0.0), ("sqrt", 0.5)])
def test_classes_are_drawn_by_a_power_of_their_size_and_images_evenly(sampler, power):
    counts = [6000, 900, 100, 25]
    targets = torch.arange(4).repeat_interleave(torch.tensor(counts))
    order = epoch_order(targets, sampler, 0, 0)
    assert len(order) == len(targets)
    chances = [count**power / sum(each**power for each in counts) for count in counts]
    for label, chance in enumerate(chances):
        low, high = binom.interval(0.9999, len(order), chance)
        assert low <= (targets[order] == label).sum() <= high
    drawn = order.bincount(minlength=len(targets))[-25:]  # of the rarest class
    assert drawn.min() > 0.5 * drawn.float().mean()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_epoch_is_a_function_of_seed_and_epoch(sampler):
    targets = torch.arange(40) % 4
    first = epoch_order(targets, sampler, 3, 5)
    torch.manual_seed(99)  # the global generator has no say
    assert torch.equal(first, epoch_order(targets, sampler, 3, 5))
    assert not torch.equal(first, epoch_order(targets, sampler, 3, 6))
    assert not torch.equal(first, epoch_order(targets, sampler, 4, 5))


def test_the_draws_of_an_epoch_are_a_function_of_seed_and_epoch():
    first = epoch_draws(20, 3, 5)
    torch.manual_seed(99)
    assert torch.equal(first, epoch_draws(20, 3, 5))
    assert not (first == epoch_draws(20, 3, 6)).any()
    assert not (first == epoch_draws(20, 4, 5)).any()
    assert not torch.isin(policy_draws(20, 3, 5), first).any()  # nor do other draws of the epoch repeat them


def test_draws_are_uniform_and_those_of_one_image_have_nothing_to_do_with_each_other():
    draws = epoch_draws(20000, 0, 0).double()
    for column in draws.T:
        assert kstest(column, "uniform").pvalue > 0.001
    correlations = np.corrcoef(draws.T) - np.eye(len(DRAWS))
    assert np.abs(correlations).max() < 0.04


@pytest.mark.parametrize(
    ("number", "size", "expected"),
    [
        (8, 4, [(0, 4), (4, 8)]),
        (10, 4, [(0, 4), (4, 8), (8, 10)]),  # a short batch is kept
        (9, 4, [(0, 4), (4, 9)]),  # a single image joins the batch before it
        (3, 4, [(0, 3)]),
        (1, 4, [(0, 1)]),  # there is no batch before it
    ],
)
def test_the_last_batch_is_kept_unless_it_holds_one_image(number, size, expected):
    assert batch_bounds(number, size) == expected


# --- loaders


def write_split(folder: Path, number: int, side: int, suffix: str = ".png") -> Split:
    """Image i is (10 i, 60 class, 100), with one noisy column in the middle to tell crops apart by."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, targets = [], [i * i % 3 for i in range(number)]
    for index, target in enumerate(targets):
        pixels = np.full((side, side, 3), (10 * index, 60 * target, 100), np.uint8)
        pixels[:, side // 2, 2] = np.random.default_rng(index).integers(0, 256, side)
        paths.append(folder / f"{index:02}{suffix}")
        Image.fromarray(pixels).save(paths[-1])
    return Split(paths, targets)


def training(split: Split, size: int, **options) -> TrainingLoader:
    return TrainingLoader(split, Pixels(size), batch_size=4, seed=0, device=CPU, **options)


def equal(batches: list[Batch], others: list[Batch]) -> bool:
    """The same bits in the same batches."""
    pairs = list(zip(batches, others, strict=True))
    values = [(a, b) for one, other in pairs for a, b in zip(one, other, strict=True)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in values)


def colours(images: torch.Tensor) -> torch.Tensor:
    """The colour beside the middle of each image, [B, 3] in 0..255; normalisation undone."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (transforms.IMAGENET_MEAN, transforms.IMAGENET_STD))
    middle = images.shape[-1] // 2
    return (255 * (images * std + mean))[:, :, middle, middle - 4]


SIZES = [16, 72]  # small: cropped on the device; large: cropped by workers


@pytest.mark.parametrize("size", SIZES)
def test_batches_have_the_same_bits_with_any_number_of_workers_cached_or_not(tmp_path, size):
    split = write_split(tmp_path, 11, size + 8 * (size > 64))
    expected = list(training(split, size).epoch(2, "sqrt"))
    assert [len(batch.images) for batch in expected] == [4, 4, 3]
    for workers in (0, 1, 2):
        for cache_limit in (0, 1e9):
            loader = training(split, size, workers=workers, cache_limit=cache_limit)
            assert equal(list(loader.epoch(2, "sqrt")), expected), (workers, cache_limit)


@pytest.mark.parametrize("size", SIZES)
def test_an_epoch_can_be_entered_at_any_batch(tmp_path, size):
    loader = training(write_split(tmp_path, 11, size), size)
    whole = list(loader.epoch(1))
    for first in range(len(loader) + 1):
        assert equal(list(loader.epoch(1, first_batch=first)), whole[first:])


@pytest.mark.parametrize("size", SIZES)
def test_an_epoch_left_half_way_does_not_disturb_the_next(tmp_path, size):
    loader = training(write_split(tmp_path, 11, size), size, workers=1, cache_limit=0)
    expected = list(loader.epoch(1))
    next(loader.epoch(0))
    assert equal(list(loader.epoch(1)), expected)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("views", [1, 2])
def test_what_an_image_looks_like_does_not_depend_on_the_batch_size(tmp_path, size, views):
    split, shown = write_split(tmp_path, 10, size), []
    for batch_size in (4, 5):
        loader = TrainingLoader(split, Pixels(size), batch_size, seed=0, device=CPU, views=views)
        batches = [batch.images.unflatten(0, (views, -1)) for batch in loader.epoch(0)]
        shown.append(torch.cat(batches, dim=1))
    assert torch.equal(shown[0], shown[1])


@pytest.mark.parametrize("size", SIZES)
def test_epochs_differ(tmp_path, size):
    loader = training(write_split(tmp_path, 11, size), size)
    assert not equal(list(loader.epoch(0)), list(loader.epoch(1)))


def test_labels_and_indices_belong_to_the_images(tmp_path):
    split = write_split(tmp_path, 13, 16)
    for batch in training(split, 16).epoch(0, "balanced"):
        red, green, _ = colours(batch.images).round().T
        assert batch.indices.tolist() == (red / 10).tolist()
        assert batch.targets.tolist() == (green / 60).tolist() == [split.targets[i] for i in batch.indices]


def test_labels_belong_to_large_images(tmp_path):
    """The colours are jittered, but red is above half of blue in the images 5, 6 ... only."""
    split = write_split(tmp_path, 11, 80)
    split = split._replace(targets=[int(10 * index > 50) for index in range(11)])
    for batch in training(split, 72, workers=2, cache_limit=0).epoch(0):
        red, _, blue = colours(batch.images).T
        assert batch.targets.tolist() == (red > 0.55 * blue).long().tolist()


@pytest.mark.parametrize("size", SIZES)
def test_two_views_are_different_crops_of_the_same_images_view_by_view(tmp_path, size):
    split = write_split(tmp_path, 11, size + 8)
    (batch, *_) = training(split, size, views=2).epoch(0)
    assert len(batch.images) == 8
    assert torch.equal(batch.indices[:4], batch.indices[4:])
    assert torch.equal(batch.targets[:4], batch.targets[4:])
    assert batch.targets.tolist() == [split.targets[i] for i in batch.indices]
    assert all(not torch.equal(one, other) for one, other in zip(batch.images[:4], batch.images[4:], strict=True))
    if size <= 64:
        torch.testing.assert_close(colours(batch.images[:4]), colours(batch.images[4:]))


def test_images_are_mirrored_only_where_it_is_allowed(tmp_path):
    """With a dark left half and little room to shift, an image is mirrored when its right side is the darker."""
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, 8:] = 255
    paths = [tmp_path / f"{index:02}.png" for index in range(40)]
    for path in paths:
        Image.fromarray(pixels).save(path)
    turned = []
    for flips in (True, False):
        batches = training(Split(paths, [0, 1] * 20), 16, flips=flips).epoch(0)
        images = torch.cat([batch.images for batch in batches])
        turned.append((images[:, 0, :, 3] > images[:, 0, :, -4]).any(dim=1).sum().item())
    assert 8 <= turned[0] <= 32
    assert turned[1] == 0


def test_an_augmented_small_image_is_cropped_mirrored_and_normalised(tmp_path):
    split = write_split(tmp_path, 4, 16)
    (batch,) = training(split, 16).epoch(0)
    draws = epoch_draws(4, 0, 0)
    for image, index, row in zip(batch.images, batch.indices, draws, strict=True):
        pixels = torch.from_numpy(np.array(Image.open(split.paths[index]))).permute(2, 0, 1)
        pixels = padded_crop(pixels[None], row[None])[0]
        pixels = tvf.hflip(pixels) if row[FLIP] < 0.5 else pixels
        expected = tvf.normalize(pixels / 255, transforms.IMAGENET_MEAN, transforms.IMAGENET_STD)
        torch.testing.assert_close(image, expected)


def test_an_augmented_large_image_is_cropped_mirrored_jittered_and_normalised(tmp_path):
    split = write_split(tmp_path, 4, 100)
    (batch,) = training(split, 72).epoch(0)
    draws = epoch_draws(4, 0, 0)
    for image, index, row in zip(batch.images, batch.indices, draws, strict=True):
        pixels = np.array(random_resized_crop(Image.open(split.paths[index]), 72, row.tolist()))
        pixels = torch.from_numpy(pixels).permute(2, 0, 1)
        pixels = (tvf.hflip(pixels) if row[FLIP] < 0.5 else pixels) / 255
        pixels = colour_jitter_(pixels[None], row[None])[0]
        torch.testing.assert_close(image, tvf.normalize(pixels, transforms.IMAGENET_MEAN, transforms.IMAGENET_STD))


def test_a_large_jpeg_is_decoded_as_finely_as_its_crop_needs(tmp_path):
    paths = [tmp_path / f"{index}.jpg" for index in range(4)]
    for index, path in enumerate(paths):
        noise(80, 80, index).resize((800, 800), Image.Resampling.BICUBIC).save(path, quality=95)
    (batch,) = training(Split(paths, [0, 1, 0, 1]), 72, flips=False, cache_limit=0).epoch(0)
    draws = epoch_draws(4, 0, 0)
    for image, index, row in zip(batch.images, batch.indices, draws, strict=True):
        crop = random_resized_crop(Image.open(paths[index]).convert("RGB"), 72, row.tolist())
        pixels = colour_jitter_(torch.from_numpy(np.array(crop)).permute(2, 0, 1)[None] / 255, row[None])[0]
        expected = tvf.normalize(pixels, transforms.IMAGENET_MEAN, transforms.IMAGENET_STD)
        assert (image - expected).abs().mean() < 0.12  # of normalised values; decoded for 72 px it is 0.14 to 0.25


def test_the_flags_of_the_images_reach_the_training_loader(tiny_dataset):
    def loader(words: str) -> TrainingLoader:
        args = train_parser().parse_args(["--data_dir", str(tiny_dataset), *words.split()])
        folders = read_data(args)
        return build_training_loader(args, folders, build_pixels(args, folders), 0, CPU)

    told = loader("--hflip False --augment cutout --mixup .5 --cutmix 1 --supcon_views 2")
    assert (told.flips, told.augment, told.mixup, told.cutmix, told.views) == (False, ("cutout",), 0.5, 1, 2)
    assert loader("").flips
    (tiny_dataset / "dataset.json").write_text('{"hflip": false}')
    assert not loader("").flips
    assert loader("--hflip").flips


def test_images_without_contrast_are_not_divided_by_zero(tiny_dataset):
    for path in tiny_dataset.glob("train/*/*.png"):
        Image.new("RGB", (16, 16), (51, 102, 255)).save(path)
    args = train_parser().parse_args(["--data_dir", str(tiny_dataset), "--normalize", "dataset"])
    pixels = build_pixels(args, read_data(args))
    assert pixels.mean == pytest.approx((0.2, 0.4, 1))
    assert pixels.std == (0.001,) * 3


@pytest.mark.parametrize(("side", "size"), [(16, 16), (40, 32), (100, 72)])
@pytest.mark.parametrize("cache_limit", [0, 1e9])
def test_evaluation_feeds_what_pixels_makes_of_each_file(tmp_path, side, size, cache_limit):
    split = write_split(tmp_path, 9, side)
    pixels = Pixels(size, (0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    loader = EvaluationLoader(split, pixels, 4, CPU, cache_limit=cache_limit)
    batches = list(loader)
    assert [len(batch.images) for batch in batches] == [4, 4, 1]
    assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(9))
    assert torch.cat([batch.targets for batch in batches]).tolist() == split.targets
    expected = torch.stack([pixels(read_image(path)) for path in split.paths])
    assert torch.equal(torch.cat([batch.images for batch in batches]), expected)


def test_evaluation_is_the_same_with_workers_and_the_second_time(tmp_path):
    split = write_split(tmp_path, 9, 80)
    expected = list(EvaluationLoader(split, Pixels(72), 4, CPU))
    loader = EvaluationLoader(split, Pixels(72), 4, CPU, workers=2, cache_limit=0)
    assert equal(list(loader), expected)
    assert equal(list(loader), expected)


# --- files that are wrong


def failure(batches) -> str:
    """What `Failed` says. It is not kept: its traceback would hold the workers until they are collected as garbage,
    which takes five seconds each."""
    try:
        for _ in batches:
            pass
    except Failed as error:
        message = str(error)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("broken_off", [ConnectionResetError, EOFError])
def test_a_connection_that_breaks_waits_for_word_of_the_workers_death(tmp_path, broken_off):
    """Which otherwise comes out wherever the process is by then. Workers of a fork server send none."""
    pool = WorkerPool(FixedViews(write_split(tmp_path, 9, 72).paths, 72), 1, CPU)
    assert len(list(pool.read([[0], [1]]))) == 2
    loader = pool.loader

    def broken():
        threading.Timer(0.5, loader._iterator._workers[0].kill).start()
        raise broken_off
        yield

    pool.loader = broken()
    forked = multiprocessing.get_start_method() == "fork"
    error, words = (RuntimeError, "killed by signal") if forked else (Failed, "a data worker died")
    with pytest.raises(error, match=words):
        list(pool.read([[2]]))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("size", SIZES)
def test_a_file_deleted_after_the_start_is_named(tmp_path, size, workers):
    split = write_split(tmp_path, 9, size)
    loader = training(split, size, workers=workers, cache_limit=0)
    split.paths[3].unlink()
    assert str(split.paths[3]) in failure(loader.epoch(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_file_broken_after_the_start_is_named_in_evaluation(tmp_path, workers):
    split = write_split(tmp_path, 9, 16)
    loader = EvaluationLoader(split, Pixels(16), 4, CPU, workers, cache_limit=0)
    content = split.paths[5].read_bytes()
    split.paths[5].write_bytes(content[: len(content) // 2])
    assert str(split.paths[5]) in failure(loader)


@pytest.mark.parametrize("size", SIZES)
def test_a_cached_file_may_go_after_the_start(tmp_path, size):
    split = write_split(tmp_path, 9, size)
    loader = training(split, size)
    split.paths[3].unlink()
    assert [len(batch.images) for batch in loader.epoch(0)] == [4, 5]


@pytest.mark.parametrize("size", SIZES)
def test_all_broken_files_are_listed_at_the_start(tmp_path, size):
    split = write_split(tmp_path, 9, size)
    for index in (1, 4, 8):
        split.paths[index].write_bytes(b"no image")
    with pytest.raises(Refused) as error:
        training(split, size, workers=2)
    assert all(str(split.paths[index]) in str(error.value) for index in (1, 4, 8))
    assert str(split.paths[0]) not in str(error.value)


@pytest.mark.parametrize("side", [64, 100])
def test_images_in_memory_are_decoded_to_where_they_stay(tmp_path, side):
    """Python's memory beside the cache itself, which is torch's: a few images at a time."""
    split = write_split(tmp_path, 25, side)
    tracemalloc.start()
    loader = training(split, side, workers=2)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 25 * 3 * side**2
    views = (
        loader.source.views
        if side == 64
        else torch.stack(
            [torch.from_numpy(np.array(loader.source.loader.dataset.decoded[i])).permute(2, 0, 1) for i in range(25)]
        )
    )
    expected = [torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in split.paths]
    assert torch.equal(views, torch.stack(expected))


def test_a_turned_image_keeps_its_shape_in_memory(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    decoded = DecodedImages([tmp_path / "a.png"], workers=1)
    assert np.array_equal(np.asarray(decoded[0]), np.rot90(pixels, -1))


def test_a_header_that_claims_a_bomb_takes_no_memory(tmp_path):
    split = write_split(tmp_path, 3, 100)
    content = bytearray(split.paths[1].read_bytes())
    content[16:24] = (30000).to_bytes(4, "big") * 2  # width and height of a PNG
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    split.paths[1].write_bytes(content)
    with pytest.raises(Refused, match=f"^{split.paths[1]} has more than"):
        DecodedImages(split.paths, workers=1)


def test_an_image_of_another_size_than_its_header_says_is_refused(tmp_path, monkeypatch):
    split = write_split(tmp_path, 2, 100)
    monkeypatch.setattr(pixel_sources, "image_size", lambda path: (100, 99))  # as if it was replaced meanwhile
    with pytest.raises(Refused, match="not of the size"):
        DecodedImages(split.paths, workers=1)


def test_of_many_broken_files_twenty_are_named_and_the_others_counted(tmp_path):
    split = write_split(tmp_path, 23, 16)
    for path in split.paths:
        path.write_bytes(b"")
    with pytest.raises(Refused, match="and 3 more; scripts/audit_data.py lists them all$") as error:
        decode_all(split.paths, lambda index, path: read_image(path), workers=2)
    assert sum(str(path) in str(error.value) for path in split.paths) == 20


# --- sizes from headers


def test_squares_of_one_size_have_an_own_size(tmp_path):
    assert own_size(write_split(tmp_path, 5, 28).paths) == (28, None)
    assert own_size(write_split(tmp_path, 5, 96).paths) == (96, None)


def test_large_oblong_or_different_images_have_no_own_size(tmp_path):
    assert own_size(write_split(tmp_path / "large", 3, 97).paths) == (None, None)
    paths = write_split(tmp_path / "small", 3, 28).paths
    other = tmp_path / "other.png"
    for width, height in ((28, 30), (32, 32)):
        noise(width, height).save(other)
        assert own_size([*paths, other]) == (None, other)
    assert own_size([other, *paths]) == (None, paths[0])


def test_one_image_that_makes_all_of_them_large_is_named(tiny_dataset, capsys):
    def size(words: str = "") -> int:
        args = train_parser().parse_args(["--data_dir", str(tiny_dataset), *words.split()])
        return build_pixels(args, read_data(args)).size

    own = size()
    assert own < 97
    assert capsys.readouterr().err == ""
    folders = read_data(train_parser().parse_args(["--data_dir", str(tiny_dataset)]))
    odd = folders.splits["train"].paths[1]
    noise(own, own + 1).save(odd)
    assert size() == 224
    assert f"{odd} is of another size" in capsys.readouterr().err
    assert size(f"--img_size {own}") == own
    assert capsys.readouterr().err == ""


def test_files_without_a_header_have_no_say_in_the_size(tmp_path):
    paths = write_split(tmp_path, 3, 28).paths
    paths[0].write_bytes(b"no image")
    assert own_size(paths) == (28, None)
    assert own_size(paths[:1]) == (None, None)


def test_decoded_bytes_are_three_a_pixel(tmp_path):
    paths = write_split(tmp_path, 5, 20).paths
    noise(40, 10).save(paths[0])
    paths[1].write_bytes(b"no image")  # counted as the mean of the others
    assert decoded_bytes(paths) == 5 * 3 * (400 + 3 * 400) / 4


def test_decoded_bytes_of_a_long_list_are_estimated_from_a_sample(tmp_path):
    paths = write_split(tmp_path, 2, 20).paths * 500
    assert decoded_bytes(paths) == pytest.approx(1000 * 1200, rel=0.02)


def test_a_line_of_a_pixel_is_cut_to_its_middle_before_it_is_enlarged():
    ramp = np.arange(60_000, dtype=np.uint16)[:, None, None] // 256
    image = Image.fromarray(np.broadcast_to(ramp, (60_000, 1, 3)).astype(np.uint8))
    view = np.asarray(transforms.fixed_view(image, 224))
    assert view.shape == (224, 224, 3)
    assert set(np.unique(view)) == {30_000 // 256}
