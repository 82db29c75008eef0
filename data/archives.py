"""Tar and zip archives unpacked into a folder, plain files and folders only."""

import shutil
import stat
import tarfile
import zipfile
import zlib
from lzma import LZMAError
from pathlib import Path, PureWindowsPath

from data.folders import SPLITS
from engine.console import progress
from engine.errors import Refused


def unpacked(path: Path | None, folder: Path) -> Path | None:
    """``path`` if it is a folder, ``folder`` with its files if it is an archive; in both the part that holds the data:
    archives often wrap everything into one folder."""
    if path is None:
        return None
    if path.is_file():
        unpack(path, folder)
        path = folder
    while True:
        inner = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        if len(inner) != 1 or not inner[0].is_dir() or inner[0].name in SPLITS:
            return path
        path = inner[0]


def unpack(archive: Path, folder: Path) -> None:
    """Write the files of ``archive`` below ``folder``; `Refused` at one that would leave it or is no plain file."""
    try:
        if tarfile.is_tarfile(archive):  # first: a tar that ends in a zip file would pass for that zip
            unpack_tar(archive, folder)
        elif zipfile.is_zipfile(archive):
            unpack_zip(archive, folder)
        else:
            raise Refused(f"{archive} is neither a tar nor a zip archive; give one, or the unpacked folder")
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, LZMAError, EOFError) as error:
        raise Refused(f"{archive} is damaged ({error}); get it again") from None
    except RuntimeError as error:  # of zipfile: a password, or a compression that it does not know
        raise Refused(f"{archive} cannot be unpacked ({error}); unpack it and give the folder") from None


def unpack_tar(archive: Path, folder: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in progress(tar, f"unpacking {archive.name}", "file"):
            refuse_foreign(archive, member.name, plain=member.isfile() or member.isdir())
            target = folder / member.name
            if member.isdir():
                target.mkdir(parents=True, exist_ok=True)
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as content, target.open("wb") as file:  # extract's filter is of Python 3.11.4
                shutil.copyfileobj(content, file)


def unpack_zip(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        members = [member for member in file.infolist() if not member.filename.startswith("__MACOSX/")]
        for member in progress(members, f"unpacking {archive.name}", "file"):
            kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where the archive was made without Unix modes
            refuse_foreign(archive, member.filename, plain=kind in (0, stat.S_IFREG, stat.S_IFDIR))
            file.extract(member, folder)


def refuse_foreign(archive: Path, name: str, plain: bool) -> None:
    path = PureWindowsPath(name)  # knows both slashes and drives
    if path.drive or path.root or ".." in path.parts:
        raise Refused(f"{archive} holds {name!r}, a path outside the folder it is unpacked into; it is not used")
    if not plain:
        raise Refused(f"{archive} holds {name!r}, a link or device where only files and folders belong; it is not used")
