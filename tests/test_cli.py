"""The two entry scripts, end to end, on digits and on folders that are wrong."""

import csv
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import balanced_accuracy_score, f1_score

import imagenet_lt_test
import imagenet_lt_train
from engine.options import train_parser
from engine.weights import load_run
from losses import check_class_weights
from scripts import prepare_data

ROOT = Path(__file__).resolve().parents[1]
OFF = ["--add_ldam_loss", "False", "--add_supcon_loss", "False", "--add_rsg", "False"]
DEFAULT = "0.1 LDAM(normed; ICF weights) + 0.9 SupCon(features)"
GENERATOR = " + 0.1 CESC + 0.01 MV"


@pytest.fixture(scope="session")
def digits(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("data") / "digits"
    prepare_data.main(prepare_data.parse_args(["digits", "--output", str(output)]))
    return output


def train(folder: Path, data: Path, *flags: str) -> Path:
    """A run of two steps of ResNet-8 unless the flags say otherwise; its folder."""
    base = ["--data_dir", str(data), "--root_model", str(folder / "checkpoint"), "--root_log", str(folder / "log")]
    base += ["--arch", "resnet8", "--max_steps", "2", "--epochs", "1", "--seed", "0", "--run_name", "run"]
    imagenet_lt_train.main(imagenet_lt_train.parse_args([*base, *flags]))
    return folder / "checkpoint" / "run"


def test(run: Path, *flags: str) -> dict:
    return imagenet_lt_test.main(imagenet_lt_test.parse_args(["--model_dir", str(run), *flags]))


test.__test__ = False


def rows_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def refused(capsys, call) -> str:
    """The one line on stderr of a call that exits with 2."""
    with pytest.raises(SystemExit) as error:
        call()
    assert error.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


TOGGLES = {
    "default": ([], DEFAULT + GENERATOR),
    "no generator": (["--add_rsg", "False"], DEFAULT),
    "linear head": (["--norm_out", "False"], "0.1 LDAM(linear; ICF weights) + 0.9 SupCon(features)" + GENERATOR),
    "linear head, no generator": (
        ["--norm_out", "0", "--add_rsg", "0"],
        "0.1 LDAM(linear; ICF weights) + 0.9 SupCon(features)",
    ),
    "ldam alone": ([*OFF, "--add_ldam_loss"], "0.1 LDAM(normed; ICF weights)"),
    "cross-entropy alone": ([*OFF, "--add_cross_entropy_loss"], "1 CE(normed)"),
    "focal alone": ([*OFF, "--add_focal_loss", "--focal_weight_type", "cbl"], "1 focal(normed; CB weights)"),
    "supcon alone": ([*OFF, "--add_supcon_loss"], "0.9 SupCon(features)"),
    "arc alone": ([*OFF, "--add_arc_margin_loss"], "1 CE(normed) + 1 CE(arc)"),
    "add alone": ([*OFF, "--add_add_margin_loss"], "1 CE(normed) + 1 CE(add)"),
    "sphere alone": ([*OFF, "--add_sphere_loss"], "1 CE(normed) + 1 CE(sphere)"),
    "cross-entropy and arc": (
        [*OFF, "--add_cross_entropy_loss", "--add_arc_margin_loss"],
        "1 CE(normed) + 1 CE(arc)",
    ),
    "two views, projection, keys": (
        ["--supcon_views", "2", "--supcon_projection_dim", "16", "--supcon_generated", "keys"],
        "0.1 LDAM(normed; ICF weights) + 0.9 SupCon(projections; generated rows as keys)" + GENERATOR,
    ),
    "everything": (
        [
            "--add_cross_entropy_loss",
            "--add_focal_loss",
            "--add_arc_margin_loss",
            "--add_add_margin_loss",
            "--add_sphere_loss",
        ],
        " + ".join(
            f"1 CE({head}) + 0.1 LDAM({head}; ICF weights) + 1 focal({head})"
            for head in ("normed", "arc", "add", "sphere")
        )
        + " + 0.9 SupCon(features)"
        + GENERATOR,
    ),
}


@pytest.mark.parametrize("name", TOGGLES)
def test_every_toggle_trains_two_steps_and_tests(name, tmp_path, tiny_dataset, capsys):
    flags, objective = TOGGLES[name]
    run = train(tmp_path, tiny_dataset, "--batch_size", "8", *flags)
    assert f"objective  {objective}\n" in capsys.readouterr().out
    result = test(run)
    assert result["n"] == 9
    assert np.isfinite(result["nll"])
    (row,) = rows_of(run)
    assert (row["generated_rows"] > 0) == ("CESC" in objective)
    assert result["predict_with"] == ("ncm" if name == "supcon alone" else "main")
    assert ("train_accuracy" in row) == (name != "supcon alone")


def test_the_generator_leaves_no_trace_when_it_is_off(tmp_path, tiny_dataset):
    run = train(tmp_path, tiny_dataset, "--add_rsg", "False")
    state = torch.load(run / "state.pt", weights_only=True)
    assert not any(name.startswith("generator") for name in state["model"])
    assert json.loads((run / "args.json").read_text())["generator_parameters"] == 0
    assert not {"loss_centre", "loss_mv"} & rows_of(run)[0].keys()


def test_a_generator_that_never_starts_is_a_warning(capsys):
    imagenet_lt_train.parse_args(["--epochs", "20", "--epoch_thresh", "160"])
    assert "RSG never generates" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        ("--drw_epoch 20", "class weights never begin"),
        ("--drw_epoch 19", None),
        ("--drw_epoch 0.8 --ldam_weight_type none", "--drw_epoch changes nothing"),
        ("--lr_schedule cosine --lr_decay 0.5", "--lr_decay changes nothing"),
        ("--lr_milestones 0.5", "--lr_milestones changes nothing"),
        ("--lr_factor 0.5", "--lr_factor changes nothing"),
        ("--optimizer adamw --momentum 0.5", "--momentum changes nothing"),
        ("--stem small --arch resnet32", "--stem small changes nothing"),
        ("--focal_gamma 5", "--focal_gamma changes nothing: it is for --add_focal_loss"),
        ("--add_ldam_loss False --add_cross_entropy_loss --ldam_max_margin 0.5", "--ldam_max_margin changes nothing"),
        ("--logit_adjust_tau 2", "--logit_adjust_tau changes nothing"),
        ("--cbl_beta 0.9", "--cbl_beta changes nothing"),
        ("--ldam_weight_type cbl --cbl_beta 0.9", None),
        ("--add_supcon_loss False --supcon_projection_dim 128", "--supcon_projection_dim changes nothing"),
        ("--add_rsg False --supcon_generated keys", "--supcon_generated changes nothing"),
        ("--add_rsg False --epoch_thresh 3", "--epoch_thresh changes nothing"),
        ("--add_rsg False --rsg_centers 3", "--rsg_centers changes nothing"),
        ("--arc_margin 0.2", "--arc_margin changes nothing"),
        ("--am_scale 10 --add_add_margin_loss", None),
        ("--freeze_backbone --weights w --backbone_lr 0.1", "--backbone_lr changes nothing"),
        ("--freeze_backbone --weights w --precise_bn", "--precise_bn changes nothing"),
        ("--freeze_backbone --weights w --add_rsg False", "SupCon trains nothing"),
        ("--freeze_backbone --weights w --add_rsg False --supcon_projection_dim 8", None),
        ("--warmup_epochs 50", "--lr is never reached"),
        ("--drs_epoch 20 --ldam_weight_type none", "DRS never begins"),
        ("--drs_epoch 19 --ldam_weight_type none", None),
    ],
)
def test_what_never_begins_or_changes_nothing_is_a_warning(words, warning, capsys):
    imagenet_lt_train.parse_args(["--epochs", "20", *words.split()])
    said = capsys.readouterr().err
    assert warning in said if warning else not said


