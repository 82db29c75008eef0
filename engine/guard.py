from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine import distributed
from engine.transfer import SentToCpu


class Trouble(NamedTuple):
    """A step whose loss or gradient was not finite."""

    step: int  # of the epoch, counted from 0
    parts: dict[str, float]  # the losses of this process's batch


class NonFiniteGuard:
    """Keeps the model as it was before the first loss that is not finite, without making a step wait for the device.

    The gradient scaler masks an update whose gradient is not finite; from the first bad loss on, `poisoned` makes every
    later loss bad too, so that nothing moves until the report, one step late. `restore` takes back what the forward
    passes did to the buffers (running means) and to the ``averaged`` model. With ``scaled`` (float16) a bad gradient of
    a good loss is part of the routine: the update is skipped, counted, and training goes on.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaled: bool,
        accumulate_steps: int = 1,
        averaged: nn.Module | None = None,
    ):
        self.accumulate_steps = accumulate_steps  # batches of one update
        buffers = [*model.buffers(), *(averaged.state_dict().values() if averaged is not None else ())]
        alike = {(each.device, each.dtype): [] for each in buffers}  # those are copied by one kernel
        for each in buffers:
            alike[each.device, each.dtype].append(each)
        self.buffers = list(alike.values())
        self.snapshots = [[[each.clone() for each in group] for group in self.buffers] for _ in range(2)]
        device = next(model.parameters()).device
        self.poison = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.scaled = scaled
        self.pending: tuple[int, SentToCpu, dict[str, Tensor]] | None = None
        optimizer.register_step_pre_hook(self._note_masked)

    def _note_masked(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        masked = optimizer.found_inf  # set by the scaler for optimisers that mask on the device
        self.skipped = self.skipped + masked
        if not self.scaled:
            self.poison = torch.where(masked > 0, torch.nan, self.poison)

    def before_forward(self, step: int) -> None:
        if step % self.accumulate_steps == 0:
            for snapshot, buffers in zip(self._snapshot(step), self.buffers, strict=True):
                torch._foreach_copy_(snapshot, buffers)

    def _snapshot(self, step: int) -> list[list[Tensor]]:
        return self.snapshots[step // self.accumulate_steps % 2]

    def poisoned(self, loss: Tensor) -> Tensor:
        """``loss``, or NaN once a loss on any process was not finite."""
        bad = distributed.summed((~loss.detach().isfinite()).float())
        self.poison = torch.where(bad > 0, torch.nan, self.poison)
        return loss + self.poison

    def trouble_before(self, step: int, parts: dict[str, Tensor]) -> Trouble | None:
        """Remember ``step``; the trouble of the step before it, whose flag has reached the CPU in the meantime."""
        previous, self.pending = self.pending, (step, SentToCpu(self.poison.isnan()), parts)
        return self._read(previous)

    def last_trouble(self) -> Trouble | None:
        previous, self.pending = self.pending, None
        return self._read(previous)

    def _read(self, sent: tuple | None) -> Trouble | None:
        if sent is None:
            return None
        step, bad, parts = sent
        return Trouble(step, {part: value.item() for part, value in parts.items()}) if bad.arrived().item() else None

    def restore(self, step: int) -> None:
        """Buffers as they were before the update that ``step``, one of the last two, belongs to."""
        for buffers, snapshot in zip(self.buffers, self._snapshot(step), strict=True):
            torch._foreach_copy_(buffers, snapshot)

    def take_skipped(self) -> Tensor:
        """Updates skipped since the last call, on the device."""
        skipped, self.skipped = self.skipped, torch.zeros_like(self.skipped)
        return skipped
