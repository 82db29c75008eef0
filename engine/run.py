"""The run folder: what a run was told, what it did, its weights, and all that an exact resume needs."""

import argparse
import math
import os
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from data.folders import SPLITS
from engine import distributed, files
from engine.console import first_of, say, warn
from engine.errors import Failed, Refused
from engine.flags import command_line
from engine.record import circumstances, plain_flags, read_log, read_record, same_code, sessions
from engine.report import REPORT_FILES
from engine.state import TrainingState
from engine.train import NonFiniteLoss
from engine.weights import read_weights, save_weights

MAY_CHANGE = {  # flags that a resumed run may give another value: they say where and how, not what
    *("workers", "print_freq", "save_every_steps", "device", "resume", "overwrite"),
    *("root_model", "root_log", "run_name"),
}
NAME_PARTS = {  # flag -> suffix of the run's name, in the original suite's words and order
    "norm_out": "normout",
    "add_rsg": "rsg",
    "add_cross_entropy_loss": "ce",
    "add_ldam_loss": "ldam",
    "add_focal_loss": "focal",
    "add_supcon_loss": "supcon",
    "add_arc_margin_loss": "arcmar",
    "add_add_margin_loss": "addmar",
    "add_sphere_loss": "sphere",
}
IN_EPOCHS = {"drw_epoch", "drs_epoch", "epoch_thresh", "warmup_epochs"}  # 1 is an epoch, 1.0 all of them
RUN_FILES = ("state.pt", "state.previous.pt", "log.jsonl", "best.safetensors", "last.safetensors", "nonfinite.json")
HPARAM_METRICS = ("val_balanced_accuracy", "val_many", "val_medium", "val_few", "val_accuracy", "train_accuracy")
REPORTS = [
    *(f"{split}*/{name}" for split in SPLITS for name in REPORT_FILES),
    "predict/*.csv",
    "predict/*.json",
    "export*/model.*",
]


def run_name(args: argparse.Namespace) -> str:
    """``--run_name``, or one that says data, architecture and what is on, as the original suite does."""
    if args.run_name:
        return args.run_name
    parts = ["ImageNet_LT", args.data_dir.absolute().name, args.arch]
    parts += [part for flag, part in NAME_PARTS.items() if getattr(args, flag)]
    others = [
        flag for flag, value in vars(args).items() if flag.startswith("add_") and flag not in NAME_PARTS and value
    ]
    parts += [flag.removeprefix("add_").removesuffix("_loss") for flag in others]
    return "_".join(parts + ([] if args.seed is None else [f"seed{args.seed}"]))


def as_given(value: object) -> str:
    """The value of a flag as the command line has it."""
    if value in (None, []):
        return "left out"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


