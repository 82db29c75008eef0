"""One epoch of training."""

import resource
import sys
from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from data.loaders import Batch
from data.samplers import step_seed
from engine import distributed
from engine.console import progress
from engine.errors import Failed
from engine.guard import NonFiniteGuard, Trouble
from engine.state import TrainingState
from models.classifier import LongTailClassifier, Output

PRECISE_BN_BATCHES = 50  # training's running mean, of momentum 0.1, is one over about 19

Sums = dict[str, Tensor]  # over the epoch so far, on the device


def train_one_epoch(
    forward: nn.Module,
    objective: nn.Module,
    state: TrainingState,
    guard: NonFiniteGuard,
    batches: Iterator[Batch],
    sizes: list[int],
    *,
    seed: int,
    amp_dtype: torch.dtype | None = None,
    clip: Callable[[], None] = lambda: None,
    save_due: Callable[[int], bool] = lambda step: False,
    save: Callable[[], None] = lambda: None,
    print_freq: int = 10,
    text: str = "training",
) -> None:
    """Train on ``batches`` and add what happened to ``state.sums``. ``sizes`` are the images of each batch of the epoch
    to train on, of all processes together. What layers draw follows from the run's ``seed``, epoch and step.

    ``forward`` is the model, or the model wrapped for several processes. ``clip`` is called on unscaled gradients,
    ``save`` after an update when ``save_due``. `NonFiniteLoss` one step after a loss that is not finite: see
    `NonFiniteGuard`.
    """
    forward.train()
    num_steps = len(sizes)
    recent = deque(maxlen=guard.accumulate_steps + 1)  # steps with the images of their batch and the sums before it
    bar = progress(range(state.step, num_steps), text, "batch")
    for step, batch in zip(bar, batches, strict=False):
        recent.append((step, batch.indices, state.sums))
        first = step - step % guard.accumulate_steps
        share = sizes[step] / sum(sizes[first : first + guard.accumulate_steps])  # of the images of the update
        guard.before_forward(step)
        torch.manual_seed(step_seed(seed, state.epoch, step * distributed.world_size() + distributed.rank()))
        with torch.autocast(batch.images.device.type, amp_dtype, enabled=amp_dtype is not None):
            output = forward(batch.images, batch.targets, batch.mixed_targets)
        loss, parts = objective(output, len(batch.images), batch.share, batch.weights, batch.mixed_weights)
        state.scaler.scale(guard.poisoned(loss) * share).backward()
        is_update = (step + 1) % guard.accumulate_steps == 0 or step == num_steps - 1
        if is_update:
            update(state, clip)
        state.sums = with_batch(state.sums, batch, output, loss.detach(), parts, guard.take_skipped(), sizes[step])
        state.step = step + 1
        stop_if(guard.trouble_before(step, parts), guard, state, recent)
        if is_update and save_due(state.step):
            stop_if(guard.last_trouble(), guard, state, recent)
            save()
        if step % print_freq == 0 and not bar.disable:  # the figure waits for the device
            bar.set_postfix(loss=f"{(state.sums['train_loss'] / state.sums['images']).item():.4g}")
    stop_if(guard.last_trouble(), guard, state, recent)


def update(state: TrainingState, clip: Callable[[], None]) -> None:
    """One step of the optimiser. The scaler, which scales in float16 only, masks it if a gradient is not finite."""
    state.scaler.unscale_(state.optimizer)
    clip()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    if state.averaged is not None:
        state.averaged.update_parameters(state.model)


def renew_statistics(
    model: LongTailClassifier, batches: Iterator[Batch], num_batches: int, amp_dtype: torch.dtype | None
) -> None:
    """Compute batch normalisation's running statistics in the backbone anew: the means of those of ``batches`` of all
    processes, unmixed and without generated rows.

    "Precise BN" of Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3, but that the variance is within
    batches, as in training. What training leaves is of mixed images and generated rows, which no test meets.
    """
    backbone = nn.Sequential(*model.backbone.lower, *model.backbone.upper)  # the layers: the parts may be compiled
    bar = progress(batches, "batch statistics", "batch", total=num_batches)
    with torch.autocast(next(model.parameters()).device.type, amp_dtype, enabled=amp_dtype is not None):
        update_bn(bar, backbone)
    for buffer in backbone.buffers():
        if buffer.is_floating_point():
            buffer.copy_(distributed.summed(buffer) / distributed.world_size())


