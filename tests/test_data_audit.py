"""The audit finds what a test spoils, and nothing where nothing is wrong."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.fft import idctn

from data.audit import distribution
from data.duplicates import MAX_DISTANCE, near_duplicates, perceptual_hashes
from data.listing import listing, listing_findings
from scripts.audit_data import main, parse_args
from scripts.prepare_data import main as prepare
from scripts.prepare_data import parse_args as preparation_flags


def scene(seed: int, side: int = 64) -> Image.Image:
    """A random image with structure: coarse colour noise, enlarged."""
    noise = np.random.default_rng(seed).integers(0, 236, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)


@pytest.fixture
def clean(tmp_path) -> Path:
    """Two classes, 6 and 3 images to train, 2 each to val and test, all different."""
    seed = 0
    for split, sizes in (
        ("train", {"cat": 6, "dog": 3}),
        ("val", {"cat": 2, "dog": 2}),
        ("test", {"cat": 2, "dog": 2}),
    ):
        for name, number in sizes.items():
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for index in range(number):
                seed += 1
                scene(seed).save(tmp_path / "data" / split / name / f"{index}.jpg", quality=90)
    return tmp_path / "data"


def audit(root: Path, *words: str) -> tuple[int, dict[str, list[str]], dict]:
    """Exit code, ``"level message"`` -> files of every finding, and the whole of audit.json."""
    try:
        main(parse_args([str(root), *words]))
        code = 0
    except SystemExit as exit_:
        code = exit_.code
    report = json.loads((root / "audit.json").read_text())
    return code, {f"{found['level']} {found['message']}": found["files"] for found in report["findings"]}, report


def test_a_clean_folder_gives_no_finding(clean, capsys):
    code, findings, report = audit(clean)
    assert (code, findings) == (0, {})
    assert report["images"] == {"train": 9, "val": 4, "test": 4}
    assert Image.open(clean / "audit.png").size[0] > 300
    assert "nothing to report" in capsys.readouterr().out


def test_a_prepared_folder_gives_no_finding_that_must_be_acted_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(preparation_flags(["digits"]))
    code, findings, report = audit(Path("data/digits"))
    assert code == 0
    assert {finding.split()[0] for finding in findings} <= {"hint"}
    assert report["groups"] == {"many": 1, "medium": 5, "few": 4}


def test_images_of_12_bits_in_16_are_named(clean):
    for name, highest in (("dim", 4095), ("bright", 65535)):
        grey = np.random.default_rng(highest).integers(0, highest + 1, (40, 40)).astype(np.uint16)
        Image.fromarray(grey).save(clean / "train" / "cat" / f"{name}.png")
    (finding,) = [files for text, files in audit(clean)[1].items() if "nearly black" in text]
    assert finding == ["train/cat/dim.png"]


def test_signs_that_no_font_has_are_drawn(clean, recwarn):
    for split in ("train", "val", "test"):
        (clean / split / "dog").rename(clean / split / "\u72ac")
    assert audit(clean)[0] == 0
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_broken_files_are_all_listed(clean, capsys):
    whole = (clean / "train/cat/0.jpg").read_bytes()
    (clean / "train/cat/0.jpg").write_bytes(whole[: len(whole) // 2])
    (clean / "val/dog/note.png").write_text("text")
    code, findings, _ = audit(clean)
    (message, files), *others = findings.items()
    assert (code, others) == (1, [])
    assert message == "act 2 file(s) that cannot be read"
    assert "truncated" in files[0]
    assert [file.split()[0] for file in files] == ["train/cat/0.jpg", "val/dog/note.png"]
    printed = capsys.readouterr()
    assert "train/cat/0.jpg" in printed.out
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("copy", "message"),
    [
        ("train/cat/copy.jpg", "note 1 image(s) twice in one class of a split"),
        ("train/dog/copy.jpg", "act 1 image(s) in two classes of a split"),
        ("test/cat/copy.jpg", "act 1 image(s) in two splits; remove one of each pair"),
    ],
)
def test_exact_duplicates_are_told_apart_by_where_they_lie(clean, copy, message):
    shutil.copy(clean / "train/cat/1.jpg", clean / copy)
    code, findings, _ = audit(clean)
    assert findings == {message: [f"train/cat/1.jpg = {copy}"]}
    assert code == (1 if message.startswith("act") else 0)


@pytest.mark.parametrize("copy", ["train/cat/copy.png", "test/cat/copy.jpg"])
def test_a_brighter_re_encoded_copy_is_a_hint(clean, copy):
    image = Image.open(clean / "train/cat/1.jpg")
    image.point(lambda value: min(255, round(1.02 * value))).save(clean / copy, quality=80)
    code, findings, _ = audit(clean)
    where = "within a split" if copy.startswith("train") else "across splits"
    assert findings == {f"hint 1 pair(s) {where} look alike": [f"train/cat/1.jpg ~ {copy}"]}
    assert code == 0


def test_empty_and_foreign_classes_must_be_acted_on(clean):
    (clean / "train/bird").mkdir()
    (clean / "test/fish").mkdir()
    scene(99).save(clean / "test/fish/0.png")
    code, findings, _ = audit(clean)
    assert code == 1
    assert findings["act 1 empty class(es) in train; add images or remove the folder"] == ["train/bird"]
    assert findings["act 1 class(es) in test that train lacks; rename, move or remove them"] == ["test/fish"]


def test_what_cannot_be_judged_and_what_is_not_used_is_noted(clean):
    shutil.rmtree(clean / "val")
    (clean / "test/dog").rename(clean / "test/.dog")
    (clean / "train/cat/notes.txt").write_text("x")
    (clean / "train/cat/nested").mkdir()
    (clean / "valid").mkdir()
    (clean / "stray.png").write_bytes(b"")
    (clean / "classes.json").write_text("{}")  # is used: synthesize_tail.py takes readable names from it
    (clean / "synthetic_img2img_0.5").mkdir()  # as ablate_synthetic.sh leaves them
    code, findings, _ = audit(clean)
    assert code == 0
    assert findings == {
        "note no val images: the last epoch will be the model": [],
        "note 1 class(es) cannot be judged in test: no images": ["test/dog"],
        "note 7 entries that are not used: no image, hidden or out of place": [
            "stray.png", "test/.dog", "test/.dog/0.jpg", "test/.dog/1.jpg", "train/cat/nested", "train/cat/notes.txt",
            "valid",
        ],
    }  # fmt: skip


def test_a_folder_without_an_image_is_audited_without_a_warning(tmp_path, recwarn):
    (tmp_path / "train/cat").mkdir(parents=True)
    code, findings, report = audit(tmp_path)
    assert code == 1
    assert report["images"] == {"train": 0}
    assert not recwarn.list


def test_a_class_with_one_image_is_noted_without_reading_it(clean):
    for path in list((clean / "train/dog").iterdir())[1:]:
        path.unlink()
    for path in clean.rglob("*.jpg"):
        path.write_bytes(b"")
    messages = [finding.message for finding in listing_findings(listing(clean))]
    assert messages == ["1 class(es) with a single training image"]


def test_images_that_changed_since_they_were_prepared_are_noticed(tmp_path, clean):
    prepare(preparation_flags(["folder", "--source", str(clean), "--output", str(tmp_path / "out")]))
    assert audit(tmp_path / "out")[:2] == (0, {})
    path = tmp_path / "out/train/cat/0.jpg"
    scene(77).save(path)
    code, findings, _ = audit(tmp_path / "out")
    assert (code, [*findings]) == (
        1,
        ["act the content of images differs from the hash in split.json; prepare the folder again with --overwrite"],
    )
    path.rename(path.with_name("renamed.jpg"))
    _, findings, _ = audit(tmp_path / "out")
    assert [*findings.values()] == [["train/cat/renamed.jpg: added", "train/cat/0.jpg: missing"]]


def test_a_file_that_was_broken_before_it_was_prepared_has_not_changed(tmp_path, clean):
    (clean / "train/cat/0.jpg").write_bytes(b"broken")
    prepare(preparation_flags(["folder", "--source", str(clean), "--output", str(tmp_path / "out")]))
    code, findings, _ = audit(tmp_path / "out")
    ((message, files),) = findings.items()
    assert code == 1
    assert message.startswith("act 1 file(s) that cannot be read; they came so from where the folder was prepared from")
    assert files[0].startswith("train/cat/0.jpg")


def test_lists_are_audited_like_folders(clean):
    (clean / "train.txt").write_text("train/cat/0.jpg 0\ntrain/dog/0.jpg 1\n")
    (clean / "test.txt").write_text("train/cat/0.jpg 0\ntest/dog/0.jpg 1\n")
    code, findings, report = audit(clean)
    assert code == 1
    assert findings["act 1 image(s) in two splits; remove one of each pair"] == ["train/cat/0.jpg = test/cat/0.jpg"]
    assert report["counts"]["train"] == {"cat": 1, "dog": 1}


def test_lists_may_leave_out_images_of_a_prepared_folder(tmp_path, clean):
    prepare(preparation_flags(["folder", "--source", str(clean), "--output", str(tmp_path / "out")]))
    names = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").glob("train/*/*.jpg"))
    lines = [f"{name} {['cat', 'dog'].index(name.parent.name)}\n" for name in names]
    (tmp_path / "out/train.txt").write_text("".join(lines[1:]))
    code, findings, _ = audit(tmp_path / "out")
    assert code == 0, findings


def test_beyond_the_limit_near_duplicates_are_not_searched(clean):
    _, findings, _ = audit(clean, "--near_limit", "5")
    assert [*findings] == ["note near-duplicates are not searched among more than 5 images; see --near_limit"]


def test_figures_of_a_distribution_by_hand():
    figures = distribution([200, 50, 10])
    assert figures["imbalance_factor"] == 20
    differences = [abs(one - other) for one in (200, 50, 10) for other in (200, 50, 10)]
    assert figures["gini"] == pytest.approx(sum(differences) / (2 * 3 * 3 * (260 / 3)))
    assert figures["groups"] == {"many": 1, "medium": 1, "few": 1}
    assert figures["suggested"] == {"cbl_beta": 1 - 1 / 200, "thresholds": {"many_above": 100, "few_below": 20}}


def test_thirds_are_suggested_where_the_usual_groups_are_empty():
    suggested = distribution([5000, 3000, 1000, 500, 300, 200])["suggested"]["thresholds"]
    assert suggested == {"many_above": 2999, "few_below": 301}


def test_near_duplicates_equal_a_plain_loop():
    images = [np.asarray(scene(seed, 32).convert("L")) for seed in range(30)]
    images += [np.clip(image * 1.02 + 3, 0, 255).astype(np.uint8) for image in images[:10]]
    thumbnails = np.stack(images + [np.full((32, 32), 9, np.uint8)] * 2)
    codes = [int(code) for code in perceptual_hashes(thumbnails)]
    expected = [
        (i, j)
        for i in range(len(codes))
        for j in range(i + 1, len(codes))
        if (codes[i] ^ codes[j]).bit_count() <= MAX_DISTANCE
        and thumbnails[i].std() > 0
        and np.corrcoef(thumbnails[i].ravel(), thumbnails[j].ravel())[0, 1] > 0.97
    ]
    assert near_duplicates(thumbnails) == expected == [(index, 30 + index) for index in range(10)]


@pytest.mark.parametrize(("pairs", "expected"), [(3, [(0, 1)]), (4, [])])
def test_hashes_are_near_with_6_of_63_bits_and_no_more(pairs, expected):
    """Each pair of frequencies that is all but the median, one above and one below, changes sides: two bits."""
    frequencies = np.full((32, 32), 0.0)
    frequencies[:8, :8] = np.resize([900.0, -900.0], (8, 8))
    frequencies[0, :5], frequencies[1, :5] = (0, 1, 2, 3, 4), (0, -1, -2, -3, -4)  # the first is the mean; 31 above 0
    other = frequencies.copy()
    other[:2, 1 : pairs + 1] *= -1
    thumbnails = np.stack([idctn(each) for each in (frequencies, other)])
    assert near_duplicates(thumbnails) == expected


@pytest.mark.parametrize(("correlation", "expected"), [(0.975, [(0, 1)]), (0.965, [])])
def test_thumbnails_of_near_hashes_are_alike_from_a_correlation_of_097_on(correlation, expected):
    """A fine chequerboard has no low frequency; sigma / sqrt(sigma^2 + a^2) is the correlation with it."""
    image = np.asarray(scene(0, 32).convert("L"), dtype=float)
    board = np.where(np.indices((32, 32)).sum(axis=0) % 2, 1, -1)
    other = image + image.std() * np.sqrt(correlation**-2 - 1) * board
    assert near_duplicates(np.stack([image, other])) == expected


def test_a_missing_folder_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(parse_args([str(tmp_path / "nowhere")]))
    assert exit_.value.code == 2
    assert "nowhere does not exist" in capsys.readouterr().err


def test_equal_images_are_not_searched_as_pairs(clean):
    for index in range(400):
        shutil.copy(clean / "train/cat/0.jpg", clean / f"train/cat/copy_{index}.jpg")
    _, findings, _ = audit(clean)
    assert [name for name in findings if "look alike" in name] == []
    (repeated,) = [files for name, files in findings.items() if "twice" in name]
    assert "copy_399.jpg" in str(repeated)


def test_names_of_any_bytes_and_signs_are_audited(clean, capsys):
    (clean / "train/dog/0.jpg").write_text("broken")
    (clean / "train/dog/0.jpg").rename(clean / "train/dog" / os.fsdecode(b"caf\xe9.jpg"))
    for split in ("train", "val", "test"):
        (clean / split / "cat").rename(clean / split / "$_$")
        (clean / split / "dog").rename(clean / split / os.fsdecode(b"d\xf6g"))
    code, _, report = audit(clean)
    assert code == 1
    assert "caf" in capsys.readouterr().out
    assert report["counts"]["train"] == {"$_$": 6, os.fsdecode(b"d\xf6g"): 3}
    assert (clean / "audit.png").is_file()
