"""Which synthetic images the filters keep out, and the reasons they name."""

import io
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from sklearn.datasets import load_digits

from data.duplicates import near_duplicates
from data.folders import read_image_folders
from data.synthetic_filters import Filters
from engine.agreement import Agreement
from engine.errors import Refused
from engine.weights import load_run
from tests.test_synthesis import train

CPU = torch.device("cpu")


def smooth(seed: int) -> Image.Image:
    """A picture of its own: soft blobs of colour."""
    pixels = np.random.default_rng(seed).integers(0, 240, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)


def recompressed(image: Image.Image) -> Image.Image:
    """A little brighter, and saved as JPEG in between: the same to the eye, another file."""
    buffer = io.BytesIO()
    ImageEnhance.Brightness(image).enhance(1.05).save(buffer, "JPEG", quality=80)
    return Image.open(buffer).convert("RGB")


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Two classes whose images differ: train a 0-2, b 3-5; val a 6, b 7; test a 8, b 9."""
    for number, (split, name) in enumerate(
        [("train", "a")] * 3 + [("train", "b")] * 3 + [(split, name) for split in ("val", "test") for name in "ab"]
    ):
        (tmp_path / "set" / split / name).mkdir(parents=True, exist_ok=True)
        smooth(number).save(tmp_path / "set" / split / name / f"{number}.png")
    return tmp_path / "set"


def candidates(folder: Path, images: list[Image.Image | bytes], flagged: int | None = None) -> list[dict]:
    """Rows, not judged, of class a with these images."""
    rows = []
    (folder / "a").mkdir(parents=True)
    for index, image in enumerate(images):
        path = folder / "a" / f"{index:05d}.png"
        path.write_bytes(image) if isinstance(image, bytes) else image.save(path)
        row = {"class": "a", "index": index, "file": f"a/{path.name}", "flagged": index == flagged, "kept": None}
        rows.append(row | {"sha256": sha256(path.read_bytes()).hexdigest(), "why": None})
    return rows


def test_each_filter_names_what_it_keeps_out(pictures, tmp_path):
    noisy_black = Image.fromarray(np.random.default_rng(0).integers(0, 15, (32, 32, 3), dtype=np.uint8))
    noisy_grey = Image.fromarray(np.random.default_rng(0).integers(97, 104, (32, 32, 3), dtype=np.uint8))
    rows = candidates(
        tmp_path / "made",
        [
            smooth(20),
            noisy_black,
            noisy_grey,
            (pictures / "train" / "b" / "4.png").read_bytes(),
            recompressed(smooth(9)),  # of test
            recompressed(smooth(6)),  # of val
            recompressed(smooth(20)),  # of the first
            smooth(21),  # flagged
            smooth(22),  # changed below
            smooth(23),  # gone below
            smooth(24),
            smooth(25),  # one too many
        ],
        flagged=7,
    )
    smooth(99).save(tmp_path / "made" / "a" / "00008.png")
    (tmp_path / "made" / "a" / "00009.png").unlink()
    filters = Filters(read_image_folders(pictures), tmp_path / "made", None, 1)
    filters.judge(rows, {"a": 2, "b": 0})
    assert [row["why"] for row in rows] == [
        None,
        "black",
        "flat",
        "copy: train/b/4.png",
        "near-duplicate: test/b/9.png",
        "near-duplicate: val/a/6.png",
        "near-duplicate: a/00000.png",
        "blanked by the model's safety checker",
        "changed since it was drawn",
        "gone or unreadable",
        None,
        "its class has all that it needs",
    ]
    assert [row["kept"] for row in rows] == [row["why"] is None for row in rows]
    verdicts = [row["why"] for row in rows]
    filters.judge(rows, {"a": 2, "b": 0})
    assert [row["why"] for row in rows] == verdicts


def test_a_twin_of_an_image_that_is_not_kept_may_be_kept(pictures, tmp_path):
    rows = candidates(tmp_path / "made", [smooth(20), recompressed(smooth(20)), smooth(20)], flagged=0)
    Filters(read_image_folders(pictures), tmp_path / "made", None, 1).judge(rows, {"a": 3, "b": 0})
    assert [row["kept"] for row in rows] == [False, True, False]
    assert rows[2]["why"] == "near-duplicate: a/00001.png"


def test_near_duplicates_of_the_first_images_are_those_pairs_of_all():
    thumbnails = np.stack([np.asarray(smooth(seed).convert("L")) for seed in (*range(300), 3, 7, 290, 295, 3)])
    pairs = near_duplicates(thumbnails)
    assert len(pairs) >= 6
    for first in (0, 4, 260, 291, 302):
        assert near_duplicates(thumbnails, first) == [pair for pair in pairs if pair[0] < first]


def test_a_digits_run_keeps_out_what_it_takes_for_another_class(tmp_path):
    """Scikit-learn's digits 0 to 3, 8x8 px: 20 of each to train on, the 5 after them are candidates."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    for label in range(4):
        folder = tmp_path / "digits" / "train" / str(label)
        folder.mkdir(parents=True)
        for index, image in enumerate(pixels[labels == label][:20]):
            Image.fromarray(image).save(folder / f"{index}.png")
    losses = ["--add_supcon_loss", "False", "--add_rsg", "False", "--hflip", "False", "--add_cross_entropy_loss"]
    run = train(tmp_path / "digits", tmp_path, *losses, "--epochs", "20", "--batch_size", "20", "--lr", "0.05")
    model, prepared, classes = load_run(run)
    images = [Image.fromarray(image) for label in range(4) for image in pixels[labels == label][20:25]]
    targets = [str(label if index < 4 else (label + 2) % 4) for label in range(4) for index in range(5)]
    rows = candidates(tmp_path / "made", images)
    rows = [row | {"class": target} for row, target in zip(rows, targets, strict=True)]
    folders = read_image_folders(tmp_path / "digits")
    for first in (1, 2):
        agreement = Agreement(run, first, folders.classes, CPU, 1)
        Filters(folders, tmp_path / "made", agreement, 1).judge(rows, dict.fromkeys(classes, 20))
        reasons = []
        for row, image in zip(rows, images, strict=True):
            with torch.no_grad():
                logits = model(prepared(image.convert("RGB"))[None]).logits["main"][0].tolist()
            ranking = sorted(range(4), key=lambda label: -logits[label])
            agreed = int(row["class"]) in ranking[:first]
            if not (row["why"] or "").startswith("near-duplicate"):
                reasons.append(None if agreed else f"wrong class: run takes it for {ranking[0]}")
                assert row["why"] == reasons[-1]
        if first == 1:
            assert reasons.count(None) >= 10
            assert sum("wrong" in (row["why"] or "") for row in rows[4::5]) >= 3  # of the 4 in a class not their own
    with pytest.raises(Refused, match="other classes"):
        Agreement(run, 1, folders.classes[:3], CPU, 1)
