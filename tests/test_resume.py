"""A run that is interrupted ends in the same bits as one that is not."""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import imagenet_lt_test
import imagenet_lt_train
from engine.errors import Failed
from engine.record import sessions
from engine.run import RunFolder
from engine.state import TrainingState, read_state
from models import ARCHITECTURES
from models.resnet_cifar import resnet_cifar

ROOT = Path(__file__).resolve().parents[1]
SWITCHES = ["--drw_epoch", "1", "--drs_epoch", "2", "--epoch_thresh", "0", "--add_sphere_loss"]


def flags_for(folder: Path, data: Path, *more: str, arch: str = "resnet8") -> list[str]:
    return [
        *("--data_dir", str(data), "--root_model", str(folder), "--root_log", str(folder / "log"), "--run_name", "run"),
        *("--arch", arch, "--epochs", "3", "--batch_size", "4", "--lr", "0.02", "--seed", "0", *SWITCHES, *more),
    ]


def train(folder: Path, data: Path, *more: str, arch: str = "resnet8") -> Path:
    imagenet_lt_train.main(imagenet_lt_train.parse_args(flags_for(folder, data, *more, arch=arch)))
    return folder / "run"


def log_of(run: Path) -> list[dict]:
    """The rows without what a clock or the operating system says."""
    measured = {"seconds", "images_per_second", "peak_memory_bytes"}
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in measured} for row in rows]


def assert_same(run: Path, other: Path) -> None:
    assert (run / "last.safetensors").read_bytes() == (other / "last.safetensors").read_bytes()
    assert (run / "best.safetensors").read_bytes() == (other / "best.safetensors").read_bytes()
    assert log_of(run) == log_of(other)
    states = [torch.load(path / "state.pt", weights_only=True) for path in (run, other)]
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name


STRONG = "--augment autoaugment cutout --ema_decay 0.5 --optimizer adamw --save_every_steps 3 --supcon_balance"
MIXED = "--mixup 1 --cutmix 1 --add_supcon_loss 0 --add_rsg 0 --save_every_steps 3 --nesterov --backbone_lr 0.01"
MIXED += " --precise_bn"


@pytest.mark.parametrize(
    "more", [[], ["--save_every_steps", "3"], ["--accumulate_steps", "2"], STRONG.split(), MIXED.split()]
)
def test_a_run_goes_on_exactly_from_its_previous_state(tmp_path, tiny_dataset, monkeypatch, more):
    """The state before the last save is put back, as after a kill: between epochs, or inside one. Dropout draws."""

    def with_dropout(args):
        backbone = resnet_cifar(8, 16)
        backbone.upper.append(nn.Dropout(0.2))
        return backbone

    monkeypatch.setitem(ARCHITECTURES, "resnet8", with_dropout)
    whole = train(tmp_path / "whole", tiny_dataset, *more)
    resumed = tmp_path / "resumed" / "run"
    shutil.copytree(whole, resumed)
    (resumed / "state.previous.pt").replace(resumed / "state.pt")
    (resumed / "last.safetensors").unlink()
    step = torch.load(resumed / "state.pt", weights_only=True)["step"]
    assert step == (3 if "--save_every_steps" in more else 0)  # of 4
    train(tmp_path / "resumed", tiny_dataset, *more, "--resume")
    assert_same(whole, resumed)


def test_an_epoch_that_is_repeated_has_its_events_once(tmp_path, tiny_dataset):
    run = train(tmp_path, tiny_dataset)
    (run / "state.previous.pt").replace(run / "state.pt")
    train(tmp_path, tiny_dataset, "--resume")
    events = EventAccumulator(str(tmp_path / "log" / "run")).Reload()
    assert [event.step for event in events.Scalars("val_accuracy")] == [0, 1, 2]


