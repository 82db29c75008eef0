"""The test script on one small run: corrections, stated priors, unlabelled images, and what it refuses."""

import csv
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import log_softmax, softmax

import imagenet_lt_test
import imagenet_lt_train
from engine.predictor import Predictor

CLASSES = {"common": 8, "odd, name": 5, "rare": 3}  # training images


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Two steps of a ResNet-32 with a Linear head and plain cross-entropy, on grey noise of three brightnesses."""
    folder, random = tmp_path_factory.mktemp("predictor"), np.random.default_rng(0)
    for brightness, (name, images) in enumerate(CLASSES.items()):
        for split, number in (("train", images), ("val", 2), ("test", 3)):
            (folder / "data" / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = 80 * brightness + random.integers(0, 60, (8, 8, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(folder / "data" / split / name / f"{index}.png")
    flags = ["--data_dir", folder / "data", "--root_model", folder, "--root_log", folder / "log", "--run_name", "run"]
    flags += ["--arch", "resnet8", "--epochs", 1, "--batch_size", 8, "--norm_out", False, "--seed", 0]
    flags += ["--add_cross_entropy_loss", True, "--add_ldam_loss", 0, "--add_supcon_loss", 0, "--add_rsg", 0]
    imagenet_lt_train.main(imagenet_lt_train.parse_args([str(flag) for flag in flags]))
    return folder / "run"


def ask(run: Path, *flags) -> dict:
    return imagenet_lt_test.main(imagenet_lt_test.parse_args(["--model_dir", str(run), *(str(flag) for flag in flags)]))


def logits_in(folder: Path) -> np.ndarray:
    with np.load(folder / "logits.npz") as file:
        return file["logits"]


def refused(capsys, call) -> str:
    """The one line on stderr of a call that exits with 2."""
    with pytest.raises(SystemExit) as error:
        call()
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def rows_of(path: Path) -> list[dict]:
    with path.open(newline="", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def tested(run) -> dict:
    """The default test, with corrections and the map of features."""
    return ask(run, "--post_hoc", "--plot_features")


def test_every_file_of_the_specification_is_there(run, tested):
    tables = {"metrics.json", "per_class.csv", "predictions.csv", "logits.npz", "post_hoc.json"}
    figures = {f"{name}.png" for name in ("accuracy_by_class", "confusion", "reliability", "features")}
    assert tables | figures <= {path.name for path in (run / "test").iterdir()}
    assert json.loads((run / "test" / "metrics.json").read_text())["ece_groups"] == tested["ece_groups"]
    assert tested["ece_groups"]["few"] == pytest.approx(tested["ece"])  # all classes are


def test_a_test_on_val_says_that_the_weights_were_chosen_there(run, tested):
    assert "chosen_on_these_images" not in tested
    assert ask(run, "--split", "val")["chosen_on_these_images"]
    assert "chosen_on_these_images" not in ask(run, "--split", "val", "--weights", "last")


def test_the_hash_is_that_of_the_weights_that_answer(run, tmp_path):
    """Not of those that a training puts in their place meanwhile."""
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("test*"))
    path = copy / "best.safetensors"
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    predictor = Predictor(imagenet_lt_test.parse_args(["--model_dir", str(copy)]), copy, torch.device("cpu"))
    path.write_bytes(b"others")
    assert predictor.weights_hash == before


def test_the_comparison_holds_the_plain_metrics_and_three_corrections(run, tested):
    content = json.loads((run / "test" / "post_hoc.json").read_text())
    assert list(content["rows"]) == ["plain", "temperature", "logit_adjustment", "tau_normalisation"]
    assert content["val_images"] == 6
    assert content["weights_hash"] == tested["weights_hash"]
    found = content["rows"]["logit_adjustment"]
    again = ask(run, "--logit_adjust", found["tau"])
    assert again["nll"] == pytest.approx(found["nll"])
    assert again["logit_adjust"] == found["tau"]
    for key in ("top1", "nll", "ece"):
        assert content["rows"]["plain"][key] == tested[key]
    temperature = content["rows"]["temperature"]["temperature"]
    targets = np.repeat([0, 1, 2], 3)
    expected = -log_softmax(logits_in(run / "test") / temperature, axis=1)[np.arange(9), targets].mean()
    assert content["rows"]["temperature"]["nll"] == pytest.approx(expected, rel=1e-9)


def test_corrections_do_not_outlive_the_test_that_they_were_of(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    ask(copy, "--weights", "last", "--post_hoc")
    ask(copy, "--weights", "last")
    assert (copy / "test_last" / "post_hoc.json").is_file()
    with (copy / "last.safetensors").open("r+b") as file:  # other weights: as if training had gone on
        file.seek(-1, os.SEEK_END)
        file.write(b"\x01")
    ask(copy, "--weights", "last")
    assert not (copy / "test_last" / "post_hoc.json").exists()


def test_other_images_and_other_groups_have_a_folder_of_their_own(run, tested, tmp_path):
    before = {path.name: path.read_bytes() for path in (run / "test").iterdir()}
    other = shutil.copytree(run.parent / "data", tmp_path / "other")
    ask(run, "--data_dir", other)  # the same images elsewhere: the same test
    assert not list(run.glob("test_other*"))
    for name in ("metrics.json", "logits.npz", "predictions.csv", "per_class.csv"):
        assert (run / "test" / name).read_bytes() == before[name]
    before = {path.name: path.read_bytes() for path in (run / "test").iterdir()}
    next((other / "test" / "common").iterdir()).unlink()
    result = ask(run, "--data_dir", other)
    (folder,) = run.glob("test_other*")
    assert folder.name == f"test_other-{result['split_hash'][:8]}"
    assert json.loads((folder / "metrics.json").read_text())["n"] == 8
    ask(run, "--shot_thresholds", 6, 4)
    ask(run, "--shot_thresholds", 6, 4, "--data_dir", other)
    assert json.loads((run / "test_shots_6_4" / "metrics.json").read_text())["n"] == 9
    assert (run / f"{folder.name}_shots_6_4").is_dir()
    assert {path.name: path.read_bytes() for path in (run / "test").iterdir()} == before


def test_a_damaged_log_ends_a_test_before_its_work(run, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("test*"))
    (copy / "log.jsonl").write_text("garbage\n" + (copy / "log.jsonl").read_text())
    with pytest.raises(SystemExit) as error:
        ask(copy)
    assert error.value.code == 2
    said = capsys.readouterr()
    assert "log.jsonl, line 1" in said.err
    assert "testing" not in said.out + said.err
    assert not list(copy.glob("test*"))


def test_images_that_changed_after_a_test_do_not_replace_it(run, tested, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    data = shutil.copytree(run.parent / "data", tmp_path / "data")
    record = json.loads((copy / "args.json").read_text())
    record["flags"]["data_dir"] = str(data)
    (copy / "args.json").write_text(json.dumps(record))
    next((data / "test" / "common").iterdir()).unlink()
    result = ask(copy)
    assert "no longer holds the images" in capsys.readouterr().err
    assert json.loads((copy / "test" / "metrics.json").read_text())["n"] == 9
    assert (copy / f"test_data-{result['split_hash'][:8]}" / "metrics.json").is_file()
    shutil.rmtree(copy / "test")  # of images that came after the training there is one test
    ask(copy)
    assert json.loads((copy / "test" / "metrics.json").read_text())["n"] == 8


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("flags", value) for value in ([], "x", {"arch": "evil"}, {"epochs": "many"}, {"data_dir": None})),
        *(("classes", value) for value in (5, ["a"], [1, 2, 3])),
        *(("class_counts", value) for value in ([0, 1, 2], [1, 2], [1.5, 2, 3], None)),
        *(("img_size", value) for value in ("big", 10**9, 0)),
        *(("std", value) for value in ([0, 1, 1], [1, 1], [float("nan")] * 3)),
        *(("mean", [float("inf")] * 3), ("readable_names", {}), ("versions", 5)),
    ],
)
def test_a_record_that_no_run_writes_is_refused(run, tmp_path, capsys, name, value):
    record = json.loads((run / "args.json").read_text())
    (tmp_path / "args.json").write_text(json.dumps(record | {name: value}))
    assert f"args.json is damaged: no run has these {name}" in refused(capsys, lambda: ask(tmp_path))


def test_a_stated_prior_shifts_the_logits_and_leaves_the_default_test_alone(run, tested):
    before = (run / "test" / "metrics.json").read_bytes()
    result = ask(run, "--test_prior", "uniform")
    assert (run / "test" / "metrics.json").read_bytes() == before
    shift = logits_in(run / "test_prior_uniform") - logits_in(run / "test")
    expected = -np.log([8 / 16, 5 / 16, 3 / 16]) - np.log(3)  # log of 1/3 over the training share
    np.testing.assert_allclose(shift, np.tile(expected, (9, 1)), atol=1e-12)
    assert result["top1_under_prior"] == pytest.approx(result["balanced_accuracy"], abs=1e-12)
    assert result["test_prior_shares"] == dict.fromkeys(CLASSES, 1 / 3)


def test_an_adjustment_subtracts_the_log_of_the_training_prior(run, tested, capsys):
    ask(run, "--logit_adjust", 0.7)
    assert "0.7 times the log of the training prior" in capsys.readouterr().out
    assert "its logits less 0.7 times" in (run / "test_adjusted_0.7" / "report.html").read_text()
    shift = logits_in(run / "test_adjusted_0.7") - logits_in(run / "test")
    np.testing.assert_allclose(shift, np.tile(-0.7 * np.log([8 / 16, 5 / 16, 3 / 16]), (9, 1)), atol=1e-12)


def test_a_prior_is_that_of_the_epoch_of_the_weights(run, tested, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")  # its weights are of epoch 0
    record = json.loads((copy / "args.json").read_text())
    record["flags"] |= {"epochs": 2, "drw_epoch": 1, "cross_entropy_weight_type": "icf"}  # weights in epoch 1 alone
    (copy / "args.json").write_text(json.dumps(record))
    ask(copy, "--test_prior", "uniform")
    assert f"{copy} is not finished: 1 of 2 epochs are done" in capsys.readouterr().err
    shift = logits_in(copy / "test_prior_uniform") - logits_in(run / "test")
    expected = -np.log([8 / 16, 5 / 16, 3 / 16]) - np.log(3)
    np.testing.assert_allclose(shift, np.tile(expected, (9, 1)), atol=1e-12)


def test_unlabelled_images_get_three_classes_and_unreadable_ones_are_named(run, tested, tmp_path, capsys):
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    source = run.parent / "data" / "test"
    names = {os.fsdecode(b"caf\xe9.png"): "rare/0", "a.PNG": "common/1", "inner/b.png": "odd, name/2"}
    for name, image in names.items():
        (folder / name).write_bytes((source / f"{image}.png").read_bytes())
    (folder / "broken.jpg").write_bytes(b"no image")
    for name in ("1.HEIC", "2.heic", "notes", ".hidden"):
        (folder / name).write_text("not read")
    (folder / "inner" / "again").symlink_to(folder)  # never ends
    with pytest.raises(SystemExit) as error:
        ask(run, "--images", folder)
    assert error.value.code == 1
    said = capsys.readouterr().err
    assert str(folder / "broken.jpg") in said
    assert f"2 .heic in {folder} are not read" in said
    rows = {row["file"]: row for row in rows_of(run / "predict" / "photos.csv")}
    assert list(rows) == sorted([*names, "broken.jpg"])
    assert set(rows["broken.jpg"].values()) == {"broken.jpg", ""}
    paths = [row["file"] for row in rows_of(run / "test" / "predictions.csv")]
    probabilities = softmax(logits_in(run / "test"), axis=1)
    for name, image in names.items():
        chances = probabilities[paths.index(f"test/{image}.png")]
        best = sorted(range(3), key=lambda index: -chances[index])  # noqa: B023
        columns = [("class", "probability"), ("class_2", "probability_2"), ("class_3", "probability_3")]
        assert [rows[name][column] for column, _ in columns] == [list(CLASSES)[index] for index in best]
        found = [float(rows[name][column]) for _, column in columns]
        assert found == pytest.approx([chances[index] for index in best], abs=2e-6)


def test_predictions_under_a_prior_have_a_table_of_their_own(run):
    result = ask(run, "--images", run.parent / "data" / "test" / "rare", "--test_prior", "train")
    assert result == {"n": 3, "table": str(run / "predict" / "rare_prior_train.csv")}
    assert not (run / "predict" / "rare.csv").exists()
    about = json.loads((run / "predict" / "rare_prior_train.json").read_text())
    assert about["test_prior"] == {"common": 8 / 16, "odd, name": 5 / 16, "rare": 3 / 16}
    assert (about["predict_with"], about["logit_adjust"]) == ("main", None)


def test_another_folder_of_the_same_name_does_not_replace_a_table(run, tmp_path, capsys):
    (own := tmp_path / "common").mkdir()
    shutil.copy(run.parent / "data" / "test" / "rare" / "0.png", own)
    ask(run, "--images", own)
    ask(run, "--images", own)
    before = (run / "predict" / "common.csv").read_bytes()
    line = refused(capsys, lambda: ask(run, "--images", run.parent / "data" / "test" / "common"))
    assert f"holds the predictions for {own}" in line
    assert (run / "predict" / "common.csv").read_bytes() == before


def test_priors_from_files_of_one_name_have_folders_of_their_own(run, tmp_path):
    for odds in ("1", "7"):
        (tmp_path / odds).mkdir()
        (tmp_path / odds / "prior.txt").write_text(f"common {odds}\nodd, name 1\nrare 1\n")
        ask(run, "--test_prior", tmp_path / odds / "prior.txt")
    assert len(list(run.glob("test_prior_prior-*/metrics.json"))) == 2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--images", "nowhere"], "nowhere is no folder"),
        (["--images", "{empty}"], "holds no image"),
        (["--images", "{empty}", "--post_hoc"], "--logit_adjust TAU predicts as --post_hoc has found"),
        (["--images", "{empty}", "--split", "val"], "no split"),
        (["--images", "{empty}", "--shot_thresholds", "5", "2"], "no split"),
        (["--post_hoc", "--split", "val"], "another --split"),
        (["--post_hoc", "--test_prior", "uniform"], "give one"),
        (["--post_hoc", "--logit_adjust", "1"], "give one"),
        (["--logit_adjust", "1", "--test_prior", "uniform"], "not allowed with"),
        (["--test_prior", "nowhere.txt"], "nowhere.txt is no file"),
        (["--predict_with", "arc"], "no such head"),
    ],
)
def test_what_cannot_work_is_refused(run, tmp_path, capsys, flags, words):
    assert words in refused(capsys, lambda: ask(run, *(flag.format(empty=tmp_path) for flag in flags)))


def test_a_test_in_another_precision_has_a_folder_of_its_own(run, tested):
    before = (run / "test" / "logits.npz").read_bytes()
    ask(run, "--amp", "bf16")
    assert (run / "test" / "logits.npz").read_bytes() == before
    assert not np.array_equal(logits_in(run / "test"), logits_in(run / "test_bfloat16"))


def test_a_run_that_lacks_its_last_weights_is_refused_before_it_predicts(run, tmp_path, capsys, monkeypatch):
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "copy" / "last.safetensors").unlink()
    monkeypatch.setattr(Predictor, "__call__", lambda *_: pytest.fail("it predicts"))
    assert "last.safetensors" in refused(capsys, lambda: ask(tmp_path / "copy"))


def test_corrections_without_val_images_are_refused(run, tmp_path, capsys):
    (tmp_path / "test").symlink_to(run.parent / "data" / "test")
    line = refused(capsys, lambda: ask(run, "--data_dir", tmp_path, "--post_hoc"))
    assert "has no val images" in line


def test_the_nearest_class_mean_is_that_of_the_runs_own_training_images(run, tmp_path, capsys):
    own = run.parent / "data"
    (tmp_path / "test").symlink_to(own / "test")
    expected = logits_in(run / "test_ncm") if ask(run, "--predict_with", "ncm") else None
    ask(run, "--data_dir", tmp_path, "--predict_with", "ncm")
    assert np.array_equal(logits_in(run / "test_ncm"), expected)
    gone = own.rename(own.with_name("gone"))
    try:
        (tmp_path / "test").unlink()
        (tmp_path / "test").symlink_to(gone / "test")
        capsys.readouterr()
        with pytest.raises(SystemExit):
            ask(run, "--data_dir", tmp_path, "--predict_with", "ncm")
        assert "--predict_with ncm needs training images" in capsys.readouterr().err
        (tmp_path / "train").symlink_to(gone / "train")
        ask(run, "--data_dir", tmp_path, "--predict_with", "ncm")
        assert "is gone: the class means are those of" in capsys.readouterr().err
    finally:
        gone.rename(own)
    assert np.array_equal(logits_in(run / "test_ncm"), expected)
