__import__("sys").path.insert(0, str(__import__("pathlib").Path(__file__).resolve().parents[1]))
"""Add finished and tested runs of the recipes to docs/ledger.jsonl, a run a line, and write docs/ledger.md from it.

    bash scripts/reproduce_ledger.sh data/CIFAR10 --seeds 0 1 2     # trains, tests, and calls this
    python scripts/ledger.py checkpoint/ledger_CIFAR10              # adds what these folders hold
    python scripts/ledger.py                                        # only writes the page again

A run belongs to the row that its folder is named after (cifar_rsg_seed0). A run that the ledger holds already, by
command, images, hardware and precision, is replaced.
"""

import argparse
import re
import shlex
import statistics
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import imagenet_lt_train
from engine.compare import Run, read_run, what_is_missing
from engine.console import say, warn
from engine.errors import Refused, one_line_errors
from engine.files import locked, read_json_lines, write_atomically, write_json_lines
from engine.flags import Parser, flag_words, given_path
from engine.record import plain_flags
from engine.run import MAY_CHANGE

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
GROUPS = ("many", "medium", "few"), ("head", "tail")
ACCURACIES = ("balanced_accuracy", *GROUPS[0], *GROUPS[1])
SAME_RUN = ("row", "data", "split", "command", "hardware", "precision")
PUBLISHED_IMBALANCE = 100
FILES = ("list_dir", "weights", "synthetic_dir")  # flags whose folders are of one machine


class Row(NamedTuple):
    """What a row of the page is about."""

    what: str
    recipe: str = ""  # the file's name; default: the row's
    published: str = ""  # per cent and source


CIFAR10 = {
    "cifar_ce": Row("cross-entropy", "", "70.4, Cao et al., 2019"),
    "cifar_ldam_drw": Row("LDAM-DRW", "", "77.0, Cao et al., 2019"),
    "cifar_rsg": Row("LDAM-DRW-RSG", "", "79.95, Wang et al., 2021"),
    "cifar_mixup_drw": Row("mixup, DRW", "", "82.1, imbalanced-DL's README"),
    "cifar_best": Row("logit-adjusted CE, balanced SupCon, AutoAugment", "", "85.9, ProCo's README"),
    "cifar_best_x4": Row("the same, four times wider", "", "89.6, GLMC's README"),
}
CIFAR100 = {
    name: CIFAR10[name]._replace(published=published)
    for name, published in {
        "cifar_ce": "38.3, Cao et al., 2019",
        "cifar_ldam_drw": "42.0, Cao et al., 2019",
        "cifar_rsg": "44.5, Wang et al., 2021",
        "cifar_mixup_drw": "46.9, imbalanced-DL's README, 300 epochs",
        "cifar_best": "52.8, ProCo's README",
        "cifar_best_x4": "58.4, GLMC's README",
    }.items()
}
ORIGINAL = {"original": Row("LDAM, SupCon, RSG on ResNeXt-50 at 224 px")}
ANY_FOLDER = {
    "any_folder_ce": Row("the baseline of any_folder: cross-entropy on Linear", "any_folder"),
    "any_folder": Row("logit-adjusted CE on NormedLinear"),
}
PAGE_ROWS = {  # name of the data's folder: its rows; any other folder has those of ANY_FOLDER
    "CIFAR10-original": CIFAR10 | ORIGINAL | ANY_FOLDER,
    "CIFAR10": CIFAR10 | ORIGINAL | ANY_FOLDER,
    "CIFAR100": CIFAR100 | ORIGINAL | ANY_FOLDER,
    "digits": ANY_FOLDER,
    "mini-ImageNet": ORIGINAL | {"mini_imagenet": Row("logit-adjusted CE")} | ANY_FOLDER,
}
ALL_ROWS = {name: row for rows in PAGE_ROWS.values() for name, row in rows.items()}

ABOUT = """# Ledger of measured recipes

Written by `scripts/ledger.py` from the runs in ledger.jsonl; `bash scripts/reproduce_ledger.sh` makes them.
Accuracies are balanced test accuracies in per cent of the last epoch, mean ± sample standard deviation over n runs;
"chosen" is the epoch with the best balanced accuracy on val/, where there is one. Many / medium / few: classes of
more than 100, 20 to 100, fewer than 20 training images. Head: the fifth of the classes with most of them; tail: all
others. Published figures are of ResNet-32 after 200 epochs (or as stated) at imbalance 100, of the last epoch or of
the best one on the test set, which is what much public code reports, on the official images and other draws of the
tail. Beside cifar_best and cifar_best_x4 they are the best of that network and number of epochs, by other methods.
CIFAR10-original (split 9cd15121309a) has the official images; CIFAR10 (8403d703aeea) has the same ones re-encoded as
JPEG (quality 75, colours at half the resolution), which costs 4 to 6 points at 32 px: the first reason of its gaps.
Both are named by number, so that `prepare_data.py cifar10`, which goes by the official names, draws as many, but other
images. mini-ImageNet (45a7a8f412c1) is 84 px, 300 down to 3 training, 10 val and 20 test images a class. Another
reason of gaps is fewer epochs than the recipe's; below 60 the CIFAR recipes have no warm-up either. results.md says
what is known of the rest."""
HEADER = [
    "| row | what | published | last epoch | chosen | many / medium / few | head / tail | epochs | n |",
    "|---|---|---|---|---|---|---|---|---|",
]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("Add runs to docs/ledger.jsonl and write docs/ledger.md.")
    parser.add_argument("folders", type=given_path, nargs="*", metavar="FOLDER", help="of runs, or of a sweep")
    parser.add_argument("--output", type=given_path, default=DOCS, metavar="DIR", help="where ledger.jsonl and .md lie")
    return parser.parse_args(argv)


