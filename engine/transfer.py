import torch
from torch import Tensor


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """A copy on ``device``. CUDA keeps a source that is freed until it is copied, so nothing waits. MPS does not
    (pytorch#189690): that copy is waited for."""
    return value.to(device, non_blocking=device.type == "cuda")


class SentToCpu:
    """A tensor on its way to the CPU. Where it is sent long before it is asked for, the device need not stop."""

    def __init__(self, value: Tensor):
        self._value, self._event = value, None
        if value.device.type == "cuda":
            self._value = torch.empty_like(value, device="cpu", pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def arrived(self) -> Tensor:
        """The tensor on the CPU, waited for only as far as its own copy goes."""
        if self._event is not None:
            self._event.synchronize()
        return self._value.cpu()
