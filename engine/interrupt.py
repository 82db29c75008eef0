import signal

import torch

from engine import distributed
from engine.console import say

CHECK_EVERY = 10  # updates


class StopSignal:
    """Remembers SIGTERM or SIGINT, so that the run can save at the end of a step. From then on SIGINT kills at once;
    SIGTERM does not, for it comes twice: from Slurm, and from torchrun or a sweep that has got it, too."""

    def __enter__(self) -> "StopSignal":
        self.received = 0
        self.former = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        if not self.received:  # else the process ends as it was told, whatever comes after
            for number, handler in self.former.items():
                signal.signal(number, handler)

    def _remember(self, number: int, frame) -> None:
        self.received = self.received or number
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def requested(self, update: int, device: torch.device) -> int:
        """The signal that any process has received, or 0. Several processes ask each other every `CHECK_EVERY` updates
        only, because they must wait for the answer."""
        return 0 if distributed.world_size() > 1 and update % CHECK_EVERY else self._of_all(device)

    def exit_if_received(self, where: str, device: torch.device) -> None:
        """Leave with 128 + the signal's number, as a shell reports it; everything has been saved. All processes ask at
        the same place and leave together."""
        if received := self._of_all(device):
            self.received = received  # also where another process got it: see __exit__
            say(f"stopped by {signal.Signals(received).name} in {where}; saved, --resume goes on")
            distributed.stop()
            raise SystemExit(128 + received)

    def _of_all(self, device: torch.device) -> int:
        if distributed.world_size() == 1:
            return self.received
        return int(distributed.largest(torch.tensor(self.received, device=device)))
