"""The ablation scripts: their commands as the train script reads them; how a sweep runs, fails, stops and goes on."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import imagenet_lt_test
import imagenet_lt_train
from engine.errors import Refused
from engine.record import REQUIRED, plain_flags
from engine.run import MAY_CHANGE
from losses import build_objective
from rsg import generates
from scripts import sweep

ROOT = Path(__file__).resolve().parents[1]
SWEEPS = {
    "ablate_losses": 7,
    "ablate_synergy": 6,
    "ablate_weighting": 8,
    "ablate_rsg": 8,
    "ablate_synthetic": 5,
}  # settings of each


def words_of(folder: Path, script: str, *words: str, **environment: str) -> list[str]:
    """What the shell script gives to scripts/sweep.py, by a ``python`` that only says so."""
    folder.mkdir(exist_ok=True)
    for name in ("python", "torchrun"):
        (folder / name).write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
        (folder / name).chmod(0o755)
    path = f"{folder}:{os.environ['PATH']}"
    command = ["bash", str(ROOT / script), *words]
    said = subprocess.run(command, env=os.environ | {"PATH": path} | environment, capture_output=True, check=True)
    assert not said.stderr
    program, *arguments = said.stdout.decode().split("\0")[:-1]
    assert program == "scripts/sweep.py"
    return arguments


def plan(tmp_path: Path, name: str, *words: str | Path, **environment: str) -> tuple[Path, list[sweep.Run]]:
    arguments = words_of(tmp_path / "bin", f"scripts/{name}.sh", *map(str, words), **environment)
    return sweep.planned(sweep.parse_args(arguments))


def refused(capsys, call, *arguments) -> str:
    """The one line of a call that refuses."""
    with pytest.raises((SystemExit, Refused)) as error:
        call(*arguments)
    if error.type is Refused:
        return str(error.value)
    assert error.value.code == 2
    return capsys.readouterr().err.strip()


# --- the settings


@pytest.mark.parametrize("name", SWEEPS)
def test_every_command_of_a_sweep_is_one_that_the_scripts_read(tmp_path, tiny_dataset, name, capsys):
    arguments = words_of(tmp_path / "bin", f"scripts/{name}.sh", str(tiny_dataset), "--seeds", "0", "3", "--list")
    sweep.main(sweep.parse_args([*arguments, "--", "--arch", "resnet32", "--epochs", "10", "--root_model", "r r"]))
    lines = capsys.readouterr().out.splitlines()
    folders, settings = set(), set()
    for line in lines:
        train, test = (shlex.split(command) for command in line.split(" && "))
        assert (train[:2], test[:2]) == (["python", "imagenet_lt_train.py"], ["python", "imagenet_lt_test.py"])
        args = imagenet_lt_train.parse_args(train[2:])
        assert args.resume
        assert (args.arch, args.data_dir) == ("resnet32", tiny_dataset)
        folder = args.root_model / args.run_name
        assert imagenet_lt_test.parse_args(test[2:]).model_dir == str(folder)
        folders.add(folder)
        settings.add(str({flag: value for flag, value in vars(args).items() if flag not in MAY_CHANGE}))
    assert len(folders) == len(settings) == len(lines) == 2 * SWEEPS[name]


def test_help_says_how_to_call_it_and_what_it_runs(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        sweep.parse_args(words_of(tmp_path / "bin", "scripts/ablate_weighting.sh", "--help"))
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert "bash scripts/ablate_weighting.sh data/digits --seeds 0 1 2 -- --arch resnet32" in text
    assert "drw_icf    --add_rsg False --ldam_weight_type icf --drw_epoch 0.8" in text
    assert "None\n" not in text.split("positional")[0]


def test_settings_that_are_the_same_with_these_flags_are_refused_at_once(tmp_path, tiny_dataset, capsys):
    (tmp_path / "recipe.txt").write_text("--lr 0.5\n")
    settings = f"one @{tmp_path}/recipe.txt\ntwo --add_rsg True"
    words = ["name", settings, str(tiny_dataset), "--"]
    assert len(sweep.planned(sweep.parse_args(words))[1]) == 6
    line = refused(capsys, lambda: sweep.planned(sweep.parse_args([*words, "--lr", "0.1"])))
    assert line.startswith("settings one and two are the same with these flags")


def args_of(runs: list[sweep.Run]) -> dict:
    """What each run is told, by its setting."""
    return {run.name.removesuffix("_seed0"): imagenet_lt_train.parse_args(run.commands[0][2:]) for run in runs}


def test_the_grid_is_every_combination_of_the_seven_losses(tmp_path, tiny_dataset):
    arguments = words_of(tmp_path / "bin", "scripts/ablate_losses.sh", str(tiny_dataset), "--seeds", "0", GRID="1")
    settings = sweep.parse_args(arguments).settings
    assert len(settings) == 127
    assert len({tuple(flags) for flags in settings.values()}) == 127
    on = [
        set(flag for flag, value in zip(each[::2], each[1::2], strict=True) if value == "True")
        for each in settings.values()
    ]
    assert {"--add_ldam_loss", "--add_supcon_loss"} in on
    assert max(map(len, on)) == 7


def test_each_loss_alone_is_alone_in_the_objective(tmp_path, tiny_dataset):
    args = args_of(plan(tmp_path, "ablate_losses", tiny_dataset, "--seeds", "0")[1])
    objectives = {name: str(build_objective(each, [8, 5, 3])) for name, each in args.items()}
    assert objectives == {
        "ce": "1 CE(normed)",
        "ldam": "1 LDAM(normed)",
        "focal": "1 focal(normed)",
        "supcon": "1 SupCon(features)",
        "arcmar": "1 CE(normed) + 1 CE(arc)",
        "addmar": "1 CE(normed) + 1 CE(add)",
        "sphere": "1 CE(normed) + 1 CE(sphere)",
    }


def test_each_step_of_the_synergy_changes_one_thing(tmp_path, tiny_dataset):
    args = args_of(plan(tmp_path, "ablate_synergy", tiny_dataset, "--seeds", "0")[1])
    objectives = {name: str(build_objective(each, [8, 5, 3])) for name, each in args.items()}
    assert objectives == {
        "ce": "1 CE(linear)",
        "ce_normed": "1 CE(normed)",
        "supcon_ldam": "0.1 LDAM(normed) + 0.9 SupCon(features)",
        "supcon_ldam_rsg": "0.1 LDAM(normed) + 0.9 SupCon(features) + 0.1 CESC + 0.01 MV",
        "supcon_ldam_rsg_icf": "0.1 LDAM(normed; ICF weights) + 0.9 SupCon(features) + 0.1 CESC + 0.01 MV",
        "supcon_ldam_rsg_linear": "0.1 LDAM(linear) + 0.9 SupCon(features) + 0.1 CESC + 0.01 MV",
    }


def test_shares_of_the_epochs_follow_the_flag(tmp_path, tiny_dataset):
    weighting = args_of(plan(tmp_path, "ablate_weighting", tiny_dataset, "--seeds", "0", "--", "--epochs", "200")[1])
    for epoch, begun in ((159, False), (160, True)):
        assert ("ICF" in str(build_objective(weighting["drw_icf"], [8, 5, 3], epoch))) is begun
    rsg = args_of(plan(tmp_path, "ablate_rsg", tiny_dataset, "--seeds", "0", "--", "--epochs", "8")[1])
    first = {name: [epoch for epoch in range(8) if generates(each, epoch)][:1] for name, each in rsg.items()}
    assert (first["from_the_start"], first["from_half"], first["on"]) == ([0], [4], [6])


# --- the names


def test_the_flags_of_the_runs_override_a_recipe(tmp_path, tiny_dataset):
    (tmp_path / "recipe.txt").write_text("--data_dir elsewhere\n--arch resnet32\n--epochs 10\n--lr 0.5\n")
    setting = f"one @{tmp_path}/recipe.txt --add_rsg False"
    words = ["name", setting, str(tiny_dataset), "--seeds", "0", "--", "--lr", "0.25"]
    folder, (run,) = sweep.planned(sweep.parse_args(words))
    assert folder.name == "name_tiny_lr-0.25"
    assert sweep.planned(sweep.parse_args([*words[:-1], "1e-3"]))[0].name == "name_tiny_lr-0.001"  # no default here
    told = imagenet_lt_train.parse_args(run.commands[0][2:])
    assert (told.data_dir, told.arch, told.epochs, told.lr, told.add_rsg) == (tiny_dataset, "resnet32", 10, 0.25, False)


def test_other_flags_lie_in_another_folder_and_idle_ones_do_not(tmp_path, tiny_dataset):
    def folder(*flags: str) -> str:
        return plan(tmp_path, "ablate_rsg", tiny_dataset, "--seeds", "0", "--", *flags)[0].name

    assert folder() == folder("--epochs", "20", "--workers", "1") == "ablate_rsg_tiny"  # the default, and no matter
    assert folder("--epochs", "3", "--lr", "5e-2") == folder("--lr", "0.05", "--epochs", "3")
    assert folder("--lr_milestones", "0.5", "0.75") == "ablate_rsg_tiny_lr_milestones-0.5-0.75"
    long = [folder("--weights", f"{'x' * 300}{index}") for index in range(2)]
    assert len(set(long)) == 2
    assert max(map(len, long)) < 200
    wide = tiny_dataset.rename(tiny_dataset.with_name("\u72ac" * 80))  # of three bytes each
    assert len(plan(tmp_path, "ablate_rsg", wide, "--seeds", "0")[0].name.encode()) < 200


def test_a_folder_whose_name_begins_with_an_at_sign_is_no_file_of_flags(tmp_path, tiny_dataset, monkeypatch):
    tiny_dataset.rename(tmp_path / "@tiny")
    monkeypatch.chdir(tmp_path)
    _, (run,) = sweep.planned(sweep.parse_args(["one", "a --add_focal_loss", "./@tiny", "--seeds", "0"]))
    assert imagenet_lt_train.parse_args(run.commands[0][2:]).data_dir == Path("@tiny")


def test_what_the_sweep_sets_is_refused_from_the_user(tmp_path, tiny_dataset, capsys):
    def message(*words: str) -> str:
        return refused(capsys, plan, tmp_path, "ablate_rsg", *words)

    data = str(tiny_dataset)
    assert message(data, "--", "--add_rsg", "True").startswith("--add_rsg is not for the flags after --: off sets it")
    assert message(data, "--", "--seed", "1") == "--seed is not for the flags after --: the sweep sets it"
    assert "--epoch 3" in message(data, "--", "--epoch", "3")
    assert "out of range" in message(data, "--", "--cbl_beta", "2")
    two = "a --add_cross_entropy_loss\nb --add_focal_loss"
    no_loss = ["--add_ldam_loss", "False", "--add_supcon_loss", "False"]  # alone no run would take that
    assert len(sweep.planned(sweep.parse_args(["two", two, data, "--seeds", "0", "--", *no_loss]))[1]) == 2
    assert "stands there twice" in message(data, "--seeds", "1", "1")
    assert "nowhere" in message(str(tmp_path / "nowhere"))
    assert "bash scripts/" in refused(capsys, sweep.parse_args, ["--help"])  # not by one of the scripts


def test_a_folder_with_a_run_of_other_flags_is_refused_with_both_values(tmp_path, tiny_dataset, capsys):
    words = ["ablate_x", "on --lr 0.1", str(tiny_dataset), "--", "--root_model", str(tmp_path)]
    _, (run, *_) = sweep.planned(sweep.parse_args(words))
    flags = plain_flags(imagenet_lt_train.parse_args(run.commands[0][2:]))
    run.folder.mkdir(parents=True)
    record = dict.fromkeys(REQUIRED, "") | {"flags": flags, "class_counts": [8, 5, 3], "img_size": 32}
    record |= {"classes": ["a", "b", "c"], "readable_names": ["a", "b", "c"], "mean": [0.5] * 3, "std": [1] * 3}
    (run.folder / "args.json").write_text(json.dumps(record))
    sweep.check_folder(run)
    assert not sweep.is_done(run)  # no epoch yet
    words[1] = "on --lr 0.2"  # somebody has edited the script
    line = refused(capsys, sweep.main, sweep.parse_args(words))
    assert "was started with --lr 0.1, now it is 0.2" in line
    assert "another --root_model" in line


# --- the runner, with small commands in place of training


def shell_run(folder: Path, name: str, *scripts: str) -> sweep.Run:
    return sweep.Run(name, folder / name, [["sh", "-c", script] for script in scripts])


def test_a_run_that_fails_is_named_and_the_others_go_on(tmp_path):
    runs = [
        shell_run(tmp_path, "good", "echo trained >> good", "echo tested >> good"),
        shell_run(tmp_path, "bad", "echo error: no space >&2; exit 1", "touch never"),
        shell_run(tmp_path, "killed", "kill -9 $$"),
        shell_run(tmp_path, "last", "touch last; echo $OMP_NUM_THREADS"),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "7"}
    commands = [run._replace(commands=[["env", "-C", str(tmp_path), *each] for each in run.commands]) for run in runs]
    failures = sweep.run_all(commands, 2, environment, tmp_path / "logs")
    assert sorted(failures) == [
        f"bad ended with 1 after 'error: no space'; see {tmp_path}/logs/bad.txt",
        "killed ended with -9",
    ]
    assert (tmp_path / "good").read_text() == "trained\ntested\n"
    assert (tmp_path / "last").exists()
    assert not (tmp_path / "never").exists()
    assert (tmp_path / "logs" / "last.txt").read_text() == "7\n"


def test_so_many_runs_at_a_time(tmp_path):
    """Each run is there while it waits for the other one; alone it would give up."""
    script = "touch {0}; for i in $(seq 500); do [ -e {1} ] && exit 0; sleep 0.02; done; exit 1"
    names = [(tmp_path / "a", tmp_path / "b"), (tmp_path / "b", tmp_path / "a")]
    runs = [shell_run(tmp_path, str(index), script.format(*pair)) for index, pair in enumerate(names)]
    assert sweep.run_all(runs, 2, dict(os.environ), tmp_path / "logs") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_each_run_once_and_ends_the_sweep(tmp_path, number):
    script = (
        f"trap 'echo saved >> {tmp_path}/saved; exit 9' INT TERM; touch {tmp_path}/$0; while :; do sleep 0.01; done"
    )
    runs = [sweep.Run(name, tmp_path / name, [["sh", "-c", script, name]]) for name in ("a", "b", "c")]

    def stop() -> None:
        while not all((tmp_path / name).exists() for name in ("a", "b")):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    former = signal.signal(number, signal.SIG_DFL)  # also where pytest runs under nohup
    threading.Thread(target=stop, daemon=True).start()
    try:
        with pytest.raises(SystemExit) as error:
            sweep.run_all(runs, 2, dict(os.environ), tmp_path / "logs")
    finally:
        signal.signal(number, former)
    assert error.value.code == 128 + number
    assert (tmp_path / "saved").read_text() == "saved\nsaved\n"
    assert not (tmp_path / "c").exists()


def test_under_nohup_a_hang_up_stops_nothing(tmp_path):
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        runs = [shell_run(tmp_path, "run", f"kill -HUP {os.getpid()}; echo done")]
        assert sweep.run_all(runs, 1, dict(os.environ), tmp_path / "logs") == []
    finally:
        signal.signal(signal.SIGHUP, former)
    assert (tmp_path / "logs" / "run.txt").read_text() == "done\n"


def test_a_run_that_another_process_still_trains_is_waited_for(tmp_path, capsys):
    """As after kill -9 of a sweep alone, which leaves its runs behind."""
    hold = "import pathlib, sys, time; sys.path.insert(0, sys.argv[2]); from engine.files import locked\n"
    hold += (
        "with locked(pathlib.Path(sys.argv[1])): print(flush=True); time.sleep(1.5); open(sys.argv[1] + '/end', 'w')"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "run"), str(ROOT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        run = sweep.Run("run", tmp_path / "run", [["test", "-e", str(tmp_path / "run" / "end")]])
        assert sweep.run_all([run], 1, dict(os.environ), tmp_path / "logs") == []
    assert "run waits for another process" in capsys.readouterr().out


def test_a_sweep_ends_in_a_comparison_names_what_failed_and_repeats_nothing_that_is_done(
    tmp_path, tiny_dataset, capsys, monkeypatch
):
    """Real runs: one setting is good, the other diverges in its first step."""
    monkeypatch.setattr(sweep, "num_cores", lambda: 8)  # two jobs would take four each
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    flags = ["--arch", "resnet32", "--epochs", "1", "--root_model", str(tmp_path), "--root_log", str(tmp_path / "log")]
    words = [str(tiny_dataset), "--seeds", "0", "--jobs", "2", "--", *flags]
    with pytest.raises(SystemExit) as error:
        sweep.main(sweep.parse_args(["mine", "good --lr 0.01\nbad --lr 1e30", *words]))
    assert error.value.code == 1
    assert "1 of 2 runs failed: bad_seed0 ended with" in capsys.readouterr().err
    good = tmp_path / "mine_tiny_arch-resnet32_epochs-1/good_seed0"
    assert (good.parent / "comparison/comparison.csv").read_text().count("\n") == 2  # names and one setting
    assert json.loads((good / "args.json").read_text())["threads"] == 1
    page = good.parent / "comparison/comparison.html"
    ours = page.read_text()
    page.write_text("mine")  # a comparison that is refused hides no failure
    with pytest.raises(SystemExit) as error:
        sweep.main(sweep.parse_args(["mine", "good --lr 0.01\nbad --lr 1e30", *words]))
    assert error.value.code == 1
    said = capsys.readouterr().err
    assert "comparison.html is not of an earlier comparison" in said
    assert "1 of 2 runs failed: bad_seed0 ended with" in said
    with pytest.raises(SystemExit) as error:
        sweep.main(sweep.parse_args(["mine", "good --lr 0.01", *words]))
    assert error.value.code == 1
    assert "all runs are done, but they are not compared" in capsys.readouterr().err
    page.write_text(ours)
    before = {path: path.stat().st_mtime_ns for path in good.rglob("*.*")}
    sweep.main(sweep.parse_args(["mine", "good --lr 0.01", *words]))
    assert before == {path: path.stat().st_mtime_ns for path in good.rglob("*.*")}


def test_a_line_of_the_list_is_the_run_that_it_prints(tmp_path, tiny_dataset, capsys):
    words = ["mine", "a --lr 0.1\nb --lr 0.2", str(tiny_dataset), "--seeds", "3", "4", "--list"]
    device = ["--", "--device", "cpu"]
    sweep.main(sweep.parse_args([*words, *device]))
    lines = capsys.readouterr().out.splitlines()
    for number, line in enumerate(lines, start=1):
        assert line.count("--device cpu") == 2  # to train and to test
        sweep.main(sweep.parse_args([*words, "--line", str(number), *device]))
        assert capsys.readouterr().out == f"{line}\n"
    assert len(lines) == 4


def test_data_may_have_any_name(tmp_path):
    words = words_of(tmp_path / "bin", "scripts/ablate_synthetic.sh", "a b's/données", "--list", LC_ALL="C")
    assert sweep.parse_args(words).settings["img2img"][-1] == "a b's/données/synthetic_img2img"


@pytest.mark.parametrize(
    ("name", "data"), [("ablate_rsg", "DATA"), ("reproduce_ledger", "CIFAR10"), ("ablate_synthetic", "DATA")]
)
def test_a_slurm_array_task_runs_its_line(tmp_path, name, data):
    """With an ``srun`` that runs what it is given, as Slurm's does on the node."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text('#!/bin/sh\n[ "$1 $2" = "--cpus-per-task 8" ] && shift 2 && exec "$@"\n')
    (tmp_path / "bin" / "srun").chmod(0o755)
    arguments = words_of(
        tmp_path / "bin",
        "scripts/slurm.sbatch",
        f"scripts/{name}.sh",
        data,
        "--seeds",
        "5",
        SLURM_ARRAY_TASK_ID="3",
        SLURM_CPUS_PER_TASK="8",
    )
    args = sweep.parse_args(arguments)
    assert (args.sweep, args.line, args.data_dir, args.seeds) == (name, 3, Path(data), [5])
    assert ("cifar_rsg" in args.settings) == (name == "reproduce_ledger")
    assert args.settings.get("img2img", ["DATA/synthetic_img2img"])[-1] == "DATA/synthetic_img2img"


def test_a_slurm_job_starts_a_process_on_every_gpu_and_resumes(tmp_path):
    for name, text in (("srun", 'printf "%s\\n" "$@"'), ("scontrol", "printf 'n7\\nn8\\n'")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_ID": 40_017, "JOB_NODELIST": "n[7-8]", "NNODES": 2, "GPUS_ON_NODE": 4, "CPUS_PER_TASK": 32}
    environment = {f"SLURM_{name}": str(value) for name, value in slurm.items()} | {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    command = ["bash", ROOT / "scripts" / "slurm.sbatch", "--seed", "5"]
    words = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    expected = "--cpus-per-task 32 .venv/bin/torchrun --nnodes 2 --nproc_per_node 4 --max_restarts 3 --rdzv_id 40017"
    expected += " --rdzv_backend c10d --rdzv_endpoint n7:20017 imagenet_lt_train.py --resume --seed 5"
    assert words == expected.split()