def test_best_weights_of_an_epoch_that_is_repeated_do_not_stay_with_the_score_of_another(tmp_path, tiny_dataset):
    """Killed between weights and state; the repeated epoch may score less, where the hardware is another one."""
    run = train(tmp_path, tiny_dataset)
    at = torch.load(run / "state.previous.pt", weights_only=True)  # as the last epoch begins
    at["best"] = {"epoch": 0, "val_balanced_accuracy": 2.0}  # which no epoch will reach
    torch.save(at, run / "state.pt")
    tensors = load_file(run / "last.safetensors")
    save_file(
        tensors | {"heads.main.weight": tensors["heads.main.weight"] * 0}, run / "best.safetensors", {"epoch": "2"}
    )
    train(tmp_path, tiny_dataset, "--resume")
    assert torch.load(run / "state.pt", weights_only=True)["best"]["epoch"] == 2
    assert (run / "best.safetensors").read_bytes() == (run / "last.safetensors").read_bytes()


def test_a_run_killed_before_its_first_state_begins_with_its_weights_again(tmp_path, tiny_dataset):
    parent = train(tmp_path / "parent", tiny_dataset, "--max_steps", "1", "--seed", "8")
    more = ("--weights", str(parent / "last.safetensors"), "--freeze_backbone")
    whole = train(tmp_path / "whole", tiny_dataset, *more)
    killed = tmp_path / "killed" / "run"
    killed.mkdir(parents=True)
    shutil.copy(whole / "args.json", killed)
    train(tmp_path / "killed", tiny_dataset, *more, "--resume")
    assert_same(whole, killed)


def test_a_run_killed_between_weights_and_state_of_its_first_epoch_begins_again(tmp_path, tiny_dataset):
    whole = train(tmp_path / "whole", tiny_dataset, "--start_epoch", "1")
    first = train(tmp_path / "first", tiny_dataset, "--start_epoch", "1", "--max_steps", "4")
    killed = tmp_path / "killed" / "run"
    killed.mkdir(parents=True)
    for file in (whole / "args.json", first / "log.jsonl", first / "last.safetensors"):
        shutil.copy(file, killed)
    train(tmp_path / "killed", tiny_dataset, "--start_epoch", "1", "--resume")
    assert_same(whole, killed)


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_exactly(tmp_path, tiny_dataset, signal_number):
    whole = train(tmp_path / "whole", tiny_dataset, "--workers", "1", arch="resnet32")
    yielding = ["nice", "-n", "15", sys.executable]  # to this process, which has to find it at work
    words = flags_for(tmp_path / "stopped", tiny_dataset, "--workers", "1", arch="resnet32")
    command = [*yielding, "imagenet_lt_train.py", *words]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "stopped" / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal_number)
    if signal_number == signal.SIGTERM:  # as Slurm and torchrun both do
        time.sleep(0.01)
        process.send_signal(signal_number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal_number
    assert f"stopped by {signal_number.name}" in output
    train(tmp_path / "stopped", tiny_dataset, "--workers", "1", "--resume", arch="resnet32")
    assert_same(whole, tmp_path / "stopped" / "run")


def test_resume_downloads_no_weights_that_the_state_replaces(tmp_path, tiny_dataset, monkeypatch):
    run = train(tmp_path, tiny_dataset, "--arch", "resnet18", "--max_steps", "5")  # one of the second epoch's
    record = json.loads((run / "args.json").read_text())
    record["flags"]["pretrained"] = True  # as if its start had found the network
    (run / "args.json").write_text(json.dumps(record))
    whole = (run / "last.safetensors").read_bytes()
    (run / "state.previous.pt").replace(run / "state.pt")
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "file"))  # no folder to download into
    train(tmp_path, tiny_dataset, "--arch", "resnet18", "--max_steps", "5", "--pretrained", "--resume")
    assert (run / "last.safetensors").read_bytes() == whole


def test_resume_starts_a_run_that_is_not_there_and_leaves_a_finished_one_alone(tmp_path, tiny_dataset, capsys):
    run = train(tmp_path, tiny_dataset, "--resume")
    before = {path.name: path.stat().st_mtime_ns for path in run.iterdir()}
    train(tmp_path, tiny_dataset, "--resume")
    assert "is finished" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in run.iterdir()} == before


def test_resume_refuses_another_flag_and_names_both_values(tmp_path, tiny_dataset, capsys):
    train(tmp_path, tiny_dataset)
    capsys.readouterr()
    for more, words in (
        ("--lr 0.5", "with --lr 0.02, now it is 0.5; give 0.02"),
        ("--augment cutout", "without --augment, now it is cutout; give no word behind it, or leave it out"),
    ):
        with pytest.raises(SystemExit, match="2"):
            train(tmp_path, tiny_dataset, "--resume", *more.split())
        assert words in capsys.readouterr().err


