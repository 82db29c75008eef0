"""What a run says of itself: args.json, log.jsonl and the lines at its start."""

import argparse
import bisect
import contextlib
import functools
import hashlib
import importlib.metadata
import io
import math
import os
import platform
import subprocess
from pathlib import Path

import torch

from data.build import mirrors
from data.folders import ImageFolders
from data.loaders import Pixels
from data.samplers import batch_bounds
from data.split_hash import split_hash, synthetic_hash
from engine import distributed, files
from engine.errors import Refused
from engine.flags import flag_words, resolved_epoch
from engine.hardware import hardware
from engine.optim import steps_in_epoch
from engine.options import train_parser
from losses import build_objective
from models import LongTailClassifier
from rsg import generates

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "scikit-learn", "safetensors")
CIRCUMSTANCES = ("precision", "channels_last", "device", "hardware", "threads", "processes", "commit")
NOT_DOCS = ":(top,exclude)docs"  # as git names it: the ledger writes there between the runs that it is made of
OUR_MODULES = [f":(top){name}/*.py" for name in ("losses", "models", "rsg", "data", "engine")]
REQUIRED = {"flags", "classes", "class_counts", "readable_names", "img_size", "mean", "std", "split_hash", "seed"}


def plain_flags(args: argparse.Namespace) -> dict:
    """The flags as JSON keeps them."""
    return {flag: str(value) if isinstance(value, Path) else value for flag, value in vars(args).items()}


@functools.cache
def default_flags() -> dict:
    """Those of the train script, as `plain_flags` keeps them."""
    return plain_flags(train_parser().parse_args([]))


def new_record(
    args: argparse.Namespace,
    folders: ImageFolders,
    pixels: Pixels,
    seed: int,
    model: LongTailClassifier,
    optimizer: torch.optim.Optimizer,
    amp_dtype: torch.dtype | None,
    channels_last: bool,
) -> dict:
    """The content of args.json."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    generator = sum(size for name, size in sizes.items() if name.startswith("generator."))
    synthetic = {}
    if folders.synthetic:
        synthetic = {"synthetic_counts": folders.synthetic_counts, "synthetic_hash": synthetic_hash(folders)}
    limit = min(group["lr_limit"] for group in optimizer.param_groups)
    return {
        "flags": plain_flags(args),
        "classes": folders.classes,
        "class_counts": folders.class_counts,
        "readable_names": folders.readable_names,
        "img_size": pixels.size,
        "mean": pixels.mean,
        "std": pixels.std,
        "mirrored": mirrors(args, folders),
        "split_hash": split_hash(folders),
        **synthetic,
        "parameters": sum(size for name, size in sizes.items() if name.startswith(("backbone.", "heads."))),
        "generator_parameters": generator,
        "objective": str(build_objective(args, folders.class_counts, args.epochs - 1)),
        "precision": str(amp_dtype or torch.float32).removeprefix("torch."),
        "channels_last": channels_last,
        "compiled": args.compile,
        "device": str(next(model.parameters()).device),
        "hardware": hardware(next(model.parameters()).device),
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
        "versions": versions,
        "center_lr_limit": limit if math.isfinite(limit) else None,
        "commit": code_commit(),
        "seed": seed,
        "parent": parent_run(args),
    }


def parent_run(args: argparse.Namespace) -> str | None:
    """The folder of the run whose weights this one starts from."""
    is_of_run = args.weights is not None and (args.weights.parent / "args.json").is_file()
    return str(args.weights.parent) if is_of_run else None


def check_start(args: argparse.Namespace, record: dict) -> list[str]:
    """Warnings when the weights that a run starts from have learned on otherwise normalised images, or come from a run
    on others of the same classes."""
    if (parent := parent_run(args)) is None:
        return []
    told, warnings = files.read_json(Path(parent) / "args.json"), []
    if any(told.get(name, [*record[name]]) != [*record[name]] for name in ("mean", "std")):
        warnings.append(
            f"--weights {args.weights} learned on images normalised with other means and deviations; see --normalize"
        )
    if told.get("classes") == record["classes"] and told.get("split_hash") != record["split_hash"]:
        warnings.append(
            f"--weights {args.weights} comes from a run on other images of these classes; none that it trained on "
            f"should be in val/ or test/ of {record['flags']['data_dir']}"
        )
    return warnings


def read_record(folder: Path) -> dict:
    """args.json of a run; flags that came after it have their defaults. `Refused` when it says what no run says."""
    path = folder / "args.json"
    record = files.read_json(path)
    if missing := REQUIRED - record.keys():
        raise Refused(f"{path} is no record of a run: it lacks {', '.join(sorted(missing))}")
    if wrong := [name for name, is_sound in _soundness(record).items() if not is_sound]:
        raise Refused(f"{path} is damaged: no run has these {', '.join(wrong)}; put a copy in its place")
    flags = default_flags() | record["flags"]
    unknown = sorted(flags.keys() - default_flags().keys())  # an older version's, or a loss or head of somebody's own
    if added := [name for name in unknown if name.startswith("add_") and flags[name] is True]:
        raise Refused(
            f"{path}: the run was trained with --{added[0]}, which this code does not know; use that of commit "
            f"{record.get('commit')}"
        )
    record["flags"] = flags
    return record


def _soundness(record: dict) -> dict[str, bool]:
    """Whether each entry that others build on is what a run has written."""

    def is_list(name: str, kind: type, low: float = -math.inf) -> bool:
        value = record[name]
        return isinstance(value, list) and all(
            isinstance(each, kind) and (kind is str or low < each < math.inf) for each in value
        )

    number = len(record["classes"]) if is_list("classes", str) else 0
    return {
        "flags": isinstance(record["flags"], dict) and _are_flags(record["flags"]),
        "classes": number > 1,
        "class_counts": is_list("class_counts", int, low=0) and len(record["class_counts"]) == number,
        "readable_names": is_list("readable_names", str) and len(record["readable_names"]) == number,
        "img_size": isinstance(record["img_size"], int) and 0 < record["img_size"] < 2**16,
        "mean": is_list("mean", float | int) and len(record["mean"]) == 3,
        "std": is_list("std", float | int, low=0) and len(record["std"]) == 3,
        "versions": isinstance(record.get("versions", {}), dict),
    }


def _are_flags(flags: dict) -> bool:
    """Whether the train script takes those of ``flags`` that it knows."""
    defaults = default_flags()
    known = {name: value for name, value in flags.items() if name in defaults}
    if any(value is None and defaults[name] is not None for name, value in known.items()):
        return False
    with contextlib.redirect_stderr(io.StringIO()), contextlib.suppress(SystemExit):
        train_parser().parse_args(flag_words(known, defaults))
        return True
    return False


def circumstances(record: dict) -> dict:
    """What a run's figures depend on beside its flags and images."""
    return {name: record[name] for name in CIRCUMSTANCES if name in record} | record.get("versions", {})


