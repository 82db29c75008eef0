"""Runs side by side: groups that differ only in their seed, means over seeds, and paired tests on the same images."""

import csv
import json
import re
import warnings
import zipfile
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest, ttest_ind

from engine.errors import Refused
from engine.files import read_json
from engine.metrics import confusion_matrix, group_means, per_class, shot_groups, spread_of_new_rows
from engine.record import default_flags, is_finished, read_log, read_record
from engine.run import MAY_CHANGE

ACCURACIES = ("balanced_accuracy", "top1", "many", "medium", "few")
ALL_PAIRS = 10  # of up to so many groups; with more, each is compared with the first one


class Run(NamedTuple):
    """A finished and tested run."""

    folder: Path
    record: dict  # args.json
    result: dict  # test/metrics.json
    measures: dict[str, float]  # fractions, seconds, bytes
    files: list[str]  # of the test images [N]
    targets: np.ndarray  # [N]
    correct: np.ndarray  # bool [N]


class Group(NamedTuple):
    """Runs that differ only in their seed."""

    name: str
    flags: str  # those in which the groups differ, where they are not the default
    runs: list[Run]


class Pair(NamedTuple):
    """The second group minus the first one on the same test images."""

    first: Group
    second: Group
    differences: dict[str, tuple[float, float, float]]  # accuracy: (difference, 95 % interval)
    discordant: list[tuple[int, int]]  # images that only the first, only the second gets right; a pair of runs each
    p: float  # McNemar's, over the pairs of runs
    p_holm: float  # and over all pairs of groups
    p_seeds: float | None  # Welch's t-test of the balanced accuracies of the runs
    p_seeds_holm: float | None = None  # and over all pairs that have one


def what_is_missing(folder: Path) -> str | None:
    """``unfinished``, ``untested`` (also when training went on after the test), or another reason why a run cannot be
    compared; None of one that can."""
    record, rows = read_record(folder), read_log(folder)
    if "tau" in record:
        return "a rescaled classifier, without a training to compare"
    if not is_finished(record, rows):
        return "unfinished"
    tested = read_json(folder / "test" / "metrics.json", default={})
    return None if tested.get("last", {}).get("epoch") == rows[-1]["epoch"] else "untested"


def read_run(folder: Path) -> Run:
    """A run that misses nothing; `Refused` when its metrics are not those of its predictions."""
    record, rows, test = read_record(folder), read_log(folder), folder / "test"
    result, counts = read_json(test / "metrics.json"), record["class_counts"]
    try:
        with np.load(test / "logits.npz") as content:
            targets, logits = content["targets"], content["logits"]
        with (test / "predictions.csv").open(newline="", errors="surrogateescape") as file:
            files = [row["file"] for row in csv.DictReader(file)]
        recall = per_class(confusion_matrix(targets, logits.argmax(axis=1), len(counts)))[0]
        means = {"balanced_accuracy": float(np.nanmean(recall)), **group_means(recall, shot_groups(counts))}
        is_same = all(abs(result.get(name, -1) - mean) <= 1e-9 for name, mean in means.items())
        is_same &= len(files) == len(targets) and bool(np.isfinite(logits).all())
    except (OSError, EOFError, ValueError, KeyError, TypeError, IndexError, zipfile.BadZipFile):
        raise Refused(f"what {test} holds is damaged; test the run again") from None
    if not is_same:
        raise Refused(
            f"{test / 'metrics.json'} is not what logits.npz beside it gives with the default --shot_thresholds; "
            f"test the run again"
        )
    measures = {name: result[name] for name in ACCURACIES if name in result}
    measures["last_balanced_accuracy"] = result["last"]["balanced_accuracy"]
    measures["parameters"] = record["parameters"]
    measures["seconds_per_epoch"] = float(np.mean([row["seconds"] for row in rows]))
    measures["peak_memory_bytes"] = max(row["peak_memory_bytes"] for row in rows)
    return Run(folder, record, result, measures, files, targets, logits.argmax(axis=1) == targets)


def check_same_splits(runs: Sequence[Run]) -> None:
    """`Refused` unless all runs were trained and tested on the same images."""
    for other in runs[1:]:
        for name, one, two in (
            ("trained", runs[0].record["split_hash"], other.record["split_hash"]),
            ("tested", runs[0].result["split_hash"], other.result["split_hash"]),
        ):
            if one != two:
                raise Refused(
                    f"{runs[0].folder} and {other.folder} were {name} on different splits ({one[:12]}, {two[:12]}); "
                    f"--allow_different_splits shows them side by side all the same"
                )