def test_resume_refuses_a_share_of_the_epochs_in_place_of_an_epoch(tmp_path, tiny_dataset, capsys):
    """1 is an epoch, 1.0 all of them, and equal in Python."""
    train(tmp_path, tiny_dataset)
    with pytest.raises(SystemExit) as error:
        train(tmp_path, tiny_dataset, "--drw_epoch", "1.0", "--resume")
    assert error.value.code == 2
    assert "with --drw_epoch 1, now it is 1.0" in capsys.readouterr().err


def test_resume_may_change_what_changes_no_bit(tmp_path, tiny_dataset, capsys):
    train(tmp_path, tiny_dataset)
    may_change = "--workers 2 --print_freq 3 --save_every_steps 5 --device cpu"
    train(tmp_path, tiny_dataset, "--resume", *may_change.split())
    assert "is finished" in capsys.readouterr().out


def test_a_finished_run_whose_state_is_gone_is_not_begun_again(tmp_path, tiny_dataset, capsys):
    run = train(tmp_path, tiny_dataset)
    for path in run.glob("state*"):
        path.unlink()
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    with pytest.raises(SystemExit, match="2"):
        train(tmp_path, tiny_dataset, "--resume")
    assert "no state.pt to go on from" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_finished_run_of_one_epoch_whose_state_is_gone_is_not_begun_again(tmp_path, tiny_dataset, capsys):
    run = train(tmp_path, tiny_dataset, "--epochs", "1")
    (run / "state.pt").unlink()
    with pytest.raises(SystemExit, match="2"):
        train(tmp_path, tiny_dataset, "--epochs", "1", "--resume")
    assert "no state.pt to go on from" in capsys.readouterr().err


def test_a_tested_run_whose_state_is_gone_keeps_its_test(tmp_path, tiny_dataset, capsys):
    run = train(tmp_path, tiny_dataset, "--max_steps", "1")  # of three epochs: as a kill in the first one leaves it
    imagenet_lt_test.main(imagenet_lt_test.parse_args(["--model_dir", str(run)]))
    (run / "state.pt").unlink()
    with pytest.raises(SystemExit, match="2"):
        train(tmp_path, tiny_dataset, "--max_steps", "1", "--resume")
    assert "no state.pt to go on from" in capsys.readouterr().err
    assert (run / "test" / "metrics.json").is_file()


def test_resume_refuses_another_word_on_mirroring(tmp_path, tiny_dataset, capsys):
    run = train(tmp_path, tiny_dataset)
    assert json.loads((run / "args.json").read_text())["mirrored"] is True
    (run / "state.previous.pt").replace(run / "state.pt")
    (tiny_dataset / "dataset.json").write_text('{"hflip": false}')
    with pytest.raises(SystemExit, match="2"):
        train(tmp_path, tiny_dataset, "--resume")
    assert "not to be mirrored" in capsys.readouterr().err