@pytest.mark.parametrize(
    ("words", "counts", "warns"),
    [
        ("--ldam_weight_type cbl --cbl_beta 0.9", [600, 60], True),
        ("--ldam_weight_type cbl --cbl_beta 0.999", [600, 60], False),
        ("--ldam_weight_type cbl --cbl_beta 0.9", [60, 60], False),
        ("--ldam_weight_type icf --cbl_beta 0.9", [600, 60], False),
        ("--ldam_weight_type cbl --add_ldam_loss False", [600, 60], False),
    ],
)
def test_class_balanced_weights_that_are_all_but_equal_are_a_warning(words, counts, warns):
    warnings = check_class_weights(train_parser().parse_args(words.split()), counts)
    assert ["all but equal" in warning and "is 0.998333" in warning for warning in warnings] == [True] * warns


def test_correcting_twice_is_a_warning(capsys):
    imagenet_lt_train.parse_args(["--sampler", "balanced"])
    assert "corrected twice" in capsys.readouterr().err


def test_resnext50_gives_the_same_bits_under_the_same_seed(tmp_path, tiny_dataset):
    flags = ("--arch", "resnext50_32x4d", "--max_steps", "4", "--batch_size", "4")
    weights = [(train(tmp_path / name, tiny_dataset, *flags) / "last.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


@pytest.fixture(scope="module")
def everything(tmp_path_factory, digits) -> Path:
    """A run with all heads, three epochs long."""
    heads = ("--add_arc_margin_loss", "--add_add_margin_loss", "--add_sphere_loss")
    flags = ("--epochs", "3", "--max_steps", "100", "--lr", "0.05")
    return train(tmp_path_factory.mktemp("everything"), digits, *heads, *flags)


@torch.no_grad()
@pytest.mark.parametrize("predict_with", ["main", "arc", "add", "sphere", "mean", "ncm"])
def test_every_head_predicts_what_the_loaded_model_says(everything, digits, predict_with):
    model, transform, classes = load_run(everything)

    def images_of(split: str, name: str) -> torch.Tensor:
        paths = sorted((digits / split / name).iterdir())
        return torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])

    outputs = [model(images_of("test", name)) for name in classes]
    if predict_with == "mean":
        predicted = [sum(logits.softmax(1) for logits in output.logits.values()).argmax(1) for output in outputs]
    elif predict_with == "ncm":
        features = [torch.nn.functional.normalize(model(images_of("train", name)).features) for name in classes]
        means = torch.nn.functional.normalize(torch.stack([rows.mean(0) for rows in features]))
        predicted = [(torch.nn.functional.normalize(output.features) @ means.T).argmax(1) for output in outputs]
    else:
        predicted = [output.logits[predict_with].argmax(1) for output in outputs]
    hits = sum((rows == index).sum().item() for index, rows in enumerate(predicted))
    assert test(everything, "--predict_with", predict_with)["top1"] == pytest.approx(hits / 300, abs=1e-12)
    folder = "test" if predict_with == "main" else f"test_{predict_with}"
    assert json.loads((everything / folder / "metrics.json").read_text())["predict_with"] == predict_with


