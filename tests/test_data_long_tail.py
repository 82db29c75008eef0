"""Class sizes against the numbers of the papers, and what a draw must keep."""

import hashlib

import pytest

from data.long_tail import Profile, draw, imbalanced_counts, random_class_order, resolved_class_order
from engine.errors import Refused

LDAM_CIFAR10 = {  # the class sizes of Cao et al., 2019
    ("exp", 10): [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500],
    ("exp", 50): [5000, 3237, 2096, 1357, 878, 568, 368, 238, 154, 100],
    ("exp", 100): [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50],
    ("step", 10): [5000] * 5 + [500] * 5,
    ("step", 50): [5000] * 5 + [100] * 5,
    ("step", 100): [5000] * 5 + [50] * 5,
}


@pytest.mark.parametrize(("profile", "counts"), LDAM_CIFAR10.items())
def test_cifar10_has_the_published_class_sizes(profile, counts):
    assert imbalanced_counts(profile[0], 5000, 10, profile[1]) == counts


def test_digits_have_the_sizes_of_imbalance_20():
    assert imbalanced_counts("exp", 124, 10, 20) == [124, 88, 63, 45, 32, 23, 16, 12, 8, 6]


def test_cifar100_ends_at_five_images_in_spite_of_floating_point():
    counts = imbalanced_counts("exp", 500, 100, 100)
    assert (counts[0], counts[-1], sum(counts)) == (500, 5, 10847)


def test_odd_class_numbers_step_down_after_the_larger_half_and_no_class_is_left_empty():
    assert imbalanced_counts("step", 10, 5, 100) == [10, 10, 10, 1, 1]
    assert imbalanced_counts("exp", 3, 3, 1000) == [3, 1, 1]


def pool(**sizes: int) -> dict:
    return {name: [f"{index}.png" for index in range(size)] for name, size in sizes.items()}


def slowly_ordered(names: list[str], class_name: str, seed: int) -> list[str]:
    digests = {hashlib.sha256(f"{seed}/{class_name}/{name}".encode()).hexdigest(): name for name in names}
    return [digests[digest] for digest in sorted(digests)]


def test_the_first_images_in_hash_order_are_drawn_and_the_last_are_tested():
    names = pool(a=30, b=30)
    drawn = draw({"train": names}, Profile("exp", 10, val_per_class=2, test_per_class=3, data_seed=7))
    order = slowly_ordered(names["b"], "b", 7)
    assert drawn["train"]["b"] == order[:2]  # (30 - 5) / 10, rounded down
    assert drawn["val"]["b"] == order[25:27]
    assert drawn["test"]["b"] == order[27:]


def test_splits_do_not_overlap_and_smaller_draws_are_nested():
    source = {"train": pool(a=100, b=100, c=100)}
    large, small = (draw(source, Profile("exp", factor, val_per_class=9, test_per_class=9)) for factor in (5, 50))
    for name in "abc":
        parts = [set(large[split][name]) for split in ("train", "val", "test")]
        assert sum(map(len, parts)) == len(set.union(*parts))
        assert set(small["train"][name]) <= set(large["train"][name])
        assert small["test"][name] == large["test"][name]


def test_the_order_of_the_files_does_not_matter_and_the_seed_does():
    names = pool(a=50, b=50)
    shuffled = {name: images[::-1] for name, images in names.items()}
    assert draw({"train": names}, Profile("exp", 5)) == draw({"train": shuffled}, Profile("exp", 5))
    assert draw({"train": names}, Profile("exp", 5)) != draw({"train": names}, Profile("exp", 5, data_seed=1))


def test_a_test_split_of_its_own_is_kept_or_cut():
    source = {"train": pool(a=20, b=20), "test": pool(a=8, b=8)}
    assert sorted(draw(source, Profile())["test"]["a"]) == sorted(source["test"]["a"])
    assert len(draw(source, Profile(test_per_class=3))["test"]["b"]) == 3


def test_fractions_keep_the_natural_imbalance_and_a_single_image_goes_to_train():
    drawn = draw({"train": pool(a=100, b=10, c=3, d=2, e=1)}, Profile(val_fraction=0.1, test_fraction=0.2))
    sizes = {name: [len(drawn[split][name]) for split in ("train", "val", "test")] for name in "abcde"}
    assert sizes == {"a": [70, 10, 20], "b": [7, 1, 2], "c": [1, 1, 1], "d": [1, 0, 1], "e": [1, 0, 0]}


def test_a_class_too_small_for_balanced_splits_is_refused_by_name():
    with pytest.raises(Refused, match="class b has 5 training images, too few for 2 in val, 3 in test"):
        draw({"train": pool(a=50, b=5)}, Profile("exp", 5, val_per_class=2, test_per_class=3))


def test_the_class_order_says_which_class_is_large(tmp_path):
    (tmp_path / "order.txt").write_text("\N{BYTE ORDER MARK}c\na\n\nb\n")
    order = resolved_class_order(str(tmp_path / "order.txt"), ["a", "b", "c"], 0)
    drawn = draw({"train": pool(a=100, b=100, c=100)}, Profile("exp", 100, class_order=order))
    assert {name: len(images) for name, images in drawn["train"].items()} == {"c": 100, "a": 10, "b": 1}


def test_a_random_class_order_depends_on_the_seed_only():
    classes = list("abcdefgh")
    assert random_class_order(classes, 3) == random_class_order(classes[::-1], 3)
    assert sorted(random_class_order(classes, 3)) == classes
    assert random_class_order(classes, 3) != random_class_order(classes, 4)


@pytest.mark.parametrize(("lines", "named"), [("a\nb", "c"), ("a\nb\nc\nc", "c"), ("a\nb\nx", "c"), (None, "neither")])
def test_a_class_order_that_is_no_permutation_is_refused(tmp_path, lines, named):
    path = tmp_path / "order.txt"
    if lines:
        path.write_text(lines)
    with pytest.raises(Refused, match=named):
        resolved_class_order(str(path), ["a", "b", "c"], 0)