@one_line_errors
def main(args: argparse.Namespace) -> None:
    with locked(args.output, wait=True):  # two sweeps may end together
        add(args.folders, args.output / "ledger.jsonl", args.output / "ledger.md")


def add(given_folders: list[Path], path: Path, page_path: Path) -> None:
    """Add the runs in these folders to the ledger at ``path``, and write its page."""
    entries = read_json_lines(path, {*SAME_RUN}, "run", may_be_torn=False)
    held = {identity(entry): entry for entry in entries}
    for given in given_folders:
        folders = [folder for folder in (given, *sorted(given.glob("*/"))) if (folder / "args.json").is_file()]
        if not folders:
            if len(given_folders) == 1:
                raise Refused(f"{given} holds no run")
            warn(f"{given} holds no run")
        for folder in folders:
            if missing := what_is_missing(folder):
                warn(f"{folder} is {missing}: it is not added")
                continue
            try:
                entry = entry_of(read_run(folder))
            except Refused as reason:
                if folder == given:
                    raise
                warn(f"{reason}; it is not added")  # the others of the sweep are
            else:
                held[identity(entry)] = entry
    entries = [held[key] for key in sorted(held)]
    write_json_lines(path, entries)
    write_atomically(page_path, lambda file: file.write(page(entries).encode()))
    say(f"{len(entries)} runs in {path}")


def identity(entry: dict) -> tuple[str, ...]:
    return tuple(str(entry[key]) for key in SAME_RUN)


def entry_of(run: Run) -> dict:
    """The ledger's line of a run. `Refused` when it is not one of a row, or was tested on other images."""
    record, flags = run.record, run.record["flags"]
    row, _, seed = run.folder.name.rpartition("_seed")
    if row not in ALL_ROWS or seed != str(record["seed"]):
        raise Refused(f"{run.folder} is not named after a row of the ledger and its seed, like cifar_rsg_seed0")
    if "hardware" not in record or flags["max_steps"] is not None:
        raise Refused(f"{run.folder} is a smoke run, or too old to say on what hardware it ran; train it again")
    if run.result["split_hash"] != record["split_hash"]:
        raise Refused(
            f"{run.folder} was tested on other images than it was trained with; put those back and test again"
        )
    if "resumed" in record:
        changed = ", ".join(sorted({name for change in record["resumed"] for name in change} - {"epoch", "step"}))
        raise Refused(f"{run.folder} went on under other circumstances ({changed}): its figures are of neither")
    command, told = command_of(flags, ALL_ROWS[row].recipe or row, record["seed"])
    return {
        "row": row,
        "data": Path(flags["data_dir"]).name,
        "split": record["split_hash"][:12],
        "imbalance": max(record["class_counts"]) / min(record["class_counts"]),
        "epochs": flags["epochs"],
        "of_epochs": told["epochs"],
        "seed": record["seed"],
        "last": {name: run.result["last"][name] for name in ACCURACIES if name in run.result["last"]},
        "chosen_on_val": None if run.result["weights"] == "last" else run.measures["balanced_accuracy"],
        "parameters": record["parameters"],
        "seconds_per_epoch": run.measures["seconds_per_epoch"],
        "threads": record["threads"],
        "hardware": record["hardware"],
        "precision": record["precision"],
        "torch": record["versions"]["torch"],
        "commit": record["commit"],
        "command": command,
    }


def command_of(flags: dict, recipe: str, seed: int) -> tuple[str, dict]:
    """The command that trains like this, and the recipe's own flags. `Refused` when no command beside the recipe can
    say it: no word stands for a flag that is not given, and an older version may have known others."""
    file = f"scripts/recipes/{recipe}.txt"
    told = plain_flags(imagenet_lt_train.parse_args([f"@{ROOT / file}"]))
    ours = {name: value for name, value in flags.items() if name not in MAY_CHANGE}
    ours |= {"data_dir": f"data/{Path(flags['data_dir']).name}", "seed": seed}
    ours |= {name: Path(flags[name]).name for name in FILES if flags[name] is not None}
    words = flag_words(ours, told)
    try:
        again = plain_flags(imagenet_lt_train.parse_args([f"@{ROOT / file}", *words]))
    except SystemExit:
        raise Refused(f"@{file} takes no {shlex.join(words)}: the run was not trained with this recipe") from None
    if changed := [name for name, value in ours.items() if again[name] != value]:
        raise Refused(f"--{changed[0]} {ours[changed[0]]} is not what @{file} says, and no flag takes that back")
    return shlex.join(["python", "imagenet_lt_train.py", f"@{file}", *words]), told


