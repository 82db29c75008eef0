"""What the epoch loop does with what the flags say: whole tiny runs against each other and against plain loops."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import imagenet_lt_test
import imagenet_lt_train
from data.build import build_pixels, build_training_loader
from data.folders import read_image_folders
from engine.optim import build_average
from engine.precision import build_scaler
from engine.run import RunFolder
from engine.state import TrainingState
from engine.train import epoch_row, update
from engine.weights import load_run

PLAIN = "--arch resnet8 --batch_size 8 --lr 0.05 --lr_schedule constant --wd 0 --seed 0 --workers 0 --amp off"
PLAIN += " --add_rsg False --add_supcon_loss False --ldam_weight_type none"


def flags(folder: Path, words: str) -> list[str]:
    places = ["--data_dir", folder / "tiny", "--root_model", folder, "--root_log", folder / "log"]
    return [str(word) for word in [*places, *PLAIN.split(), *words.split()]]


def train(folder: Path, name: str, words: str) -> Path:
    imagenet_lt_train.main(imagenet_lt_train.parse_args(flags(folder, f"--run_name {name} {words}")))
    return folder / name


def test_the_parts_in_the_log_add_up_and_centres_that_stay_are_warned_of(tmp_path, tiny_dataset, capsys):
    words = "--epochs 1 --lr 1e-30 --add_rsg True --add_supcon_loss True"
    run = train(tmp_path, "run", f"{words} --rsg_cesc_weight 1e-4 --rsg_mv_weight 1e-3")
    row = json.loads((run / "log.jsonl").read_text())
    factors = {"ldam_main": 0.1, "supcon": 0.9, "centre": 1e-4, "contrast": 1e-4, "mv": 1e-3}
    assert all(row[f"loss_{name}"] > 0 for name in factors if name != "contrast")
    assert row["train_loss"] == pytest.approx(sum(f * row[f"loss_{name}"] for name, f in factors.items()), rel=1e-4)
    assert row["rsg_center_distance"] == pytest.approx(1, abs=1e-5)
    assert "hardly moved" in capsys.readouterr().err


def weights_of(run: Path) -> torch.Tensor:
    return load_file(run / "last.safetensors")["heads.main.weight"]


def losses_of(run: Path) -> list[float]:
    return [json.loads(line)["train_loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_an_epoch_trains_at_its_learning_rate(tmp_path, tiny_dataset):
    """At next to none in the second epoch the first one's weights stay."""
    one = train(tmp_path, "one", "--epochs 1")
    two = train(tmp_path, "two", "--epochs 2 --lr_schedule step --lr_milestones 0.5 --lr_factor 1e-30")
    assert torch.equal(weights_of(one), weights_of(two))
    still = train(tmp_path, "still", "--epochs 1 --lr 1e-30")
    assert not torch.equal(weights_of(one), weights_of(still))
    clipped = train(tmp_path, "clipped", "--epochs 1 --clip_grad_norm 1e-30")
    torch.testing.assert_close(weights_of(clipped), weights_of(still), rtol=0, atol=1e-12)


@pytest.mark.parametrize("later", ["--ldam_weight_type icf --drw_epoch 1", "--sampler balanced --drs_epoch 1"])
def test_what_is_deferred_begins_in_its_epoch_and_not_before(tmp_path, tiny_dataset, later):
    plain, deferred = (
        losses_of(train(tmp_path, *each)) for each in (("a", "--epochs 2"), ("b", f"--epochs 2 {later}"))
    )
    assert plain[0] == deferred[0]
    assert plain[1] != deferred[1]


def test_the_generators_parts_stay_as_they_are_out_of_their_phase(tmp_path, tiny_dataset):
    """Weight decay included: 0.05 * 0.5 of a weight in every update."""
    words = "--add_rsg True --wd 0.5"
    begun = train(tmp_path, "begun", f"{words} --epochs 1 --epoch_thresh 0 --max_steps 1 --lr 1e-30")
    run = train(tmp_path, "run", f"{words} --epochs 2 --epoch_thresh 0")
    states = [begun / "state.pt", run / "state.previous.pt", run / "state.pt"]  # at the start, after each epoch
    at_first, learnt, generated = (torch.load(path, weights_only=True)["model"] for path in states)
    for part, still, moved in (
        ("transform", (at_first, learnt), (learnt, generated)),
        ("contrast", (learnt, generated), (at_first, learnt)),
    ):
        names = [name for name in learnt if name.startswith(f"generator.{part}.") and name.endswith("weight")]
        assert names
        for name in names:
            assert torch.equal(still[0][name], still[1][name])
            assert not torch.equal(moved[0][name], moved[1][name])