def test_a_head_that_the_run_lacks_is_refused(tmp_path, tiny_dataset, capsys):
    run = train(tmp_path, tiny_dataset)
    capsys.readouterr()
    assert "main" in refused(capsys, lambda: test(run, "--predict_with", "arc"))


def test_the_report_agrees_with_scikit_learn_and_with_its_own_files(everything, digits):
    result = test(everything)
    folder = everything / "test"
    with (folder / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    true, predicted = [row["true"] for row in rows], [row["predicted"] for row in rows]
    assert result["top1"] == pytest.approx(np.mean(np.array(true) == np.array(predicted)), abs=1e-12)
    assert result["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(true, predicted), abs=1e-12)
    assert result["macro_f1"] == pytest.approx(f1_score(true, predicted, average="macro"), abs=1e-12)
    assert all((digits / row["file"]).parent.name == row["true"] for row in rows)
    with (folder / "per_class.csv").open() as file:
        classes = list(csv.DictReader(file))
    assert [int(row["train_images"]) for row in classes] == [124, 88, 63, 45, 32, 23, 16, 12, 8, 6]
    assert json.loads((folder / "metrics.json").read_text())["top1"] == result["top1"]
    for name in ("accuracy_by_class.png", "confusion.png"):
        with Image.open(folder / name) as image:
            assert min(image.size) > 300
    saved = np.load(folder / "logits.npz")
    assert (saved["logits"].argmax(axis=1) == [int(name) for name in predicted]).all()


def test_last_weights_stand_beside_the_best(tmp_path, tiny_dataset):
    run = train(tmp_path, tiny_dataset)
    tensors = load_file(run / "last.safetensors")
    tensors["heads.main.weight"] = tensors["heads.main.weight"].roll(1, 0)
    save_file(tensors, run / "last.safetensors", {"epoch": "7"})
    result, last = test(run), test(run, "--weights", "last")
    assert (result["epoch"], result["last"]["epoch"], last["epoch"]) == (0, 7, 7)
    assert result["last"]["nll"] == last["nll"] != result["nll"]
    assert (run / "test_last" / "metrics.json").exists()


def test_a_run_predicts_in_python_as_the_readme_says(everything, digits, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "photos").symlink_to(everything)
    Image.open(next((digits / "test" / "3").iterdir())).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    exec(code, names := {})
    assert capsys.readouterr().out.strip() in names["classes"] == [str(digit) for digit in range(10)]
    assert not names["model"].training


def test_without_val_the_last_epoch_is_the_model(tmp_path, tiny_dataset, capsys):
    shutil.rmtree(tiny_dataset / "val")
    run = train(tmp_path, tiny_dataset, "--batch_size", "4")
    said = capsys.readouterr()
    assert "has no val/" in said.err
    assert "mirrored at random" in said.out  # no dataset.json says that they may not be
    assert not (run / "best.safetensors").exists()
    assert test(run)["weights"] == "last"
    capsys.readouterr()
    assert "best.safetensors" in refused(capsys, lambda: test(run, "--weights", "best"))


def test_large_images_of_different_shapes_train_and_test(tmp_path, tiny_dataset):
    for index, path in enumerate(sorted(tiny_dataset.glob("*/*/*.png"))):
        Image.open(path).resize((90 + 7 * (index % 5), 100)).save(path)
    run = train(tmp_path, tiny_dataset, "--batch_size", "4", "--img_size", "72", "--workers", "1")
    assert test(run)["n"] == 9
    assert json.loads((run / "args.json").read_text())["img_size"] == 72


# --- what a user gets wrong first


def test_an_empty_class_is_named(tmp_path, tiny_dataset, capsys):
    (tiny_dataset / "train" / "hollow").mkdir()
    assert str(tiny_dataset / "train" / "hollow") in refused(capsys, lambda: train(tmp_path, tiny_dataset))


def test_all_broken_images_are_named_and_nothing_is_written(tmp_path, tiny_dataset, capsys):
    for name in ("train_0.png", "train_3.png"):
        (tiny_dataset / "train" / "common" / name).write_bytes(b"no image")
    line = refused(capsys, lambda: train(tmp_path, tiny_dataset))
    assert "train_0.png" in line
    assert "train_3.png" in line
    assert not (tmp_path / "checkpoint").exists()


def test_a_wrong_number_of_classes_names_both(tmp_path, tiny_dataset, capsys):
    line = refused(capsys, lambda: train(tmp_path, tiny_dataset, "--cls_num", "100"))
    assert "100" in line
    assert "3 classes" in line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (OFF, "no loss is on"),
        (["--arch", "resnet99"], "resnext50_32x4d"),
        (["--lr", "0"], "above 0"),
        (["--batch_size", "1"], "at least 2"),
        (["--cbl_beta", "1"], "below 1"),
        (["--ema_decay", "1"], "below 1"),
        (["--momentum", "1"], "below 1"),
        (["--label_smoothing", "1"], "below 1"),
        (["--learning", "1"], "unrecognized"),
        (["--start_epoch", "20"], "--start_epoch"),
        (["@missing.txt"], "missing.txt"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, words, capsys):
    assert words in refused(capsys, lambda: imagenet_lt_train.parse_args(flags))


def test_synchronized_batch_norm_is_refused_on_a_cpu(tmp_path, tiny_dataset, capsys):
    assert "--sync_bn" in refused(capsys, lambda: train(tmp_path, tiny_dataset, "--sync_bn", "--device", "cpu"))


def test_a_run_starts_from_the_weights_of_another(tmp_path, tiny_dataset, capsys):
    first = train(tmp_path / "first", tiny_dataset, "--batch_size", "4")
    weights = str(first / "last.safetensors")
    start = ["--batch_size", "4", "--weights", weights, "--lr", "1e-30"]
    run = train(tmp_path / "second", tiny_dataset, *start)
    said = capsys.readouterr()
    assert "not used: heads.main.weight" in said.out
    assert "--weights" not in said.err
    image = next((tiny_dataset / "test" / "rare").iterdir())
    image.rename(tiny_dataset / "train" / "rare" / "again.png")
    train(tmp_path / "third", tiny_dataset, *start, "--normalize", "dataset")
    said_now = capsys.readouterr().err
    assert "learned on images normalised with other means" in said_now
    assert "comes from a run on other images of these classes" in said_now
    one, other = load_run(first)[0].state_dict(), load_run(run)[0].state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one if name.endswith("conv1.weight"))
    assert not torch.equal(one["heads.main.weight"], other["heads.main.weight"])
    (first / "last.safetensors").unlink()
    assert f"{weights} is no file" in refused(capsys, lambda: train(tmp_path / "fourth", tiny_dataset, *start))
    train(tmp_path / "second", tiny_dataset, *start, "--resume")
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--data_dir", "--root_model", "--weights"])
def test_an_empty_path_is_refused(capsys, flag):
    """As of a shell variable that is not set; it would be the current folder."""
    assert f"argument {flag}: the path is empty" in refused(capsys, lambda: imagenet_lt_train.parse_args([flag, ""]))


def test_a_name_that_no_file_system_takes_is_refused(tmp_path, tiny_dataset, capsys):
    assert "is longer than 200 bytes" in refused(capsys, lambda: train(tmp_path, tiny_dataset, "--run_name", "é" * 101))


def test_a_run_is_not_overwritten_unless_told(tmp_path, tiny_dataset, capsys):
    run = train(tmp_path, tiny_dataset)
    mine = run / "notes.txt"
    mine.write_text("keep me")
    before = (run / "last.safetensors").read_bytes()
    capsys.readouterr()
    assert "--overwrite" in refused(capsys, lambda: train(tmp_path, tiny_dataset))
    train(tmp_path, tiny_dataset, "--overwrite", "--seed", "1")
    assert (run / "last.safetensors").read_bytes() != before
    assert mine.read_text() == "keep me"


def test_a_run_that_does_not_exist_lists_those_that_do(tmp_path, tiny_dataset, capsys):
    run = train(tmp_path, tiny_dataset)
    capsys.readouterr()
    line = refused(
        capsys,
        lambda: imagenet_lt_test.main(
            imagenet_lt_test.parse_args(["--model_dir", "wrong", "--root_model", str(run.parent)])
        ),
    )
    assert "runs in" in line
    assert run.name in line


def test_the_default_name_of_a_run_is_the_original_suites(tmp_path, tiny_dataset):
    run = train(tmp_path, tiny_dataset, "--run_name", "", "--seed", "3")
    assert not run.exists()
    name = "ImageNet_LT_tiny_resnet8_normout_rsg_ldam_supcon_seed3"
    assert (tmp_path / "checkpoint" / name / "last.safetensors").exists()


@pytest.mark.parametrize("script", [imagenet_lt_train, imagenet_lt_test])
def test_help_shows_defaults(script, capsys):
    with pytest.raises(SystemExit, match="0"):
        script.parse_args(["--help"])
    said = capsys.readouterr()
    assert "(default: " in said.out
    assert not said.err


def test_image_lists_train_and_test_like_folders(tmp_path, tiny_dataset):
    for split in ("train", "val", "test"):
        paths = sorted((tiny_dataset / split).glob("*/*.png"))
        classes = sorted({path.parent.name for path in paths})
        lines = [f"{path.relative_to(tiny_dataset)} {classes.index(path.parent.name)}\n" for path in paths]
        (tmp_path / f"{split}.txt").write_text("".join(lines))
    by_folders = train(tmp_path / "folders", tiny_dataset, "--batch_size", "4")
    by_lists = train(tmp_path / "lists", tiny_dataset, "--batch_size", "4", "--list_dir", str(tmp_path))
    assert (by_folders / "last.safetensors").read_bytes() == (by_lists / "last.safetensors").read_bytes()
    assert test(by_lists)["top1"] == test(by_folders)["top1"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b'--run_name "abc', "quotation"), (b"--run_name \xff", "UTF-8"), (b"@{path}", "names itself")],
)
def test_a_faulty_file_of_flags_is_one_line(content, words, tmp_path, capsys):
    recipe = tmp_path / "recipe.txt"
    recipe.write_bytes(content.replace(b"{path}", str(recipe).encode()))
    assert words in refused(capsys, lambda: imagenet_lt_train.parse_args([f"@{recipe}"]))