def sessions(record: dict) -> list[dict]:
    """The `circumstances` from the run's start, and from each time on that it went on under others: ``resumed`` holds
    epoch, step and what changed."""
    states = [circumstances(record)]
    for change in record.get("resumed", []):
        states.append(states[-1] | change)
    return states


def synthetic_use(record: dict) -> dict:
    """What a report says of synthetic images among those that a run was trained on; empty when there were none."""
    if "synthetic_counts" not in record:
        return {}
    made, weight = sum(record["synthetic_counts"]), record["flags"]["synthetic_weight"]
    return {"synthetic": {"images": made, "share": made / training_images(record), "weight": weight}}


def real_class_counts(record: dict) -> list[int]:
    """Training images by class, without synthetic ones."""
    if not record["flags"]["count_synthetic"] or "synthetic_counts" not in record:
        return record["class_counts"]
    return [all_ - made for all_, made in zip(record["class_counts"], record["synthetic_counts"], strict=True)]


def training_images(record: dict) -> int:
    """All that an epoch goes through, real and synthetic."""
    return sum(real_class_counts(record)) + sum(record.get("synthetic_counts", []))


def is_finished(record: dict, rows: list[dict]) -> bool:
    """Whether the run with these ``rows`` of its log has nothing left to train."""
    flags = argparse.Namespace(**record["flags"])
    num_batches = len(batch_bounds(training_images(record), flags.batch_size, 2 * record.get("processes", 1)))
    return bool(rows) and not steps_in_epoch(flags, rows[-1]["epoch"] + 1, num_batches)


def check_finished(folder: Path, record: dict) -> list[str]:
    """A warning that the run in ``folder`` has epochs left, if its log is there to say so."""
    rows = read_log(folder)
    if not rows or is_finished(record, rows):
        return []
    return [f"{folder} is not finished: {rows[-1]['epoch'] + 1} of {record['flags']['epochs']} epochs are done"]


def read_log(folder: Path) -> list[dict]:
    """The rows of log.jsonl."""
    return files.read_json_lines(folder / "log.jsonl", {"epoch"}, "row of a log")


