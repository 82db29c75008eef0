"""What goes wrong during a run ends with one line and exit code 1, and the run can go on."""

import json
import multiprocessing
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import imagenet_lt_train
from data.pixel_sources import _end_workers
from engine.errors import Refused, one_line_errors
from engine.state import read_state
from scripts import audit_data

ROOT = Path(__file__).resolve().parents[1]
FROM_FILES = ["--img_size", "72", "--cache_limit", "0", "--workers", "1", "--epochs", "1000"]


def flags_for(folder: Path, data: Path, *more: str) -> list[str]:
    base = ["--data_dir", str(data), "--root_model", str(folder), "--root_log", str(folder / "log")]
    return [*base, "--arch", "resnet8", "--batch_size", "4", "--seed", "0", "--run_name", "run", *more]


def train(folder: Path, data: Path, *more: str) -> None:
    imagenet_lt_train.main(imagenet_lt_train.parse_args(flags_for(folder, data, *more)))


def when(condition, action) -> threading.Thread:
    """A thread that acts as soon as the condition holds."""

    def wait() -> None:
        deadline = time.monotonic() + 60
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        action()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def failure(capsys, call) -> str:
    """The one line on stderr of a call that exits with 1. Workers that its exception keeps alive are ended as at exit:
    collected as garbage, they would take ten seconds each, in some later test."""
    with pytest.raises(SystemExit) as error:
        call()
    assert error.value.code == 1
    handler = signal.getsignal(signal.SIGCHLD)
    _end_workers()
    for worker in multiprocessing.active_children():
        worker.join()
    signal.signal(signal.SIGCHLD, handler)
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1, lines
    return lines[0]


def has_saved(folder: Path) -> bool:
    return (folder / "run" / "state.pt").exists()


def on_a_full_gpu(size: int) -> None:
    raise RuntimeError("CUDA error: out of memory")


@pytest.mark.parametrize(("local_rank", "lines"), [("0", 1), ("1", 0)])
def test_a_refusal_is_said_once_on_every_machine(local_rank, lines, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", local_rank)

    def refuse() -> None:
        raise Refused("this")

    with pytest.raises(SystemExit) as error:
        one_line_errors(refuse)()
    assert error.value.code == 2
    assert capsys.readouterr().err == "error: this\n" * lines


@pytest.mark.parametrize("allocate", [np.empty, torch.empty, on_a_full_gpu])
def test_memory_that_is_not_there_is_one_line(capsys, allocate):
    line = failure(capsys, lambda: one_line_errors(allocate)(2**58))
    assert line.startswith("error: out of memory")


def test_processes_that_cannot_talk_are_one_line(capsys):
    def gather() -> None:
        raise torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:1\nremote process exited")

    line = failure(capsys, lambda: one_line_errors(gather)())
    assert line.startswith("error: another process of the launch ended")
    assert line.endswith("(remote process exited)")


def test_on_a_terminal_there_are_bars(tmp_path, tiny_dataset, capsys, monkeypatch):
    """Of images that are read, decoded and hashed, of batches, and of statistics; elsewhere there are none."""
    steps = ("--epochs", "1", "--max_steps", "1", "--precise_bn", "--overwrite")
    train(tmp_path, tiny_dataset, *steps)
    assert "%|" not in capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "100")
    audit_data.main(audit_data.parse_args([str(tiny_dataset)]))
    train(tmp_path, tiny_dataset, *steps)
    found = set(re.findall(r"(\w[\w ]*):\s+\d+%\|", capsys.readouterr().err))
    assert found >= {"reading", "decoding", "hashing", "epoch 0", "batch statistics", "validation"}


def test_a_file_deleted_during_training_is_named(tmp_path, tiny_dataset, capsys):
    victim = tiny_dataset / "train" / "common" / "train_1.png"
    thread = when(lambda: has_saved(tmp_path), victim.unlink)
    line = failure(capsys, lambda: train(tmp_path, tiny_dataset, *FROM_FILES))
    thread.join()
    assert str(victim) in line
    assert read_state(tmp_path / "run")["epoch"] >= 1


def test_a_killed_worker_is_reported(tmp_path, tiny_dataset, capsys):
    others = multiprocessing.active_children()  # of earlier tests

    def workers() -> list[multiprocessing.Process]:
        own = [worker for worker in multiprocessing.active_children() if worker not in others]
        return sorted(own, key=lambda worker: worker.pid)  # training's comes before val's

    thread = when(lambda: has_saved(tmp_path) and workers(), lambda: workers()[0].kill())
    line = failure(capsys, lambda: train(tmp_path, tiny_dataset, *FROM_FILES))
    thread.join()
    assert "a data worker died" in line
    assert read_state(tmp_path / "run")["epoch"] >= 1


def test_a_disk_that_is_full_leaves_the_last_good_state(tmp_path, tiny_dataset, capsys):
    """No file can grow beyond half of a state: for the system the same as no room."""
    train(tmp_path, tiny_dataset, "--epochs", "3")
    run = tmp_path / "run"
    weights = (run / "last.safetensors").read_bytes()
    (run / "state.previous.pt").replace(run / "state.pt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((run / "state.pt").stat().st_size // 2, limits[1]))
    try:
        line = failure(capsys, lambda: train(tmp_path, tiny_dataset, "--epochs", "3", "--resume"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert line.startswith(f"error: cannot write {run / 'state.pt'}: File too large")
    assert not list(run.glob(".*.tmp"))
    train(tmp_path, tiny_dataset, "--epochs", "3", "--resume")
    assert (run / "last.safetensors").read_bytes() == weights
    assert [json.loads(line)["epoch"] for line in (run / "log.jsonl").read_text().splitlines()] == [0, 1, 2]


def test_a_process_that_fails_ends_although_its_exception_keeps_workers_alive(tmp_path, tiny_dataset):
    """Workers ignore SIGTERM, with which Python ends them at exit before it waits for them."""
    code = """if True:
        import sys
        import torch
        from data.pixel_sources import FixedViews, WorkerPool
        pool = WorkerPool(FixedViews([sys.argv[1]], 32), 1, torch.device("cpu"))
        pool.itself = pool
        print(next(pool.read([[0], [0]])).shape)
        sys.exit(1)
    """
    image = next((tiny_dataset / "train").rglob("*.png"))
    command = [sys.executable, "-c", code, image]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert (result.returncode, result.stdout, result.stderr) == (1, "torch.Size([1, 3, 32, 32])\n", "")
