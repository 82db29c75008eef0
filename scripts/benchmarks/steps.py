"""Training steps on batches in memory against the bare network's forward and backward: time, memory, precision."""

import argparse
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from data.loaders import Batch
from data.long_tail import imbalanced_counts
from engine import distributed
from engine.guard import NonFiniteGuard
from engine.optim import build_clip, build_optimizer
from engine.options import train_parser
from engine.precision import autocast_dtype, build_scaler, has_fast_bfloat16, is_channels_last
from engine.state import TrainingState
from engine.train import peak_memory_bytes, train_one_epoch
from losses import build_objective
from models import ARCHITECTURES, FROM_TORCHVISION, build_model
from scripts.benchmarks.measuring import Bench, Row, interleaved, quotients, wait_for

NO_RSG = "--add_rsg False"
LOSS_SETS = {
    "CE": f"--add_cross_entropy_loss --add_ldam_loss False --add_supcon_loss False {NO_RSG}",
    "LDAM": f"--add_supcon_loss False {NO_RSG}",
    "LDAM + SupCon": NO_RSG,
    "LDAM + SupCon + RSG": "",
}
COUNTS = imbalanced_counts("exp", 500, 100, 100)  # as CIFAR-100-LT
PHASES = {"before the threshold": False, "generating": True}


def flags(words: str) -> argparse.Namespace:
    """What the train script would read."""
    return train_parser().parse_args(words.split())


def size_flags(bench: Bench) -> str:
    """The network, images and batches that are measured."""
    size = "--arch resnet32 --img_size 16 -b 8" if bench.quick else "--arch resnext50_32x4d --img_size 224 -b 16"
    return f"{size} --amp {bench.amp} --channels_last {bench.channels_last} --compile {bench.compile}"


def class_mix(args: argparse.Namespace, device: torch.device, num_batches: int = 8) -> list[Batch]:
    """Batches of noise whose targets are drawn as often as their classes have images."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch_size, 3, args.img_size, args.img_size)
    batches = []
    for _ in range(num_batches):
        targets = torch.multinomial(torch.tensor(COUNTS).double(), args.batch_size, True, generator=generator)
        images = torch.randn(shape, generator=generator)
        batches.append(Batch(images.to(device), targets.to(device), torch.arange(args.batch_size)))
    return batches


class TrainingSteps:
    """The steps of the train script: model, objective, guard, optimiser, sums, exactly as it builds them."""

    def __init__(self, args: argparse.Namespace, class_counts: list[int], device: torch.device, generating: bool):
        torch.manual_seed(0)
        self.amp_dtype = autocast_dtype(args.amp, device)
        model = build_model(args, class_counts, with_generator=args.add_rsg).to(device)
        if is_channels_last(args.channels_last, self.amp_dtype, device):
            model = model.to(memory_format=torch.channels_last)
        optimizer = build_optimizer(args, model, args.img_size)
        if args.compile:
            model.backbone.compile()
        self.objective = build_objective(args, class_counts).to(device)
        model.start_phase(generating, heads_trained=bool(self.objective.head_terms))
        self.state = TrainingState(model, optimizer, build_scaler(self.amp_dtype, device))
        self.guard = NonFiniteGuard(model, optimizer, self.amp_dtype == torch.float16, args.accumulate_steps)
        self.clip = build_clip(model, args.clip_grad_norm)

    def __call__(self, batches: Iterable[Batch], num_steps: int) -> None:
        self.state.step, self.state.sums = 0, {}
        train_one_epoch(
            self.state.model,
            self.objective,
            self.state,
            self.guard,
            iter(batches),
            [1] * num_steps,  # all of one size
            seed=0,
            amp_dtype=self.amp_dtype,
            clip=self.clip,
        )

    def generated_rows(self) -> float:
        """In a step of the last call, on average."""
        return float(self.state.sums["generated_rows"]) / self.state.step


class BareSteps:
    """Forward and backward of the bare network with a linear layer and cross-entropy, and nothing else. With
    ``with_optimizer`` the optimiser's step too."""

    def __init__(self, args: argparse.Namespace, num_classes: int, device: torch.device, with_optimizer: bool = False):
        torch.manual_seed(0)
        self.amp_dtype = autocast_dtype(args.amp, device)
        self.model = bare_network(args, num_classes).to(device)
        if is_channels_last(args.channels_last, self.amp_dtype, device):
            self.model = self.model.to(memory_format=torch.channels_last)
        if args.compile:
            self.model.compile()
        parameters = self.model.parameters()
        self.optimizer = None
        if with_optimizer:
            self.optimizer = torch.optim.SGD(parameters, args.lr, args.momentum, weight_decay=args.wd, fused=True)

    def __call__(self, batches: Iterable[Batch], num_steps: int) -> None:
        for images, targets, *_ in itertools.islice(batches, num_steps):
            self.model.zero_grad()
            with torch.autocast(images.device.type, self.amp_dtype, enabled=self.amp_dtype is not None):
                logits = self.model(images)
            F.cross_entropy(logits.float(), targets).backward()
            if self.optimizer:
                self.optimizer.step()


