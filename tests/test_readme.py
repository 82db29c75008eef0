"""Every command in the documents is one that the scripts read, and every link leads somewhere."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from scripts import sweep
from tests.test_sweeps import words_of

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ["README.md", "data/README.md", "docs/guide.md", "docs/results.md"]
NOT_READ = {"scripts/quickstart.sh", "scripts/test.sh", "scripts/retrain_classifier.py"}  # hand flags on, need a run


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
    words = [word.replace("NAME", "cifar_ce").replace("DATA", "data") for word in shlex.split(command)]
    _, script, *flags = words if not words[0].startswith("JOBS=") else words[1:]
    assert (ROOT / script).is_file()
    monkeypatch.chdir(ROOT)
    if script in NOT_READ:
        return
    if script.endswith(".py"):
        importlib.import_module(script.removesuffix(".py").replace("/", ".")).parse_args(flags)
    else:
        assert sweep.parse_args(words_of(tmp_path / "bin", script, flags[0], "--list", *flags[1:])).settings


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_to_files(name):
    links = re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text())
    assert all((ROOT / name).parent.joinpath(link).exists() for link in links if "://" not in link)
