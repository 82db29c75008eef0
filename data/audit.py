"""Every image of a data folder decoded once: unreadable files, duplicates, class sizes and what they suggest."""

import hashlib
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from math import ceil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from data.duplicates import near_duplicates
from data.folders import image_names
from data.images import read_image
from data.listing import ACT, HINT, NOTE, Finding, Listing, listing_findings
from data.split_hash import hash_of_lines
from engine.console import progress
from engine.errors import Refused
from engine.files import read_json
from engine.metrics import FEW, MANY, shot_groups

AGAIN = "prepare the folder again with --overwrite"


def audit(found: Listing, workers: int, near_limit: int) -> tuple[list[Finding], dict]:
    """All findings, the worst first, and the figures of the data set."""
    paths = image_names(found.root, found.splits)
    names, inspected = list(paths), inspect_all(list(paths.values()), workers)
    findings = listing_findings(found)
    changed = [] if found.listed else record_findings(found.root, names, inspected)
    findings += unreadable_findings(found.root, inspected, came_broken=not changed) + changed
    if dim := [name for name, image in zip(names, inspected, strict=True) if image.dim]:
        text = f"{len(dim)} image(s) of 16 bits use less than an eighth of their range: they are read as nearly black"
        findings.append(Finding(NOTE, text, dim))
    findings += duplicate_findings(names, inspected)
    findings += near_duplicate_findings(names, inspected, near_limit)
    findings.sort(key=lambda finding: (ACT, NOTE, HINT).index(finding.level))
    return findings, figures(found, inspected)


class Inspected(NamedTuple):
    """One image file."""

    digest: str | None = None  # SHA-256 of the content; None where not even that can be read
    thumbnail: np.ndarray | None = None  # grey, uint8 [32, 32]
    size: tuple[int, int] | None = None  # width, height as stored
    error: str | None = None
    dim: bool = False  # of 16 bits that use less than an eighth of their range


def inspect(path: Path) -> Inspected:
    digest = None
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        grey = read_image(path, at_least=32).convert("L").resize((32, 32), Image.Resampling.BOX)
        with Image.open(path) as image:
            size = image.size
            dim = image.mode.startswith("I;16") and np.asarray(image).max() < 2**13
    except (OSError, Refused) as error:
        return Inspected(digest, error=str(error))
    return Inspected(digest, np.asarray(grey), size, dim=bool(dim))


def inspect_all(paths: list[Path], workers: int) -> list[Inspected]:
    with ThreadPoolExecutor(workers) as pool:  # decoding and hashing leave the interpreter lock
        return list(progress(pool.map(inspect, paths), "reading", "image", total=len(paths)))


def unreadable_findings(root: Path, inspected: list[Inspected], came_broken: bool) -> list[Finding]:
    errors = [image.error.removeprefix(f"{root}/") for image in inspected if image.error]
    remedy = ""
    if came_broken and (root / "split.json").is_file():
        remedy = f"; they came so from where the folder was prepared from: mend them there, then {AGAIN}"
    return [Finding(ACT, f"{len(errors)} file(s) that cannot be read{remedy}", errors)] if errors else []


def record_findings(root: Path, names: list[str], inspected: list[Inspected]) -> list[Finding]:
    """Whether the images are still those of ``split.json``."""
    record = read_json(root / "split.json", default={})
    if not record:
        return []
    listed = set(record.get("files") or [])
    changed = [f"{name}: added" for name in names if name not in listed]
    changed += [f"{name}: missing" for name in sorted(listed - set(names))]
    if changed:
        return [Finding(ACT, f"{len(changed)} image(s) differ from split.json; {AGAIN}", changed)]
    digest = hash_of_lines(f"{name} {image.digest}" for name, image in zip(names, inspected, strict=True))
    if digest != record.get("hash") and all(image.digest for image in inspected):
        return [Finding(ACT, f"the content of images differs from the hash in split.json; {AGAIN}")]
    return []


