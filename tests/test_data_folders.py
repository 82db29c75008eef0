"""Reading class folders and image lists, and the hash that names a split."""

import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

import data
from data.build import check_data, read_data
from data.folders import read_image_folders
from data.split_hash import split_hash, stamp
from data.wordnet import MINI_IMAGENET_NAMES
from engine.errors import Refused
from engine.options import train_parser


def write_images(root: Path, names: dict[str, int]) -> Path:
    """``{"train/cat": 2}`` gives train/cat/0.png and train/cat/1.png, all different."""
    for shade, (folder, number) in enumerate(names.items()):
        (root / folder).mkdir(parents=True)
        for index in range(number):
            Image.new("RGB", (4, 4), (shade, index, 0)).save(root / folder / f"{index}.png")
    return root


def test_counts_follow_the_sorted_folders_of_train(tmp_path):
    folders = read_image_folders(write_images(tmp_path, {"train/b": 2, "train/a": 3, "test/b": 1}))
    assert folders.classes == ["a", "b"]
    assert folders.class_counts == [3, 2]
    assert folders.splits["test"].targets == [1]
    assert folders.untested("test") == ["a"]


def test_other_files_and_dot_files_are_ignored_and_suffixes_have_any_case(tmp_path):
    root = write_images(tmp_path, {"train/a": 1, "train/b": 1, "train/.hidden": 1})
    (root / "train/a/notes.txt").write_text("x")
    (root / "train/a/.0.png").write_bytes(b"")
    (root / "train/a/0.png").rename(root / "train/a/0.PNG")
    assert [path.name for path in read_image_folders(root).splits["train"].paths] == ["0.PNG", "0.png"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"test/a": 1}, "has no train/ folder"),
        ({"train/a": 1}, "at least two"),
        ({"train/a": 1, "train/b": 0, "train/c": 0}, r"no images in .*train/b, .*train/c"),
        ({"train/a": 1, "train/b": 0, "train/b/c": 1}, r"train/b itself but in .*train/b/c"),
        ({"train/a": 1, "train/b": 1, "val/c": 1}, r"val holds classes that train/ lacks: c;"),
        ({"train/a": 1, "train/caf\xe9": 1, "val/cafe\u0301": 1}, r"cafe\u0301 \(rename it: .* Unicode form\)"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(tmp_path, names, message):
    with pytest.raises(Refused, match=message):
        read_image_folders(write_images(tmp_path, names))


def test_what_is_no_file_is_no_image_whatever_its_name(tmp_path):
    root = write_images(tmp_path, {"train/a": 1, "train/b": 1})
    os.mkfifo(root / "train/a/pipe.png")
    (root / "train/a/folder.png").mkdir()
    (root / "train/a/nowhere.png").symlink_to("gone")  # which is named when it is read
    assert [path.name for path in read_image_folders(root).splits["train"].paths] == ["0.png", "nowhere.png", "0.png"]


def test_a_missing_folder_says_how_to_prepare_one(tmp_path):
    with pytest.raises(Refused, match=r"prepare_data\.py digits"):
        read_image_folders(tmp_path / "nowhere")


def test_the_hash_is_that_of_the_sorted_lines(tmp_path):
    root = write_images(tmp_path, {"train/b": 1, "train/a": 2, "val/a": 1})
    lines = [
        f"{path.relative_to(root).as_posix()} {hashlib.sha256(path.read_bytes()).hexdigest()}\n"
        for path in root.glob("*/*/*.png")
    ]
    expected = hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
    assert split_hash(read_image_folders(root)) == expected


def test_a_record_is_believed_only_for_the_same_files_in_the_folder_that_was_stamped(tmp_path):
    root = write_images(tmp_path / "data", {"train/a": 1, "train/b": 1})
    counted = split_hash(read_image_folders(root))
    (root / "split.json").write_text(json.dumps({"hash": "recorded", "files": ["train/a/0.png", "train/b/0.png"]}))
    assert split_hash(read_image_folders(root)) == counted
    stamp(root)
    assert split_hash(read_image_folders(root)) == "recorded"
    shutil.copytree(root, tmp_path / "copy")
    assert split_hash(read_image_folders(tmp_path / "copy")) == counted
    root.rename(tmp_path / "renamed")
    assert split_hash(read_image_folders(tmp_path / "renamed")) == "recorded"
    (tmp_path / "renamed").rename(root)
    (root / "split.json").write_text(json.dumps({"hash": "recorded", "files": ["train/a/0.png"]}))
    assert split_hash(read_image_folders(root)) == counted


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_record_is_refused_by_name(tmp_path, content):
    root = write_images(tmp_path, {"train/a": 1, "train/b": 1})
    (root / "split.json").write_text(content)
    with pytest.raises(Refused, match=r"split\.json"):
        split_hash(read_image_folders(root))


def test_dataset_json_says_names_and_flips(tmp_path):
    root = write_images(tmp_path, {"train/n01532829": 1, "train/six": 1, "train/z": 1})
    (root / "dataset.json").write_text('{"readable_names": {"six": "number six"}, "hflip": false}')
    folders = read_image_folders(root)
    assert folders.readable_names == ["house finch", "number six", "z"]
    assert not folders.flips
    for wrong in ('{"hflip": "no"}', '{"readable_names": ["six"]}', '{"readable_names": {"six": 6}}'):
        (root / "dataset.json").write_text(wrong)
        with pytest.raises(Refused, match=r"dataset\.json"):
            read_image_folders(root)


def test_mini_imagenet_has_a_hundred_different_names():
    assert len(set(MINI_IMAGENET_NAMES.values())) == len(MINI_IMAGENET_NAMES) == 100


def write_lists(root: Path, **lists: str) -> Path:
    for split, lines in lists.items():
        (root / f"{split}.txt").write_text(lines)
    return root


def test_lists_in_the_data_folder_are_used_instead_of_folders(tmp_path):
    root = write_images(tmp_path, {"train/n2": 2, "train/n1": 2, "flat": 2})
    write_lists(
        root, train="train/n2/0.png 0\ntrain/n1/1.png 1\ntrain/n1/0.png 1\n", test="flat/1.png 1\nflat/0.png 0\n"
    )
    folders = read_image_folders(root)
    assert folders.classes == ["n2", "n1"]  # in the order of the labels, whatever the folders are called
    assert folders.class_counts == [1, 2]
    assert [path.relative_to(root).as_posix() for path in folders.splits["test"].paths] == ["flat/0.png", "flat/1.png"]
    assert "val" not in folders.splits


def test_what_is_not_used_is_said_before_the_training(tmp_path, capsys):
    def said(*more: str) -> str:
        args = train_parser().parse_args(["--data_dir", str(root), *more])
        check_data(args, read_data(args))
        return "".join(capsys.readouterr())

    root = write_images(tmp_path, {"train/a": 3, "train/b": 2, "val/a": 1, "val/b": 1, "test/a": 1, "test/b": 1})
    assert said() == ""
    for path in ("train/a/1.heic", "test/b/2.HEIC", "train/b/Thumbs.db", "train/b/heic", "train/b/.hidden"):
        (root / path).write_text("not read")
    (root / "notes.txt").write_text("not read")
    (root / "train/a/again").symlink_to("again")  # leads nowhere but to itself
    assert "warning: 2 .heic in the class folders" in said()
    (root / "train/a/2.png").unlink()
    assert "every class has 2 training images" in said()
    assert "every class" not in said("--add_rsg", "False")
    write_lists(root, train="train/a/0.png 0\ntrain/b/0.png 1\n")
    text = said()
    assert f"those that {root / 'train.txt'} and its like list" in text
    assert f"{root} has no list of val images" in text


def test_lists_may_lie_elsewhere_under_their_published_names(tmp_path):
    root = write_images(tmp_path / "images", {"x/a b": 1, "x/c": 1})
    (tmp_path / "ImageNet_LT_train.txt").write_text("\N{BYTE ORDER MARK}x/a b/0.png 0\nx/c/0.png 1\n")
    assert read_image_folders(root, list_dir=tmp_path).classes == ["a b", "c"]


def test_classes_of_lists_are_named_by_more_of_the_path_or_the_label_where_needed(tmp_path):
    root = write_images(tmp_path, {"apartment/outdoor": 1, "church/outdoor": 2})
    write_lists(root, train="apartment/outdoor/0.png 0\nchurch/outdoor/0.png 1\n")
    assert read_image_folders(root).classes == ["apartment-outdoor", "church-outdoor"]
    write_lists(root, train="apartment/outdoor/0.png 0\nchurch/outdoor/0.png 1\nchurch/outdoor/1.png 0\n")
    assert read_image_folders(root).classes == ["0", "1"]


def test_equal_names_in_one_class_of_a_list_keep_the_hash_apart(tmp_path):
    root = write_images(tmp_path, {"p/one": 1, "q/one": 1, "r/two": 1})
    write_lists(root, train="p/one/0.png 0\nr/two/0.png 1\nq/one/0.png 0\n")
    before = split_hash(read_image_folders(root))
    for folder in ("p/one", "q/one"):  # whichever of the two stands for the name, both count
        content = (root / folder / "0.png").read_bytes()
        (root / folder / "0.png").write_bytes(content + b" ")
        assert split_hash(read_image_folders(root)) != before
        (root / folder / "0.png").write_bytes(content)


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"train": "a/0.png 0\nb/0.png x\n"}, r"train\.txt, line 2, is not `path label`"),
        ({"train": "a/0.png 0\nb/0.png\n"}, r"line 2, is not"),
        ({"train": "a/0.png 0\nb/0.png 2\n"}, r"no image of label 1"),
        ({"train": "a/0.png 0\n"}, r"at least two"),
        ({"train": "\n"}, r"lists no images"),
        ({"train": "a/0.png 0\nb/0.png 1\n", "test": "a/0.png 2\n"}, r"test\.txt holds label 2"),
        ({"train": "a/0.png 0\nb/7.png 1\n"}, r"lists .*b/7\.png, which does not exist"),
    ],
)
def test_wrong_lists_are_refused_with_their_place(tmp_path, lists, message):
    root = write_lists(write_images(tmp_path, {"a": 1, "b": 1}), **lists)
    with pytest.raises(Refused, match=message):
        read_image_folders(root)


