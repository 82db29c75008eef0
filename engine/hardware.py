"""What the figures of a run depend on beside its flags: the machine."""

import ctypes
import os
import platform
from pathlib import Path

import torch


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def hardware(device: torch.device) -> str:
    """In words: the GPU, or how many cores of which processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cores = f"{num_cores()} core{'s' if num_cores() > 1 else ''}"
    return f"{cores} of {cpu_name()}{', its GPU' if device.type == 'mps' else ''}"


def masks_updates(device: torch.device) -> bool:
    """Whether torch's fused optimisers leave out an update that the gradient scaler has found not finite. With MPS they
    applied it, or raised (pytorch#186360)."""
    parameter = torch.zeros(1, device=device, requires_grad=True)
    parameter.grad = torch.full_like(parameter, torch.nan)
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        optimizer = kind([parameter], lr=1.0, fused=True)
        optimizer.found_inf = torch.ones((), device=device)
        try:
            optimizer.step()
        except RuntimeError:
            return False
    return bool(parameter.isfinite())


def keep_freed_memory() -> None:
    """Let glibc keep for the next step what a step frees, but for blocks of 32 MB and more.

    By default most of it goes back to the system and comes again page by page, filled with zeros: with ResNeXt-50 at
    224 px on two cores a sixth of the time of a float32 step. To keep the largest blocks too would save 3 % more of the
    time and take 6 % more memory.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        mmap_threshold, trim_threshold = -3, -1  # of malloc.h
        if libc.mallopt(mmap_threshold, 2**25):  # where that is refused, the other alone would slow things down
            libc.mallopt(trim_threshold, 2**31 - 1)