def test_shot_thresholds_reach_the_table(tmp_path, tiny_dataset):
    run = train(tmp_path, tiny_dataset, "--batch_size", "4")
    assert test(run)["counts"] == {"few": 3, "head": 1, "tail": 2}
    assert test(run, "--shot_thresholds", "7", "4")["counts"] == {
        "many": 1,
        "medium": 1,
        "few": 1,
        "head": 1,
        "tail": 2,
    }


def test_a_file_name_that_is_not_utf8_trains_and_tests(tmp_path, tiny_dataset):
    path = tiny_dataset / "test" / "common" / "test_0.png"
    path.rename(path.with_name(os.fsdecode(b"caf\xe9.png")))
    run = train(tmp_path, tiny_dataset, "--batch_size", "4")
    assert test(run)["n"] == 9
    assert b"caf\xe9.png" in (run / "test" / "predictions.csv").read_bytes()


def test_class_names_that_are_no_utf8_and_signs_that_no_font_has_are_drawn(tmp_path, tiny_dataset, recwarn):
    names = {"common": os.fsdecode(b"caf\xe9"), "medium": "\u72ac", "rare": "$_$"}
    for split in ("train", "val", "test"):
        for old, new in names.items():
            (tiny_dataset / split / old).rename(tiny_dataset / split / new)
    run = train(tmp_path, tiny_dataset, "--max_steps", "1", "--add_rsg", "False")
    imagenet_lt_test.main(imagenet_lt_test.parse_args(["--model_dir", str(run), "--plot_features"]))
    assert {"confusion.png", "features.png", "report.html"} <= {path.name for path in (run / "test").iterdir()}
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
