"""A prepared folder is whole or not there, whatever happens in between, and the same command always gives the same."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from data.folders import read_image_folders
from data.images import read_image
from data.preparation import refuse_names_of_paths
from data.split_hash import is_as_stamped, split_hash
from engine.errors import Refused
from scripts.prepare_data import main, name_of, parse_args

ROOT = Path(__file__).parents[1]


def prepare(*words) -> None:
    main(parse_args([str(word) for word in words]))


def error_of(capsys, *words, code: int = 2) -> str:
    with pytest.raises(SystemExit) as exit_:
        prepare(*words)
    error = capsys.readouterr().err
    assert exit_.value.code == code
    assert error.count("\n") == 1
    return error


def snapshot(folder: Path) -> dict:
    """Every file below ``folder`` with its content and time."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three classes of 60 small images."""
    for shade, name in enumerate("abc"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(60):
            Image.new("RGB", (4, 4), (shade, index, 0)).save(tmp_path / "photos" / name / f"{index}.png")
    return tmp_path / "photos"


def test_digits_land_in_data_digits_with_the_shipped_split(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    prepare("digits")
    folders = read_image_folders(Path("data/digits"))
    assert folders.class_counts == [124, 88, 63, 45, 32, 23, 16, 12, 8, 6]
    assert [len(folders.splits[split].paths) for split in ("val", "test")] == [200, 300]
    assert read_image(folders.splits["train"].paths[0]).size == (32, 32)
    assert not folders.flips
    assert Path("data/digits/split.json").read_text() == (ROOT / "data/splits/digits.json").read_text()
    assert "train 417 images of 10 classes (124, 88, 63, 45, 32, 23, 16, 12, 8, 6)" in capsys.readouterr().out


def test_the_recorded_hash_is_that_of_the_files(tmp_path, photos):
    prepare("folder", "--source", photos, "--output", tmp_path / "out")
    recorded = split_hash(read_image_folders(tmp_path / "out"))
    (tmp_path / "out/split.json").unlink()
    assert split_hash(read_image_folders(tmp_path / "out")) == recorded


def test_the_record_says_seed_profile_and_counts(tmp_path, photos):
    draw = ["--imb_type", "step", "--imb_factor", 9, "--val_per_class", 3, "--test_per_class", 3, "--data_seed", 5]
    prepare("folder", "--source", photos, "--output", tmp_path / "out", *draw)
    record = json.loads((tmp_path / "out/split.json").read_text())
    assert record["seed"] == 5
    assert (record["profile"]["imb_type"], record["profile"]["imb_factor"]) == ("step", 9)
    assert record["counts"] == {"train": {"a": 54, "b": 54, "c": 6}, "val": dict.fromkeys("abc", 3),
                                "test": dict.fromkeys("abc", 3)}  # fmt: skip
    assert str(tmp_path) not in json.dumps(record)


def test_a_second_run_changes_nothing(tmp_path, photos, capsys):
    prepare("folder", "--source", photos, "--output", tmp_path / "out")
    before = snapshot(tmp_path)
    prepare("folder", "--source", photos, "--output", tmp_path / "out")
    assert snapshot(tmp_path) == before
    assert "is prepared already" in capsys.readouterr().out


def test_another_draw_is_refused_until_overwrite_is_said(tmp_path, photos, capsys):
    words = ["folder", "--source", photos, "--output", tmp_path / "out"]
    prepare(*words)
    before = snapshot(tmp_path)
    assert "--overwrite" in error_of(capsys, *words, "--data_seed", 1)
    assert snapshot(tmp_path) == before
    prepare(*words, "--data_seed", 1, "--overwrite")
    assert json.loads((tmp_path / "out/split.json").read_text())["seed"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]


def test_another_dataset_json_is_kept_until_overwrite_is_said(tmp_path, photos, capsys):
    words = ["folder", "--source", photos, "--output", tmp_path / "out"]
    prepare(*words)
    (photos / "dataset.json").write_text('{"hflip": false}')
    prepare(*words)
    assert "its dataset.json is another one and is kept" in capsys.readouterr().out
    assert read_image_folders(tmp_path / "out").flips
    prepare(*words, "--overwrite")
    assert not read_image_folders(tmp_path / "out").flips


def test_a_copy_is_believed_when_it_was_compared_with_its_source(tmp_path, photos, capsys):
    words = ["folder", "--source", photos, "--output"]
    prepare(*words, tmp_path / "out")
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(tmp_path / "out/split.json", copy)
    time.sleep(1.1)  # a copy takes its time
    shutil.copytree(tmp_path / "out", copy, dirs_exist_ok=True, ignore=shutil.ignore_patterns("split.json"))
    assert not is_as_stamped(copy, copy.glob("*/*/*.png"))
    prepare(*words, copy)
    assert "prepared already" in capsys.readouterr().out
    assert is_as_stamped(copy, copy.glob("*/*/*.png"))


@pytest.mark.parametrize("moved", ["test", "test/a"])
def test_what_was_moved_here_from_another_folder_is_noticed(tmp_path, photos, moved):
    prepare("folder", "--source", photos, "--output", tmp_path / "one")
    for path in photos.rglob("*.png"):
        Image.new("RGB", (8, 8), "red").save(path)
    prepare("folder", "--source", photos, "--output", tmp_path / "other")
    hashes = [split_hash(read_image_folders(tmp_path / name)) for name in ("one", "other")]
    shutil.rmtree(tmp_path / "one" / moved)
    (tmp_path / "other" / moved).rename(tmp_path / "one" / moved)
    assert split_hash(read_image_folders(tmp_path / "one")) not in hashes


def test_a_missing_image_is_noticed_and_overwrite_brings_it_back(tmp_path, photos, capsys):
    words = ["folder", "--source", photos, "--output", tmp_path / "out"]
    prepare(*words)
    before = (tmp_path / "out/split.json").read_text()
    path = next((tmp_path / "out/test/c").iterdir())
    path.unlink()
    assert "something else" in error_of(capsys, *words)
    prepare(*words, "--overwrite")
    assert path.exists()
    assert (tmp_path / "out/split.json").read_text() == before


def test_a_damaged_image_is_noticed_and_overwrite_mends_it(tmp_path, photos, capsys):
    words = ["folder", "--source", photos, "--output", tmp_path / "out"]
    prepare(*words)
    before, path = snapshot(tmp_path / "out"), next((tmp_path / "out/test/c").iterdir())
    path.write_bytes(b"junk")
    assert "something else" in error_of(capsys, *words)
    prepare(*words, "--overwrite")
    after = snapshot(tmp_path / "out")
    assert after.pop(".stamp") != before.pop(".stamp")
    assert {name: content for name, (content, _) in after.items()} == {
        name: content for name, (content, _) in before.items()
    }


def test_overwrite_deletes_nothing_that_was_added(tmp_path, photos, capsys):
    words = ["folder", "--source", photos, "--output", tmp_path / "out"]
    prepare(*words)
    (tmp_path / "out/synthetic").mkdir()
    assert "holds synthetic, which" in error_of(capsys, *words, "--data_seed", 1, "--overwrite")
    assert (tmp_path / "out/synthetic").is_dir()


@pytest.mark.parametrize(
    "added", ["train/new/a.png", "train/a/notes.txt", "val/labels.csv", "train/a/.labels.csv", ".notes"]
)
def test_overwrite_deletes_nothing_that_was_added_to_a_split(tmp_path, photos, capsys, added):
    words = ["folder", "--source", photos, "--output", tmp_path / "out"]
    prepare(*words)
    (tmp_path / "out" / added).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / added).write_text("mine")
    assert f"holds {added}, which" in error_of(capsys, *words, "--data_seed", 1, "--overwrite")
    assert (tmp_path / "out" / added).read_text() == "mine"


def test_overwrite_replaces_what_file_managers_leave_and_says_what_becomes_of_dataset_json(tmp_path, photos, capsys):
    words = ["folder", "--source", photos, "--output", tmp_path / "out"]
    prepare(*words)
    for litter in (".DS_Store", "train/a/._0.png"):
        (tmp_path / "out" / litter).touch()
    (tmp_path / "out/dataset.json").write_text('{"hflip": false}')
    capsys.readouterr()
    prepare(*words, "--data_seed", 1, "--overwrite")
    assert "dataset.json, which was another one, is replaced" in capsys.readouterr().out
    assert not (tmp_path / "out/.DS_Store").exists()
    prepare(*words, "--data_seed", 2, "--overwrite")
    assert "dataset.json" not in capsys.readouterr().out


def test_where_a_link_leads_is_replaced_and_not_the_link(tmp_path, photos):
    (tmp_path / "large").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large/set")
    words = ["folder", "--source", photos, "--output", tmp_path / "out"]
    for more in ([], ["--data_seed", 1, "--overwrite"]):
        prepare(*words, *more)
        assert (tmp_path / "out").is_symlink()
        assert [path.name for path in (tmp_path / "large").iterdir()] == ["set"]
    assert json.loads((tmp_path / "large/set/split.json").read_text())["seed"] == 1


def test_files_that_are_left_out_are_counted(tmp_path, photos, capsys):
    for name in ("a/inner/x.png", "a/y.heic", "loose.jpg", "a/.hidden"):
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).touch()
    prepare("folder", "--source", photos, "--output", tmp_path / "out")
    assert "3 files of" in (line := capsys.readouterr().err)
    assert "a/inner/x.png, a/y.heic, loose.jpg;" in line


