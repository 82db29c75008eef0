__import__("sys").path.insert(0, str(__import__("pathlib").Path(__file__).resolve().parents[1]))
"""Compare finished and tested runs: those that differ only in their seed are one row, with mean and deviation.

    python scripts/compare_runs.py quickstart quickstart_seed_1 quickstart_seed_2
    python scripts/compare_runs.py checkpoint/ablate_synergy_digits     # all runs in a folder

Prints the tables and writes comparison.csv, pairs.csv, comparison.md, comparison.png and comparison.html, a page that
needs nothing else. Every pair of groups that was tested on the same images (of more than 10 groups: the first with each
other one) gets a paired bootstrap of its differences and McNemar's test.
"""

import csv
import io
import os
from pathlib import Path

from engine.compare import (
    Group,
    Pair,
    Run,
    check_same_splits,
    grouped,
    mean_and_deviation,
    paired_tests,
    read_run,
    what_is_missing,
)
from engine.compare_page import GENERATOR, NOTES, TITLES, figure_png, group_table, html_page, markdown, pair_table
from engine.console import say, warn
from engine.errors import Refused, one_line_errors
from engine.files import write_atomically
from engine.flags import Parser, add_root_model, add_switch, given_path
from engine.record import read_record, sessions
from engine.run import find_run

FILES = ("comparison.html", "comparison.csv", "pairs.csv", "comparison.md", "comparison.png")


SPEED = ("hardware", "threads", "processes", "precision", "channels_last", "compiled")  # what it depends on


@one_line_errors
def parse_args(argv: list[str] | None = None):
    parser = Parser("Compare finished and tested runs; groups are runs that differ only in their seed.")
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a run's folder, its name, or a folder of runs")
    add_root_model(parser)
    add("--output", type=given_path, metavar="DIR", help="default: comparison/ in the folder that holds the runs")
    add_switch(parser, "--allow_different_splits", False, "also runs that saw other images; pairs where tested alike")
    return parser.parse_args(argv)


@one_line_errors
def main(args) -> None:
    folders = list(dict.fromkeys(folder for name in args.runs for folder in run_folders(name, args.root_model)))
    missing = [(folder, what) for folder in folders if (what := what_is_missing(folder))]
    if missing:
        names = ", ".join(f"{folder} is {what}" for folder, what in missing)
        raise Refused(
            f"{names}; imagenet_lt_train.py --resume finishes a training, imagenet_lt_test.py tests it; leave out what "
            f"has no training"
        )
    output = args.output or Path(os.path.commonpath([folder.absolute().parent for folder in folders])) / "comparison"
    refuse_foreign_files(output)
    runs = [read_run(folder) for folder in folders]
    if not args.allow_different_splits:
        check_same_splits(runs)
    groups = grouped(runs)
    write_comparison(output, groups, paired_tests(groups), remarks_on(runs))


def run_folders(name: str, root: Path) -> list[Path]:
    """The run of that name, or the runs in the folder of that name: where some were trained, without those whose
    classifier was rescaled."""
    for folder in (Path(name), root / name):
        if not (folder / "args.json").is_file() and (inside := sorted(folder.glob("*/args.json"))):
            runs = [path.parent for path in inside]
            trained = [run for run in runs if "tau" not in read_record(run)]
            if trained:
                warn(*(f"{run} is left out: it is {what_is_missing(run)}" for run in runs if run not in trained))
            return trained or runs
    return [find_run(name, root)]


def refuse_foreign_files(output: Path) -> None:
    """`Refused` when files in ``output`` would be lost that an earlier comparison has not written."""
    if output.exists() and not output.is_dir():
        raise Refused(f"--output {output} is no folder; give one")
    there = [output / name for name in FILES if (output / name).exists()]
    page = output / FILES[0]
    if there and not (page.is_file() and GENERATOR in page.read_text(errors="replace")[:1000]):
        raise Refused(f"{there[0]} is not of an earlier comparison; move it away or choose another --output")


def remarks_on(runs: list[Run]) -> list[str]:
    """What makes figures of these runs less comparable than they look."""
    records = [run.record | session for run in runs for session in sessions(run.record)]
    machines = {", ".join(f"{key} {record.get(key)}" for key in SPEED) for record in records}
    commits = {str(record.get("commit")) for record in records}
    remarks = []
    if len({run.record["split_hash"] for run in runs} | {run.result["split_hash"] for run in runs}) > 1:
        remarks.append("These runs saw different images; differences are given only between runs tested on the same.")
    if len(machines) > 1:
        remarks.append(f"Seconds and memory are not of like runs: {'; '.join(sorted(machines))}.")
    if len(commits) > 1:
        remarks.append(
            f"The runs are of different code: commits {', '.join(sorted(each[:12] + each[40:] for each in commits))}."
        )
    return remarks


def write_comparison(output: Path, groups: list[Group], pairs: list[Pair], remarks: list[str]) -> None:
    """Print the tables and write `FILES`, the page first: by it the others are known as ours."""
    title = f"Comparison of runs on {Path(groups[0].runs[0].record['flags']['data_dir']).name}"
    png = figure_png(groups)
    tables = [markdown(group_table(groups)), *([markdown(pair_table(pairs))] if pairs else [])]
    notes = NOTES if pairs else NOTES[:1]
    text = "\n\n".join([f"# {title}", *remarks, *tables, *notes]) + "\n"
    output.mkdir(parents=True, exist_ok=True)
    page = html_page(title, groups, pairs, png, remarks)
    contents = [page, csv_of(group_rows(groups)), csv_of(pair_rows(pairs)), text, png]
    for name, content in zip(FILES, contents, strict=True):
        binary = content if isinstance(content, bytes) else content.encode(errors="replace")
        write_atomically(output / name, lambda file, binary=binary: file.write(binary))
    warn(*remarks)
    say("\n\n".join(tables))
    say(f"page, tables and figure in {output}")


def group_rows(groups: list[Group]) -> list[dict]:
    """Fractions, seconds and bytes; an empty deviation where there is one run."""
    rows = []
    for group in groups:
        row = {"setting": group.name, "flags": group.flags, "n": len(group.runs)}
        row["seeds"] = " ".join(str(run.record["seed"]) for run in group.runs)
        for name in TITLES:
            row[f"{name}_mean"], row[f"{name}_std"] = mean_and_deviation(group, name) or (None, None)
        rows.append(row)
    return rows


def pair_rows(pairs: list[Pair]) -> list[dict]:
    """Differences as fractions."""
    rows = []
    for pair in pairs:
        row = {"first": pair.first.name, "second": pair.second.name}
        for name, (value, low, high) in pair.differences.items():
            row |= {f"{name}_difference": value, f"{name}_low": low, f"{name}_high": high}
        images = [":".join(map(str, numbers)) for numbers in pair.discordant]
        row |= {"only_first:only_second": " ".join(images), "p": pair.p, "p_holm": pair.p_holm}
        rows.append(row | {"p_seeds": pair.p_seeds, "p_seeds_holm": pair.p_seeds_holm})
    return rows


def csv_of(rows: list[dict]) -> str:
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


if __name__ == "__main__":
    main(parse_args())
