"""Every source, written small in its original format, becomes the same kind of folder."""

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.folders import read_image_folders
from data.wordnet import MINI_IMAGENET_NAMES
from scripts.prepare_data import main, parse_args

CIFAR10_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def prepare(*words) -> None:
    main(parse_args([str(word) for word in words]))


def refusal(capsys, *words) -> str:
    """The one line of a refused command."""
    with pytest.raises(SystemExit) as exit_:
        prepare(*words)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.count("\n") == 1
    return error


class Python2Pickler(pickle._Pickler):
    """Writes what Python 2 wrote, as in the official batches: byte strings everywhere, NumPy 1's module names."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_text(self, value):
        value = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + len(value).to_bytes(4, "little") + value)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_text
    dispatch_table = {type(np.dtype("u1")): lambda dtype: (np.dtype, ("u1", 0, 1), dtype.__reduce__()[2])}


def write_python2_pickle(path: Path, content: dict) -> None:
    buffer = io.BytesIO()
    Python2Pickler(buffer, 2).dump(content)
    path.write_bytes(buffer.getvalue().replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"))


def write_cifar10(folder: Path, per_batch: int = 40) -> dict[str, np.ndarray]:
    """The official files with a few images; returns ``split/name`` -> the 3,072 bytes of each."""
    generator, images = np.random.default_rng(0), {}
    folder.mkdir(parents=True)
    for batch in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]:
        data = generator.integers(0, 256, (per_batch, 3072), dtype=np.uint8)
        labels = [row % 10 for row in range(per_batch)]
        names = [f"{batch}_s_{row:06d}.png" for row in range(per_batch)]
        split = "test" if batch == "test_batch" else "train"
        images |= {f"{split}/{CIFAR10_NAMES[k]}/{name}": row for k, name, row in zip(labels, names, data, strict=True)}
        content = {"batch_label": batch, "labels": labels, "data": data, "filenames": names}
        write_python2_pickle(folder / batch, content)
    write_python2_pickle(folder / "batches.meta", {"num_cases_per_batch": per_batch, "label_names": CIFAR10_NAMES})
    return images


def assert_same_pixels(path: Path, row: np.ndarray) -> None:
    """``row``: 1,024 red values, row by row, then green, then blue."""
    image = Image.open(path)
    for x, y in ((0, 0), (31, 0), (0, 31), (17, 5)):
        assert image.getpixel((x, y)) == tuple(int(row[channel * 1024 + y * 32 + x]) for channel in range(3))
    assert np.array_equal(np.asarray(image).transpose(2, 0, 1).reshape(-1), row)


def test_the_official_cifar10_batches_become_the_same_pixels(tmp_path):
    images = write_cifar10(tmp_path / "source/cifar-10-batches-py")
    prepare("cifar10", "--source", tmp_path / "source", "--output", tmp_path / "out", "--imb_type", "none")
    written = {path.relative_to(tmp_path / "out").as_posix(): path for path in (tmp_path / "out").glob("*/*/*.png")}
    assert written.keys() == images.keys()
    for name, path in written.items():
        assert_same_pixels(path, images[name])


def test_cifar10_from_the_archive_is_long_tailed_and_equal_to_its_folder(tmp_path):
    write_cifar10(tmp_path / "cifar-10-batches-py")
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "cifar-10-batches-py", "cifar-10-batches-py")
    prepare("cifar10", "--source", tmp_path / "cifar-10-python.tar.gz", "--output", tmp_path / "a", "--imb_factor", 10)
    prepare("cifar10", "--source", tmp_path / "cifar-10-batches-py", "--output", tmp_path / "b", "--imb_factor", 10)
    folders = read_image_folders(tmp_path / "a")
    assert folders.class_counts == [20, 15, 11, 9, 7, 5, 4, 3, 2, 2]
    assert len(folders.splits["test"].paths) == 40
    assert (tmp_path / "a/split.json").read_text() == (tmp_path / "b/split.json").read_text()


def test_class_folders_of_the_same_images_give_the_same_hash(tmp_path):
    write_cifar10(tmp_path / "batches")
    prepare("cifar10", "--source", tmp_path / "batches", "--output", tmp_path / "all", "--imb_type", "none")
    hashes = []
    for source, output in (("batches", "a"), ("all", "b")):
        prepare("cifar10", "--source", tmp_path / source, "--output", tmp_path / output, "--imb_factor", 5)
        hashes.append(json.loads((tmp_path / output / "split.json").read_text())["hash"])
    assert hashes[0] == hashes[1]


def test_cifar100_takes_the_fine_labels_and_readable_names(tmp_path):
    names = ["aquarium_fish"] + [f"class{k:02d}" for k in range(1, 100)]
    data = np.random.default_rng(0).integers(0, 256, (200, 3072), dtype=np.uint8)
    (tmp_path / "source").mkdir()
    for file in ("train", "test"):
        content = {"data": data, "filenames": [f"{file}_{k}.png" for k in range(200)], "coarse_labels": [0] * 200}
        write_python2_pickle(tmp_path / "source" / file, {**content, "fine_labels": [k % 100 for k in range(200)]})
    write_python2_pickle(tmp_path / "source/meta", {"fine_label_names": names, "coarse_label_names": ["x"]})
    prepare("cifar100", "--source", tmp_path / "source", "--output", tmp_path / "out", "--imb_factor", 2)
    folders = read_image_folders(tmp_path / "out")
    assert (folders.class_counts[0], folders.class_counts[99], len(folders.classes)) == (2, 1, 100)
    assert folders.readable_names[0] == "aquarium fish"


@pytest.mark.parametrize("damage", ["short", "label", "key", "missing"])
def test_a_batch_that_does_not_fit_is_refused_by_name(tmp_path, capsys, damage):
    write_cifar10(tmp_path / "source", per_batch=10)
    labels = [10 if damage == "label" else 0] * (9 if damage == "short" else 10)
    content = {"labels": labels, "data": np.zeros((10, 3072), np.uint8), "filenames": ["x.png"] * 10}
    if damage == "key":
        del content["data"]
    write_python2_pickle(tmp_path / "source/data_batch_3", content)
    if damage == "missing":
        (tmp_path / "source/data_batch_3").unlink()
    assert "data_batch_3" in refusal(capsys, "cifar10", "--source", tmp_path / "source", "--output", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_cifar10_with_another_number_of_classes_is_refused(tmp_path, capsys):
    write_classes(tmp_path / "source/train", "ab", 3)
    assert "2 classes" in refusal(capsys, "cifar10", "--source", tmp_path / "source", "--output", tmp_path / "out")


def write_classes(folder: Path, classes, number: int, name: str = "{name}{index:08d}.jpg") -> None:
    for name_ in classes:
        (folder / name_).mkdir(parents=True)
        for index in range(1, number + 1):
            write_image(folder / name_ / name.format(name=name_, index=index), name_, index)


def write_image(path: Path, class_name: str, index: int) -> None:
    """An image that shows its class and its number."""
    Image.new("RGB", (8, 8), (sum(class_name.encode()) % 256, index, 0)).save(path, "PNG")


WNIDS = list(MINI_IMAGENET_NAMES)[:10]


def write_in_all_splits(root: Path) -> None:
    for split, number in (("train", 12), ("val", 2), ("test", 3)):
        write_classes(root / split, WNIDS, number, name=split + "{index}.jpg")


def write_few_shot_folders(root: Path) -> None:
    for split, classes in (("train", WNIDS[:6]), ("val", WNIDS[6:8]), ("test", WNIDS[8:])):
        write_classes(root / split, classes, 17)


def write_few_shot_lists(root: Path) -> None:
    """CSV lists that number each class's ILSVRC images from 1, in the order of the numbers in their names."""
    for split, classes in (("train", WNIDS[:6]), ("val", WNIDS[6:8]), ("test", WNIDS[8:])):
        rows = [f"{name}{index:08d}.jpg,{name}" for name in classes for index in range(1, 18)]
        (root / f"{split}.csv").write_text("\n".join(["filename,label", *rows]) + "\n")
    for name in WNIDS:
        (root / "images" / name).mkdir(parents=True)
        for index in range(1, 18):  # 3, 10, 17, ...: sorted as text, 10 would come before 3
            write_image(root / "images" / name / f"{name}_{7 * index - 4}.JPEG", name, index)


