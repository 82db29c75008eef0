"""Train an image classifier on long-tailed class folders; leaves a run folder in checkpoint/.

python imagenet_lt_train.py --data_dir data/digits --epochs 60 --lr 0.05 --lr_schedule cosine --seed 0
"""

import argparse
import contextlib
import math
import secrets

import torch

from data.build import build_pixels, build_training_loader, check_data, check_data_flags, read_data, sampler_of
from data.loaders import TrainingLoader
from engine import distributed, files
from engine.console import say, warn
from engine.errors import Refused, one_line_errors
from engine.guard import NonFiniteGuard
from engine.hardware import masks_updates
from engine.interrupt import StopSignal
from engine.optim import (
    build_clip,
    check_average,
    check_optimizer_flags,
    learning_rate,
    rates_in_force,
    set_learning_rate,
    steps_in_epoch,
)
from engine.options import check_idle_flags, check_run_flags, train_parser
from engine.precision import autocast_dtype, check_compiler, is_channels_last
from engine.record import check_start, describe, new_record
from engine.run import RunFolder
from engine.selection import Selection, build_selection
from engine.start import build_state, open_run, take_up
from engine.state import TrainingState
from engine.train import PRECISE_BN_BATCHES, NonFiniteLoss, epoch_row, renew_statistics, train_one_epoch
from engine.weights import pixels_of
from losses import build_objective, check_class_weights, check_loss_flags
from models import check_model_flags
from rsg import check_rsg_flags, generates, unmoved_centers


@one_line_errors
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = train_parser(__doc__)
    args = parser.parse_args(argv)
    check_run_flags(args)
    warn(
        *check_idle_flags(args, parser.parse_args([])),
        *check_optimizer_flags(args),
        *check_data_flags(args),
        *check_model_flags(args),
        *check_rsg_flags(args),
        *check_loss_flags(args, sampler_of(args, args.epochs - 1)),
    )
    return args


@one_line_errors
def main(args: argparse.Namespace) -> None:
    device = distributed.start(args.device)
    if not masks_updates(device):
        raise Refused(f"--device {device.type}: this torch applies updates that are not finite; update it, or use cpu")
    if args.sync_bn and device.type != "cuda":
        raise Refused("--sync_bn works on GPUs only; leave it out on a CPU")
    folders = distributed.together(lambda: read_data(args))
    distributed.together(lambda: check_data(args, folders))
    warn(*check_class_weights(args, folders.class_counts))
    run, saved = open_run(args)
    if saved and saved["finished"]:
        say(f"{run.path} is finished; test it with: {run.test_command()}")
        distributed.stop()
        return
    seed = secrets.randbits(31) if args.seed is None else args.seed
    seed = run.record["seed"] if run.record else distributed.from_main(seed)
    pixels = pixels_of(run.record) if saved else build_pixels(args, folders)
    amp_dtype = autocast_dtype(args.amp, device)
    channels_last = is_channels_last(args.channels_last, amp_dtype, device)
    if args.compile:
        check_compiler(device)
    training = distributed.together(lambda: build_training_loader(args, folders, pixels, seed, device))
    warn(*check_average(args, len(training)))
    selection = distributed.together(lambda: build_selection(args, folders, pixels, device, amp_dtype))

    fresh = saved is None
    del saved  # is read again with the lock held; until then the model needs the memory
    state = build_state(args, folders, pixels, seed, device, amp_dtype, channels_last, fresh)
    record = new_record(args, folders, pixels, seed, state.model, state.optimizer, amp_dtype, channels_last)
    if fresh:
        warn(*distributed.together(lambda: check_start(args, record)))
    if args.compile:
        state.model.backbone.compile()
    with files.locked(run.path) if distributed.is_main() else contextlib.nullcontext():
        goes_on = take_up(run, state, record)
        say(describe(args, folders, record))
        say(f"{'goes on' if goes_on else 'starts'} in epoch {state.epoch}, step {state.step}; run folder {run.path}")
        with StopSignal() as stop:
            fit(args, run, state, training, selection, stop)
    say(f"done; test it with: {run.test_command()}")
    distributed.stop()


def fit(
    args: argparse.Namespace,
    run: RunFolder,
    state: TrainingState,
    training: TrainingLoader,
    selection: Selection,
    stop: StopSignal,
) -> None:
    """The epochs that are left: train, judge on val/, log, save."""
    model, device, amp_dtype = state.model, training.device, selection.amp_dtype
    guard = NonFiniteGuard(model, state.optimizer, amp_dtype == torch.float16, args.accumulate_steps, state.averaged)
    clip = build_clip(model, args.clip_grad_norm)
    forward = generating = None

    def save_due(step: int) -> bool:
        updates = math.ceil(step / args.accumulate_steps)
        scheduled = args.save_every_steps is not None and updates % args.save_every_steps == 0
        return bool(stop.requested(updates, device)) or scheduled

    def save() -> None:
        state.stop_clock()
        state.save(run.path)
        stop.exit_if_received(f"epoch {state.epoch}, step {state.step}", device)
        state.start_clock()

    while not state.finished:
        epoch = state.epoch
        set_learning_rate(state.optimizer, learning_rate(args, epoch))
        objective = build_objective(args, selection.class_counts, epoch).to(device)
        if generating != (generating := generates(args, epoch)):
            model.start_phase(generating, heads_trained=bool(objective.head_terms))
            forward = distributed.data_parallel(model)
        batches = training.epoch(epoch, sampler_of(args, epoch), state.step)
        num_steps = steps_in_epoch(args, epoch, len(training))
        state.start_clock()
        try:
            train_one_epoch(
                forward,
                objective,
                state,
                guard,
                batches,
                training.sizes[:num_steps],
                seed=training.seed,
                amp_dtype=amp_dtype,
                clip=clip,
                save_due=save_due,
                save=save,
                print_freq=args.print_freq,
                text=f"epoch {epoch}",
            )
        except NonFiniteLoss as error:
            raise run.nonfinite(error, state, training.paths) from None
        state.stop_clock()
        end_epoch(args, run, state, training, selection)
        if not state.finished:
            stop.exit_if_received(f"epoch {state.epoch}, step 0", device)


def end_epoch(
    args: argparse.Namespace, run: RunFolder, state: TrainingState, training: TrainingLoader, selection: Selection
) -> None:
    """Judge on val/, log, save."""
    epoch = state.epoch
    if args.precise_bn and not args.freeze_backbone:
        number = min(steps_in_epoch(args, epoch, len(training)), PRECISE_BN_BATCHES)
        batches = training.unmixed(epoch, sampler_of(args, epoch), slice(number))
        renew_statistics(state.judged, batches, number, selection.amp_dtype)
    distributed.share_buffers(state.model)
    if state.averaged is not None:
        distributed.share_buffers(state.judged)
    row, class_means = selection.judge(state.judged)
    row = {"epoch": epoch, **rates_in_force(args, epoch)} | epoch_row(state, training.views) | row
    warn(*unmoved_centers(row))
    run.commit(state, row, class_means, finished=not steps_in_epoch(args, epoch + 1, len(training)))


if __name__ == "__main__":
    main(parse_args())