def code_commit(folder: Path = Path(__file__).parent) -> str | None:
    """The checkout's commit; None outside a checkout. Where files differ from it, outside docs/ or new modules in
    our packages, ``-dirty-`` and a hash of the difference follow."""

    def git(*words: str) -> bytes:
        return subprocess.run(["git", "-C", folder, *words], capture_output=True, check=True).stdout

    try:
        commit, top = os.fsdecode(git("rev-parse", "HEAD", "--show-toplevel")).splitlines()
        changes = git("diff", "--binary", "--no-ext-diff", "HEAD", "--", NOT_DOCS)
        new = git("ls-files", "--others", "--exclude-standard", "--full-name", "-z", "--", *OUR_MODULES)
        for name in filter(None, new.split(b"\0")):
            changes += name + (Path(top) / os.fsdecode(name)).read_bytes()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}-dirty-{hashlib.sha256(changes).hexdigest()[:8]}" if changes else commit


def same_code(commit: str | None, other: str | None, folder: Path = Path(__file__).parent) -> bool:
    """Whether two commits of this checkout differ in docs/ at most; not where one is ``-dirty`` or unknown here."""
    git = ["git", "-C", str(folder), "diff", "--quiet", str(commit), str(other), "--", NOT_DOCS]
    try:
        return commit == other or subprocess.run(git, check=False, capture_output=True).returncode == 0
    except OSError:
        return False


def describe(args: argparse.Namespace, folders: ImageFolders, record: dict) -> str:
    """The lines at the start of a run."""
    counts = real_class_counts(record)
    images = {name: len(split.paths) for name, split in folders.splits.items()}
    data = (
        f"data       {folders.root}: {len(counts)} classes of {max(counts)} to {min(counts)} training images "
        f"(imbalance {max(counts) / min(counts):.4g}); {', '.join(f'{n} {name}' for name, n in images.items())}; "
        f"{record['img_size']} px, {'mirrored at random' if record['mirrored'] else 'not mirrored'}; "
        f"split {record['split_hash'][:12]}"
    )
    layout = "channels last" if record["channels_last"] else "channels first"
    threads = f"{record['threads']} thread{'s' * (record['threads'] > 1)}"
    model = (
        f"model      {args.arch}, {record['parameters'] / 1e6:.2f} M parameters; {record['precision']}, {layout}"
        f"{', compiled' if record['compiled'] else ''} on {record['device']}, {threads}; "
        f"seed {record['seed']}"
    )
    lines = [data]
    changes = [*args.augment, *(f"{name} {value:g}" for name in ("mixup", "cutmix") if (value := getattr(args, name)))]
    if changes:
        lines.append(f"           augmented by {', '.join(changes)}")
    if folders.synthetic:
        made = record["synthetic_counts"]
        lines.append(
            f"synthetic  {sum(made)} images of {sum(map(bool, made))} classes, {sum(made) / sum(made + counts):.1%} of "
            f"the images to train on; weight {args.synthetic_weight:g}, "
            f"{'counted' if args.count_synthetic else 'not counted'} in class counts; {record['synthetic_hash'][:12]}"
        )
    lines += [model, f"objective  {record['objective']}"]
    if args.mixup or args.cutmix:
        lines.append("           train accuracy: how much of a mixed image is of the predicted class")
    if args.ema_decay is not None:
        lines.append(f"           judged and saved: mean of the weights over the updates, decay {args.ema_decay:g}")
    if args.precise_bn and not args.freeze_backbone:
        lines.append("           judged and saved: batch statistics of unmixed images, without generated rows")
    if str(build_objective(args, folders.class_counts, epoch=0)) != record["objective"]:
        lines.append(f"           class weights from epoch {resolved_epoch(args, 'drw_epoch')} on")
    if args.add_rsg:
        # halving, not walking: there is no limit to the epochs
        first = bisect.bisect(range(args.epochs), False, key=lambda epoch: generates(args, epoch))
        when = f"generates from epoch {first} of {args.epochs} on" if first < args.epochs else "never generates"
        lines.append(f"rsg        {record['generator_parameters'] / 1e6:.2f} M parameters, in training only; {when}")
        if record["center_lr_limit"] is not None and record["center_lr_limit"] < args.lr:
            why = "" if args.rsg_center_lr else ", to stay stable"
            lines.append(f"           its centres learn at {record['center_lr_limit']:.3g} at most{why}")
    return "\n".join(lines)