def write_caches(root: Path) -> None:
    for split, classes in (("train", WNIDS[:6]), ("val", WNIDS[6:8]), ("test", WNIDS[8:])):
        pixels = np.zeros((17 * len(classes), 84, 84, 3), np.uint8)
        rows = {name: [len(classes) * index + k for index in range(17)] for k, name in enumerate(classes)}
        for name, indices in rows.items():
            for index, row in enumerate(indices, 1):
                pixels[row] = [sum(name.encode()) % 256, index, 0]
        content = {"image_data": pixels, "class_dict": rows}
        (root / f"mini-imagenet-cache-{split}.pkl").write_bytes(pickle.dumps(content, 2))


@pytest.mark.parametrize("write", [write_in_all_splits, write_few_shot_folders, write_few_shot_lists, write_caches])
def test_every_layout_of_mini_imagenet_has_all_classes_in_every_split(tmp_path, write):
    (tmp_path / "source").mkdir()
    write(tmp_path / "source")
    draw = ["--imb_type", "exp", "--imb_factor", 4, "--val_per_class", 2, "--test_per_class", 3]
    prepare("mini-imagenet", "--source", tmp_path / "source", "--output", tmp_path / "out", *draw)
    folders = read_image_folders(tmp_path / "out")
    assert folders.classes == sorted(WNIDS)
    assert folders.class_counts == [12, 10, 8, 7, 6, 5, 4, 4, 3, 3]
    assert folders.readable_names[0] == "house finch"
    for split, number in (("val", 2), ("test", 3)):
        assert folders.splits[split].targets == [index for index in range(10) for _ in range(number)]
    for path, target in zip(*folders.splits["train"], strict=True):
        assert Image.open(path).getpixel((0, 0))[0] == sum(folders.classes[target].encode()) % 256