@pytest.mark.parametrize(
    ("folders", "flags", "words"),
    [
        (["Train/a", "Train/b", "Test/a"], [], "Test has a name that is not used here"),
        (["train/a", "train/b", "val/a"], ["--val_fraction", 0.3], "--val_fraction changes nothing"),
        (["a", "b"], ["--ilsvrc", "nowhere"], "--ilsvrc is for mini-imagenet"),
    ],
)
def test_what_would_change_nothing_or_mislead_is_refused(tmp_path, capsys, folders, flags, words):
    for folder in folders:
        (tmp_path / "in" / folder).mkdir(parents=True)
        for index in range(5):
            Image.new("RGB", (4, 4), (index, 0, 0)).save(tmp_path / "in" / folder / f"{index}.png")
    assert words in error_of(capsys, "folder", "--source", tmp_path / "in", "--output", tmp_path / "out", *flags)


def test_a_folder_that_wraps_the_classes_may_have_any_name(tmp_path, photos):
    photos.rename(tmp_path / "images")
    (tmp_path / "in").mkdir()
    (tmp_path / "images").rename(tmp_path / "in/images")
    prepare("folder", "--source", tmp_path / "in", "--output", tmp_path / "out")
    assert read_image_folders(tmp_path / "out").classes == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("name", "expected"), [("photos", "photos"), ("photos.v2", "photos.v2"), ("a.b.tar.gz", "a.b"), ("x.zip", "x")]
)
def test_a_data_set_is_named_after_its_source(tmp_path, name, expected):
    (tmp_path / name).touch() if name.endswith(("gz", "zip")) else (tmp_path / name).mkdir()
    assert name_of(tmp_path / name) == expected