def duplicate_findings(names: list[str], inspected: list[Inspected]) -> list[Finding]:
    """Pairs of equal files, each with the first of its group: a leak between splits is told from one label twice and
    from two labels."""
    groups, leaks, contradictions, repeats = defaultdict(list), [], [], []
    for name, image in zip(names, inspected, strict=True):
        if not image.error:
            groups[image.digest].append(name)
    for first, *others in groups.values():
        for other in others:
            (split, label, _), (other_split, other_label, _) = first.split("/", 2), other.split("/", 2)
            kind = leaks if split != other_split else contradictions if label != other_label else repeats
            kind.append(f"{first} = {other}")
    findings = []
    if leaks:
        findings.append(Finding(ACT, f"{len(leaks)} image(s) in two splits; remove one of each pair", leaks))
    if contradictions:
        findings.append(Finding(ACT, f"{len(contradictions)} image(s) in two classes of a split", contradictions))
    if repeats:
        findings.append(Finding(NOTE, f"{len(repeats)} image(s) twice in one class of a split", repeats))
    return findings


def near_duplicate_findings(names: list[str], inspected: list[Inspected], limit: int) -> list[Finding]:
    """Pairs that look alike without being equal; across splits they are named first."""
    if len(names) > limit:
        return [Finding(NOTE, f"near-duplicates are not searched among more than {limit} images; see --near_limit")]
    first = {image.digest: index for index, image in reversed(list(enumerate(inspected))) if not image.error}
    readable = sorted(first.values())  # one of equal files, which are reported as such
    if not readable:
        return []
    pairs = [
        (names[readable[i]], names[readable[j]])
        for i, j in near_duplicates(np.stack([inspected[index].thumbnail for index in readable]))
    ]
    across = [f"{one} ~ {other}" for one, other in pairs if one.split("/")[0] != other.split("/")[0]]
    within = [f"{one} ~ {other}" for one, other in pairs if one.split("/")[0] == other.split("/")[0]]
    findings = [Finding(HINT, f"{len(across)} pair(s) across splits look alike", across)] if across else []
    return findings + ([Finding(HINT, f"{len(within)} pair(s) within a split look alike", within)] if within else [])


def figures(found: Listing, inspected: list[Inspected]) -> dict:
    """Counts, how uneven they are, image sizes, and settings that they suggest."""
    counts = {split: found.counts(split) for split in found.splits}
    sizes = sorted({image.size for image in inspected if image.size}, key=lambda size: size[0] * size[1])
    train = [count for count in counts["train"].values() if count]
    return {
        "images": {split: sum(classes.values()) for split, classes in counts.items()},
        "image_sizes": {"smallest": sizes[0], "largest": sizes[-1], "different": len(sizes)} if sizes else {},
        **(distribution(train) if train else {}),
        "counts": counts,
    }


def distribution(class_counts: list[int]) -> dict:
    """How uneven positive ``class_counts`` are, and the settings that they suggest.

    ``cbl_beta`` is 1 - 1/N with N the images of the largest class (Cui et al., Class-Balanced Loss, 2019).
    ``thresholds`` (many above, few below) are the usual ones, or thirds of the classes where those leave a group empty.
    """
    counts = np.sort(class_counts)
    groups = {name: int(group.sum()) for name, group in shot_groups(counts).items()}
    rank = np.arange(1, len(counts) + 1)
    third = ceil(len(counts) / 3)
    few, many = int(counts[third - 1]) + 1, int(counts[-third]) - 1
    thirds = shot_groups(counts, many, few)
    better = min(groups.values()) == 0 and few <= many and all(group.any() for group in thirds.values())
    return {
        "classes": len(counts),
        "largest_class": int(counts[-1]),
        "smallest_class": int(counts[0]),
        "imbalance_factor": float(counts[-1] / counts[0]),
        "gini": float(((2 * rank - len(counts) - 1) * counts).sum() / (len(counts) * counts.sum())),
        "groups": groups,
        "suggested": {
            "cbl_beta": 1 - 1 / int(counts[-1]),
            "thresholds": {"many_above": many, "few_below": few} if better else {"many_above": MANY, "few_below": FEW},
        },
    }