def grouped(runs: Sequence[Run]) -> list[Group]:
    """Runs by all that was set but the seed, in the order given; `Refused` when one setting has a seed twice."""
    by_setting: dict[str, list[Run]] = {}
    for run in runs:
        by_setting.setdefault(json.dumps(_setting(run), sort_keys=True), []).append(run)
    members = [sorted(group, key=lambda run: run.record["seed"]) for group in by_setting.values()]
    for group in members:
        for one, two in zip(group, group[1:], strict=False):
            if one.record["seed"] == two.record["seed"]:
                raise Refused(f"{one.folder} and {two.folder} have the same flags and seed; leave one of them out")
    settings = [_setting(group[0]) for group in members]
    defaults = default_flags()
    known = dict.fromkeys(flag for each in settings for flag in each)  # older runs have flags that are gone
    differing = [flag for flag in known if any(each.get(flag) != settings[0].get(flag) for each in settings)]
    flags = [
        ", ".join(f"{flag} {each[flag]}" for flag in differing if flag in each and each[flag] != defaults.get(flag))
        or ("the defaults" if differing else "-")
        for each in settings
    ]
    names = [_common_name(group) for group in members]
    names = names if all(names) and len(set(names)) == len(names) else flags
    return [Group(*each) for each in zip(names, flags, members, strict=True)]


def _setting(run: Run) -> dict:
    """What a run was told but for its seed. The images are told by their hash: a folder's path is no setting, and the
    run whose weights it starts from has a seed in its name."""
    aside = MAY_CHANGE | {"seed", "data_dir", "list_dir", "synthetic_dir"}
    flags = {flag: value for flag, value in run.record["flags"].items() if flag not in aside}
    if parent := run.record.get("parent"):
        flags["weights"] = f"{_without_seed(Path(parent).name, run)}/{Path(flags['weights']).name}"
    flags["hflip"] = run.record.get("mirrored", flags["hflip"])  # by default the data set's word, which may change
    made = run.record.get("synthetic_hash")
    return flags | {"split": run.record["split_hash"][:12], "synthetic_images": made and made[:12]}


def _common_name(runs: Sequence[Run]) -> str | None:
    """The name of all run folders without their seed; None when they have none in common."""
    names = {_without_seed(run.folder.name, run) for run in runs}
    return names.pop() if len(names) == 1 else None


def _without_seed(name: str, run: Run) -> str:
    """``a`` of ``a_seed3`` or ``a_seed_3``, as sweeps and the quick start name runs of seed 3."""
    return re.sub(f"_seed_?{run.record['seed']}$", "", name)


def mean_and_deviation(group: Group, measure: str) -> tuple[float, float | None] | None:
    """Over the runs: mean and sample standard deviation, which one run has not; None where a run lacks the measure."""
    values = [run.measures[measure] for run in group.runs if measure in run.measures]
    if len(values) < len(group.runs):
        return None
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


