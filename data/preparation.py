"""A data folder written whole or not at all: into a locked sibling, then renamed."""

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from data.folders import SPLITS, images_by_class
from data.long_tail import Names, Profile
from data.source_folders import Source
from data.split_hash import STAMP, Files, file_content, hash_of_files, hash_of_lines, is_as_stamped, stamp
from engine.console import first_of, progress
from engine.errors import Failed, Refused
from engine.files import read_json, write_json

WRITTEN = {*SPLITS, "dataset.json", "split.json", STAMP, "audit.json", "audit.png"}  # in a folder that was prepared
LITTER = (".DS_Store", ".directory", "._*")  # what file managers leave


def publish(
    source: Source, drawn: dict[str, Names], profile: Profile, scratch: Path, output: Path, link: bool, overwrite: bool
) -> str:
    """Make ``output`` hold the images ``drawn`` from ``source``; returns what a user wants to read about it."""
    files = {
        f"{split}/{name}/{image}": source.splits[origin][name][image]
        for split, classes in drawn.items()
        for origin in [split if split in source.splits else "train"]
        for name, images in classes.items()
        for image in images
    }
    told = ""
    refuse_names_of_paths(drawn)
    if len(drawn["train"]) < 2:
        raise Refused(f"there is one class, {next(iter(drawn['train']))}; a classifier needs at least two")
    if output.exists():
        is_same = holds_exactly(output, files)
        is_told_so = read_json(output / "dataset.json", default={}) == source.about
        if is_same and (is_told_so or not overwrite):
            if not is_as_stamped(output, [output / name for name in files]):
                with contextlib.suppress(OSError):  # of a folder that is protected: it is hashed at every start
                    (output / "split.json").touch()
                    stamp(output)
            kept = "" if is_told_so else "; its dataset.json is another one and is kept, --overwrite replaces it"
            return f"{output} is prepared already: {summary(drawn)}, split hash {recorded_hash(output)}{kept}"
        refuse_to_lose(output)
        if not overwrite:
            raise Refused(f"{output} holds something else; --overwrite replaces it, --output DIR writes elsewhere")
        told = "" if is_told_so else "; its dataset.json, which was another one, is replaced, too"
    new = scratch / "new"
    digest = write_files(files, new, link)
    write_json(new / "dataset.json", source.about)
    counts = {split: {name: len(images) for name, images in classes.items()} for split, classes in drawn.items()}
    record = {"hash": digest, "source": source.about["source"], "seed": profile.data_seed, "profile": asdict(profile)}
    write_json(new / "split.json", {**record, "counts": counts, "files": sorted(files)})
    stamp(new)
    replace(new, output, scratch)
    return f"{output}: {summary(drawn)}, split hash {digest}{told}"


def summary(drawn: dict[str, Names]) -> str:
    sizes = [len(images) for images in drawn["train"].values()]
    others = [f"{split} {sum(map(len, drawn[split].values()))}" for split in ("val", "test") if split in drawn]
    shown = ", ".join(map(str, sizes)) if len(sizes) <= 20 else f"{max(sizes)} down to {min(sizes)}"
    train = f"train {sum(sizes)} images of {len(sizes)} classes ({shown})"
    return ", ".join([train, *others])


@contextlib.contextmanager
def scratch_folder(output: Path) -> Iterator[Path]:
    """An empty folder beside ``output``, ours alone until the end; what a killed run left there is removed first."""
    if not output.resolve().name:
        raise Refused(f"{output} cannot be written; give a folder with --output")
    scratch, lock = output.resolve().parent / f".{output.resolve().name}.part", None
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        lock = try_lock(scratch)
        if lock is None:
            raise Failed(f"another process is preparing {output}; wait for it to end")
        yield emptied(scratch, output)
    except OSError as error:
        raise Failed(f"preparing {output} stopped: {error}") from None
    finally:
        if lock is not None:
            emptied(scratch, output).rmdir()
            os.close(lock)


def try_lock(folder: Path) -> int | None:
    """An open file that locks ``folder``; None when another process holds it. The kernel unlocks a killed process."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(lock), folder.stat()):  # not removed by its former owner in between
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    return None


def emptied(scratch: Path, output: Path) -> Path:
    """Undo what a stopped run left: the folder that it was about to replace goes back, the rest goes away."""
    if (scratch / "old").exists() and not output.exists():
        (scratch / "old").rename(output.resolve())
    for leftover in scratch.iterdir():
        remove(leftover)
    return scratch


def replace(new: Path, output: Path, scratch: Path) -> None:
    """Rename ``new`` to ``output``, or to where a link there leads; what was there is deleted with ``scratch``."""
    output = output.resolve()
    if output.exists():
        output.rename(scratch / "old")
    new.rename(output)


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_files(files: Files, folder: Path, link: bool) -> str:
    """Write ``files`` below ``folder`` and return their split hash."""
    for parent in {str(Path(name).parent) for name in files}:
        (folder / parent).mkdir(parents=True, exist_ok=True)
    lines = []
    for name, image in progress(files.items(), "writing", "image"):
        content = file_content(image)
        lines.append(f"{name} {hashlib.sha256(content).hexdigest()}")
        if link and isinstance(image, Path):
            hard_link(image, folder / name)
        else:
            (folder / name).write_bytes(content)
    return hash_of_lines(lines)


def hard_link(image: Path, target: Path) -> None:
    try:
        os.link(image.resolve(), target)
    except OSError as error:
        raise Failed(f"cannot hard-link {image} to {target} ({error.strerror}); leave out --link to copy") from None


def holds_exactly(folder: Path, files: Files) -> bool:
    """Whether the images in the splits of ``folder`` are, byte for byte, those of ``files`` and of ``split.json``."""
    found = [path for classes in images_by_class(folder).values() for paths in classes.values() for path in paths]
    if {str(path.relative_to(folder)) for path in found} != set(files):
        return False
    return recorded_hash(folder) == hash_of_files(files) == hash_of_files({name: folder / name for name in files})


def refuse_names_of_paths(drawn: dict[str, Names]) -> None:
    """`Refused` for a class or image, from a list or an archive, whose name would lead elsewhere as a path."""
    names = {name for classes in drawn.values() for item in classes.items() for name in (item[0], *item[1])}
    if odd := sorted(name for name in names if Path(name).name != name or name[:1] in ("", ".")):
        raise Refused(f"{odd[0]!r} cannot be the name of a class or image; get the original source, or rename it")


def refuse_to_lose(folder: Path) -> None:
    """`Refused` when replacing ``folder`` would delete what this script did not write."""
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if "split.json" in there:
        written = set(read_json(folder / "split.json").get("files") or [])
        inside = [path for split in SPLITS for path in (folder / split).rglob("*") if not path.is_dir()]
        there = (there - WRITTEN) | {name for path in inside if (name := str(path.relative_to(folder))) not in written}
    if lost := sorted(name for name in there if not any(Path(name).match(pattern) for pattern in LITTER)):
        raise Refused(
            f"{folder} holds {first_of(lost, 1)}, which this script did not write and never deletes; move them away, "
            f"or write elsewhere with --output"
        )


def recorded_hash(folder: Path) -> str | None:
    return read_json(folder / "split.json", default={}).get("hash")


def refuse_foreign_output(output: Path, sources: list[Path | None]) -> None:
    """`Refused` when writing ``output`` would change or contain what it is made from."""
    output = output.resolve()
    for source in [source.resolve() for source in sources if source is not None]:
        if output == source or output in source.parents or source in output.parents:
            raise Refused(f"{output} and the source {source} lie inside each other; choose another with --output")
