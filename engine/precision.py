"""In which precision, and in which order of memory, a model computes on a device."""

import os
import shutil
import sys

import torch

from engine.errors import Refused
from engine.hardware import cpu_name

AMP = ("auto", "off", "bf16", "fp16")
CHANNELS_LAST = ("auto", "on", "off")


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The type that ``--amp`` means on ``device``; None is float32 throughout.

    ``auto`` takes bfloat16 where the hardware multiplies it faster than float32: Ampere GPUs and newer, CPUs with AMX,
    AMD's with AVX512-BF16.
    """
    if amp == "auto":
        return torch.bfloat16 if has_fast_bfloat16(device) else None
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def is_channels_last(choice: str, amp_dtype: torch.dtype | None, device: torch.device) -> bool:
    """Whether ``--channels_last`` means that maps lie in memory pixel by pixel, all channels of each.

    ``auto``: with half precision on hardware that is fast at it, whose convolutions want that order.
    """
    if choice == "auto":
        return amp_dtype is not None and (device.type == "cuda" or has_fast_bfloat16(device))
    return choice == "on"


def check_compiler(device: torch.device) -> None:
    """`Refused` where `torch.compile` lacks the compiler that it calls."""
    if device.type == "cpu":
        compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
        if not shutil.which(compiler):
            raise Refused(f"--compile needs a C++ compiler, and there is no {compiler}; install one or leave it out")


def build_scaler(amp_dtype: torch.dtype | None, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss for float16 gradients; otherwise by 1, and masks updates that are not finite all the same."""
    if amp_dtype == torch.float16:
        return torch.amp.GradScaler(device.type)
    return torch.amp.GradScaler(device.type, init_scale=1.0, growth_interval=2**31 - 1)


def has_fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        # Intel's, whose AMX a virtual machine may hide, multiplies it at half of float32's rate by AVX512 alone
        return bool(capabilities.get("amx_bf16") or (capabilities.get("avx512_bf16") and "Intel" not in cpu_name()))
    return False
