"""Every command in the documents is one that the scripts read, and every link leads somewhere."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

import imagenet_lt_train
from engine.options import train_parser
from scripts import sweep
from tests.test_sweeps import words_of

ROOT = Path(__file__).resolve().parents[1]
CODE = ("data", "engine", "losses", "models", "rsg", "scripts")
OTHERS = {"--nproc_per_node"}  # torchrun's
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


ROWS = re.findall(r"^\| `(\w+)( --[^`]*)?` \|", (ROOT / "README.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("recipe", "words"), ROWS)
def test_a_row_of_the_table_is_a_recipe_with_flags(recipe, words):
    assert imagenet_lt_train.parse_args([f"@{ROOT}/scripts/recipes/{recipe}.txt", *words.split()])


def test_the_table_has_rows():
    assert {"cifar_ce", "any_folder", "original"} <= {recipe for recipe, _ in ROWS}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_flags_in_the_text_are_flags(name):
    """Each is in the source of a script, or one of the train script's that are made from the names of the losses."""
    sources = [*ROOT.glob("*.py"), *(path for folder in CODE for path in (ROOT / folder).glob("*"))]
    source = "".join(path.read_text() for path in sources if path.suffix in (".py", ".sh"))
    known = set(re.findall(r"--[a-z]\w+", source)) | set(train_parser()._option_string_actions) | OTHERS
    code = re.findall(r"`[^`]*`", (ROOT / name).read_text())
    assert set(re.findall(r"(?<![\w-])--[a-z]\w+", " ".join(code))) <= known


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_to_files(name):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text())
    assert all((ROOT / name).parent.joinpath(link).exists() for link in links if "://" not in link)
