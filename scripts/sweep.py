__import__("sys").path.insert(0, str(__import__("pathlib").Path(__file__).resolve().parents[1]))
"""Train and test every setting of an ablation with every seed; the ablate_*.sh beside it hold the settings."""

import argparse
import contextlib
import hashlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import imagenet_lt_train
from data.folders import read_image_folders
from engine import files
from engine.compare import what_is_missing
from engine.console import say
from engine.errors import Failed, Refused, one_line_errors
from engine.files import read_json
from engine.flags import Parser, given_path, number_in
from engine.hardware import num_cores
from engine.metrics import FEW, MANY
from engine.options import train_parser
from engine.record import read_record
from engine.run import MAY_CHANGE, RunFolder
from scripts import compare_runs

ABOUT = """Train and test every setting of an ablation with every seed, and compare them.

    bash scripts/{sweep}.sh data/digits --seeds 0 1 2 -- --arch resnet32 --epochs 30 --lr 0.05
    JOBS=2 bash scripts/{sweep}.sh ...      # two runs at a time, half of the cores each
    bash scripts/{sweep}.sh ... --list      # only print the commands, a run a line; --line 3 runs the third

What follows -- goes to imagenet_lt_train.py. Run folders lie in checkpoint/<sweep>_<data>_<these flags>/, events for
TensorBoard in log/ likewise, what a run prints in <run>.txt, the comparison in comparison/. Run again, whatever stopped
it, the same command skips what is done and goes on with the rest. A run that fails is named, the others go on, and the
exit code is 1. Ctrl-C lets the runs save and stops.

Settings, with what they give imagenet_lt_train.py:
{settings}"""
OURS = {"data_dir", "seed", "run_name", "resume", "overwrite"}  # flags of the train script that the sweep gives
LONGEST_NAME = 150  # bytes; the runs lie in it


class Run(NamedTuple):
    name: str
    folder: Path
    commands: list[list[str]]  # train, test


@one_line_errors
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) < 2 or argv[0].startswith("-"):
        raise Refused("the settings come from a script, as in: bash scripts/ablate_losses.sh --help")
    sweep, settings, *words = argv
    own, extra = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = Parser(ABOUT.format(sweep=sweep, settings=settings))
    parser.prog, parser.usage = f"bash scripts/{sweep}.sh", "%(prog)s DATA [flags of the sweep] [-- flags of the runs]"
    parser.formatter_class = type("Help", (argparse.RawDescriptionHelpFormatter, parser.formatter_class), {})
    add, positive = parser.add_argument, number_in(1, kind=int)
    add("data_dir", type=given_path, metavar="DATA", help="folder with train/, val/ and test/")
    add("--seeds", type=number_in(0, 2**31, kind=int), nargs="+", default=[0, 1, 2], metavar="K", help="of the runs")
    add("--jobs", type=positive, default=os.environ.get("JOBS", "1"), metavar="K", help="runs at a time, also JOBS=K")
    add("--list", action="store_true", help="only print the commands, a run a line")
    add("--line", type=positive, metavar="N", help="only the run of this line of the list, as for a Slurm array")
    args = parser.parse_args(own)
    args.sweep, args.settings, args.extra = sweep, settings_of(settings), extra
    if len(set(args.seeds)) < len(args.seeds):
        raise Refused(f"--seeds {' '.join(map(str, args.seeds))}: one of them stands there twice")
    return args


