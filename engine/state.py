"""All that an exact resume needs, in ``state.pt``. The order of images and their draws follow from seed and epoch."""

import io
import time
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from engine import distributed, files
from engine.console import warn
from engine.errors import Refused, is_out_of_memory


@dataclass
class TrainingState:
    """Model, optimiser and scaler, and how far the run has come."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0  # in progress
    step: int = 0  # batches done in it
    sums: dict[str, Tensor] = field(default_factory=dict)  # of the epoch in progress
    seconds: float = 0.0  # spent training in it
    best: dict | None = None  # {"epoch", "val_balanced_accuracy"}
    finished: bool = False
    averaged: AveragedModel | None = None  # of the model over the updates

    @property
    def judged(self) -> nn.Module:
        """The model to evaluate and to save for testing."""
        return self.model if self.averaged is None else self.averaged.module

    def next_epoch(self) -> None:
        self.epoch, self.step, self.sums, self.seconds = self.epoch + 1, 0, {}, 0.0

    def start_clock(self) -> None:
        self._started = time.perf_counter()

    def stop_clock(self) -> None:
        self.seconds += time.perf_counter() - self._started

    def save(self, folder: Path) -> None:
        """Write ``state.pt``, the point from which a resumed run goes on; the one before is kept beside it.

        The main process writes, and counts what all have done so far.
        """
        self.sums = {name: distributed.summed(value) * distributed.is_main() for name, value in self.sums.items()}
        if not distributed.is_main():
            return
        content = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        content |= {name: value.state_dict() for name, value in content.items() if hasattr(value, "state_dict")}
        buffer = io.BytesIO()  # torch.save tells no reason when a disk is full
        torch.save(content, buffer)
        previous = folder / "state.previous.pt"
        files.write_atomically(folder / "state.pt", lambda file: file.write(buffer.getbuffer()), keep_previous=previous)

    def load(self, content: dict) -> None:
        """Take over what `save` wrote; `Refused` when it is of another model."""
        try:
            for entry in fields(self):
                if hasattr(getattr(self, entry.name), "load_state_dict"):
                    getattr(self, entry.name).load_state_dict(content[entry.name])
                else:
                    setattr(self, entry.name, content[entry.name])
            for parameter, moments in self.optimizer.state.items():
                for name, moment in moments.items():
                    if moment is not None and moment.shape == parameter.shape:
                        # in the order of the parameter, which may have been another: fused updates go by memory
                        moments[name] = torch.empty_like(parameter).copy_(moment)
            device = next(self.model.parameters()).device
            self.sums = {name: value.to(device) * distributed.is_main() for name, value in self.sums.items()}
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split())
            raise Refused(f"the saved state is not of this model: {reason}; start again with --overwrite") from None


def read_state(folder: Path, quiet: bool = False) -> dict | None:
    """The newest readable state, with a warning, unless ``quiet``, about a newer one that is not; None when nothing has
    been saved. Only tensors and plain values are loaded: no pickle is executed."""
    trouble = None
    for path in (folder / "state.pt", folder / "state.previous.pt"):
        if path.exists():
            try:
                with warnings.catch_warnings(action="ignore"):  # about the format of files that are not ours
                    content = torch.load(path, map_location="cpu", weights_only=True)
                if {entry.name for entry in fields(TrainingState)} - set(content):
                    raise ValueError
                if trouble and not quiet:
                    warn(f"{trouble}; going on from {path}")
                return content
            except Exception as error:  # truncated archives and foreign pickles share no base class
                if isinstance(error, OSError) or is_out_of_memory(error):
                    raise  # that says nothing of the content
                trouble = trouble or f"{path} cannot be used: it is damaged, or no state that a training has saved"
    if trouble:
        raise Refused(f"{trouble}; there is no good one before it, start again with --overwrite")
    return None
