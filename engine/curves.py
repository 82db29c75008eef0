"""Learning curves of log.jsonl as lines to draw: positions and ticks in per cent of a plot."""

import math
from typing import NamedTuple

GENERATOR_LOSSES = ("loss_centre", "loss_contrast", "loss_mv")


class Curve(NamedTuple):
    """A line over the epochs; positions in per cent of the plot, ticks as (position, text)."""

    title: str
    points: list[tuple[float, float]]
    epochs: list[int]
    values: list[str]  # for people
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def loss_curves(log: list[dict]) -> list[Curve]:
    """The training loss, or with RSG each part of it that trains the network: the total is next to nothing but the
    centre loss, which does not."""
    titles = {"train_loss": "Training loss"}
    if log and "loss_centre" in log[0]:
        parts = [key for key in log[0] if key.startswith("loss_") and key not in GENERATOR_LOSSES]
        titles = {key: f"Training loss {key.removeprefix('loss_')}, before its factor" for key in parts} or titles
    return [loss_curve(values, title) for key, title in titles.items() if (values := logged(log, key))]


def loss_curve(values: dict[int, float], title: str) -> Curve:
    """On a logarithmic axis when it falls by more than a factor of 20."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    low, high = min(values.values()), max(values.values())
    if low > 0 and high / low > 20:
        span = math.log(high / low)
        ticks = [(100 * math.log(t / low) / span, t) for t in LogLocator(numticks=5).tick_values(low, high)]
        heights = [100 * math.log(value / low) / span for value in values.values()]
        title = f"{title}, logarithmic"
    else:
        low, high = min(low, 0.0), max(high, 0.0) or 1.0
        ticks = [(100 * (t - low) / (high - low), t) for t in MaxNLocator(4).tick_values(low, high)]
        heights = [100 * (value - low) / (high - low) for value in values.values()]
    ticks = [(at, f"{value:g}") for at, value in ticks if -0.01 <= at <= 100.01]
    return curve(title, list(values), heights, [f"{value:.4g}" for value in values.values()], ticks)


def accuracy_curve(log: list[dict]) -> Curve | None:
    values = logged(log, "val_balanced_accuracy")
    if not values:
        return None
    heights = [100 * value for value in values.values()]
    texts = [f"{height:.1f}\N{NO-BREAK SPACE}%" for height in heights]
    ticks = [(at, f"{at}\N{NO-BREAK SPACE}%") for at in (0, 25, 50, 75, 100)]
    return curve("Balanced accuracy on val", list(values), heights, texts, ticks)


def logged(log: list[dict], key: str) -> dict[int, float]:
    """Finite values of ``key`` by epoch."""
    return {row["epoch"]: row[key] for row in log if math.isfinite(row.get(key, math.nan))}


def curve(title: str, epochs: list[int], heights: list[float], values: list[str], y_ticks: list) -> Curve:
    from matplotlib.ticker import MaxNLocator

    first, last = epochs[0], epochs[-1]
    places = [100 * (epoch - first) / max(last - first, 1) for epoch in epochs]
    ticks = MaxNLocator(5, integer=True).tick_values(first, last) if last > first else [first]
    x_ticks = [(100 * (tick - first) / max(last - first, 1), f"{tick:g}") for tick in ticks if first <= tick <= last]
    return Curve(title, list(zip(places, heights, strict=True)), epochs, values, x_ticks, y_ticks)