def test_views_and_projection_of_a_loss_that_is_off_change_nothing(tmp_path, tiny_dataset):
    words = "--epochs 2 --add_rsg True"
    runs = [
        train(tmp_path, name, words + more)
        for name, more in (("plain", ""), ("idle", " --supcon_views 2 --supcon_projection_dim 8"))
    ]
    contents = [(run / "last.safetensors").read_bytes() for run in runs]
    assert contents[0] == contents[1]


def test_updates_skipped_in_float16_are_counted_and_training_goes_on(tmp_path, tiny_dataset):
    """Of 20 updates the first ones overflow; each halves the scale, which begins at 65536."""
    run = train(tmp_path, "run", "--epochs 10 --amp fp16 --ldam_loss_weight 1e3 --lr 1e-6")
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    skipped = sum(row["skipped_batches"] for row in rows)
    state = torch.load(run / "state.pt", weights_only=True)
    assert 0 < skipped < 20
    assert state["scaler"]["scale"] == 65536 / 2**skipped
    assert all(value.isfinite().all() for value in state["model"].values())


def test_averaged_weights_are_the_ones_judged_and_saved(tmp_path, tiny_dataset):
    run = train(tmp_path, "run", "--epochs 1 --ema_decay 0.9 --add_arc_margin_loss")
    state, saved = torch.load(run / "state.pt", weights_only=True), load_file(run / "last.safetensors")
    assert torch.equal(saved["heads.main.weight"], state["averaged"]["module.heads.main.weight"])
    assert not torch.equal(saved["heads.main.weight"], state["model"]["heads.main.weight"])
    row = json.loads((run / "log.jsonl").read_text())
    for key, head in (("val_loss", "main"), ("val_loss_arc", "arc")):
        words = ["--model_dir", str(run), "--split", "val", "--weights", "last", "--predict_with", head]
        result = imagenet_lt_test.main(imagenet_lt_test.parse_args(words))
        assert row[key] == pytest.approx(result["nll"], rel=1e-5)


def test_every_update_goes_into_the_average():
    """The first one is taken whole; then 0.75 of the average and 0.25 of the new weight."""
    model = nn.Linear(1, 1, bias=False)
    state = TrainingState(model, torch.optim.SGD(model.parameters(), lr=1.0), build_scaler(None, torch.device("cpu")))
    state.averaged, values = build_average(model, 0.75), []
    for _ in range(3):
        state.scaler.scale(model.weight.sum()).backward()
        update(state, lambda: None)
        values.append(model.weight.item())
    expected = 0.75 * (0.75 * values[0] + 0.25 * values[1]) + 0.25 * values[2]
    assert state.averaged.module.weight.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "words", ["--mixup 1", "--cutmix 1 --ema_decay 0.5", "--add_rsg True --epoch_thresh -1 --sampler balanced"]
)
def test_precise_statistics_are_those_of_unmixed_images_and_nothing_else_changes(tmp_path, tiny_dataset, words):
    run = train(tmp_path, "run", f"{words} --epochs 2 --precise_bn")
    without = load_file(train(tmp_path, "without", f"{words} --epochs 2") / "last.safetensors")
    for name, value in load_file(run / "last.safetensors").items():
        if not name.endswith("num_batches_tracked"):
            assert torch.equal(value, without[name]) == (".running_" not in name), name

    model, _, _ = load_run(run, "last")
    args = imagenet_lt_train.parse_args(flags(tmp_path, "--epochs 2"))  # whose batches are not mixed
    sampler = "balanced" if "balanced" in words else "uniform"
    folders, device = read_image_folders(tiny_dataset), torch.device("cpu")
    loader = build_training_loader(args, folders, build_pixels(args, folders), 0, device)
    seen = {layer: [] for layer in model.backbone.modules() if isinstance(layer, nn.BatchNorm2d)}
    for layer in seen:
        layer.register_forward_pre_hook(lambda layer, inputs: seen[layer].append(inputs[0]))
    model.train()
    saved = [(layer.running_mean.clone(), layer.running_var.clone()) for layer in seen]
    with torch.no_grad():
        for batch in loader.epoch(1, sampler):
            model(batch.images)
    for maps, (mean, variance) in zip(seen.values(), saved, strict=True):
        channels = [each.transpose(0, 1).flatten(1) for each in maps]
        torch.testing.assert_close(mean, torch.stack([each.mean(dim=1) for each in channels]).mean(dim=0))
        torch.testing.assert_close(variance, torch.stack([each.var(dim=1) for each in channels]).mean(dim=0))


