"""Heads and SupCon, forward and backward, against pytorch-metric-learning's."""

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterable
from statistics import median

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from engine.console import say
from losses import CrossEntropyLoss, SupConLoss
from models.heads import AMSoftmaxHead, ArcFaceHead, NormedLinear, SphereFaceHead
from scripts.benchmarks.measuring import Bench, Row, interleaved, quotients

SIZES = {(256, 2048, 1000): (1.1, 0.7), (32, 2048, 100): (1.5, None)}  # rows, features, classes: speed, memory to reach


def head_rows(bench: Bench) -> Iterable[Row]:
    """Speed, and memory kept for the backward pass, of each head with cross-entropy, and of SupCon."""
    if importlib.util.find_spec("pytorch_metric_learning") is None:
        say("heads: pytorch-metric-learning is not installed, nothing to compare with")
        return
    for sizes, targets in {(8, 16, 5): (None, None)}.items() if bench.quick else SIZES.items():
        yield from _rows_of_size(sizes, targets, bench)


def _rows_of_size(sizes: tuple[int, int, int], targets: tuple, bench: Bench) -> Iterable[Row]:
    torch.manual_seed(0)
    rows, width, classes = sizes
    features = torch.randn(rows, width, device=bench.device, requires_grad=True)
    labels = torch.randint(classes, (rows,), device=bench.device)
    title = f"{rows} x {width} x {classes}"
    for name, (ours, theirs) in pairs(width, classes).items():
        ours, theirs = ours.to(bench.device), theirs.to(bench.device)
        candidates = {"ours": backward_of(ours, features, labels), "theirs": backward_of(theirs, features, labels)}
        with warnings.catch_warnings():  # numpy's, about the other side's SphereFace
            warnings.simplefilter("ignore")
            kept = {side: saved_bytes(each, features, labels) for side, each in (("o", ours), ("t", theirs))}
            seconds = interleaved(candidates, bench)
        is_supcon = name == "SupCon"
        figures = {"ms": 1000 * median(seconds["ours"]), "theirs ms": 1000 * median(seconds["theirs"])}
        at_least = 1.2 if is_supcon and targets[0] else targets[0]
        ratios = quotients(seconds["theirs"], seconds["ours"])
        yield Row("heads", f"{name} {title}: speed / metric-learning", ratios, figures, at_least=at_least)
        figures = {"MB": kept["o"] / 1e6, "theirs MB": kept["t"] / 1e6}
        at_most = None if is_supcon else targets[1]
        yield Row("heads", f"{name} {title}: memory kept / theirs", [kept["o"] / kept["t"]], figures, at_most=at_most)


class _Classifier(nn.Module):
    def __init__(self, head: nn.Module):
        super().__init__()
        self.head, self.loss_fn = head, CrossEntropyLoss()

    def forward(self, features: Tensor, targets: Tensor) -> Tensor:
        return self.loss_fn(self.head(features, targets), targets)


def pairs(width: int, classes: int) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Ours and theirs, which compute the same loss (but for SphereFace, whose lambda they do not have)."""
    from pytorch_metric_learning import losses as metric_learning

    theirs = {
        "NormedLinear": metric_learning.NormalizedSoftmaxLoss(classes, width, temperature=1 / 30),
        "ArcFace": metric_learning.ArcFaceLoss(classes, width, margin=math.degrees(0.5), scale=30),
        "AM-softmax": metric_learning.CosFaceLoss(classes, width, margin=0.35, scale=30),
        "SphereFace": metric_learning.SphereFaceLoss(classes, width, margin=4, scale=1),
    }
    heads = (NormedLinear, ArcFaceHead, AMSoftmaxHead, SphereFaceHead)
    out = {
        name: (_Classifier(head(width, classes)), other)
        for head, (name, other) in zip(heads, theirs.items(), strict=True)
    }
    return out | {"SupCon": (SupConLoss(0.07), metric_learning.SupConLoss(0.07))}


def backward_of(loss_fn: nn.Module, features: Tensor, targets: Tensor) -> Callable[[], None]:
    def call() -> None:
        features.grad = None
        loss_fn.zero_grad()
        loss_fn(features, targets).backward()

    return call


def saved_bytes(loss_fn: nn.Module, features: Tensor, targets: Tensor) -> int:
    """Bytes that the forward pass keeps for the backward pass, features and weights included; each memory once."""
    kept = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_fn(features, targets)
    del loss  # until here nothing that was kept can have been freed
    return sum(kept.values())
