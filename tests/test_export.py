"""The ONNX file against the test script, on a run that the entry scripts leave."""

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from PIL import Image

import imagenet_lt_test
import imagenet_lt_train
from scripts import export

ROOT = Path(__file__).resolve().parents[1]
LOSSES = "--add_cross_entropy_loss --add_arc_margin_loss"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tested run of one epoch with a generator and two heads, on images of three colours, shown at 16 px."""
    folder, random = tmp_path_factory.mktemp("export"), np.random.default_rng(0)
    for split, number in (("train", 4), ("test", 3)):
        for index, name in enumerate(("red", "green", "blue")):
            (folder / "data" / split / name).mkdir(parents=True)
            for image in range(number):
                pixels = random.integers(0, 80, (30, 24, 3)) + 170 * np.eye(3, dtype=int)[index]
                Image.fromarray(pixels.astype(np.uint8)).save(folder / "data" / split / name / f"{image}.png")
    words = f"--data_dir {folder}/data --root_model {folder} --root_log {folder}/log --run_name run --arch resnet8"
    words += f" {LOSSES} --neck fc --img_size 16 --epochs 1 --batch_size 6 --seed 0"
    imagenet_lt_train.main(imagenet_lt_train.parse_args(words.split()))
    for head in ("main", "mean", "ncm"):
        imagenet_lt_test.main(imagenet_lt_test.parse_args(["--model_dir", str(folder / "run"), "--predict_with", head]))
    return folder / "run"


def exported(run, *words: str) -> dict:
    return export.main(export.parse_args(["--model_dir", str(run), *words]))


def input_of(path, about: dict) -> np.ndarray:
    """The image as model.json says, in other words than ours."""
    assert "short side is 16 px" in about["resize"]
    image = Image.open(path).convert("RGB").resize((16, 20), Image.Resampling.BILINEAR)  # from 24 x 30
    pixels = np.asarray(image, dtype=np.float64)[2:18]
    return ((pixels / 255 - about["mean"]) / about["std"]).transpose(2, 0, 1).astype(np.float32)


@pytest.mark.parametrize(("head", "suffix"), [("main", ""), ("mean", "_mean"), ("ncm", "_ncm")])
def test_the_model_gives_the_logits_of_the_test_script(run, head, suffix):
    about = exported(run, "--predict_with", head)
    assert json.loads((run / f"export{suffix}" / "model.json").read_text()) == about
    assert about["checked"]["images"] == about["checked"]["same_prediction"] == 9
    session = onnxruntime.InferenceSession(run / f"export{suffix}" / "model.onnx")
    paths = sorted((run.parent / "data" / "test").glob("*/*.png"))
    inputs = np.stack([input_of(path, about) for path in paths])
    with np.load(run / f"test{suffix}" / "logits.npz") as expected:
        for rows in (slice(0, 1), slice(0, 9)):  # any number of images
            (logits,) = session.run(["logits"], {"images": inputs[rows]})
            np.testing.assert_allclose(logits, expected["logits"][rows], rtol=1e-4, atol=1e-4)
    assert about["classes"] == ["blue", "green", "red"]


def test_a_correction_for_the_prior_is_in_the_model(run, tmp_path):
    (tmp_path / "odds.txt").write_text("blue 1\ngreen 2\nred 5\n")
    about = exported(run, "--test_prior", str(tmp_path / "odds.txt"))
    assert about["checked"]["same_prediction"] == 9
    assert about["test_prior"] == pytest.approx({"blue": 1 / 8, "green": 2 / 8, "red": 5 / 8})
    (folder,) = run.glob("export_prior_odds-*")
    paths = sorted((run.parent / "data" / "test").glob("*/*.png"))
    inputs = np.stack([input_of(path, about) for path in paths])
    (logits,) = onnxruntime.InferenceSession(folder / "model.onnx").run(["logits"], {"images": inputs})
    with np.load(run / "test" / "logits.npz") as plain:
        shift = logits - plain["logits"]  # all classes had as many images and weights
    np.testing.assert_allclose(shift - shift[:, :1], np.tile(np.log([1, 2, 5]), (9, 1)), atol=1e-3)


def test_without_images_the_model_is_written_unchecked_and_nothing_of_the_generator_or_of_this_machine_is_in_it(
    run, capsys
):
    assert exported(run, "--split", "val")["checked"] is None
    assert "not checked" in capsys.readouterr().err
    content = (run / "export" / "model.onnx").read_bytes()
    assert b"heads.main.weight" in content
    for other in (b"generator", b"heads.arc", str(ROOT).encode()):
        assert other not in content


def test_listed_images_are_not_taken_for_gone(tmp_path):
    args, flags = (
        argparse.Namespace(data_dir=None, list_dir=None, split="test"),
        {"data_dir": tmp_path, "list_dir": None},
    )
    assert export.images_are_gone(args, flags)
    (tmp_path / "train.txt").touch()
    assert not export.images_are_gone(args, flags)


def test_a_model_that_answers_otherwise_is_not_written(run, monkeypatch, capsys):
    monkeypatch.setattr(export.Answer, "forward", lambda self, images: 2 * self.model(images).logits["arc"])
    with pytest.raises(SystemExit) as error:
        exported(run, "--predict_with", "arc")
    assert error.value.code == 1
    assert "nothing was written" in capsys.readouterr().err
    assert not (run / "export_arc").exists()


def test_wrong_data_are_refused_and_not_an_excuse(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        exported(run, "--data_dir", str(tmp_path / "nowhere"), "--predict_with", "arc")
    assert error.value.code == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (run / "export_arc").exists()