def test_few_shot_lists_count_images_by_their_number(tmp_path):
    (tmp_path / "source").mkdir()
    write_few_shot_lists(tmp_path / "source")
    prepare("mini-imagenet", "--source", tmp_path / "source", "--output", tmp_path / "out", "--imb_factor", 1,
            "--val_per_class", 0, "--test_per_class", 1)  # fmt: skip
    for path in (tmp_path / "out").glob("*/*/*.jpg"):
        assert Image.open(path).getpixel((0, 0))[1] == int(path.stem[-8:])


@pytest.mark.parametrize("imb_type", ["exp", "none"])
def test_lists_without_a_row_are_refused(tmp_path, capsys, imb_type):
    (tmp_path / "images").mkdir()
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.csv").write_text("filename,label\n")
    words = ["mini-imagenet", "--source", tmp_path, "--output", tmp_path.parent / "out", "--imb_type", imb_type]
    assert "names no class" in refusal(capsys, *words)


@pytest.mark.parametrize(
    ("pixels", "rows", "message"),
    [
        (np.zeros((4, 3, 84, 84), np.uint8), {"n01532829": [0, 1]}, "does not hold image_data"),
        (np.zeros((4, 84 * 84 * 3), np.uint8), {"n01532829": [0, 1]}, "does not hold image_data"),
        (np.zeros((4, 84, 84, 3), np.uint8), {}, "names no class"),
        (np.zeros((4, 84, 84, 3), np.uint8), {"n01532829": [0, 1, 2, 3], "n01558993": []}, "one without an image"),
    ],
)
def test_caches_of_something_else_are_refused(tmp_path, capsys, pixels, rows, message):
    (tmp_path / "source").mkdir()
    content = pickle.dumps({"image_data": pixels, "class_dict": rows}, 2)
    (tmp_path / "source" / "mini-imagenet-cache-train.pkl").write_bytes(content)
    words = ["mini-imagenet", "--source", tmp_path / "source", "--output", tmp_path / "out"]
    assert message in refusal(capsys, *words)


def test_ilsvrc_folders_may_lie_elsewhere_and_missing_images_are_named(tmp_path, capsys):
    (tmp_path / "source").mkdir()
    write_few_shot_lists(tmp_path / "source")
    (tmp_path / "source/images").rename(tmp_path / "ilsvrc")
    words = ["mini-imagenet", "--source", tmp_path / "source", "--output", tmp_path / "out", "--imb_type", "none"]
    assert "--ilsvrc" in refusal(capsys, *words)
    prepare(*words, "--ilsvrc", tmp_path / "ilsvrc", "--val_per_class", 1, "--test_per_class", 1)
    next((tmp_path / "ilsvrc" / WNIDS[9]).iterdir()).unlink()
    assert f"{WNIDS[9]}00000017.jpg" in refusal(capsys, *words, "--ilsvrc", tmp_path / "ilsvrc")


def test_the_long_tailed_class_folders_are_kept_as_they_are(tmp_path):
    write_in_all_splits(tmp_path / "source")
    prepare("mini-imagenet", "--source", tmp_path / "source", "--output", tmp_path / "out", "--link")
    folders = read_image_folders(tmp_path / "out")
    assert folders.class_counts == [12] * 10
    assert all(path.stat().st_nlink == 2 for path in folders.splits["val"].paths)


def test_a_folder_of_ones_own_is_split_inside_every_class(tmp_path):
    for name, number in (("many", 40), ("some", 10), ("single", 1)):
        write_classes(tmp_path / "photos", [name], number)
    prepare("folder", "--source", tmp_path / "photos", "--output", tmp_path / "out")
    folders = read_image_folders(tmp_path / "out")
    assert dict(zip(folders.classes, folders.class_counts, strict=True)) == {"many": 28, "single": 1, "some": 7}
    assert folders.untested("test") == ["single"]
    assert "hflip" not in folders.about  # whether mirrored images keep their class is not known


def test_splits_of_ones_own_are_kept_and_missing_ones_carved(tmp_path):
    write_classes(tmp_path / "photos/train", "ab", 10)
    write_classes(tmp_path / "photos/test", "ab", 4)
    prepare("folder", "--source", tmp_path / "photos", "--output", tmp_path / "out")
    folders = read_image_folders(tmp_path / "out")
    assert [len(folders.splits[split].paths) for split in ("train", "val", "test")] == [18, 2, 8]


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["train/a", "train/b", "validation/a"], "validation"),
        (["train/a", "train/b", "dev/a"], "dev"),
        (["train/a", "train/b", "test/c"], "classes that train/ lacks: c"),
        ([], "no class folders"),
        (["train/a", "val/a"], "there is one class, a;"),
        (["test/a", "val/a"], "has test/ but no train/ folder"),
        (["train", "car", "plane"], "car holds images beside train/"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path, capsys, folders, message):
    (tmp_path / "photos").mkdir()
    for folder in folders:
        write_classes(tmp_path / "photos" / Path(folder).parent, [Path(folder).name], 10)
    assert message in refusal(capsys, "folder", "--source", tmp_path / "photos", "--output", tmp_path / "out")