def test_precise_statistics_take_no_more_batches_than_they_need(tmp_path, tiny_dataset):
    """Of two batches an epoch: one where there is one step, one where one is the limit."""
    words = "--mixup 1 --precise_bn --lr 1e-30"
    runs = [train(tmp_path, "smoke", f"{words} --epochs 1 --max_steps 1")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imagenet_lt_train, "PRECISE_BN_BATCHES", 1)
        runs.append(train(tmp_path, "one", f"{words} --epochs 1"))
    runs.append(train(tmp_path, "both", f"{words} --epochs 1"))
    means = [load_file(run / "last.safetensors")["backbone.lower.1.running_mean"] for run in runs]
    torch.testing.assert_close(means[0], means[1])
    assert not torch.allclose(means[0], means[2])


def test_a_frozen_backbone_keeps_its_statistics(tmp_path, tiny_dataset):
    parent = train(tmp_path, "parent", "--epochs 1 --mixup 1")
    start = f"--epochs 1 --weights {parent / 'last.safetensors'} --freeze_backbone"
    child, before = train(tmp_path, "child", f"{start} --precise_bn"), load_file(parent / "last.safetensors")
    for name, value in load_file(child / "last.safetensors").items():
        assert torch.equal(value, before[name]) == name.startswith("backbone."), name


def test_gradients_are_clipped_at_their_own_size_and_not_at_that_of_the_scaled_loss():
    model, seen = nn.Linear(1, 1, bias=False), []
    scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    state = TrainingState(model, torch.optim.SGD(model.parameters(), lr=1.0), scaler)
    scaler.scale(2 * model.weight.sum()).backward()
    update(state, lambda: seen.append(model.weight.grad.item()))
    assert seen == [2.0]


def test_best_is_the_first_epoch_of_the_highest_balanced_accuracy(tmp_path, tiny_dataset):
    args = imagenet_lt_train.parse_args(flags(tmp_path, "--run_name run --epochs 5"))
    run, model = RunFolder(args), nn.Linear(1, 1)
    run.path.mkdir()
    run.writer = SummaryWriter(run.events)
    state = TrainingState(model, torch.optim.SGD(model.parameters(), lr=1.0), build_scaler(None, torch.device("cpu")))
    for epoch, (balanced, accuracy) in enumerate([(0.5, 0.9), (0.7, 0.6), (0.7, 0.95), (0.6, 0.6)]):
        row = {"epoch": epoch, "lr": 1.0, "generated_rows": 0, "seconds": 1.0}
        run.commit(state, row | {"val_balanced_accuracy": balanced, "val_accuracy": accuracy}, None, finished=False)
    run.writer.close()
    assert state.best == {"epoch": 1, "val_balanced_accuracy": 0.7}
    for name, epoch in (("best", "1"), ("last", "3")):
        with safe_open(run.path / f"{name}.safetensors", "pt") as file:
            assert file.metadata() == {"epoch": epoch}


def test_without_a_classifier_the_nearest_class_mean_of_the_training_images_is_judged(tmp_path, tiny_dataset, capsys):
    run = train(tmp_path, "run", "--epochs 1 --add_ldam_loss False --add_supcon_loss True")
    model, transform, classes = load_run(run, "last")
    assert "no loss trained the classifier" in capsys.readouterr().err

    def features(split: str, name: str) -> torch.Tensor:
        paths = sorted((tiny_dataset / split / name).iterdir())
        rows = [model(transform(Image.open(path).convert("RGB"))[None]).features[0].double() for path in paths]
        return torch.stack([row / row.norm() for row in rows]).detach()

    means = torch.stack([features("train", name).mean(dim=0) for name in classes])
    saved = load_file(run / "last.safetensors")["class_means"]
    torch.testing.assert_close(saved, means, rtol=1e-4, atol=1e-6)
    cosine = nn.CosineSimilarity(dim=0)
    hits = [
        max(range(3), key=lambda index: cosine(row, means[index])) == target
        for target, name in enumerate(classes)
        for row in features("val", name)
    ]
    assert json.loads((run / "log.jsonl").read_text())["val_accuracy"] == pytest.approx(np.mean(hits))


def test_throughput_counts_each_image_once_and_each_epoch_its_own_time():
    model = nn.ModuleDict({"heads": nn.ModuleDict({"main": nn.Linear(1, 1)})})
    model.heads = model["heads"]
    state = TrainingState(model, None, None, seconds=2.0)
    zeros = dict.fromkeys(("train_accuracy", "generated_rows", "skipped_batches"), torch.tensor(0.0))
    state.sums = {"images": torch.tensor(20.0), **zeros}
    assert epoch_row(state, views=2)["images_per_second"] == 5
    state.next_epoch()
    assert (state.epoch, state.step, state.sums, state.seconds) == (1, 0, {}, 0.0)