def test_a_list_folder_without_a_training_list_is_refused(tmp_path):
    root = write_images(tmp_path, {"train/a": 1, "train/b": 1})
    with pytest.raises(Refused, match=r"holds no train\.txt"):
        read_image_folders(root, list_dir=root / "train")


def test_a_file_put_in_place_of_another_is_noticed_whatever_its_time(tmp_path):
    root = write_images(tmp_path, {"train/a": 2, "train/b": 2})
    names = ["train/a/0.png", "train/a/1.png", "train/b/0.png", "train/b/1.png"]
    (root / "split.json").write_text(json.dumps({"files": names, "hash": "of the former images"}))
    stamp(root)
    assert split_hash(read_image_folders(root)) == "of the former images"
    time.sleep(1.1)
    Image.new("RGB", (5, 5)).save(root / "other.png")
    os.utime(root / "other.png", (0, 0))
    (root / "other.png").replace(root / names[0])
    assert split_hash(read_image_folders(root)) != "of the former images"


def test_each_repetition_of_a_listed_image_counts(tmp_path):
    root = write_images(tmp_path, {"a": 1, "b": 1})
    hashes = set()
    for times in range(1, 5):
        write_lists(root, train="a/0.png 0\n" * times + "b/0.png 1\n")
        hashes.add(split_hash(read_image_folders(root)))
    assert len(hashes) == 4


def test_the_package_says_where_to_look_for_every_file():
    named = set(re.findall(r"\w+", data.__doc__))
    assert {path.stem for path in Path(data.__file__).parent.glob("*.py")} - {"__init__"} <= named