def bare_network(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """torchvision's own, or for networks that it lacks ours in one piece."""
    if args.arch in FROM_TORCHVISION:
        return torchvision.models.get_model(args.arch, num_classes=num_classes)
    backbone = ARCHITECTURES[args.arch](args)
    return nn.Sequential(*backbone.lower, *backbone.upper, nn.Linear(backbone.num_features, num_classes))


def endless(steps: Callable[[Iterable[Batch], int], None], batches: list[Batch], num_steps: int) -> Callable[[], None]:
    """Calls of ``steps`` on the batches in turn; each candidate has its own place in the round."""
    source = itertools.cycle(batches)
    return lambda: steps(source, num_steps)


def operations(steps: Callable[[Iterable[Batch], int], None], batches: list[Batch]) -> float:
    """Floating-point operations of convolutions and matrix products, forward and backward, over the batches."""
    with FlopCounterMode(display=False) as counter:
        steps(batches, len(batches))
    return counter.get_total_flops()


def step_rows(bench: Bench) -> Iterable[Row]:
    """Speed of the whole training step as a share of the bare network's, with each set of losses."""
    base, num_steps = size_flags(bench), 1 if bench.device.type == "cpu" else 20
    args = flags(base)
    batches = class_mix(args, bench.device, num_batches=1 if bench.quick else 8)
    bare = BareSteps(args, len(COUNTS), bench.device)
    steps = {}
    for name, words in LOSS_SETS.items():
        for phase, generating in PHASES.items():
            if words == "" or not generating:
                label = f"{name}, {phase}" if words == "" else name
                steps[label] = TrainingSteps(flags(f"{base} {words}"), COUNTS, bench.device, generating)
    candidates = {"bare": endless(bare, batches, num_steps)}
    candidates |= {label: endless(each, batches, num_steps) for label, each in steps.items()}
    seconds = interleaved(candidates, bench)
    compiled = args.compile  # the counter does not see into compiled parts
    bare_operations = 0 if compiled else operations(bare, batches)
    for label, each in steps.items():
        figures = {
            "ms a step": 1000 * median(seconds[label]) / num_steps,
            "bare ms": 1000 * median(seconds["bare"]) / num_steps,
        }
        if not compiled:
            figures["extra layers, % of operations"] = 100 * (1 - bare_operations / operations(each, batches))
        figures["generated rows a step"] = each.generated_rows()
        at_least = {"before the threshold": 0.93, "generating": 0.70}.get(label.rpartition(", ")[2])
        ratios = quotients(seconds["bare"], seconds[label])
        yield Row("step", f"{_title(args)}, {label}: speed / bare", ratios, figures, at_least=at_least)


def _title(args: argparse.Namespace) -> str:
    return f"{args.arch} {args.img_size} px b{args.batch_size}"


def memory_rows(bench: Bench) -> Iterable[Row]:
    """Peak memory with the optimiser, each in a process of its own, as a multiple of the bare network's."""
    words = {"bare": (None, False), "LDAM": (LOSS_SETS["LDAM"], False)}
    words |= {f"LDAM + SupCon + RSG, {phase}": ("", generating) for phase, generating in PHASES.items()}
    peaks = {label: [] for label in words}
    context = multiprocessing.get_context("spawn")
    for _ in range(max(1, bench.repeats // 2)):
        for label, (losses, generating) in words.items():
            with ProcessPoolExecutor(1, context) as process:
                task = process.submit(peak_bytes, size_flags(bench), losses, generating, str(bench.device))
                peaks[label].append(task.result())
    args = flags(size_flags(bench))
    for label, at_most in zip(list(words)[1:], (None, 1.15, 1.30), strict=True):
        figures = {"MB": median(peaks[label]) / 1e6, "bare MB": median(peaks["bare"]) / 1e6}
        ratios = quotients(peaks[label], peaks["bare"])
        yield Row("memory", f"{_title(args)}, {label}: peak memory / bare", ratios, figures, at_most=at_most)


def peak_bytes(size: str, losses: str | None, generating: bool, device_name: str) -> int:
    """After three steps in this process. ``losses`` None: the bare network's, in plain PyTorch."""
    device = torch.device(device_name) if losses is None else distributed.start(device_name)
    args = flags(f"{size} {losses or ''}")
    batches = class_mix(args, device, num_batches=3)
    if losses is None:
        BareSteps(args, len(COUNTS), device, with_optimizer=True)(batches, 3)
    else:
        TrainingSteps(args, COUNTS, device, generating)(batches, 3)
    status = Path("/proc/self/status")
    if device.type == "cpu" and status.is_file():  # the peak that the system reports may be that of the parent
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    return peak_memory_bytes(device)


def precision_rows(bench: Bench) -> Iterable[Row]:
    """Speed of the training step with ``--amp`` and ``--channels_last``, as a multiple of that without."""
    plain, bf16 = "--amp off --channels_last off", "--amp bf16 --channels_last"
    variants = {"--channels_last on": "--amp off --channels_last on"}
    if has_fast_bfloat16(bench.device):
        variants |= {f"--amp bf16 --channels_last {layout}": f"{bf16} {layout}" for layout in ("off", "on")}
    yield from _variant_rows("precision", plain, variants, bench)


def compile_rows(bench: Bench) -> Iterable[Row]:
    """Speed of the training step with ``--compile``, as a multiple of that without."""
    for words in ("--amp off", "--amp bf16") if has_fast_bfloat16(bench.device) else ("--amp off",):
        yield from _variant_rows(
            "compile", f"{words} --compile False", {f"{words} --compile": f"{words} --compile"}, bench
        )


def _variant_rows(group: str, plain: str, variants: dict[str, str], bench: Bench) -> Iterable[Row]:
    base, num_steps = f"{size_flags(bench)} {NO_RSG}", 1 if bench.device.type == "cpu" else 20
    batches = class_mix(flags(base), bench.device)
    candidates, first_call = {}, {}
    for label, words in {"plain": plain, **variants}.items():
        steps = TrainingSteps(flags(f"{base} {words}"), COUNTS, bench.device, generating=False)
        candidates[label] = endless(steps, batches, num_steps)
        begun = time.perf_counter()
        candidates[label]()
        wait_for(bench.device)
        first_call[label] = time.perf_counter() - begun
    seconds = interleaved(candidates, bench)
    for label in variants:
        figures = {
            f"steps/s{suffix}": num_steps / median(seconds[name]) for suffix, name in (("", label), (" plain", "plain"))
        }
        figures["s of the first call"] = first_call[label]
        at_least = 1.5 if "bf16" in label and bench.device.type == "cpu" and "compile" not in label else None
        name = f"{_title(flags(base))}, LDAM + SupCon, {label}: speed / {plain}"
        yield Row(group, name, quotients(seconds["plain"], seconds[label]), figures, at_least=at_least)