def with_batch(
    sums: Sums, batch: Batch, output: Output, loss: Tensor, parts: dict[str, Tensor], skipped: Tensor, size: int
) -> Sums:
    """Losses weighted by the batch's images, ``size`` of all processes; hits of the main head, which has no margin, on
    real images only. A mixed image is hit by as much of it as is of the predicted class."""
    num_real, processes = len(batch.images), distributed.world_size()
    own = len(range(distributed.rank(), size, processes))
    rows = num_real * size / own / processes  # not this process's: the mean of the processes' losses is the batch's
    predicted = output.logits["main"][:num_real].detach().argmax(dim=1)
    hits = hits_on(predicted, batch.targets, batch.real)
    if batch.mixed_targets is not None:
        hits = batch.share * hits + (1 - batch.share) * hits_on(predicted, batch.mixed_targets, batch.mixed_real)
    values = {"images": num_real, "train_loss": loss * rows}
    values |= {f"loss_{part}": value * rows for part, value in parts.items()}
    if batch.real is not None:
        values["real_images"] = batch.real.sum()  # also of mixed ones: each image is mixed into one other
    values |= {"train_accuracy": hits, "generated_rows": len(output.features) - num_real}
    values["skipped_batches"] = skipped * distributed.is_main()  # all processes skip together
    if "center_distance" in output.auxiliary:
        values["rsg_center_distance"] = output.auxiliary["center_distance"] * num_real
    zero = torch.zeros((), device=loss.device)
    return {name: sums.get(name, zero) + value for name, value in values.items()}


def hits_on(predicted: Tensor, targets: Tensor, real: Tensor | None) -> Tensor:
    hits = predicted == targets
    return (hits if real is None else hits & real).sum()


def epoch_row(state: TrainingState, views: int) -> dict[str, float]:
    """What log.jsonl says of the epoch's training: means over the images, in all their views, of all processes."""
    totals = distributed.summed(torch.stack(list(state.sums.values()))).tolist()
    row = dict(zip(state.sums, totals, strict=True))
    images, counts = row.pop("images"), {name: int(row.pop(name)) for name in ("generated_rows", "skipped_batches")}
    real_images = row.pop("real_images", images)
    if not (real_images and state.model.heads["main"].weight.requires_grad):
        del row["train_accuracy"]  # no real image, or a head that no loss trains: it would mislead
    return {name: total / (real_images if name == "train_accuracy" else images) for name, total in row.items()} | {
        **counts,
        "seconds": state.seconds,
        "images_per_second": images / views / state.seconds,
        "peak_memory_bytes": peak_memory_bytes(next(state.model.parameters()).device),
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Since the process began, validation included: of CUDA's allocator, or of the whole process without CUDA."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class NonFiniteLoss(Failed):
    """A loss or gradient that is not finite. The state is as it was before the update it belongs to."""

    def __init__(self, step: int, parts: dict[str, float], indices: list[int]):
        self.step, self.parts, self.indices = step, parts, indices
        super().__init__(f"the loss is not finite in step {step}: {parts}")


def stop_if(trouble: Trouble | None, guard: NonFiniteGuard, state: TrainingState, recent: deque) -> None:
    if trouble is None:
        return
    guard.restore(trouble.step)
    before = {step: (indices, sums) for step, indices, sums in recent}
    state.step = trouble.step - trouble.step % guard.accumulate_steps
    state.sums = before[state.step][1]
    raise NonFiniteLoss(trouble.step, trouble.parts, before[trouble.step][0].tolist())
