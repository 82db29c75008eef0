"""From flags to a state that is ready to train: the run folder, and model and optimiser, new or as they were saved."""

import argparse

import torch
from torch import nn

from data.folders import ImageFolders
from data.loaders import Pixels
from engine import distributed
from engine.console import say
from engine.errors import Refused
from engine.optim import build_average, build_optimizer
from engine.precision import build_scaler
from engine.run import RunFolder
from engine.state import TrainingState, read_state
from models import build_model, load_backbone_weights


def open_run(args: argparse.Namespace) -> tuple[RunFolder, dict | None]:
    """The run folder, and what is saved in it to go on from. `Refused` where processes see different ones, or where a
    fresh start would lose a trained model."""
    run = distributed.together(lambda: RunFolder(args))
    saved = distributed.together(lambda: read_state(run.path, quiet=True) if run.record else None)
    found = (saved["epoch"], saved["step"]) if saved else run.record is not None
    if len(set(distributed.from_all(found))) > 1:
        raise Refused(f"the processes do not find the same state in {run.path}; all machines must share its disk")
    if run.record and not saved:
        run.refuse_to_lose()
    return run, saved


def build_state(
    args: argparse.Namespace,
    folders: ImageFolders,
    pixels: Pixels,
    seed: int,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    channels_last: bool,
    fresh: bool,
) -> TrainingState:
    """Model, optimiser and what belongs to them on ``device``, as a ``fresh`` run begins; else without the weights that
    its state replaces."""
    torch.manual_seed(seed)
    start = argparse.Namespace(**vars(args) | {"pretrained": args.pretrained and fresh})
    model = distributed.together(lambda: build_model(start, folders.class_counts, with_generator=args.add_rsg))
    if args.weights and fresh:
        whole = args.freeze_backbone
        for mismatch in distributed.together(lambda: load_backbone_weights(model.backbone, args.weights, whole)):
            say(f"{args.weights}: {mismatch}")
    if args.sync_bn:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(device, memory_format=torch.channels_last if channels_last else torch.preserve_format)
    optimizer = build_optimizer(args, model, pixels.size)
    state = TrainingState(model, optimizer, build_scaler(amp_dtype, device), epoch=args.start_epoch)
    state.averaged = build_average(model, args.ema_decay)
    return state


def take_up(run: RunFolder, state: TrainingState, record: dict) -> bool:
    """With the lock held: load what the run has saved, if it has, and make its folder ready; whether it goes on."""
    if distributed.is_main():  # the others may look when it has begun to write
        run.check_unchanged()
    saved = read_state(run.path) if run.record else None
    if saved:
        state.load(saved)
        run.check_same_start(record, state.epoch, state.step)
        if run.holds_weights_of(state.epoch):
            state.best = None  # is overwritten; the epoch that did it is repeated
    if distributed.is_main():
        run.begin(record, state.epoch, fresh=not saved)
    return saved is not None