class RunFolder:
    """The folder of the run that the flags name. `record` is args.json of the run to go on with, None of a fresh one.

    `Refused` when a run, or somebody's files, would be lost, or when the run to go on with was told something else.
    """

    def __init__(self, args: argparse.Namespace):
        self.path = args.root_model / run_name(args)
        self.events = args.root_log / run_name(args)  # for TensorBoard
        self.found = self._begun_run()
        self.launch, restarted = distributed.launch(), False
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):  # of a run that this launch has begun
            restarted = files.read_json(self.path / "args.json", default={}).get("launch") == self.launch
        self.record = None
        if self.found is not None and (restarted or not args.overwrite):
            self.record = read_record(self.path)
            if "tau" in self.record:
                raise Refused(
                    f"{self.path} already holds a run, of a rescaled classifier, with which no training goes on; "
                    f"--overwrite replaces it, --run_name names another"
                )
            if not args.resume and not restarted:
                raise Refused(
                    f"{self.path} already holds a run; --resume goes on with it, --overwrite replaces it, "
                    f"--run_name names another"
                )
            self._check_flags(args)
        if self.record is None and args.weights and args.weights.resolve().parent == self.path.resolve():
            raise Refused(
                f"--weights {args.weights} would be replaced by the run that starts from it; give a --run_name"
            )
        if self.record is None and args.weights and not args.weights.is_file():
            raise Refused(f"--weights {args.weights} is no file; give a state dict")
        foreign = self._own_files() if self.found is None else []
        if foreign:
            raise Refused(f"{foreign[0]} is there without args.json; move it away or choose another --run_name")
        if (there := next(path for path in (self.events, *self.events.parents) if path.exists())).is_file():
            raise Refused(f"--root_log: {there} is a file, not a folder; name another one")

    def _own_files(self) -> list[Path]:
        """All that a run and its tests write, and that a fresh start removes."""
        return [path for pattern in (*RUN_FILES, *REPORTS) for path in self.path.glob(pattern)]

    def _begun_run(self) -> bytes | None:
        """The record of the run that is here now."""
        path = self.path / "args.json"
        return path.read_bytes() if path.exists() else None

    def check_unchanged(self) -> None:
        """Called with the lock held: `Failed` when another process has begun a run here since this one looked."""
        if self._begun_run() != self.found:
            raise Failed(f"another process has begun a run in {self.path} meanwhile; give the command again")

    def _check_flags(self, args: argparse.Namespace) -> None:
        for flag, value in plain_flags(args).items():
            recorded = self.record["flags"].get(flag)
            other_unit = flag in IN_EPOCHS and isinstance(value, float) != isinstance(recorded, float)
            if flag not in MAY_CHANGE and (value != recorded or (value and other_unit)):
                was, remedy = f"with --{flag} {as_given(recorded)}", f"give {as_given(recorded)}"
                if recorded is None:
                    was, remedy = f"without --{flag}", "leave it out"
                elif recorded == []:  # where a file of flags gives it, it cannot be left out
                    was, remedy = f"without --{flag}", "give no word behind it, or leave it out"
                raise Refused(
                    f"{self.path} was started {was}, now it is {as_given(value)}; {remedy} to go on, or another "
                    f"--run_name"
                )

    def test_command(self) -> str:
        return command_line("imagenet_lt_test.py", {"model_dir": self.path}, {})

    def refuse_to_lose(self) -> None:
        """`Refused` when no state is left but more than a kill in the first epoch leaves: a fresh start deletes it."""
        first, epochs = self.record["flags"]["start_epoch"], self.record["flags"]["epochs"]
        trained = (self.path / "last.safetensors").is_file() and read_weights(self.path, "last").epoch + 1 - first
        tested = any(True for pattern in REPORTS for _ in self.path.glob(pattern))
        if tested or trained >= min(2, epochs - first) or len(read_log(self.path)) > 1:
            raise Refused(
                f"{self.path} holds a trained model but no state.pt to go on from; --overwrite trains anew in its "
                f"place, --run_name elsewhere"
            )

    def check_same_start(self, record: dict, epoch: int, step: int) -> None:
        """`Refused` for other images; a warning about other circumstances, which `begin` records, from ``step`` of
        ``epoch`` on."""
        if (record["split_hash"], record["classes"]) != (self.record["split_hash"], self.record["classes"]):
            raise Refused(
                f"the images in {record['flags']['data_dir']} are not those that {self.path} was started with "
                f"(split {record['split_hash'][:12]}, recorded {self.record['split_hash'][:12]})"
            )
        if record.get("synthetic_hash") != self.record.get("synthetic_hash"):
            raise Refused(
                f"the synthetic images are not those that {self.path} was started with: they were made or judged again "
                f"since; give the run another --run_name"
            )
        if record["mirrored"] != self.record.get("mirrored", record["mirrored"]):
            raise Refused(
                f"dataset.json says now that images are {'' if record['mirrored'] else 'not '}to be mirrored, other "
                f"than when {self.path} was started; set its hflip back"
            )
        earlier = self.record.pop("resumed", [])  # of those that ended before they saved anything nothing is left
        resumed = [change for change in earlier if (change["epoch"], change["step"]) < (epoch, step)]
        begun, now = sessions(self.record | {"resumed": resumed})[-1], circumstances(record)
        changed = {name: value for name, value in now.items() if begun.get(name, value) != value}
        if "commit" in changed and same_code(begun["commit"], now["commit"]):
            del changed["commit"]
        if changed:
            changes = ", ".join(f"{name} {value} (before: {begun[name]})" for name, value in changed.items())
            warn(f"{self.path} goes on under other circumstances, the result may be that of neither: {changes}")
            resumed.append({"epoch": epoch, "step": step} | changed)
        self.record |= {"resumed": resumed} if resumed else {}

    def holds_weights_of(self, epoch: int) -> bool:
        """Whether the best weights are of ``epoch`` or a later one: a kill came between weights and state."""
        return (self.path / "best.safetensors").is_file() and read_weights(self.path, "best").epoch >= epoch

    def begin(self, record: dict, epoch: int, fresh: bool) -> None:
        """Make the folder ready for ``epoch``: log rows that the saved state has not seen are dropped. A fresh start
        removes what an earlier run and its tests wrote here."""
        try:
            self.writer = SummaryWriter(self.events, purge_step=epoch)
        except OSError as error:
            raise Failed(f"cannot write to {self.events}: {error.strerror}; --root_log says where events lie") from None
        flags = {flag: str(value) for flag, value in record["flags"].items() if flag not in MAY_CHANGE}
        experiment, session, _ = hparams(flags, dict.fromkeys(HPARAM_METRICS))  # the tab shows the tags' last values
        for summary in (experiment, session):
            self.writer.file_writer.add_summary(summary)
        record = (record if fresh else self.record) | ({"launch": self.launch} if self.launch else {})
        if fresh:
            for path in self._own_files():
                path.unlink()
        if fresh or read_record(self.path) != record:
            files.write_json(self.path / "args.json", record)
        files.write_json_lines(self.path / "log.jsonl", [row for row in read_log(self.path) if row["epoch"] < epoch])

    def commit(self, state: TrainingState, row: dict, class_means: np.ndarray | None, finished: bool) -> None:
        """End an epoch: log, weights, and last the state, which makes the rest count."""
        score = row.get("val_balanced_accuracy")
        is_best = score is not None and (state.best is None or score > state.best["val_balanced_accuracy"])
        if is_best:
            state.best = {"epoch": row["epoch"], "val_balanced_accuracy": score}
        state.next_epoch()
        state.finished = finished
        if distributed.is_main():
            say(summary_line(row, is_best))
            files.append_json(self.path / "log.jsonl", row)
            for key, value in row.items():
                if key != "epoch":
                    self.writer.add_scalar(key, value, row["epoch"])
            self.writer.flush()
            if finished:
                self.writer.close()
            for name in ("last", "best") if is_best else ("last",):
                save_weights(self.path / f"{name}.safetensors", state.judged, class_means, row["epoch"])
        state.save(self.path)

    def nonfinite(self, error: NonFiniteLoss, state: TrainingState, paths: list[Path]) -> BaseException:
        """Save what led to a loss that is not finite; what to raise about it."""
        names = [str(paths[index]) for index in dict.fromkeys(error.indices)]  # once, of two views
        bad = [part for part, value in error.parts.items() if not math.isfinite(value)]
        parts = {part: str(value) if part in bad else value for part, value in error.parts.items()}  # JSON knows no NaN
        report = {"epoch": state.epoch, "step": error.step, "bad": bad, "parts": parts, "files": names}
        reports = distributed.from_all(report)
        report = next((each for each in reports if each["bad"]), reports[0])
        state.save(self.path)
        if distributed.is_main():
            files.write_json(self.path / "nonfinite.json", report)
        return distributed.failed(
            f"{', '.join(report['bad']) or 'a gradient'} is not finite in epoch {state.epoch}, step {error.step}; its "
            f"{len(report['files'])} images are listed in {self.path / 'nonfinite.json'} and the state before it is "
            f"saved; begin a new run with a lower --lr, or with --clip_grad_norm"
        )


