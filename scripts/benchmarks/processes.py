"""Whole commands: what it takes to start, and training in several processes."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

import torch

from engine.errors import Failed
from engine.record import read_log
from scripts.benchmarks.inputs import make_images
from scripts.benchmarks.measuring import Bench, Row, interleaved, quotients

ROOT = Path(__file__).resolve().parents[2]
TRAIN = str(ROOT / "imagenet_lt_train.py")
FIRST_STEP = """
import sys, torch, torchvision
from torchvision import transforms
device = sys.argv[2]
images = torchvision.datasets.ImageFolder(sys.argv[1], transforms.ToTensor())
batch, targets = next(iter(torch.utils.data.DataLoader(images, 32, shuffle=True)))
model = torchvision.models.resnet18(num_classes=10).to(device)
optimizer = torch.optim.SGD(model.parameters(), 0.001, momentum=0.9)
loss = torch.nn.functional.cross_entropy(model(batch.to(device)), targets.to(device))
loss.backward()
optimizer.step()
print(loss.item())
"""


def run(command: list[str], threads: int | None = None) -> None:
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    if done.returncode:
        raise Failed(f"{' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-500:]}")


def python(*words: str) -> Callable[[], None]:
    return lambda: run([sys.executable, *words])


def startup_rows(bench: Bench) -> Iterable[Row]:
    """Seconds of whole commands, as a multiple of what torch and torchvision alone take."""
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder) / "data" / "train", [10] * 10, (32, 32), ".png")
        first_step = f"{TRAIN} --data_dir {folder}/data --arch resnet18 -j 0 --max_steps 1 --overwrite --run_name run"
        first_step += f" --root_model {folder} --root_log {folder}/log --device {bench.device.type} --add_rsg False"
        candidates = {
            "import torch, torchvision": python("-c", "import torch, torchvision"),
            "import imagenet_lt_train": python("-c", "import imagenet_lt_train"),
            "imagenet_lt_train.py --help": python(TRAIN, "--help"),
            "bare first step": python("-c", FIRST_STEP, f"{folder}/data/train", str(bench.device)),
            "a run of one step, saved": python(*first_step.split()),
        }
        seconds = interleaved(candidates, bench)
    libraries, bare = "import torch, torchvision", "bare first step"
    for name in candidates:
        if name not in (libraries, bare):
            other = bare if "step" in name else libraries
            figures = {"s": median(seconds[name]), f"s {other}": median(seconds[other])}
            yield Row("startup", f"{name}: time / {other}", quotients(seconds[name], seconds[other]), figures)


def scaling_rows(bench: Bench) -> Iterable[Row]:
    """Images a second in the second epoch of the same global batch in 1, 2 and 4 processes, the cores shared out."""
    available = torch.cuda.device_count() if bench.device.type == "cuda" else 4
    with tempfile.TemporaryDirectory() as folder:
        make_images(Path(folder) / "data" / "train", [4 if bench.quick else 100] * 10, (32, 32), ".png")
        speeds = {number: [] for number in (1, 2, 4) if number <= available}
        for _ in range(max(1, bench.repeats // 2)):
            for number in speeds:
                speeds[number].append(_images_per_second(number, Path(folder), bench))
        for number in list(speeds)[1:]:
            figures = {"images/s": median(speeds[number]), "in one": median(speeds[1])}
            name = f"resnet32, b128, {number} processes on {bench.cores} cores: speed / one process"
            yield Row("scaling", name, quotients(speeds[number], speeds[1]), figures)


def _images_per_second(processes: int, folder: Path, bench: Bench) -> float:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", TRAIN]
    command += f"--data_dir {folder}/data --arch resnet32 -b 128 -j 0 --epochs 2 --add_rsg False --overwrite".split()
    command += f"--root_model {folder} --root_log {folder}/log --run_name run --device {bench.device.type}".split()
    run(command, threads=max(1, bench.cores // processes))
    return read_log(folder / "run")[-1]["images_per_second"]