@one_line_errors
def main(args: argparse.Namespace) -> None:
    root_model, runs = planned(args)
    if args.line is not None:
        if args.line > len(runs):
            raise Refused(f"--line {args.line}: the list has {len(runs)} lines")
        runs = runs[args.line - 1 : args.line]
    if args.list:
        for run in runs:
            say(" && ".join(shlex.join(["python", *command[1:]]) for command in run.commands))
        return
    for run in runs:
        check_folder(run)
    to_do = [run for run in runs if not is_done(run)]
    threads = {"OMP_NUM_THREADS": str(max(1, num_cores() // args.jobs))} if args.jobs > 1 else {}
    say(f"runs in {root_model}: {len(runs)}, done: {len(runs) - len(to_do)}; {args.jobs} at a time")
    logs = None if args.line else root_model
    with files.locked(root_model) if logs else contextlib.nullcontext():  # lines of the list may run side by side
        failures = run_all(to_do, args.jobs, threads | os.environ, logs)
    done, compared = [run for run in runs if is_done(run)], True
    if done and not args.line:
        flags = [*(str(run.folder) for run in done), "--output", str(root_model / "comparison")]
        try:
            compare_runs.main(compare_runs.parse_args(flags))
        except SystemExit as error:
            if error.code != Refused.exit_code:
                raise
            compared = False  # it has said why; what failed is summed up all the same
    if not failures:
        failures = [f"{run.name} is not tested on its own images" for run in to_do if run not in done]
    if failures:
        raise Failed(f"{len(failures)} of {len(runs)} runs failed: {'; '.join(failures)}")
    if not compared:
        raise Failed("all runs are done, but they are not compared")


def settings_of(text: str) -> dict[str, list[str]]:
    """Flags of the train script by the setting's name: a setting a line, ``#`` comments."""
    lines = [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]
    return {name: flags for name, *flags in lines}


def planned(args: argparse.Namespace) -> tuple[Path, list[Run]]:
    """The folder of the sweep, and all runs in order: each seed of the first setting, of the second, and so on.
    `Refused` for flags that no run would take, and for those that the sweep itself sets."""
    recipes = [recipe for flags in args.settings.values() for recipe in beside_recipe(flags)[0]]
    words = [*recipes[:1], f"--data_dir={args.data_dir}", *args.extra]
    extra = parsed("the flags after --", words, train_parser().parse_args)  # each setting says if they go together
    given = given_flags(args.extra)
    for name, flags in {"the sweep": [], **args.settings}.items():
        taken = sorted(given & (OURS if name == "the sweep" else given_flags(beside_recipe(flags)[1])))
        if taken:
            raise Refused(f"--{taken[0]} is not for the flags after --: {name} sets it")
    folders = read_image_folders(args.data_dir, extra.list_dir)
    if "test" not in folders.splits:
        raise Refused(f"{args.data_dir} has no test images, without which nothing can be compared")
    defaults = {} if recipes else vars(train_parser().parse_args([]))  # beside a recipe a default is a change
    sweep = sweep_name(args.sweep.removeprefix("reproduce_"), args.data_dir, extra, given, defaults)
    root_model, root_log = extra.root_model / sweep, extra.root_log / sweep
    fixed = [f"--data_dir={args.data_dir}", *args.extra, f"--root_model={root_model}", f"--root_log={root_log}"]
    runs, names = [], {}
    for setting, flags in args.settings.items():
        recipe, flags = beside_recipe(flags)
        own = [*recipe, *fixed, *flags]
        other = names.setdefault(str(parsed(f"setting {setting}", own)), setting)
        if other != setting:
            raise Refused(f"settings {other} and {setting} are the same with these flags; give others")
        for seed in args.seeds:
            name = f"{setting}_seed{seed}"
            train = [*own, "--seed", str(seed), "--run_name", name, "--resume"]
            test = ["--model_dir", str(root_model / name), "--device", extra.device]
            scripts = (["imagenet_lt_train.py", *train], ["imagenet_lt_test.py", *test])
            runs.append(Run(name, root_model / name, [[sys.executable, *script] for script in scripts]))
    return root_model, runs


def beside_recipe(flags: list[str]) -> tuple[list[str], list[str]]:
    """A setting's ``@file``, which the flags after ``--`` override, and its other flags, which they may not."""
    return [flag for flag in flags if flag.startswith("@")], [flag for flag in flags if not flag.startswith("@")]


def parsed(what: str, flags: list[str], read: Callable = imagenet_lt_train.parse_args) -> argparse.Namespace:
    """As the train script reads ``flags``, but without its warnings, which each run gives."""
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            return read(flags)
        except SystemExit as error:
            if not error.code:
                raise
    raise Refused(f"{what}: {said.getvalue().strip().splitlines()[-1].removeprefix('error: ')}")


def given_flags(flags: list[str]) -> set[str]:
    """Names of the flags that are given, whatever their values."""
    parser, missing = train_parser(), object()
    unset = argparse.Namespace(**dict.fromkeys(vars(parser.parse_args([])), missing))
    return {flag for flag, value in vars(parser.parse_args(flags, unset)).items() if value is not missing}


def sweep_name(sweep: str, data_dir: Path, extra: argparse.Namespace, given: set[str], defaults: dict) -> str:
    """Of the sweep's folder: other data or flags, another folder. Flags at their default or without influence on the
    result are left out."""
    parts = [sweep, data_dir.absolute().name]
    for flag, value in vars(extra).items():
        if flag in given - MAY_CHANGE and (flag not in defaults or value != defaults[flag]):
            words = "-".join(map(str, value)) if isinstance(value, list) else str(value)
            parts.append(f"{flag}-{re.sub('[^A-Za-z0-9.=-]+', '_', words)}")
    name = "_".join(parts)
    encoded = os.fsencode(name)
    short = encoded[:LONGEST_NAME].decode(errors="ignore")
    return name if len(encoded) <= LONGEST_NAME else f"{short}_{hashlib.sha256(encoded).hexdigest()[:8]}"


def check_folder(run: Run) -> None:
    """`Refused` when the folder holds a run that was told something else, as after a change of the settings."""
    try:
        RunFolder(parsed(f"run {run.name}", run.commands[0][2:]))
    except Refused as error:
        raise Refused(
            f"{error}; a sweep goes on with another --root_model after --, or with that folder moved"
        ) from None


def is_done(run: Run) -> bool:
    """Whether the run is trained and tested, on its own images and with the default groups of classes."""
    if not (run.folder / "args.json").is_file() or what_is_missing(run.folder) is not None:
        return False
    result = read_json(run.folder / "test" / "metrics.json")
    own = result.get("split_hash") == read_record(run.folder)["split_hash"]
    return own and result.get("shot_thresholds") == [MANY, FEW]


def in_use(folder: Path) -> bool:
    """Whether another process trains there, such as one that a killed sweep has left behind."""
    if not os.access(folder / ".lock", os.W_OK):
        return False
    try:
        with files.locked(folder):
            return False
    except Failed:
        return True


class Processes:
    """Those of the runs that are under way. A signal is handed on to them, which save. A hang-up is a SIGTERM to them,
    who do not know it, and nothing under nohup."""

    def __init__(self, environment: dict[str, str], logs: Path | None):
        self.environment, self.logs = environment, logs
        self.running: set[subprocess.Popen] = set()
        self.received: list[int] = []  # signals

    @contextlib.contextmanager
    def hearing_signals(self) -> Iterator[None]:
        numbers = [signal.SIGINT, signal.SIGTERM]
        numbers += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
        former = {number: signal.signal(number, self.hand_on) for number in numbers}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def hand_on(self, number: int, frame) -> None:
        self.received.append(number)
        for process in list(self.running):
            self.stop(process)

    def stop(self, process: subprocess.Popen) -> None:
        process.send_signal(signal.SIGINT if self.received[-1] == signal.SIGINT else signal.SIGTERM)

    def carry_out(self, run: Run) -> str | None:
        """Train and test; what failed, in words."""
        if in_use(run.folder):
            say(f"{run.name} waits for another process that trains in {run.folder}")
        while in_use(run.folder) and not self.received:
            time.sleep(0.2)
        for command in run.commands:
            if self.received:
                return None
            code = self.call(command, run)
            if code and not self.received:
                return f"{run.name} ended with {code}{last_line(run, self.logs)}"
        return None

    def call(self, command: list[str], run: Run) -> int:
        with (self.logs / f"{run.name}.txt").open("a") if self.logs else contextlib.nullcontext() as log:
            process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
            self.running.add(process)
            if self.received:  # after it was asked whether there is a signal, and before the start
                self.stop(process)
            code = process.wait()
            self.running.discard(process)
        return code


def run_all(runs: list[Run], jobs: int, environment: dict[str, str], logs: Path | None) -> list[str]:
    """Carry out ``runs``, so many at a time; their output goes into ``logs``, or where ours goes. Returns what failed,
    in words. After a signal the sweep ends with its exit code."""
    failures, processes = [], Processes(environment, logs)
    if logs:
        logs.mkdir(parents=True, exist_ok=True)
    with (
        processes.hearing_signals(),
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=len(runs), unit="run", disable=None) as bar,
    ):
        started = {pool.submit(processes.carry_out, run): run for run in runs}
        for future in as_completed(started):
            failure = future.result()
            failures += [failure] if failure else []
            bar.update()
            if not processes.received:
                bar.write(f"failed: {failure}" if failure else f"done: {started[future].name}")
    if processes.received:
        say(f"stopped by {signal.Signals(processes.received[0]).name}; the same command goes on")
        raise SystemExit(128 + processes.received[0])
    return failures


def last_line(run: Run, logs: Path | None) -> str:
    """What a run said last, which is its error when it failed, as the end of a sentence."""
    lines = (logs / f"{run.name}.txt").read_text(errors="replace").strip().splitlines() if logs else []
    return f" after {lines[-1]!r}; see {logs / run.name}.txt" if lines else ""


if __name__ == "__main__":
    main(parse_args())