def test_a_source_without_a_name_is_not_written_into_the_folder_of_all_data(tmp_path, photos, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos.rename(tmp_path / ".photos")
    assert "give one with --output" in error_of(capsys, "folder", "--source", ".photos", "--overwrite")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("--imb_factor 50", "--imb_factor changes nothing"),
        ("--class_order random", "--class_order changes nothing"),
        ("--val_fraction .6 --test_fraction .4", "nothing is left to train on"),
        ("--val_fraction .1 --val_per_class 5", "say the size of one split twice"),
    ],
)
def test_flags_that_change_nothing_or_leave_nothing_are_refused(tmp_path, photos, capsys, words, error):
    output = ["--output", tmp_path / "out"]
    assert error in error_of(capsys, "folder", "--source", photos, *output, *words.split())
    assert not (tmp_path / "out").exists()


def test_a_share_that_is_not_in_force_is_not_counted(tmp_path, photos):
    prepare("folder", "--source", photos, "--output", tmp_path / "out", "--val_per_class", 5, "--test_fraction", 0.9)
    assert read_image_folders(tmp_path / "out").class_counts == [1, 1, 1]


def test_the_class_that_comes_first_in_the_given_order_is_the_largest(tmp_path, photos):
    (tmp_path / "order").write_text("c\na\nb\n")
    words = ["--imb_type", "exp", "--imb_factor", 10, "--class_order", tmp_path / "order"]
    prepare("folder", "--source", photos, "--output", tmp_path / "out", *words)
    assert read_image_folders(tmp_path / "out").class_counts == [13, 4, 42]


def test_a_given_share_goes_before_a_sources_own_number(tmp_path):
    prepare("digits", "--val_fraction", 0.5, "--output", tmp_path / "out")
    assert len(read_image_folders(tmp_path / "out").splits["val"].paths) > 800


def test_what_a_source_says_of_itself_is_kept(tmp_path, photos):
    (photos / "dataset.json").write_text('{"hflip": false, "readable_names": {"a": "Apple"}, "source": "mine"}')
    prepare("folder", "--source", photos, "--output", tmp_path / "out")
    folders = read_image_folders(tmp_path / "out")
    assert not folders.flips
    assert folders.readable_names == ["Apple", "b", "c"]


def test_file_names_are_bytes(tmp_path, photos):
    (photos / "a/0.png").rename(photos / "a" / os.fsdecode(b"caf\xe9.png"))
    words = ["folder", "--source", photos, "--output", tmp_path / "out"]
    prepare(*words)
    before = snapshot(tmp_path / "out")
    prepare(*words)
    assert snapshot(tmp_path / "out") == before
    names = [os.fsencode(path.name) for path in (tmp_path / "out").glob("*/a/*")]
    assert len(names) == 60
    assert b"caf\xe9.png" in names