def page(entries: list[dict]) -> str:
    """docs/ledger.md: a table of each data set, and how each of its rows was measured."""
    text = [ABOUT]
    for data in dict.fromkeys([*PAGE_ROWS, *(entry["data"] for entry in entries)]):
        measured = {entry["row"]: ALL_ROWS[entry["row"]] for entry in entries if entry["data"] == data}
        rows = PAGE_ROWS.get(data, ANY_FOLDER)
        rows = rows | {name: row._replace(published="") for name, row in measured.items() if name not in rows}
        text += [f"\n## {data}\n", *HEADER]
        details = []
        for name, row in rows.items():
            own = [entry for entry in entries if (entry["data"], entry["row"]) == (data, name)]
            for group in alike(own) or [[]]:
                text.append(table_row(name, row, group))
                details += [detail(name, row, group)] if group else []
        text += ["", *details] if details else []
    return "\n".join(text) + "\n"


def alike(entries: list[dict]) -> list[list[dict]]:
    """Those that differ only in their seed, version or commit; most epochs first."""

    def key(entry: dict) -> tuple:
        kind = entry["hardware"].rpartition(" of ")[2]  # however many of its cores were free; threads stand beside it
        return -entry["epochs"], entry["split"], changes(entry), kind, entry["precision"]

    ordered = sorted(entries, key=lambda entry: (key(entry), entry["seed"]))
    return [list(group) for _, group in groupby(ordered, key)]


def table_row(name: str, row: Row, runs: list[dict]) -> str:
    cells = [name, row.what, published(row, runs) or "-"]
    cells[1] += f"; `{changes(runs[0])}`" if runs and changes(runs[0]) else ""
    if not runs:
        return f"| {' | '.join([*cells, 'not measured', *5 * ['']])} |"
    chosen = [run["chosen_on_val"] for run in runs]
    cells.append(percent([run["last"]["balanced_accuracy"] for run in runs]))
    cells.append("-" if None in chosen else percent(chosen))
    for group in GROUPS:
        known = [key in runs[0]["last"] and percent([run["last"][key] for run in runs]) for key in group]
        cells.append(" / ".join(each or "-" for each in known))
    cells += [f"{runs[0]['epochs']} of {runs[0]['of_epochs']}", str(len(runs))]
    return f"| {' | '.join(cells)} |"


def published(row: Row, runs: list[dict]) -> str:
    """The published figure where it is of the runs' imbalance, and its source."""
    return row.published if not runs or round(runs[0]["imbalance"]) == PUBLISHED_IMBALANCE else ""


def percent(values: list[float]) -> str:
    """Mean and, of several, sample standard deviation."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def detail(name: str, row: Row, runs: list[dict]) -> str:
    """What else there is to say of a row of the table."""
    seeds = ", ".join(f"{100 * run['last']['balanced_accuracy']:.2f} (seed {run['seed']})" for run in runs)
    seconds = statistics.mean(run["seconds_per_epoch"] for run in runs)
    threads = {f"{run['threads']} thread{'s' * (run['threads'] > 1)}" for run in runs}
    machines, versions = {run["hardware"] for run in runs}, {f"torch {run['torch']}" for run in runs}
    place = ", ".join([*sorted(threads), " or ".join(sorted(machines)), runs[0]["precision"], *sorted(versions)])
    commits = {str(run["commit"])[:7] + str(run["commit"])[40:] for run in runs}
    gap = ""
    if known := published(row, runs):
        mean = statistics.mean(100 * run["last"]["balanced_accuracy"] for run in runs)
        gap = f", {mean - float(known.split(',')[0]):+.1f} against the published figure"
    return (
        f"- {name}, {runs[0]['epochs']} epochs: {seeds}{gap}; `{without_seed(runs[0]['command'])}`; "
        f"split {runs[0]['split']}, imbalance {runs[0]['imbalance']:.3g}; {runs[0]['parameters'] / 1e6:.2f} M "
        f"parameters; {seconds:.0f} s an epoch; {place}; commit {', '.join(sorted(commits))}"
    )


def without_seed(command: str) -> str:
    return re.sub(r" --seed \d+", "", command)


def changes(run: dict) -> str:
    """The flags in which a run is not its recipe, but for data, epochs and seed."""
    words = run["command"].partition(".txt")[2]
    return re.sub(r" --(data_dir|epochs|seed) ('[^']*'|\S)+", "", words).strip()


if __name__ == "__main__":
    main(parse_args())