def summary_line(row: dict, is_best: bool) -> str:
    """The line of an epoch."""
    parts = [f"epoch {row['epoch']:3d}", f"lr {row['lr']:.3g}"]
    parts.append(f"train accuracy {row['train_accuracy']:6.1%}" if "train_accuracy" in row else "")
    if "val_balanced_accuracy" in row:
        groups = [f"{name} {row[f'val_{name}']:.1%}" for name in ("many", "medium", "few") if f"val_{name}" in row]
        parts.append(
            f"val balanced {row['val_balanced_accuracy']:6.1%} ({', '.join(groups)}){' *' if is_best else '  '}"
        )
    parts.append(f"{row['generated_rows']} rows generated" if row["generated_rows"] else "")
    return "  ".join(part for part in [*parts, f"{row['seconds']:.1f} s"] if part)


def find_run(name: str, root: Path) -> Path:
    """The run folder at the path ``name``, or of that name below ``root``; `Refused` with those that there are."""
    for folder in (Path(name), root / name):
        if (folder / "args.json").is_file():
            return folder
    runs = sorted(path.parent.name for path in root.glob("*/args.json"))
    there_are = f"runs in {root}: {first_of(runs, 10)}" if runs else f"there are no runs in {root}; train one first"
    raise Refused(f"no run at {name} or {root / name}; {there_are}")
