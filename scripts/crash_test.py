__import__("sys").path.insert(0, str(__import__("pathlib").Path(__file__).resolve().parents[1]))
"""Kill a training run at random moments, resume it each time, and compare it with a run that was left alone.

    python scripts/prepare_data.py digits
    python scripts/crash_test.py                   # 20 times SIGKILL, about 5 minutes
    python scripts/crash_test.py --signal TERM     # the run saves at each signal

The run reads its images with 2 worker processes, saves every 3 steps, and changes its phase three times: class weights
from epoch 2 on, balanced sampling from epoch 4, generated rows from epoch 6. Weights, state and log must be the same in
every bit. Prints each kill and the verdict; exit code 1 if anything differs.
"""

import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from engine.errors import Failed, one_line_errors
from engine.flags import Parser, given_path, number_in
from engine.record import read_log

ROOT = Path(__file__).resolve().parents[1]
MEASURED = {"seconds", "images_per_second", "peak_memory_bytes"}  # keys of the log that a clock or the system fills
FLAGS = "--arch resnet32 --epochs 10 --lr 0.02 --seed 0 --workers 2 --cache_limit 0 --save_every_steps 3"
FLAGS += " --drw_epoch 2 --drs_epoch 4 --epoch_thresh 5 --add_sphere_loss --run_name run --resume"


def parse_args(argv: list[str] | None = None):
    parser = Parser("Kill a training run at random moments and check that it ends in the same bits.")
    parser.add_argument(
        "--data_dir", type=given_path, default=Path("data/digits"), metavar="DIR", help="what to train on"
    )
    parser.add_argument("--kills", type=number_in(1, kind=int), default=20, metavar="N", help="how often")
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL", help="what to send")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    return parser.parse_args(argv)


def start(data_dir: Path, folder: Path) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "imagenet_lt_train.py"), "--data_dir", str(data_dir), *FLAGS.split()]
    command += ["--root_model", str(folder), "--root_log", str(folder / "log")]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def run_to_the_end(data_dir: Path, folder: Path) -> Path:
    process = start(data_dir, folder)
    errors = process.communicate()[1]
    if process.returncode:
        raise Failed(f"a run that nobody killed ended with {process.returncode}: {errors.strip()}")
    return folder / "run"


def kill_at_random(folder: Path, args, whole: Path, seconds: float) -> None:
    """As many kills as asked for, each after a random share of the ``seconds`` that the ``whole`` run took, start-up
    included. A run that has finished before its kill is compared and begun again, and does not count."""
    moments, kills = random.Random(args.seed), 0
    while kills < args.kills:
        process = start(args.data_dir, folder)
        time.sleep(moments.uniform(0.2, 0.5) * seconds)
        process.send_signal(signal.Signals[f"SIG{args.signal}"])
        errors = process.communicate()[1]
        if process.returncode == 0:
            check_same(whole, folder / "run")
            shutil.rmtree(folder)
        elif process.returncode in (1, 2):
            raise Failed(f"a resumed run failed: {errors.strip()}")
        else:
            kills += 1
            rows = len(read_log(folder / "run"))
            print(f"kill {kills:2d}: exit {process.returncode:4d}, {rows} epochs in the log", flush=True)


def leaves(content, name: str = "") -> dict:
    """Every value of nested dicts and lists by its path, but for the seconds, which a clock fills."""
    if isinstance(content, dict):
        content = list(content.items())
    elif isinstance(content, list):
        content = list(enumerate(content))
    else:
        return {name: content}
    inner = [leaves(value, f"{name}.{key}") for key, value in content if key != "seconds"]
    return {path: value for each in inner for path, value in each.items()}


def same(name: str, one: dict, other: dict) -> bool:
    if isinstance(one.get(name), torch.Tensor) and isinstance(other.get(name), torch.Tensor):
        return torch.equal(one[name], other[name])
    return one.get(name) == other.get(name)


def differences(run: Path, other: Path) -> list[str]:
    """What is not the same in two runs."""
    found = [
        name
        for name in ("best.safetensors", "last.safetensors")
        if (run / name).read_bytes() != (other / name).read_bytes()
    ]
    states = [leaves(torch.load(path / "state.pt", weights_only=True)) for path in (run, other)]
    found += [f"state.pt: {name}" for name in states[0].keys() | states[1].keys() if not same(name, *states)]
    logs = [[{k: v for k, v in row.items() if k not in MEASURED} for row in read_log(path)] for path in (run, other)]
    return found + ([] if logs[0] == logs[1] else ["log.jsonl"])


def check_same(whole: Path, killed: Path) -> None:
    if found := differences(whole, killed):
        raise Failed(f"kills changed {', '.join(found)}")


@one_line_errors
def main(args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        whole = run_to_the_end(args.data_dir, Path(folder) / "whole")
        seconds = time.perf_counter() - begun
        print(f"left alone: {seconds:.0f} s", flush=True)
        kill_at_random(Path(folder) / "killed", args, whole, seconds)
        check_same(whole, run_to_the_end(args.data_dir, Path(folder) / "killed"))
        print(f"{args.kills} x SIG{args.signal}: weights, state and log are the same in every bit")


if __name__ == "__main__":
    main(parse_args())