def mcnemar(correct: np.ndarray, other: np.ndarray) -> tuple[int, int, float]:
    """Images that only the first, only the second classifier gets right, and the two-sided exact binomial p-value
    that both are equally likely (McNemar, 1947; always exact, so no rule for small numbers is needed)."""
    first, second = int((correct & ~other).sum()), int((other & ~correct).sum())
    return first, second, binomtest(first, first + second).pvalue if first + second else 1.0


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm, 1979), in the order given."""
    order = np.argsort(p_values)
    factors = len(p_values) - np.arange(len(p_values))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(factors * np.asarray(p_values)[order]))
    return adjusted.tolist()


def resampled_accuracies(
    correct: np.ndarray, targets: np.ndarray, class_groups: dict[str, np.ndarray], resamples: int = 1000, seed: int = 0
) -> dict[str, np.ndarray]:
    """Accuracies [resamples, G] of the columns of ``correct`` [N, G], all on the same images: drawn again within their
    class, with replacement, see `spread_of_new_rows`. A column is a classifier, or the mean of several."""
    generator = np.random.default_rng(seed)
    labels, sizes = np.unique(targets, return_counts=True)
    shares = {"balanced_accuracy": np.ones(len(labels)), "top1": sizes}  # of each class's recall in the accuracy
    shares |= {name: group[labels] for name, group in class_groups.items() if group[labels].any()}
    accuracies = {name: np.zeros((resamples, correct.shape[1])) for name in shares}
    for index, (label, size) in enumerate(zip(labels, sizes, strict=True)):
        times = generator.multinomial(size, np.full(size, 1 / size), size=resamples)  # that each image is drawn
        own = correct[targets == label]
        recall = spread_of_new_rows(times @ own / size, own.mean(axis=0), size)
        for name, share in shares.items():
            accuracies[name] += share[index] / share.sum() * recall
    return accuracies


def paired_tests(groups: Sequence[Group]) -> list[Pair]:
    """Every pair of groups that were tested on the same images, or of many groups the first with each other one. Many,
    medium and few are compared where both trained on classes of the same sizes.

    The intervals are a paired bootstrap over test images of the difference of the means over seeds: they say how far
    the test images decide between these trained models; what other seeds would do, Welch's t-test over runs asks.
    McNemar compares the k-th runs of both groups; their smallest p-value times the number of such pairs holds however
    they depend on each other (Bonferroni).
    """
    every = list(combinations(range(len(groups)), 2))
    pairs = [pair for pair in every if pair[0] == 0 or len(groups) <= ALL_PAIRS]
    tested_on: dict[tuple, list[int]] = {}
    is_new = all("tested_hash" in run.result for group in groups for run in group.runs)
    hash_of_images = "tested_hash" if is_new else "split_hash"  # older tests know that of all splits only
    for index, group in enumerate(groups):
        keys = {(run.result[hash_of_images], *run.files, *run.record["classes"]) for run in group.runs}
        if len(keys) == 1:
            tested_on.setdefault(keys.pop(), []).append(index)
    found = []
    for indices in tested_on.values():
        counts = {index: tuple(groups[index].runs[0].record["class_counts"]) for index in indices}
        parts = {(name, sizes): part for sizes in set(counts.values()) for name, part in shot_groups(sizes).items()}
        correct = np.stack([np.mean([run.correct for run in groups[index].runs], axis=0) for index in indices], axis=1)
        draws = resampled_accuracies(correct, groups[indices[0]].runs[0].targets, parts)
        column = {index: place for place, index in enumerate(indices)}
        for first, second in pairs:
            if first in column and second in column:
                change = {}
                for key, each in draws.items():
                    name, sizes = key if key in parts else (key, None)
                    if sizes is None or sizes == counts[first] == counts[second]:
                        change[name] = each[:, column[second]] - each[:, column[first]]
                found.append(_pair(groups[first], groups[second], change))
    over_images = holm([pair.p for pair in found])
    over_seeds = iter(holm([pair.p_seeds for pair in found if pair.p_seeds is not None]))
    return [
        pair._replace(p_holm=p, p_seeds_holm=None if pair.p_seeds is None else next(over_seeds))
        for pair, p in zip(found, over_images, strict=True)
    ]


def _pair(first: Group, second: Group, draws: dict[str, np.ndarray]) -> Pair:
    differences = {}
    for name in [name for name in ACCURACIES if name in draws]:
        value = mean_and_deviation(second, name)[0] - mean_and_deviation(first, name)[0]
        differences[name] = (value, *map(float, np.percentile(draws[name], [2.5, 97.5])))
    of_seed = {run.record["seed"]: run for run in second.runs}
    both = [(run, of_seed[seed]) for run in first.runs if (seed := run.record["seed"]) in of_seed]
    both = both or zip(first.runs, second.runs, strict=False)
    tests = [mcnemar(one.correct, two.correct) for one, two in both]
    p = min(1.0, len(tests) * min(p for *_, p in tests))
    return Pair(first, second, differences, [tuple(numbers) for *numbers, _ in tests], p, p, _welch(first, second))


def _welch(first: Group, second: Group) -> float | None:
    """p-value that other seeds have the same mean balanced accuracy; None with one run, or when no seed matters."""
    values = [[run.measures["balanced_accuracy"] for run in group.runs] for group in (first, second)]
    if min(map(len, values)) < 2 or all(np.ptp(each) == 0 for each in values):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # one group of equal values is no trouble
        return float(ttest_ind(*values, equal_var=False).pvalue)
