"""A comparison of runs as text for the terminal, tables, a figure, and one HTML page that needs nothing else."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

import numpy as np

from engine.compare import ACCURACIES, Group, Pair, mean_and_deviation
from engine.console import printable
from engine.figures import new_figure, png_of
from engine.page import data_uri, template

TEMPLATE = Path(__file__).with_name("compare_page.html.jinja")
GENERATOR = '<meta name="generator" content="compare_runs.py">'  # tells our own page from somebody else's
TITLES = {  # measure: (title, factor, decimals)
    "balanced_accuracy": ("balanced %", 100, 1),
    "top1": ("top-1 %", 100, 1),
    "many": ("many %", 100, 1),
    "medium": ("medium %", 100, 1),
    "few": ("few %", 100, 1),
    "last_balanced_accuracy": ("balanced %, last epoch", 100, 1),
    "parameters": ("parameters, M", 1e-6, 2),
    "seconds_per_epoch": ("training, s/epoch", 1, 2),
    "peak_memory_bytes": ("peak memory, GiB", 2**-30, 2),
}
EXACT = ("parameters",)  # no deviation: the same for every seed
NOTES = (
    "Mean ± sample standard deviation over seeds; n = 1 has none. Test accuracies of the epoch chosen on val/ (the "
    "last one where there is no val/); balanced: mean recall of the classes; many, medium, few: classes of more than "
    "100, 20 to 100, fewer than 20 training images. Parameters: those of the tested model, without the generator. Peak "
    "memory: of the allocator on a GPU, of the process on a CPU.",
    "Differences: second minus first, in points of per cent, with a 95 % interval from a bootstrap over the test "
    "images, resampled within their class and spread as new ones would be, the same for both (1,000 resamples): too "
    "narrow where classes have few test images and hardly a mistake. McNemar: images that only the first : only the "
    "second gets right, for each pair of runs (of one seed, or k-th with k-th where no seed is in both); p, images: "
    "exact, two-sided, the smallest times the number of such pairs. All of these ask whether these trained models "
    "differ on other test images; with many images they nearly always do. Many, medium and few are compared where both "
    "trained on classes of the same sizes.",
    "p, seeds: Welch's t-test of the balanced accuracies of the runs asks whether the settings differ with other "
    "seeds; it needs two seeds of both, and has little power with three. Holm: corrected for all comparisons here.",
)


class Cell(NamedTuple):
    text: str
    value: float | str = ""  # to sort by


class Table(NamedTuple):
    titles: list[str]
    rows: list[list[Cell]]


def group_table(groups: Sequence[Group]) -> Table:
    """A row for each group; columns that no group has are left out."""
    measures = [name for name in TITLES if any(mean_and_deviation(group, name) for group in groups)]
    named_by_flags = all(group.name == group.flags for group in groups)
    titles = ["setting", "n", *(TITLES[name][0] for name in measures), *([] if named_by_flags else ["flags"])]
    rows = []
    for group in groups:
        numbers = [Cell(str(len(group.runs)), len(group.runs)), *(_measure_cell(group, name) for name in measures)]
        flags = [] if named_by_flags else [Cell(group.flags, group.flags)]
        rows.append([Cell(group.name, group.name), *numbers, *flags])
    return Table(titles, rows)


def _measure_cell(group: Group, name: str) -> Cell:
    both, (_, factor, decimals) = mean_and_deviation(group, name), TITLES[name]
    if both is None:
        return Cell("–", "")
    mean, deviation = both
    text = f"{factor * mean:.{decimals}f}"
    if deviation is not None and name not in EXACT:
        text += f" ± {factor * deviation:.{decimals}f}"
    return Cell(text, mean)


def pair_table(pairs: Sequence[Pair]) -> Table:
    """A row for each pair of groups."""
    names = [name for name in ACCURACIES if any(name in pair.differences for pair in pairs)]
    titles = ["first", "second", *(TITLES[name][0].replace("%", "points") for name in names)]
    rows = []
    for pair in pairs:
        cells = [Cell(group.name, group.name) for group in (pair.first, pair.second)]
        for name in names:
            value, low, high = (100 * number for number in pair.differences.get(name, [np.nan] * 3))
            cells.append(Cell(f"{value:+.1f} [{low:+.1f}, {high:+.1f}]", value) if value == value else Cell("–"))
        images = ", ".join(f"{first} : {second}" for first, second in pair.discordant)
        p_values = [_p_cell(p) for p in (pair.p, pair.p_holm, pair.p_seeds, pair.p_seeds_holm)]
        rows.append([*cells, Cell(images, sum(map(sum, pair.discordant))), *p_values])
    return Table([*titles, "McNemar", "p, images", "p, images, Holm", "p, seeds", "p, seeds, Holm"], rows)


def _p_cell(p: float | None) -> Cell:
    if p is None:
        return Cell("–")
    return Cell(f"{p:.2g}" if p >= 1e-4 else "< 0.0001", p)


def markdown(table: Table) -> str:
    """The table with columns that line up, so that it reads well as it is, too."""
    lines = [table.titles, *([cell.text for cell in row] for row in table.rows)]
    lines = [[word.replace("|", "\\|").replace("\n", " ") for word in line] for line in lines]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        f"| {' | '.join(word.ljust(width) for word, width in zip(line, widths, strict=True))} |" for line in lines
    )


def figure_png(groups: Sequence[Group]) -> bytes:
    """Accuracies of every run as dots, mean and standard deviation of every group as a bar; groups from top down."""
    names = [name for name in ACCURACIES if any(mean_and_deviation(group, name) for group in groups) and name != "top1"]
    labels = [fill(printable(group.name), 36) for group in groups]
    lines = sum(label.count("\n") + 2 for label in labels)
    size = 3 + 2.3 * len(names), 1.1 + 0.22 * lines
    figure, panels = new_figure(*size, ncols=len(names), sharey=True, squeeze=False)
    for name, axes in zip(names, panels[0], strict=True):
        for row, group in enumerate(groups):
            values = [100 * run.measures[name] for run in group.runs if name in run.measures]
            axes.plot(values, [row] * len(values), "o", color="#1b6ca8", alpha=0.6, markersize=6, zorder=3)
            if (both := mean_and_deviation(group, name)) is not None:
                deviation = None if both[1] is None else 100 * both[1]
                axes.errorbar(100 * both[0], row, xerr=deviation, fmt="|", color="#c8402f", markersize=13, capsize=3)
        axes.set_title(name.replace("_accuracy", "").replace("balanced", "balanced accuracy"), fontsize=10)
        axes.set_xlabel("%")
        axes.margins(x=0.12)
        low, high = axes.get_xlim()
        axes.set_xlim(max(low, -1), min(high, 101))  # room for a dot at 0 or 100, and no other impossible value
        axes.grid(axis="x", alpha=0.3)
    panels[0, 0].set_yticks(range(len(groups)), labels, parse_math=False)
    panels[0, 0].set_ylim(len(groups) - 0.5, -0.5)
    return png_of(figure)


def html_page(title: str, groups: Sequence[Group], pairs: Sequence[Pair], png: bytes, remarks: Sequence[str]) -> str:
    """The whole comparison; tables sort by a click on a column's title."""
    return template(TEMPLATE).render(
        generator=GENERATOR,
        title=title,
        remarks=remarks,
        settings=group_table(groups),
        differences=pair_table(pairs),
        figure=data_uri("png", png),
        notes=NOTES if pairs else NOTES[:1],
        groups=groups,
    )
