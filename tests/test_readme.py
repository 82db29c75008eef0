"""Every command in the documents is one that the scripts read, and every link leads somewhere."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest

import imagenet_lt_train
from engine.options import train_parser
from scripts import sweep
from scripts.ledger import changes, percent
from tests.test_sweeps import words_of

ROOT = Path(__file__).resolve().parents[1]
CODE = ("data", "engine", "losses", "models", "rsg", "scripts")
OTHERS = {"--nproc_per_node", "--max_restarts"}  # torchrun's
DOCUMENTS = ["README.md", "data/README.md", "docs/guide.md", "docs/results.md"]
NOT_READ = {"scripts/test.sh", "scripts/retrain_classifier.py"}  # hand flags on to pytest, need a run


def commands() -> list[str]:
    """Lines of code blocks, and code in running text, that call something of ours; without comments."""
    found = []
    for name in DOCUMENTS:
        text = (ROOT / name).read_text()
        code = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
        code += re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        code = [re.sub(r" +#.*", "", line) for line in code]
        found += [
            line for line in code if re.match(r"(JOBS=\d )?(python|bash) \S+\.(py|sh)", line) and "..." not in line
        ]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("command", commands())
def test_a_documented_command_is_read_by_its_script(tmp_path, monkeypatch, command):
    words = [word.replace("NAME", "cifar_ce") for word in shlex.split(command)]
    _, script, *flags = words if not words[0].startswith("JOBS=") else words[1:]
    assert (ROOT / script).is_file()
    monkeypatch.chdir(ROOT)
    if script in NOT_READ:
        return
    if script.endswith(".py"):
        importlib.import_module(script.removesuffix(".py").replace("/", ".")).parse_args(flags)
    elif script == "scripts/quickstart.sh":
        imagenet_lt_train.parse_args(["0" if flag == "k" else flag for flag in flags])
    else:
        told = sweep.parse_args(words_of(tmp_path / "bin", script, flags[0], "--list", *flags[1:]))
        assert told.settings
        imagenet_lt_train.parse_args(told.extra)


def test_the_scripts_are_among_the_documented_commands():
    assert {"imagenet_lt_train.py", "imagenet_lt_test.py", "scripts/export.py"} <= {
        each.split()[1] for each in commands()
    }


def table() -> list[list[str]]:
    """The cells of the table of recipes; its last row is of quickstart.sh, which the ledger does not know."""
    text = (ROOT / "README.md").read_text().partition("## Recipes")[2]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [row for row in rows if not row[0].startswith(("`NAME`", "`bash"))]


BASELINE = "--norm_out False --add_cross_entropy_loss True --add_logit_adjusted_loss False"  # of any_folder
DATA = {"CIFAR-10": "CIFAR10-original", "CIFAR-10 as JPEG": "CIFAR10"}  # in the README: in the ledger


@pytest.mark.parametrize("cells", table(), ids=" ".join)
def test_a_row_of_the_table_is_what_the_ledger_holds(cells):
    name, data, epochs, n, balanced, groups, _, commit = cells
    recipe, _, flags = ("any_folder_ce", "", BASELINE) if name == "its baseline" else name.strip("`").partition(" ")
    flags = re.sub(r"--epochs \d+", "", flags).strip()
    data = data.rpartition(",")[0]
    runs = [json.loads(line) for line in (ROOT / "docs/ledger.jsonl").read_text().splitlines()]
    runs = [run for run in runs if (run["row"], run["data"]) == (recipe, DATA.get(data, data))]
    runs = [run for run in runs if re.sub(r"\.0\b", "", changes(run)) == flags]
    runs = [run for run in runs if run["epochs"] == int(epochs) and run["commit"].startswith(tuple(commit.split(", ")))]
    assert len(runs) == int(n)
    assert percent([run["last"]["balanced_accuracy"] for run in runs]) == balanced
    assert " / ".join(mean_of(runs, group) for group in ("many", "medium", "few")) == groups


def mean_of(runs: list[dict], group: str) -> str:
    if group not in runs[0]["last"]:
        return "-"
    return percent([run["last"][group] for run in runs]).split()[0].replace("100.0", "100")


def test_the_table_has_rows():
    assert {"`cifar_ce`", "`any_folder`", "its baseline"} <= {cells[0] for cells in table()}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_flags_in_the_text_are_flags(name):
    """Each is in the source of a script, or one of the train script's that are made from the names of the losses."""
    sources = [*ROOT.glob("*.py"), *(path for folder in CODE for path in (ROOT / folder).glob("*"))]
    source = "".join(path.read_text() for path in sources if path.suffix in (".py", ".sh"))
    known = set(re.findall(r"--[a-z]\w+", source)) | set(train_parser()._option_string_actions) | OTHERS
    code = re.findall(r"`[^`]*`", (ROOT / name).read_text())
    assert set(re.findall(r"(?<![\w-])--[a-z]\w+", " ".join(code))) <= known


def test_links_lead_to_files():
    links = [
        (ROOT / name).parent / link
        for name in DOCUMENTS
        for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text())
        if "://" not in link
    ]
    assert links
    assert [link for link in links if not link.exists()] == []
