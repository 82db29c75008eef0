"""A second stage on a saved run."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

import imagenet_lt_test
import imagenet_lt_train
from engine.compare import what_is_missing
from engine.weights import load_run, read_weights
from scripts import compare_runs, retrain_classifier

BASE = "--arch resnet8 --epochs 1 --batch_size 8 --lr 0.05 --seed 3 --add_rsg 0 --add_supcon_loss 0"
PRIOR, GO_ON = ("--test_prior", "uniform"), ("--run_name", "parent_tau", "--resume")
LINEAR = "--norm_out False --add_ldam_loss False --add_cross_entropy_loss"


def places(folder: Path) -> list[str]:
    return ["--root_model", str(folder), "--root_log", str(folder / "log")]


def trained(folder: Path, data: Path, words: str) -> Path:
    flags = ["--data_dir", str(data), "--run_name", "parent", *places(folder), *BASE.split(), *words.split()]
    imagenet_lt_train.main(imagenet_lt_train.parse_args(flags))
    return folder / "parent"


def retrain(folder: Path, *words: str) -> None:
    args = retrain_classifier.parse_args(["--model_dir", "parent", *places(folder), *words])
    retrain_classifier.main(args)


def record_of(run: Path) -> dict:
    return json.loads((run / "args.json").read_text())


def test_crt_trains_a_new_head_on_the_backbone_as_it_is_and_names_its_parent(tmp_path, tiny_dataset, capsys):
    parent = trained(tmp_path, tiny_dataset, "--norm_scale 20 --normalize dataset --neck fc")
    record = record_of(parent)
    (parent / "args.json").write_text(
        json.dumps(record | {"flags": record["flags"] | {"epochs": 9, "max_steps": None}})
    )
    tensors = load_file(parent / "last.safetensors")
    save_file({name: 0 * value for name, value in tensors.items()}, parent / "last.safetensors", {"epoch": "0"})
    retrain(tmp_path, "--epochs", "1")
    assert "parent is not finished: 1 of 9 epochs are done" in capsys.readouterr().err
    record = record_of(tmp_path / "parent_crt")
    assert record["parent"] == str(parent)
    assert record["objective"] == "1 CE(normed)"
    assert (record["flags"]["sampler"], record["flags"]["norm_scale"], record["seed"]) == ("balanced", 20, 3)
    assert record["mean"] == record_of(parent)["mean"]
    before, after = load_file(parent / "best.safetensors"), load_file(tmp_path / "parent_crt" / "last.safetensors")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]) is not name.startswith("heads."), name
    result = imagenet_lt_test.main(imagenet_lt_test.parse_args(["--model_dir", str(tmp_path / "parent_crt")]))
    assert result["n"] == 9


def test_what_a_second_stage_takes_from_its_parent_is_the_parents(tmp_path, tiny_dataset):
    trained(tmp_path, tiny_dataset, "--hflip False --batch_size 4 --norm_scale 20 --head_tail_ratio 0.4")
    args = retrain_classifier.parse_args(["--model_dir", "parent", *places(tmp_path)]).training
    assert (args.hflip, args.batch_size, args.norm_scale, args.head_tail_ratio) == (False, 4, 20, 0.4)


def test_tau_rescales_the_rows_of_the_parents_head(tmp_path, tiny_dataset, capsys):
    for index in range(2):
        (tiny_dataset / f"val/rare/val_{index}.png").unlink()  # so that accuracy is not balanced accuracy
    for old, new in (("common", "other"), ("rare", "common"), ("other", "rare")):
        (tiny_dataset / "test" / old).rename(tiny_dataset / "test" / new)
    parent = trained(tmp_path, tiny_dataset, f"{LINEAR} --epochs 7")
    model, transform, classes = load_run(parent)
    images = [Image.open(tiny_dataset / "val" / name / "val_2.png") for name in classes]
    features = torch.cat([model(transform(image)[None]).features for image in images]).detach()
    tensors = load_file(parent / "best.safetensors")  # with class means of norms 9, 3 and 1 tau decides
    tensors["heads.main.weight"] = nn.functional.normalize(features) * torch.tensor([[9.0], [3.0], [1.0]])
    save_file(tensors, parent / "best.safetensors", {"epoch": "0"})
    retrain(tmp_path, "--method", "tau", "--tau", "0.5")
    run = tmp_path / "parent_tau"
    before, after = load_file(parent / "best.safetensors"), load_file(run / "last.safetensors")
    for row, rescaled in zip(before["heads.main.weight"], after["heads.main.weight"], strict=True):
        torch.testing.assert_close(rescaled, row / sum(x.item() ** 2 for x in row) ** 0.25)
    assert not after["heads.main.bias"].any()
    assert (read_weights(parent, "last").epoch, read_weights(run, "last").epoch) == (6, 0)  # of the best ones
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("backbone."))
    retrain(tmp_path, "--method", "tau", "--overwrite")
    record = record_of(run)
    scores = {float(tau): score for tau, score in record["val_balanced_accuracy_by_tau"].items()}
    assert len(scores) == 41
    assert len(set(scores.values())) > 1
    assert scores[record["tau"]] == max(scores.values())
    assert record["parent"] == str(parent)
    capsys.readouterr()
    result = imagenet_lt_test.main(imagenet_lt_test.parse_args(["--model_dir", str(run), "--split", "val"]))
    assert result["balanced_accuracy"] == pytest.approx(scores[record["tau"]])
    assert result["balanced_accuracy"] > 0.9  # which the tau that test/ would choose does not reach
    assert result["chosen_on_these_images"]
    with pytest.raises(SystemExit, match="2"):
        retrain(tmp_path, "--method", "tau")
    assert "already holds a run" in capsys.readouterr().err


def test_tau_is_not_chosen_on_other_images_nor_written_over_its_parent(tmp_path, tiny_dataset, capsys):
    parent = trained(tmp_path, tiny_dataset, LINEAR)
    shutil.copytree(tiny_dataset, tmp_path / "other")
    next((tmp_path / "other" / "val" / "common").iterdir()).unlink()
    for words, said in (
        (["--data_dir", str(tmp_path / "other")], "does not hold the images of"),
        (["--run_name", "parent", "--overwrite"], "would be replaced"),
    ):
        with pytest.raises(SystemExit, match="2"):
            retrain(tmp_path, "--method", "tau", *words)
        assert said in capsys.readouterr().err
    assert (parent / "best.safetensors").is_file()


def test_a_rescaled_run_says_how_it_was_made_and_is_not_taken_for_a_training(tmp_path, tiny_dataset, capsys):
    trained(tmp_path, tiny_dataset, LINEAR)
    retrain(tmp_path, "--method", "tau", "--tau", "0.5", "--parent_weights", "last")
    run = tmp_path / "parent_tau"
    before = load_file(run / "last.safetensors")
    imagenet_lt_test.main(imagenet_lt_test.parse_args(["--model_dir", str(run)]))
    page = re.sub("<[^>]*>", "", (run / "test" / "report.html").read_text())
    command = "retrain_classifier.py --model_dir ROOT/parent --root_model ROOT --method tau --parent_weights last"
    assert f"{command} --tau 0.5".replace("ROOT", str(tmp_path)) in page
    assert f"the last of {tmp_path / 'parent'}, rescaled" in page
    assert what_is_missing(run) == "a rescaled classifier, without a training to compare"
    imagenet_lt_test.main(imagenet_lt_test.parse_args(["--model_dir", str(tmp_path / "parent")]))
    compare_runs.main(compare_runs.parse_args([str(tmp_path)]))
    assert "parent_tau is left out: it is a rescaled classifier" in capsys.readouterr().err
    flags = ["--data_dir", str(tiny_dataset), *places(tmp_path), *BASE.split(), *LINEAR.split()]
    for call, words in (
        (lambda: imagenet_lt_test.main(imagenet_lt_test.parse_args(["--model_dir", str(run), *PRIOR])), "no prior"),
        (lambda: imagenet_lt_train.main(imagenet_lt_train.parse_args([*flags, *GO_ON])), "no training goes on"),
    ):
        with pytest.raises(SystemExit, match="2"):
            call()
        assert words in capsys.readouterr().err
    assert all(torch.equal(value, before[name]) for name, value in load_file(run / "last.safetensors").items())


@pytest.mark.parametrize(
    ("parent", "words", "error"),
    [
        (LINEAR, "--method tau --epochs 30", "--epochs is for --method crt"),
        (LINEAR, "--method tau --resume", "--resume is for --method crt"),
        (LINEAR, "--tau 1", "--tau is for --method tau"),
        ("--norm_out False --add_ldam_loss False --add_supcon_loss", "--method tau", "no loss trained a head"),
    ],
)
def test_what_a_method_does_not_take_is_refused(tmp_path, tiny_dataset, parent, words, error, capsys):
    trained(tmp_path, tiny_dataset, f"--max_steps 1 {parent}")
    with pytest.raises(SystemExit, match="2"):
        retrain(tmp_path, *words.split())
    assert error in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("parent_*")] == []


def test_tau_is_refused_for_a_head_without_norms(tmp_path, tiny_dataset, capsys):
    trained(tmp_path, tiny_dataset, "--max_steps 1")
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        retrain(tmp_path, "--method", "tau")
    assert "--method crt" in capsys.readouterr().err
    assert not (tmp_path / "parent_tau").exists()
