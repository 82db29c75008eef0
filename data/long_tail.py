"""Long-tailed class sizes and the draw of the images: pure functions of names, numbers and a seed.

No random generator is used anywhere: everything is ordered by SHA-256, so that every machine and every version of every
library draws the same images, and a smaller draw is contained in a larger one.
"""

import hashlib
from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path

from engine.errors import Refused

IMBALANCES = ("exp", "step", "none")
Names = dict[str, list[str]]  # class -> names of images


@dataclass(frozen=True)
class Profile:
    """How the images of a source are spread over the splits.

    ``val_per_class`` and ``test_per_class`` are images of every class. Where one is None, a split that the source has
    is kept whole, and one that it lacks gets ``val_fraction`` or ``test_fraction`` of every class.
    """

    imb_type: str = "none"
    imb_factor: float = 100.0  # largest / smallest class
    class_order: tuple[str, ...] | None = None  # largest class first; None: in class-index order
    val_per_class: int | None = None
    test_per_class: int | None = None
    val_fraction: float = 0.0
    test_fraction: float = 0.0
    data_seed: int = 0


def imbalanced_counts(imb_type: str, n_max: int, num_classes: int, imb_factor: float) -> list[int]:
    """Images by class, largest first (Cao et al., LDAM, 2019, section 4).

    ``exp``: ``n_max * imb_factor ** (-k / (num_classes - 1))``, rounded down. ``step``: the first half (rounded up)
    ``n_max``, the others ``n_max / imb_factor``. No class is left without an image.
    """
    if imb_type == "exp":
        shares = [imb_factor ** (-k / max(num_classes - 1, 1)) for k in range(num_classes)]
    else:
        half = ceil(num_classes / 2)
        shares = [1.0] * half + [1.0 / imb_factor] * (num_classes - half)
    return [max(1, floor(n_max * share + 1e-9)) for share in shares]  # 1e-9: 5000 / 100 may come out as 49.999...


def drawing_order(names: list[str], seed: int, class_name: str) -> list[str]:
    """``names`` by the SHA-256 of ``<seed>/<class>/<name>``."""
    return sorted(names, key=lambda name: sha256_of(f"{seed}/{class_name}/{name}"))


def random_class_order(classes: list[str], seed: int) -> tuple[str, ...]:
    """``classes`` by the SHA-256 of ``<seed>/<class>``."""
    return tuple(sorted(classes, key=lambda name: sha256_of(f"{seed}/{name}")))


def resolved_class_order(order: str, classes: list[str], seed: int) -> tuple[str, ...] | None:
    """The classes, largest first, that ``index``, ``random`` or the lines of a file ask for; None: index order."""
    if order == "index":
        return None
    if order == "random":
        return random_class_order(classes, seed)
    if not Path(order).is_file():
        raise Refused(f"--class_order {order} is neither index, random nor a file with one class name a line")
    lines = Path(order).read_text("utf-8-sig", "surrogateescape").splitlines()
    names = tuple(line.strip() for line in lines if line.strip())
    odd = sorted(set(names) ^ set(classes))
    if odd or len(names) != len(classes):
        named = odd[0] if odd else next(name for name in names if names.count(name) > 1)
        raise Refused(f"--class_order {order} must name every one of the {len(classes)} classes once: see {named}")
    return names


def sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


def draw(source: dict[str, Names], profile: Profile) -> dict[str, Names]:
    """The names in each split, in drawing order.

    A val or test split that the source lacks is carved from the end of each training class's drawing order. The
    training images are the first of what is left, as many as the imbalance asks for.
    """
    ordered = {
        split: {name: drawing_order(names, profile.data_seed, name) for name, names in classes.items()}
        for split, classes in source.items()
    }
    drawn = {split: {} for split in ("train", "val", "test")}
    for name, names in ordered["train"].items():
        val, test = carved_sizes(
            len(names), name, profile, carves_val="val" not in source, carves_test="test" not in source
        )
        rest = len(names) - val - test
        drawn["train"][name], drawn["val"][name], drawn["test"][name] = (
            names[:rest],
            names[rest : rest + val],
            names[rest + val :],
        )
    for split, per_class in (("val", profile.val_per_class), ("test", profile.test_per_class)):
        if split in source:
            drawn[split] = {name: names[:per_class] for name, names in ordered[split].items()}
    drawn["train"] = imbalanced(drawn["train"], profile)
    return {split: classes for split, classes in drawn.items() if any(classes.values())}


def carved_sizes(n: int, class_name: str, profile: Profile, carves_val: bool, carves_test: bool) -> tuple[int, int]:
    """Images of a class of ``n`` for val and for test. Train keeps at least one; then test is served, then val."""
    val = wanted(n, profile.val_per_class, profile.val_fraction) if carves_val else 0
    test = wanted(n, profile.test_per_class, profile.test_fraction) if carves_test else 0
    if n <= val + test and profile.imb_type != "none":
        raise Refused(
            f"class {class_name} has {n} training images, too few for {val} in val, {test} in test and one in train; "
            f"lower --val_per_class or --test_per_class, or keep the natural imbalance with --imb_type none"
        )
    test = min(test, n - 1)
    return min(val, n - 1 - test), test


def wanted(n: int, per_class: int | None, fraction: float) -> int:
    if per_class is not None:
        return per_class
    return max(1, floor(n * fraction + 0.5)) if fraction else 0


def imbalanced(train: Names, profile: Profile) -> Names:
    """The first images of each class, as many as the profile says for its place in the order of classes."""
    if profile.imb_type == "none":
        return train
    order = profile.class_order or sorted(train)
    smallest = min(len(names) for names in train.values())
    counts = imbalanced_counts(profile.imb_type, smallest, len(order), profile.imb_factor)
    return {name: train[name][:count] for name, count in zip(order, counts, strict=True)}