@pytest.mark.parametrize("names", [{"../../x": ["0.png"]}, {"a": ["b/0.png"]}, {"": ["0.png"]}, {".a": ["0.png"]}])
def test_names_that_are_paths_are_refused(names):
    with pytest.raises(Refused, match="cannot be the name"):
        refuse_names_of_paths({"train": names})


def test_changed_source_images_are_noticed(tmp_path, photos, capsys):
    words = ["folder", "--source", photos, "--output", tmp_path / "out"]
    prepare(*words)
    (photos / "a/0.png").write_bytes((photos / "a/1.png").read_bytes())
    assert "something else" in error_of(capsys, *words)


def test_a_folder_that_was_not_prepared_is_never_touched(tmp_path, photos, capsys):
    (tmp_path / "mine/train").mkdir(parents=True)
    (tmp_path / "mine/train/diary.txt").write_text("mine")
    words = ["folder", "--source", photos, "--output", tmp_path / "mine"]
    for more in ([], ["--overwrite"]):
        assert "holds train, which this script did not write" in error_of(capsys, *words, *more)
    assert (tmp_path / "mine/train/diary.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("output", ["photos", "photos/a", "."])
def test_the_source_is_never_written_into(tmp_path, photos, capsys, output):
    words = ["folder", "--source", photos, "--output", tmp_path / output, "--overwrite"]
    assert "inside each other" in error_of(capsys, *words)
    assert len(snapshot(photos)) == 180


def test_links_share_the_bytes_and_give_the_same_hash(tmp_path, photos):
    prepare("folder", "--source", photos, "--output", tmp_path / "copied")
    prepare("folder", "--source", photos, "--output", tmp_path / "linked", "--link")
    path = next((tmp_path / "linked/train/a").iterdir())
    assert path.samefile(photos / "a" / path.name)
    assert not path.is_symlink()
    copied, linked = ((tmp_path / name / "split.json").read_text() for name in ("copied", "linked"))
    assert copied == linked


def test_two_runs_at_once_do_not_mix(tmp_path, photos, capsys):
    (tmp_path / ".out.part").mkdir()
    lock = os.open(tmp_path / ".out.part", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)  # the weakest lock that an exclusive one must wait for
    words = ["folder", "--source", photos, "--output", tmp_path / "out"]
    assert "another process" in error_of(capsys, *words, code=1)
    os.close(lock)
    prepare(*words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]


def test_a_run_killed_between_its_two_renames_gives_the_old_folder_back(tmp_path, photos, capsys):
    words = ["folder", "--source", photos, "--output", tmp_path / "out"]
    prepare(*words)
    (tmp_path / ".out.part/new").mkdir(parents=True)
    (tmp_path / "out").rename(tmp_path / ".out.part/old")
    prepare(*words)
    assert "prepared already" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos"]


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.8, 0.95])
def test_a_run_killed_at_any_moment_completes_when_run_again(tmp_path, photos, fraction):
    for index in range(60, 1500):
        os.link(photos / "a/0.png", photos / f"a/{index}.png")
    words = [sys.executable, ROOT / "scripts/prepare_data.py", "folder", "--source", photos, "--output"]
    words = [str(word) for word in words]
    begin = time.monotonic()
    subprocess.run([*words, str(tmp_path / "undisturbed")], check=True, capture_output=True)
    seconds = time.monotonic() - begin

    killed = subprocess.Popen([*words, str(tmp_path / "out")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(fraction * seconds)
    killed.kill()
    killed.wait()
    if (tmp_path / "out").exists():  # whole, or not there
        assert len(snapshot(tmp_path / "out")) == 1623
    subprocess.run([*words, str(tmp_path / "out")], check=True, capture_output=True)
    records = [(tmp_path / name / "split.json").read_text() for name in ("out", "undisturbed")]
    assert records[0] == records[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "photos", "undisturbed"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cifar10"], "needs --source PATH or --download"),
        (["folder"], "folder needs --source"),
        (["folder", "--source", "nowhere"], "nowhere does not exist"),
        (["digits", "--source", "x"], "leave out --source"),
        (["folder", "--download"], "--download goes with cifar10 or cifar100"),
        (["digits", "--class_order", "nowhere"], "--class_order nowhere"),
        (["digits", "--test_per_class", "200"], "too few for 20 in val, 200 in test"),
    ],
)
def test_flags_that_do_not_fit_are_refused_in_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in error_of(capsys, *words)
    assert not list(tmp_path.glob("data/*"))


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, photos, capsys):
    (tmp_path / "file").write_text("in the way")
    assert "file" in error_of(capsys, "folder", "--source", photos, "--output", tmp_path / "file/out", code=1)
