"""The ledger's rows against the runs that they are made of, and their arithmetic."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import imagenet_lt_test
import imagenet_lt_train
from engine.errors import Refused
from engine.record import code_commit, same_code
from scripts import ledger

ROOT = Path(__file__).resolve().parents[1]
ENTRY = {
    "row": "cifar_rsg",
    "data": "CIFAR10-original",
    "split": "abc",
    "imbalance": 100.0,
    "epochs": 30,
    "of_epochs": 200,
    "seed": 0,
}
ENTRY |= {"last": {"balanced_accuracy": 0.6, "many": 0.7, "medium": 0.5}, "chosen_on_val": None, "parameters": 470_000}
ENTRY |= {
    "seconds_per_epoch": 20.0,
    "threads": 1,
    "hardware": "cores",
    "precision": "bfloat16",
    "torch": "2",
    "commit": "1" * 40,
}
ENTRY |= {"command": "python imagenet_lt_train.py @scripts/recipes/cifar_rsg.txt --epochs 30 --seed 0"}


def other(seed: int, balanced: float, **changes) -> dict:
    last = {"balanced_accuracy": balanced, "many": balanced, "medium": balanced}
    return ENTRY | {"seed": seed, "last": last, "command": ENTRY["command"][:-1] + str(seed)} | changes


def refusal(folder: Path, capsys) -> str:
    with pytest.raises(SystemExit) as error:
        ledger.main(ledger.parse_args([str(folder), "--output", str(folder)]))
    assert error.value.code == 2
    return capsys.readouterr().err


def table_of(text: str, row: str) -> list[list[str]]:
    """Of the row in the first data set that has it."""
    table = next(section for section in text.split("\n## ") if f"\n| {row} |" in section)
    return [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith(f"| {row} |")]


def test_a_row_is_the_mean_and_the_sample_deviation_over_seeds():
    (cells,) = table_of(ledger.page([ENTRY, other(1, 0.7), other(2, 0.8)]), "cifar_rsg")
    assert cells[3:] == ["70.0 ± 10.0", "-", "73.3 ± 5.8 / 66.7 ± 15.3 / -", "- / -", "30 of 200", "3"]


def test_other_budgets_and_images_are_other_rows_and_one_run_has_no_deviation():
    rows = table_of(ledger.page([ENTRY, other(0, 0.9, epochs=200), other(0, 0.5, split="def")]), "cifar_rsg")
    assert [(cells[3], cells[7]) for cells in rows] == [
        ("90.0", "200 of 200"),
        ("60.0", "30 of 200"),
        ("50.0", "30 of 200"),
    ]


def test_another_machine_and_other_flags_are_other_rows_and_the_flags_are_named():
    changed = ENTRY["command"].replace(" --epochs", " --lr 0.5 --epochs")
    rows = table_of(ledger.page([ENTRY, other(1, 0.7, hardware="GPU"), other(2, 0.8, command=changed)]), "cifar_rsg")
    assert sorted((cells[1], cells[3]) for cells in rows) == [
        ("LDAM-DRW-RSG", "60.0"),
        ("LDAM-DRW-RSG", "70.0"),
        ("LDAM-DRW-RSG; `--lr 0.5`", "80.0"),
    ]


def test_how_many_cores_of_one_kind_a_run_saw_makes_no_other_row():
    cores = [other(seed, 0.6, hardware=f"{2 - seed} cores of AMD EPYC") for seed in (1, 0)]
    ((*_, number),) = table_of(text := ledger.page(cores), "cifar_rsg")
    assert number == "2"
    assert "60.00 (seed 0), 60.00 (seed 1)" in text
    assert "1 cores of AMD EPYC or 2 cores of AMD EPYC" in text


def test_a_folder_with_a_blank_is_no_flag():
    command = "python imagenet_lt_train.py @scripts/recipes/any_folder.txt --data_dir 'data/my photos' --lr 1 --seed 0"
    assert ledger.changes({"command": command}) == "--lr 1"


def test_a_row_that_is_measured_on_other_data_is_shown_without_a_published_figure():
    text = ledger.page([ENTRY | {"data": "CIFAR10_ir50"}])
    (cells,) = table_of(text[text.index("## CIFAR10_ir50") - 1 :], "cifar_rsg")
    assert cells[2:4] == ["-", "60.0"]
    assert "CIFAR10_ir50" not in ledger.PAGE_ROWS


def test_a_published_figure_stands_beside_runs_of_its_imbalance_alone():
    ten = [other(seed, 0.5, imbalance=10.0) for seed in (0, 1)]
    assert [table_of(ledger.page(runs), "cifar_rsg")[0][2][:5] for runs in ([ENTRY], ten)] == ["79.95", "-"]
    near = [other(seed, value, row="cifar_ce") for seed, value in enumerate((0.69, 0.7))]
    assert "70.00 (seed 1), -0.9 against the published figure;" in ledger.page(near)  # 70.4
    assert "against" not in ledger.page(ten)


def test_the_order_of_the_ledger_is_that_of_its_rows_and_not_of_the_runs(tmp_path):
    entries = [other(seed, 0.5, row=row) for row in ("cifar_ce", "cifar_rsg") for seed in (0, 1)]
    for given in (entries, entries[::-1]):
        path = tmp_path / "ledger.jsonl"
        path.write_text("".join(f"{json.dumps(entry)}\n" for entry in given))
        ledger.add([], path, tmp_path / "ledger.md")
        assert [json.loads(line) for line in path.read_text().splitlines()] == entries


def test_what_nobody_measured_says_so():
    text = ledger.page([ENTRY])
    assert {cells[3] for name in ("cifar_best", "original") for cells in table_of(text, name)} == {"not measured"}
    assert "`python imagenet_lt_train.py @scripts/recipes/cifar_rsg.txt --epochs 30`" in text


def test_the_shipped_page_is_what_the_shipped_runs_give():
    entries = [json.loads(line) for line in (ROOT / "docs" / "ledger.jsonl").read_text().splitlines()]
    assert (ROOT / "docs" / "ledger.md").read_text() == ledger.page(entries)


def test_the_script_trains_every_row_of_the_page_with_its_recipe(tmp_path):
    """By a ``python`` that only says what it is told."""
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text('#!/bin/sh\necho "$@"\n')
        (tmp_path / name).chmod(0o755)
    for data, rows in ledger.PAGE_ROWS.items():
        command = ["bash", ROOT / "scripts" / "reproduce_ledger.sh", f"data/{data}"]
        said = subprocess.run(
            command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=True
        )
        found = dict(re.findall(r"^(\w+) @scripts/recipes/(\w+)\.txt", said.stdout, re.MULTILINE))
        assert found == {name: row.recipe or name for name, row in rows.items()}
        assert "scripts/ledger.py" in said.stdout


def test_a_run_becomes_a_line_once_with_the_figures_of_its_test(tiny_dataset, tmp_path, capsys):
    words = f"--data_dir {tiny_dataset} --root_model {tmp_path} --seed 3"
    words += f" --root_log {tmp_path}/log --run_name any_folder_seed3 --arch resnet8 --epochs 1 --batch_size 4"
    recipe = f"@{ROOT}/scripts/recipes/any_folder.txt"
    imagenet_lt_train.main(imagenet_lt_train.parse_args([recipe, *words.split()]))
    ledger.main(ledger.parse_args([str(tmp_path), "--output", str(tmp_path)]))
    assert "untested" in capsys.readouterr().err
    test = ["--model_dir", str(tmp_path / "any_folder_seed3")]
    image = next((tiny_dataset / "test" / "rare").iterdir())
    taken = image.rename(tmp_path / "taken.png")
    imagenet_lt_test.main(imagenet_lt_test.parse_args(test))
    assert "tested on other images" in refusal(tmp_path / "any_folder_seed3", capsys)
    ledger.main(ledger.parse_args([str(tmp_path), "--output", str(tmp_path)]))  # as one of a sweep it stops no other
    assert "tested on other images" in capsys.readouterr().err
    taken.rename(image)
    (tmp_path / "empty").mkdir()  # as a sweep leaves whose runs have all failed
    ledger.main(ledger.parse_args([str(tmp_path / "empty"), str(tmp_path), "--output", str(tmp_path)]))
    assert "empty holds no run" in capsys.readouterr().err
    assert (tmp_path / "ledger.jsonl").read_text() == ""
    result = imagenet_lt_test.main(imagenet_lt_test.parse_args(test))
    result["last"]["balanced_accuracy"] = 0.125  # one epoch, which is the best and the last
    (tmp_path / "any_folder_seed3" / "test" / "metrics.json").write_text(json.dumps(result))
    for _ in range(2):
        ledger.main(ledger.parse_args([str(tmp_path), "--output", str(tmp_path)]))
        (line,) = (tmp_path / "ledger.jsonl").read_text().splitlines()
        (tmp_path / "ledger.jsonl").write_text(json.dumps(json.loads(line) | {"parameters": 1}))  # is replaced
    ledger.main(ledger.parse_args([str(tmp_path), "--output", str(tmp_path)]))
    (entry,) = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert (entry["last"]["balanced_accuracy"], entry["chosen_on_val"]) == (0.125, result["balanced_accuracy"])
    assert entry["parameters"] > 1
    assert (entry["data"], entry["epochs"], entry["of_epochs"], entry["seed"]) == ("tiny", 1, 90, 3)
    told = imagenet_lt_train.parse_args([word.replace("@", f"@{ROOT}/") for word in entry["command"].split()[2:]])
    assert (told.arch, told.epochs, told.batch_size, told.lr, told.seed) == ("resnet8", 1, 4, 0.05, 3)
    for name in ("ledger.jsonl", "ledger.md"):
        assert str(tmp_path) not in (tmp_path / name).read_text()
    record = json.loads((tmp_path / "any_folder_seed3" / "args.json").read_text())
    record["resumed"] = [{"epoch": 1, "threads": 9}]
    (tmp_path / "any_folder_seed3" / "args.json").write_text(json.dumps(record))
    assert "other circumstances (threads)" in refusal(tmp_path / "any_folder_seed3", capsys)
    (tmp_path / "ledger.jsonl").write_text(json.dumps(entry)[:-9])
    assert "line 1, is no run" in refusal(tmp_path, capsys)


def test_a_folder_that_is_named_after_no_row_is_refused(tiny_dataset, tmp_path, capsys):
    words = f"--data_dir {tiny_dataset} --root_model {tmp_path} --root_log {tmp_path}/log --seed 0 --max_steps 1"
    imagenet_lt_train.main(imagenet_lt_train.parse_args(f"{words} --arch resnet8 --run_name mine".split()))
    imagenet_lt_test.main(imagenet_lt_test.parse_args(["--model_dir", str(tmp_path / "mine")]))
    assert "mine is not named after a row" in refusal(tmp_path / "mine", capsys)
    assert not (tmp_path / "mine" / "ledger.jsonl").exists()
    (tmp_path / "mine").rename(tmp_path / "any_folder_seed0")
    assert "is a smoke run" in refusal(tmp_path / "any_folder_seed0", capsys)


@pytest.mark.parametrize(
    ("recipe", "flag", "value", "words"),
    [
        ("cifar_ldam_drw", "drw_epoch", None, "--drw_epoch None is not what"),
        ("cifar_best", "augment", ["retired"], "takes no --augment retired"),
    ],
)
def test_a_flag_that_no_command_can_say_is_refused(recipe, flag, value, words):
    told = vars(imagenet_lt_train.parse_args([f"@{ROOT}/scripts/recipes/{recipe}.txt"]))
    with pytest.raises(Refused, match=words):
        ledger.command_of(told | {flag: value}, recipe, 0)


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_commit_is_dirty_by_code_and_not_by_the_ledger(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):  # as in a hook
        monkeypatch.delenv(name, raising=False)

    def git(*words):
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        return subprocess.run(["git", *who, "-C", tmp_path, *words], check=True, capture_output=True, text=True).stdout

    for name in ("engine/a.py", "docs/ledger.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    assert code_commit(tmp_path / "engine") is None
    git("init")
    git("add", ".")
    git("commit", "-m", "both")
    head = git("rev-parse", "HEAD").strip()
    (tmp_path / "docs/ledger.jsonl").write_text("{}\n")
    assert code_commit(tmp_path / "engine") == head
    (tmp_path / "engine/a.py").write_text("1\n")
    changed = code_commit(tmp_path / "engine")
    assert changed.startswith(f"{head}-dirty-")
    (tmp_path / "engine/new.py").touch()
    (tmp_path / "notes.py").touch()  # of nothing that a run is made by
    assert len({changed, code_commit(tmp_path / "engine")}) == 2
    (tmp_path / "engine/new.py").unlink()
    assert code_commit(tmp_path / "engine") == changed
    (tmp_path / "engine/a.py").write_text("2\n")
    assert code_commit(tmp_path / "engine") != changed
    git("commit", "docs/ledger.jsonl", "-m", "ledger")
    assert same_code(head, docs := git("rev-parse", "HEAD").strip(), tmp_path / "engine")
    git("commit", "engine/a.py", "-m", "code")
    code = git("rev-parse", "HEAD").strip()
    others = [(docs, code), (head, changed), (head, None), (head, "0" * 40)]
    assert not any(same_code(*pair, tmp_path / "engine") for pair in others)
