"""Ratios of things that run side by side: alternating in one process, several times, so that both meet the same
machine."""

import math
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from engine.console import progress
from engine.hardware import cpu_name
from engine.precision import has_fast_bfloat16

LEAST_SECONDS = 0.2  # what is faster is called several times for one measurement


class Bench(NamedTuple):
    """How to measure, for every group of rows."""

    device: torch.device
    repeats: int
    cores: int
    quick: bool  # sizes for a smoke test: the ratios mean nothing
    amp: str  # of both sides of "step", "memory" and "epoch"
    channels_last: str
    compile: bool


class Row(NamedTuple):
    """A ratio, once for every repeat. ``at_least`` or ``at_most`` is what its median should be."""

    group: str
    name: str  # what is divided by what
    ratios: list[float]
    figures: dict[str, float]  # medians behind the ratio; the key names the unit
    at_least: float | None = None
    at_most: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def target(self) -> str:
        for sign, bound in ((">=", self.at_least), ("<=", self.at_most)):
            if bound is not None:
                return f"{sign} {bound:g}"
        return ""

    @property
    def verdict(self) -> str:
        """ "met" or "missed", and nothing without a target."""
        if not self.target:
            return ""
        low = -math.inf if self.at_least is None else self.at_least
        high = math.inf if self.at_most is None else self.at_most
        return "met" if low <= self.median <= high else "missed"


def interleaved(candidates: dict[str, Callable[[], object]], bench: Bench) -> dict[str, list[float]]:
    """Seconds that a call of each candidate takes, once for every repeat: in every repeat all of them run, beginning
    with another one each time. Each is called once before, unmeasured."""
    names, calls = list(candidates), {}
    for name, candidate in candidates.items():
        candidate()
        calls[name] = math.ceil(LEAST_SECONDS / _seconds(candidate, 1, bench.device)) if not bench.quick else 1
    seconds = {name: [] for name in names}
    for repeat in progress(range(bench.repeats), "measuring", "repeat"):
        first = repeat % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(_seconds(candidates[name], calls[name], bench.device))
    return seconds


def _seconds(candidate: Callable[[], object], calls: int, device: torch.device) -> float:
    wait_for(device)
    begun = time.perf_counter()
    for _ in range(calls):
        candidate()
    wait_for(device)
    return (time.perf_counter() - begun) / calls


def wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def quotients(numerators: list[float], denominators: list[float]) -> list[float]:
    """Repeat by repeat."""
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def machine(bench: Bench) -> dict[str, object]:
    """The machine and the software, as far as figures depend on them."""
    gpu = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else None
    return {
        "cpu": cpu_name(),
        "cores": bench.cores,
        "gpu": gpu,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "fast_bfloat16": has_fast_bfloat16(bench.device),
    }


HEADER = f"{'':86} {'median':>7}  {'spread':16} {'target':16} medians of both"


def text_of(row: Row) -> str:
    """A line of the table."""
    spread = f"{min(row.ratios):.3g} to {max(row.ratios):.3g}"
    figures = ", ".join(f"{key} {value:.4g}" for key, value in row.figures.items())
    line = f"{row.group:10}  {row.name:74} {row.median:7.3g}  {spread:16} {row.target:8} {row.verdict:7} {figures}"
    return line.rstrip()
