"""An audit for people: lines of text and the distribution of the classes."""

from pathlib import Path

import numpy as np

from data.listing import ACT, Finding
from engine.console import number_of_classes, printable
from engine.figures import GROUP_COLOURS, new_figure, save_figure
from engine.metrics import FEW, MANY, shot_groups

SHOWN = 5  # files printed of a note or hint; of what must be acted on, all


def summary_lines(root: Path, findings: list[Finding], figures: dict) -> list[str]:
    lines = [f"{root}: " + ", ".join(f"{split} {count} images" for split, count in figures["images"].items())]
    if figures["image_sizes"]:
        smallest, largest = ("x".join(map(str, figures["image_sizes"][end])) for end in ("smallest", "largest"))
        different = figures["image_sizes"]["different"]
        sizes = f"{smallest} to {largest} px, {different} different" if different > 1 else f"{smallest} px, all alike"
        lines.append(f"image sizes  {sizes}")
    if "classes" in figures:
        lines += distribution_lines(figures)
    for finding in findings:
        lines.append(f"{finding.level:5}{finding.message}")
        shown = len(finding.files) if finding.level == ACT else SHOWN
        lines += [f"       {file}" for file in finding.files[:shown]]
        if len(finding.files) > shown:
            lines.append(f"       and {len(finding.files) - shown} more, in audit.json")
    return lines if findings else [*lines, "nothing to report"]


def distribution_lines(figures: dict) -> list[str]:
    groups, suggested = figures["groups"], figures["suggested"]
    thresholds = suggested["thresholds"]
    return [
        f"classes      {figures['classes']}, largest {figures['largest_class']}, smallest {figures['smallest_class']} "
        f"training images; imbalance factor {figures['imbalance_factor']:.4g}, Gini coefficient {figures['gini']:.3f}",
        f"groups       {groups['many']} many (> {MANY}), {groups['medium']} medium, {groups['few']} few (< {FEW})",
        f"suggested    --cbl_beta {suggested['cbl_beta']:.6g} (1 - 1/N, N images in the largest class); "
        f"group thresholds: many > {thresholds['many_above']}, few < {thresholds['few_below']}",
    ]


def save_distribution(counts: dict[str, dict[str, int]], readable: dict[str, str], path: Path) -> None:
    """Bars of the training images by class, largest first, on a logarithmic axis; val and test as lines."""
    train = counts["train"]
    order = sorted(train, key=lambda name: -train[name])
    sizes = np.array([train[name] for name in order])
    figure, axes = new_figure(width=min(max(6.0, 0.2 * len(order)), 24.0), height=4.5)
    for group, members in shot_groups(sizes).items():
        at = np.flatnonzero(members)
        axes.bar(at, sizes[at], width=1.0, color=GROUP_COLOURS[group], label=f"{group}: {number_of_classes(len(at))}")
    for split, style in (("val", ":"), ("test", "--")):
        if split in counts:
            heights = [counts[split].get(name, 0) or np.nan for name in order]
            axes.step(range(len(order)), heights, style, color="black", where="mid", label=split)
    scale = "log" if sizes.any() else "linear"  # of nothing there is no logarithm
    axes.set(yscale=scale, ylabel="images", xlabel="class, largest first", xlim=(-0.5, len(order) - 0.5))
    axes.set_ylim(0.7, None)
    if len(order) <= 120:
        labels = [printable(readable.get(name, name)) for name in order]
        axes.set_xticks(range(len(order)), labels, rotation=90, fontsize=7, parse_math=False)
    axes.legend()
    save_figure(figure, path)
