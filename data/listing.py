"""What lies in a data folder, right or wrong, and what the names alone show."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data.folders import images_by_class, lists_in_use, read_image_folders
from data.preparation import WRITTEN
from engine.errors import Refused

ACT, NOTE, HINT = "act", "note", "hint"  # act: training would stop, or its figures would be wrong


class Finding(NamedTuple):
    level: str
    message: str
    files: list[str] = []  # below the data folder; of a pair, "one = other"


@dataclass(frozen=True)
class Listing:
    """Every split, class and image that was found."""

    root: Path
    splits: dict[str, dict[str, list[Path]]]  # split -> class -> images
    ignored: list[Path]  # neither folder nor image, or out of place
    listed: bool = False  # by image lists, which may leave out what lies there

    def counts(self, split: str) -> dict[str, int]:
        return {name: len(paths) for name, paths in self.splits.get(split, {}).items()}


def listing(root: Path, list_dir: Path | None = None) -> Listing:
    """The images of every split and class, empty classes and classes of one split included."""
    if lists_in_use(root, list_dir) is not None:
        folders = read_image_folders(root, list_dir)
        return Listing(root, {name: folders.by_class(split) for name, split in folders.splits.items()}, [], True)
    if not (root / "train").is_dir():
        raise Refused(f"{root} has no train/ folder; a data set is laid out as {root}/train/<class>/<image>")
    splits = images_by_class(root)
    used = {path for classes in splits.values() for paths in classes.values() for path in paths}
    used |= {root / split / name for split in splits for name in splits[split]}
    ours = {*WRITTEN, "classes.json"}
    found = [path for split in splits for path in [*(root / split).glob("*"), *(root / split).glob("*/*")]]
    found += [path for path in root.iterdir() if path.name not in ours and not path.name.startswith("synthetic")]
    return Listing(root, splits, sorted(set(found) - used))


def listing_findings(found: Listing) -> list[Finding]:
    """Wrong, doubtful or worth knowing, from the names alone."""
    train = found.counts("train")
    findings = []
    if len(train) < 2:
        findings.append(Finding(ACT, f"train has {len(train)} class(es); a classifier needs at least two"))
    empty = [f"train/{name}" for name, count in train.items() if not count]
    if empty:
        findings.append(Finding(ACT, f"{len(empty)} empty class(es) in train; add images or remove the folder", empty))
    for split in ("val", "test"):
        findings += split_findings(split, found.counts(split), train)
    single = [f"train/{name}" for name, count in train.items() if count == 1]
    if single:
        findings.append(Finding(NOTE, f"{len(single)} class(es) with a single training image", single))
    if found.ignored:
        files = [str(path.relative_to(found.root)) for path in found.ignored]
        findings.append(
            Finding(NOTE, f"{len(files)} entries that are not used: no image, hidden or out of place", files)
        )
    return findings


def split_findings(split: str, counts: dict[str, int], train: dict[str, int]) -> list[Finding]:
    if not any(counts.values()):
        purpose = "the last epoch will be the model" if split == "val" else "nothing can be tested"
        return [Finding(NOTE, f"no {split} images: {purpose}")]
    findings = []
    unknown = [f"{split}/{name}" for name in counts if name not in train]
    if unknown:
        findings.append(
            Finding(ACT, f"{len(unknown)} class(es) in {split} that train lacks; rename, move or remove them", unknown)
        )
    without = [f"{split}/{name}" for name, count in train.items() if count and not counts.get(name)]
    if without:
        findings.append(Finding(NOTE, f"{len(without)} class(es) cannot be judged in {split}: no images", without))
    return findings