def test_a_run_does_not_replace_the_weights_that_it_starts_from(tmp_path, tiny_dataset, capsys):
    run = train(tmp_path, tiny_dataset)
    before = (run / "last.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="2"):
        train(tmp_path, tiny_dataset, "--overwrite", "--weights", str(run / "last.safetensors"))
    assert "would be replaced" in capsys.readouterr().err
    assert (run / "last.safetensors").read_bytes() == before


def test_going_on_under_other_circumstances_is_a_warning_and_is_recorded(tmp_path, tiny_dataset, capsys):
    run = train(tmp_path, tiny_dataset)
    record = json.loads((run / "args.json").read_text())
    begun = record | {"processes": 2, "precision": "float16", "versions": record["versions"] | {"torch": "2.0"}}
    (run / "args.json").write_text(json.dumps(begun))
    (run / "state.previous.pt").replace(run / "state.pt")
    train(tmp_path, tiny_dataset, "--resume")
    assert "processes 1 (before: 2)" in capsys.readouterr().err
    now = {"precision": record["precision"], "processes": 1, "torch": record["versions"]["torch"]}
    resumed = [{"epoch": 2, "step": 0} | now]
    assert json.loads((run / "args.json").read_text()) == begun | {"resumed": resumed}
    assert [state["precision"] for state in sessions(begun | {"resumed": resumed})] == ["float16", now["precision"]]


@pytest.mark.parametrize("same", [False, True])
def test_another_commit_is_another_circumstance_unless_only_documents_differ(
    tmp_path, tiny_dataset, monkeypatch, capsys, same
):
    run = train(tmp_path, tiny_dataset)
    record = json.loads((run / "args.json").read_text())
    (run / "args.json").write_text(json.dumps(record | {"commit": "0" * 40}))
    (run / "state.previous.pt").replace(run / "state.pt")
    monkeypatch.setattr("engine.run.same_code", lambda *commits: same)
    train(tmp_path, tiny_dataset, "--resume")
    assert ("commit" in capsys.readouterr().err) is not same
    assert ("resumed" in json.loads((run / "args.json").read_text())) is not same


@pytest.mark.parametrize(("epoch", "kept"), [(1, True), (2, False)])
def test_what_a_start_that_saved_nothing_ran_under_is_forgotten(tmp_path, tiny_dataset, capsys, epoch, kept):
    """From the state before epoch 2: what was so since epoch 1 stays; what began with this state led to nothing."""
    run = train(tmp_path, tiny_dataset)
    record = json.loads((run / "args.json").read_text())
    threads = {"threads": 9} if kept else {}
    other = {"resumed": [{"epoch": epoch, "step": 0, "threads": record["threads"] if kept else 9}]}
    (run / "args.json").write_text(json.dumps(record | threads | other))
    (run / "state.previous.pt").replace(run / "state.pt")
    train(tmp_path, tiny_dataset, "--resume")
    assert "circumstances" not in capsys.readouterr().err
    assert json.loads((run / "args.json").read_text()) == record | threads | (other if kept else {})


def test_resume_refuses_other_images(tmp_path, tiny_dataset, capsys):
    run = train(tmp_path, tiny_dataset)
    (run / "state.previous.pt").replace(run / "state.pt")
    next((tiny_dataset / "train" / "common").iterdir()).unlink()
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        train(tmp_path, tiny_dataset, "--resume")
    assert error.value.code == 2
    assert "images" in capsys.readouterr().err


def test_resume_refuses_lists_that_give_the_classes_other_numbers(tmp_path, tiny_dataset, capsys):
    """Where the images and their classes' names are the same, and with them the hash."""

    def number(classes: list[str]) -> None:
        for split in ("train", "val", "test"):
            found = sorted((tiny_dataset / split).glob("*/*.png"))
            rows = [f"{path.relative_to(tiny_dataset)} {classes.index(path.parent.name)}\n" for path in found]
            (tiny_dataset / f"{split}.txt").write_text("".join(rows))

    number(["common", "medium", "rare"])
    run = train(tmp_path, tiny_dataset)
    (run / "state.previous.pt").replace(run / "state.pt")
    number(["rare", "medium", "common"])
    with pytest.raises(SystemExit, match="2"):
        train(tmp_path, tiny_dataset, "--resume")
    assert "are not those that" in capsys.readouterr().err


def test_a_drawn_seed_is_recorded_and_kept(tmp_path, tiny_dataset):
    flags = flags_for(tmp_path, tiny_dataset)
    del flags[flags.index("--seed") : flags.index("--seed") + 2]
    imagenet_lt_train.main(imagenet_lt_train.parse_args(flags))
    run = tmp_path / "run"
    drawn, weights = json.loads((run / "args.json").read_text())["seed"], (run / "last.safetensors").read_bytes()
    (run / "state.previous.pt").replace(run / "state.pt")
    imagenet_lt_train.main(imagenet_lt_train.parse_args([*flags, "--resume"]))
    assert json.loads((run / "args.json").read_text())["seed"] == drawn
    assert (run / "last.safetensors").read_bytes() == weights


# --- files that went bad


class Bomb:
    """What a malicious state file would run."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


def test_a_truncated_state_is_named_and_the_one_before_is_used(tmp_path, tiny_dataset, capsys):
    whole = train(tmp_path / "whole", tiny_dataset)
    broken = tmp_path / "broken" / "run"
    shutil.copytree(whole, broken)
    content = (broken / "state.pt").read_bytes()
    (broken / "state.pt").write_bytes(content[: len(content) // 2])
    train(tmp_path / "broken", tiny_dataset, "--resume")
    assert capsys.readouterr().err.count(f"{broken / 'state.pt'} cannot be used: it is damaged") == 1
    assert_same(whole, broken)


def test_a_pickle_bomb_does_not_go_off(tmp_path, capsys):
    torch.save({"model": Bomb(tmp_path / "exploded")}, tmp_path / "state.pt")
    whole = {entry.name: 1 for entry in fields(TrainingState)}
    torch.save(whole, tmp_path / "state.previous.pt")
    assert read_state(tmp_path) == whole
    assert "cannot be used" in capsys.readouterr().err
    assert not (tmp_path / "exploded").exists()


def test_the_state_of_another_architecture_is_refused(tmp_path, tiny_dataset, capsys):
    run = train(tmp_path / "a", tiny_dataset)
    other = train(tmp_path / "b", tiny_dataset, "--norm_out", "False")
    shutil.copy(other / "state.previous.pt", run / "state.pt")
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        train(tmp_path / "a", tiny_dataset, "--resume")
    assert error.value.code == 2
    assert "heads.main.bias" in capsys.readouterr().err


def test_a_non_finite_loss_keeps_the_model_of_the_step_before(tmp_path, tiny_dataset, capsys):
    flags = ["--lr", "1e6", "--ema_decay", "0.5", "--supcon_views", "2"]
    with pytest.raises(SystemExit) as error:
        train(tmp_path, tiny_dataset, *flags)
    assert error.value.code == 1
    run = tmp_path / "run"
    report = json.loads((run / "nonfinite.json").read_text(), parse_constant=pytest.fail)  # JSON has no NaN
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"epoch {report['epoch']}, step {report['step']}" in line
    assert all(Path(name).exists() for name in report["files"])
    assert len(set(report["files"])) == len(report["files"]) == 4
    state = torch.load(run / "state.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (report["epoch"], report["step"])
    assert report["epoch"] == 0
    stopped = ["--save_every_steps", "1", "--max_steps", str(report["step"])]
    with contextlib.suppress(SystemExit):  # its validation may not be finite, its last update is
        train(tmp_path / "before", tiny_dataset, *flags, *stopped)
    expected = torch.load(tmp_path / "before" / "run" / "state.pt", weights_only=True)
    assert expected["step"] in (report["step"], 0)  # 0 of the next epoch
    for model in ("model", "averaged"):
        for name, value in expected[model].items():
            assert torch.equal(state[model][name], value), name


HOLD = (
    "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
)


def test_two_runs_in_one_folder_do_not_mix(tmp_path, tiny_dataset, capsys):
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(SystemExit) as error:
            train(tmp_path, tiny_dataset)
        holder.communicate("\n")
    assert error.value.code == 1
    assert "another process is at work" in capsys.readouterr().err


def test_a_file_where_events_would_lie_is_refused(tmp_path, tiny_dataset, capsys):
    (tmp_path / "log").write_text("mine")
    with pytest.raises(SystemExit) as error:
        train(tmp_path, tiny_dataset)
    assert error.value.code == 2
    assert f"--root_log: {tmp_path / 'log'} is a file" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", ["log.jsonl", "predict/log.jsonl.csv", "test_mine/metrics.json"])
def test_files_of_somebody_else_are_not_touched(file, tmp_path, tiny_dataset, capsys):
    mine = tmp_path / "run" / file
    mine.parent.mkdir(parents=True)
    mine.write_text("my own log")
    with pytest.raises(SystemExit) as error:
        train(tmp_path, tiny_dataset)
    assert error.value.code == 2
    assert f"{mine} is there without args.json" in capsys.readouterr().err
    assert mine.read_text() == "my own log"


@pytest.mark.parametrize("name", ["..", "a/b", "."])
def test_a_run_name_is_a_plain_name(name, tmp_path, tiny_dataset, capsys):
    with pytest.raises(SystemExit) as error:
        train(tmp_path, tiny_dataset, "--run_name", name)
    assert error.value.code == 2
    assert "plain name" in capsys.readouterr().err


def test_an_elastic_restart_goes_on_with_what_its_own_launch_began(tmp_path, tiny_dataset, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    train(tmp_path, tiny_dataset, "--overwrite")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for more in ([], ["--overwrite"]):
        capsys.readouterr()
        train(tmp_path, tiny_dataset, *more)
        assert "is finished" in capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    with pytest.raises(SystemExit, match="2"):
        train(tmp_path, tiny_dataset)
    assert "already holds a run" in capsys.readouterr().err
    train(tmp_path, tiny_dataset, "--overwrite")
    assert "starts in epoch 0" in capsys.readouterr().out


@pytest.mark.parametrize("content", [{"epoch": 1}, torch.zeros(3), "text", [1]])
def test_a_foreign_state_is_named(content, tmp_path, tiny_dataset, capsys):
    run = train(tmp_path, tiny_dataset)
    for name in ("state.pt", "state.previous.pt"):
        torch.save(content, run / name)
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        train(tmp_path, tiny_dataset, "--resume")
    assert error.value.code == 2
    assert f"{run / 'state.pt'} cannot be used" in capsys.readouterr().err


def test_a_broken_line_of_the_log_is_named(tmp_path, tiny_dataset, capsys):
    run = train(tmp_path, tiny_dataset)
    lines = (run / "log.jsonl").read_text().splitlines()
    (run / "log.jsonl").write_text("\n".join([lines[0], "{broken", lines[2]]))
    (run / "state.previous.pt").replace(run / "state.pt")
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        train(tmp_path, tiny_dataset, "--resume")
    assert error.value.code == 2
    assert "log.jsonl, line 2" in capsys.readouterr().err


def test_a_run_with_a_loss_that_this_code_does_not_know_is_refused(tmp_path, tiny_dataset, capsys):
    run = train(tmp_path, tiny_dataset, "--max_steps", "1")
    record = json.loads((run / "args.json").read_text())
    record["flags"]["add_new_loss"] = False  # changes nothing
    (run / "args.json").write_text(json.dumps(record))
    args = imagenet_lt_test.parse_args(["--model_dir", str(run)])
    imagenet_lt_test.main(args)
    record["flags"]["add_new_loss"] = True
    (run / "args.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit) as error:
        imagenet_lt_test.main(args)
    assert error.value.code == 2
    expected = f"trained with --add_new_loss, which this code does not know; use that of commit {record['commit']}"
    assert expected in capsys.readouterr().err


def test_a_run_from_before_a_flag_was_added_goes_on(tmp_path, tiny_dataset):
    run = train(tmp_path, tiny_dataset)
    record = json.loads((run / "args.json").read_text())
    del record["flags"]["clip_grad_norm"]
    (run / "args.json").write_text(json.dumps(record))
    before = (run / "last.safetensors").read_bytes()
    (run / "state.previous.pt").replace(run / "state.pt")
    train(tmp_path, tiny_dataset, "--resume")
    assert (run / "last.safetensors").read_bytes() == before


def test_divergence_in_the_last_step_is_one_line(tmp_path, tiny_dataset, capsys):
    with pytest.raises(SystemExit) as error:
        train(tmp_path, tiny_dataset, "--batch_size", "400", "--lr", "1e6")
    assert error.value.code == 1
    assert len(capsys.readouterr().err.strip().splitlines()) <= 2  # a warning about correcting twice, and the error


@pytest.mark.parametrize("there", [None, b"", b"{}"])
def test_a_run_that_another_process_has_begun_since_this_one_looked_is_not_replaced(tmp_path, tiny_dataset, there):
    record = tmp_path / "run" / "args.json"
    if there is not None:
        record.parent.mkdir()
        record.write_bytes(there)
    run = RunFolder(imagenet_lt_train.parse_args(flags_for(tmp_path, tiny_dataset, "--overwrite")))
    run.check_unchanged()
    record.parent.mkdir(exist_ok=True)
    record.write_text('{"another": "run"}')
    with pytest.raises(Failed, match="another process has begun a run"):
        run.check_unchanged()
