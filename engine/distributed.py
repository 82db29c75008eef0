"""Many processes as one: torchrun's environment, exact means over all of them, rows gathered with their gradient.

With one process everything here is the identity, so there is one path through the code.
"""

import os
import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from engine.errors import Failed, Refused
from engine.hardware import keep_freed_memory, masks_updates


def start(device_name: str) -> torch.device:
    """Join the processes that torchrun started, if it did, and return this one's device for ``--device``. On a CPU
    the process keeps the memory that it frees."""
    if device_name == "auto":
        alone = "WORLD_SIZE" not in os.environ
        mps = alone and torch.backends.mps.is_available() and masks_updates(torch.device("mps"))
        device_name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    device = torch.device(device_name)
    if device.type == "cpu":
        keep_freed_memory()
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise Refused("--device mps: this machine has none; try --device auto")
    if device.type == "mps" and "WORLD_SIZE" in os.environ:
        raise Refused("--device mps: several processes cannot share it; try --device cpu, or leave torchrun out")
    if device.type == "cuda":
        processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if processes > gpus:  # all of this machine refuse: only the first one is heard
            raise Refused(f"--device cuda: {processes} process(es) need a GPU each, but {gpus} can be used")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False  # float32 is what --amp off says; TF32 would round to 10 bits
        torch.backends.cuda.matmul.allow_tf32 = False
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys() and not dist.is_initialized():
        on_gpu = device.type == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    return device


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def from_main(value: Any) -> Any:
    """The main process's ``value``, on all of them."""
    if dist.is_initialized():
        holder = [value]
        dist.broadcast_object_list(holder)
        value = holder[0]
    return value


def launch() -> str | None:
    """What names this start of torchrun, the same after its restarts; None without torchrun."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return from_main(f"{platform.node()} {os.getppid()}" if name == "none" else name)


def failed(sentence: str) -> BaseException:
    """What each process raises about something that all of them know, when the main one has written what it had to:
    that one says it, the others end alike."""
    barrier()  # torchrun ends all of them with the first
    return Failed(sentence) if is_main() else SystemExit(Failed.exit_code)


def together(build: Callable[[], Any]) -> Any:
    """``build()``; `Refused` on all processes when it is on one, because each may look at other files."""
    result, error = None, None
    try:
        result = build()
    except Refused as refusal:
        error = str(refusal)
    if errors := [each for each in from_all(error) if each]:
        raise Refused(errors[0])
    return result


def share_buffers(model: nn.Module) -> None:
    """Give every process the main one's running statistics, which are the ones that are saved."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def data_parallel(model: nn.Module) -> nn.Module:
    """What to call in training: the model, wrapped so that gradients are averaged when there are several processes."""
    return nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model


def from_all(value: Any) -> list:
    """Every process's ``value``, on all of them."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def summed(value: Tensor) -> Tensor:
    """Sum over the processes, without gradient."""
    value = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def largest(value: Tensor) -> Tensor:
    """Maximum over the processes."""
    value = value.clone()
    if dist.is_initialized():
        dist.all_reduce(value, dist.ReduceOp.MAX)
    return value


def mean_over_processes(total: Tensor, count: Tensor | int) -> Tensor:
    """``total / count``, where both are sums over the rows of this process, as a mean over the rows of all.

    `DistributedDataParallel` averages the processes' gradients; ``total * processes / sum of counts`` makes that
    average the gradient of the mean over all rows, however unevenly they are spread (pytorch#72047). 0 for no rows.
    """
    if not isinstance(count, Tensor):
        count = total.new_full((), count)  # a fill, not a copy, which the device would wait for
    return total * world_size() / summed(count).to(total.dtype).clamp_min(torch.finfo(total.dtype).tiny)


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes, this one's first; gradients flow back to the process each row came from."""
    if not dist.is_initialized():
        return rows
    counts = _gather_blocks(torch.full((1,), len(rows), device=rows.device)).tolist()
    padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])
    blocks = _GatherBlocks.apply(padded) if rows.requires_grad else _gather_blocks(padded)
    blocks = [block[:count] for block, count in zip(blocks.chunk(world_size()), counts, strict=True)]
    return torch.cat([blocks[rank()], *blocks[: rank()], *blocks[rank() + 1 :]])


def _gather_blocks(block: Tensor) -> Tensor:
    out = block.new_empty(world_size() * len(block), *block.shape[1:])
    dist.all_gather_into_tensor(out, block.contiguous())
    return out


class _GatherBlocks(torch.autograd.Function):
    """all_gather whose backward sums what all processes ask of a block (reduce_scatter)."""

    @staticmethod
    def forward(ctx, block: Tensor) -> Tensor:
        return _gather_blocks(block)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        out = gradient.new_empty(len(gradient) // world_size(), *gradient.shape[1:])
        dist.reduce_scatter_tensor(out, gradient.contiguous())
        return out
