"""Archives and pickles from anywhere: plain files come out, anything else is refused and nothing runs."""

import datetime
import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from data.archives import unpack, unpacked
from data.pickles import load_arrays
from engine.errors import Refused


def tar_with(path: Path, *members: tarfile.TarInfo, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


def zip_with(path: Path, name: str, mode: int = 0o100644) -> Path:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(info, b"content")
    return path


@pytest.mark.parametrize(("name", "mode"), [("x.tar.xz", "w:xz"), ("x.tar.gz", "w:gz"), ("x.tar", "w")])
def test_a_tar_is_unpacked_and_its_wrapping_folders_are_passed_over(tmp_path, name, mode):
    archive = tar_with(tmp_path / name, member("top/inner/train/a/0.png", size=3), mode=mode)
    root = unpacked(archive, tmp_path / "out")
    assert root == tmp_path / "out/top/inner"
    assert (root / "train/a/0.png").read_bytes() == bytes(3)


def test_a_tar_that_ends_in_a_zip_is_a_tar(tmp_path):
    zip_with(tmp_path / "old.zip", "train/b/0.png")
    archive = tar_with(tmp_path / "x.tar", member("train/a/0.png", size=3))
    with tarfile.open(archive, "a") as tar:
        tar.add(tmp_path / "old.zip", "train/old.zip")
    unpack(archive, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.*")) == ["0.png", "old.zip"]


def test_a_zip_is_unpacked(tmp_path):
    root = unpacked(zip_with(tmp_path / "x.zip", "train/a/0.png"), tmp_path / "out")
    assert (root / "train/a/0.png").read_bytes() == b"content"


@pytest.mark.parametrize(
    "bad",
    [
        member("../outside"),
        member("a/../../outside"),
        member("/outside"),
        member("link", tarfile.SYMTYPE, "/etc/passwd"),
        member("link", tarfile.SYMTYPE, "train"),
        member("link", tarfile.LNKTYPE, "train/0.png"),
        member("pipe", tarfile.FIFOTYPE),
        member("device", tarfile.CHRTYPE),
    ],
    ids=lambda bad: f"{bad.name}-{bad.type.decode()}",
)
def test_a_tar_with_anything_but_plain_files_inside_is_refused(tmp_path, bad):
    archive = tar_with(tmp_path / "bad.tar", member("train/0.png"), bad)
    with pytest.raises(Refused, match=f"bad.tar holds '{bad.name}'") as refusal:
        unpack(archive, tmp_path / "in" / "out")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "in" / "outside").exists()


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("../outside", 0o100644),
        ("/outside", 0o100644),
        ("a\\..\\..\\outside", 0o100644),
        ("C:\\outside", 0o100644),
        ("link", 0o120777),
    ],
)
def test_a_zip_with_anything_but_plain_files_inside_is_refused(tmp_path, name, mode):
    with pytest.raises(Refused, match="bad.zip holds"):
        unpack(zip_with(tmp_path / "bad.zip", name, mode), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["x.tar.xz", "x.tar.gz"])
def test_a_damaged_archive_is_refused_by_name(tmp_path, name):
    noise = member("noise", size=100_000)
    with tarfile.open(tmp_path / name, f"w:{name[-2:]}") as tar:
        tar.addfile(noise, io.BytesIO(np.random.default_rng(0).bytes(100_000)))
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Refused, match=f"{name} is damaged"):
        unpack(tmp_path / name, tmp_path / "out")


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(Refused, match="neither a tar nor a zip"):
        unpack(tmp_path / "notes.txt", tmp_path / "out")


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_arrays_and_containers_come_back_from_every_protocol(tmp_path, protocol):
    content = {b"data": np.arange(6, dtype=np.uint8).reshape(2, 3), b"labels": [1, 2], "scalar": np.float32(3)}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(content, protocol))
    loaded = load_arrays(tmp_path / "x.pkl")
    assert (loaded[b"data"] == content[b"data"]).all()
    assert loaded[b"labels"] == [1, 2]
    assert loaded["scalar"] == np.float32(3)


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_would_run_something_is_refused_by_name_and_does_not(tmp_path, protocol):
    marker = tmp_path / "marker"
    content = {b"data": [Command(f"touch {marker}")]}
    (tmp_path / "evil").write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(Refused, match=rf"evil is not opened: its pickle asks for {os.name}\.system"):
        load_arrays(tmp_path / "evil")
    assert not marker.exists()


def test_harmless_objects_of_other_types_are_refused_too(tmp_path):
    (tmp_path / "date").write_bytes(pickle.dumps(datetime.date(2000, 1, 1)))
    with pytest.raises(Refused, match=r"datetime\.date"):
        load_arrays(tmp_path / "date")


def test_arrays_of_objects_are_refused(tmp_path):
    (tmp_path / "objects").write_bytes(pickle.dumps(np.array([1, "a"], dtype=object)))
    with pytest.raises(Refused, match="objects is not opened: its pickle asks for an array of type object"):
        load_arrays(tmp_path / "objects")


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps([1, 2, 3])[:-4]])
def test_a_damaged_pickle_is_refused_by_name(tmp_path, content):
    (tmp_path / "cut").write_bytes(content)
    with pytest.raises(Refused, match="cut is no readable pickle"):
        load_arrays(tmp_path / "cut")


def test_what_a_mac_adds_to_a_zip_is_left_out(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        for name in ("photos/a/0.png", "__MACOSX/photos/a/._0.png"):
            file.writestr(name, b"content")
    assert unpacked(tmp_path / "x.zip", tmp_path / "out") == tmp_path / "out/photos/a"


def test_a_zip_with_a_password_is_refused(tmp_path):
    content = bytearray(zip_with(tmp_path / "x.zip", "a/0.png").read_bytes())
    content[6] |= 1  # the flag, in the file's own header and in the directory
    content[content.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(Refused, match="unpack it and give the folder"):
        unpack(tmp_path / "x.zip", tmp_path / "out")
