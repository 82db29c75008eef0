"""Training with synthetic images: what they weigh, what is counted, exact resume."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import imagenet_lt_test
import imagenet_lt_train
from data.build import build_training_loader, read_data
from data.loaders import Batch, Pixels, TrainingLoader
from data.samplers import epoch_order
from data.synthesis import Recipe
from engine.options import train_parser
from engine.state import TrainingState
from engine.train import epoch_row, with_batch
from losses import (
    CLASSIFICATION_LOSSES,
    CrossEntropyLoss,
    SupConLoss,
    build_objective,
    inverse_frequency_weights,
)
from models import build_model
from models.classifier import Output
from tests.test_synthesis import error_of, train

CPU = torch.device("cpu")
OURS = ("data", "engine", "losses", "models", "rsg", "imagenet_lt_train", "imagenet_lt_test")


@pytest.fixture
def with_synthetic(tiny_dataset) -> Path:
    """The data set with 2 kept and 1 rejected synthetic image of medium, 4 kept of rare."""
    rows, random = [], np.random.default_rng(1)
    for name, kept in (("medium", [True, False, True]), ("rare", [True] * 4)):
        (tiny_dataset / "synthetic" / name).mkdir(parents=True)
        for index, keep in enumerate(kept):
            file = f"{name}/{index:05d}.png"
            Image.fromarray(random.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(
                tiny_dataset / "synthetic" / file
            )
            row = dataclasses.asdict(Recipe("model", "text2img", "{}")) | {"class": name, "index": index, "file": file}
            rows.append(row | dict.fromkeys(("batch_size", "precision", "sha256", "flagged", "why")) | {"kept": keep})
    lines = "".join(f"{json.dumps(row)}\n" for row in reversed(rows))
    (tiny_dataset / "synthetic" / "manifest.jsonl").write_text(lines)
    return tiny_dataset


@pytest.fixture
def without_diffusers():
    """Our modules imported anew where diffusers and transformers cannot be."""
    blocked = {"diffusers": None, "transformers": None}
    saved = {name: module for name, module in sys.modules.items() if name.split(".")[0] in (*OURS, *blocked)}
    for name in saved:
        del sys.modules[name]
    sys.modules.update(blocked)
    import imagenet_lt_test as test_script
    import imagenet_lt_train as train_script

    yield train_script, test_script
    for name in [name for name in sys.modules if name.split(".")[0] in (*OURS, *blocked)]:
        del sys.modules[name]
    sys.modules.update(saved)


def test_training_and_testing_need_no_diffusers(with_synthetic, tmp_path, without_diffusers):
    train_script, test_script = without_diffusers
    assert train_script is not imagenet_lt_train
    flags = ["--data_dir", str(with_synthetic), "--root_model", str(tmp_path), "--root_log", str(tmp_path / "log")]
    flags += ["--arch", "resnet32", "--max_steps", "1", "--run_name", "run", "--synthetic_weight", "1"]
    train_script.main(train_script.parse_args(flags))
    result = test_script.main(test_script.parse_args(["--model_dir", str(tmp_path / "run")]))
    assert result["synthetic"]["images"] == 6
    with pytest.raises(ImportError):
        import diffusers  # noqa: F401


def record_of(run: Path) -> dict:
    return json.loads((run / "args.json").read_text())


def test_weight_0_leaves_the_images_out_and_the_record_says_what_is_in(with_synthetic, tmp_path, capsys):
    without, zero, half, counted = (
        train(with_synthetic, tmp_path / str(number), "--max_steps", "1", *more)
        for number, more in enumerate(
            [
                [],
                ["--synthetic_weight", "0"],
                ["--synthetic_weight", "0.5"],
                ["--synthetic_weight", "0.5", "--count_synthetic"],
            ]
        )
    )
    assert (without / "last.safetensors").read_bytes() == (zero / "last.safetensors").read_bytes()
    assert (without / "last.safetensors").read_bytes() != (half / "last.safetensors").read_bytes()
    records = [record_of(run) for run in (without, zero, half, counted)]
    assert len({record["split_hash"] for record in records}) == 1
    assert "synthetic_counts" not in records[0] | records[1]
    assert [record["class_counts"] for record in records] == [[8, 5, 3]] * 3 + [[8, 7, 7]]
    assert [record["synthetic_counts"] for record in records[2:]] == [[0, 2, 4]] * 2
    assert "not counted in class counts" in capsys.readouterr().out


def test_corrections_of_the_prior_count_synthetic_images_by_their_weight(with_synthetic, tmp_path):
    flags = "--max_steps 2 --synthetic_weight 0.5 --norm_out False --add_cross_entropy_loss --add_ldam_loss False"
    run = train(with_synthetic, tmp_path, *flags.split(), "--add_supcon_loss", "False", "--add_rsg", "False")

    def tested(*words: str) -> np.ndarray:
        imagenet_lt_test.main(imagenet_lt_test.parse_args(["--model_dir", str(run), *words]))
        folder = run / ("test_prior_uniform" if "uniform" in words else "test")
        return np.load(folder / "logits.npz")["logits"]

    plain, prior = tested("--post_hoc"), np.array([8, 5 + 2 / 2, 3 + 4 / 2]) / 19
    np.testing.assert_allclose(tested("--test_prior", "uniform"), plain - np.log(prior) - np.log(3), atol=1e-9)
    row = json.loads((run / "test" / "post_hoc.json").read_text())["rows"]["logit_adjustment"]
    logits, targets = plain - row["tau"] * np.log(prior), np.repeat([0, 1, 2], 3)
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert row["nll"] == pytest.approx(-np.log(probabilities[np.arange(9), targets]).mean(), rel=1e-9)


def test_a_run_with_synthetic_images_resumes_exactly_and_refuses_others(with_synthetic, tmp_path, capsys):
    flags = ("--synthetic_weight", "0.5", "--save_every_steps", "2", "--supcon_generated", "keys")
    whole = train(with_synthetic, tmp_path / "whole", *flags)
    resumed = train(with_synthetic, tmp_path / "resumed", *flags)
    (resumed / "state.previous.pt").replace(resumed / "state.pt")
    (resumed / "last.safetensors").unlink()
    train(with_synthetic, tmp_path / "resumed", *flags, "--resume")
    assert (whole / "last.safetensors").read_bytes() == (resumed / "last.safetensors").read_bytes()
    (whole / "state.previous.pt").replace(whole / "state.pt")
    Image.new("RGB", (20, 20)).save(with_synthetic / "synthetic" / "rare" / "00003.png")
    line = error_of(lambda: train(with_synthetic, tmp_path / "whole", *flags, "--resume"), 2, capsys)
    assert "the synthetic images are not those" in line


def test_synthetic_images_that_are_not_there_are_named(tiny_dataset, with_synthetic, tmp_path, capsys):
    def line(*more: str) -> str:
        return error_of(lambda: train(tiny_dataset, tmp_path / "runs", "--synthetic_weight", "1", *more), 2, capsys)

    assert "holds no synthetic images" in line("--synthetic_dir", str(tmp_path))
    (with_synthetic / "synthetic" / "rare" / "00002.png").unlink()
    assert "rare/00002.png is gone" in line()
    manifest = with_synthetic / "synthetic" / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"kept": true', '"kept": false'))
    assert "no image that passed" in line()
    manifest.write_text(manifest.read_text().replace('"rare"', '"unknown"'))
    assert "classes that train/ lacks: unknown" in line()


ROW_LOSSES = {
    **{
        name: build(train_parser().parse_args([]), [9, 4, 2], inverse_frequency_weights([9, 4, 2]))
        for name, (_, build) in CLASSIFICATION_LOSSES.items()
    },
    "weighted, smoothed": CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0]), label_smoothing=0.2),
}


@pytest.mark.parametrize("name", ROW_LOSSES)
def test_a_row_of_weight_r_counts_as_r_rows(name):
    loss_fn, repeats = ROW_LOSSES[name], torch.tensor([1, 3, 1, 2, 4])
    logits, targets = torch.randn(5, 3, dtype=torch.double), torch.tensor([0, 1, 2, 2, 0])
    repeated = loss_fn(logits.repeat_interleave(repeats, dim=0), targets.repeat_interleave(repeats))
    for scale in (1, 0.25):  # only their ratios matter
        torch.testing.assert_close(loss_fn(logits, targets, row_weights=scale * repeats), repeated)
    buffers = [buffer.clone() for buffer in loss_fn.buffers()]
    torch.testing.assert_close(loss_fn(logits, targets, row_weights=torch.ones(5)), loss_fn(logits, targets))
    assert all(map(torch.equal, buffers, loss_fn.buffers()))  # it is built anew in each epoch, and keeps no state


@pytest.mark.parametrize("anchors", [7, 4])
@pytest.mark.parametrize("balanced", [False, True])
def test_the_weights_of_rows_weigh_anchors_in_supcon_and_leave_the_keys(balanced, anchors):
    features, targets = torch.randn(7, 5, dtype=torch.double), torch.tensor([0, 0, 1, 0, 1, 2, 1])  # 5 is alone
    prototypes = {"prototypes": torch.randn(3, 5, dtype=torch.double)} if balanced else {}
    loss_fn, weights = SupConLoss(), torch.rand(7, dtype=torch.double)

    def loss(row_weights=None):
        return loss_fn(features, targets, **prototypes, num_anchors=anchors, row_weights=row_weights)

    def alone(anchor: int) -> torch.Tensor:
        order = [anchor, *(row for row in range(7) if row != anchor)]
        return loss_fn(features[order], targets[order], num_anchors=1, **prototypes)

    each = [alone(anchor) for anchor in range(anchors)]
    counted = [anchor for anchor in range(anchors) if balanced or anchor != 5]
    torch.testing.assert_close(loss(), sum(each[anchor] for anchor in counted) / len(counted))
    expected = sum(weights[anchor] * each[anchor] for anchor in counted) / sum(weights[anchor] for anchor in counted)
    torch.testing.assert_close(loss(weights), expected)
    views = torch.stack([features, features.flip(0)], dim=1)
    twice = loss_fn(views, targets, **prototypes, row_weights=weights)
    flat = loss_fn(views.transpose(0, 1).flatten(0, 1), targets.repeat(2), **prototypes, row_weights=weights.repeat(2))
    torch.testing.assert_close(twice, flat)


def options(*words: str):
    return imagenet_lt_train.parse_args(["--arch", "resnet32", "--seed", "0", *words])


@pytest.mark.parametrize("generated", ["all", "keys", "none"])
def test_generated_rows_weigh_what_the_row_weighs_that_they_stem_from(generated):
    args = options("--supcon_generated", generated, "--add_cross_entropy_loss")
    model = build_model(args, [9, 4, 2], with_generator=True)
    model.generator.generating = True
    targets, weights = torch.tensor([0, 1, 2, 0, 0, 1]), torch.tensor([1.0, 0.5, 1.0, 1.0, 0.5, 0.25])
    output = model(torch.randn(6, 3, 16, 16), targets)
    tails = output.auxiliary["tail_rows"]
    assert len(output.targets) == 6 + len(tails) > 6
    assert torch.equal(output.targets[6:], targets[tails])
    assert set(tails.tolist()) == {1, 2, 5}
    _, parts = build_objective(args, [9, 4, 2])(output, 6, row_weights=weights)
    own = torch.tensor([*weights.tolist(), *(weights[row].item() for row in tails)])
    losses = torch.nn.functional.cross_entropy(output.logits["main"], output.targets, reduction="none")
    torch.testing.assert_close(parts["cross_entropy_main"], (own * losses).sum() / own.sum())
    keys = 6 if generated == "none" else None
    anchors = None if generated == "all" else 6
    supcon = SupConLoss()(output.features[:keys], output.targets[:keys], anchors, own[:keys])
    torch.testing.assert_close(parts["supcon"], supcon)
    _, ones = build_objective(args, [9, 4, 2])(output, 6, row_weights=torch.ones(6))
    _, none = build_objective(args, [9, 4, 2])(output, 6)
    torch.testing.assert_close(ones, none)


def test_a_mixed_image_counts_each_of_its_two_with_its_weight():
    losses = [
        "--add_supcon_loss",
        "False",
        "--add_rsg",
        "False",
        "--add_ldam_loss",
        "False",
        "--add_cross_entropy_loss",
    ]
    args = options(*losses, "--mixup", "1")
    targets, others = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    weights, mixed_weights = torch.tensor([1.0, 0.5, 1.0]), torch.tensor([0.5, 1.0, 1.0])
    output = build_model(args, [9, 4, 2], with_generator=False)(torch.randn(3, 3, 16, 16), targets, others)
    loss, _ = build_objective(args, [9, 4, 2])(output, 3, 0.7, weights, mixed_weights)
    own = torch.nn.functional.cross_entropy(output.logits["main"], targets, reduction="none")
    mixed = torch.nn.functional.cross_entropy(output.logits["main"], others, reduction="none")
    torch.testing.assert_close(loss, (0.7 * (weights * own).sum() + 0.3 * (mixed_weights * mixed).sum()) / 2.5)


def loader_of(data: Path, *words: str) -> TrainingLoader:
    args = options("--data_dir", str(data), "--synthetic_weight", "0.5", "--batch_size", "5", "--workers", "0", *words)
    return build_training_loader(args, read_data(args), Pixels(16), 0, CPU)


def test_synthetic_images_come_after_the_real_ones_with_their_weight(with_synthetic):
    loader = loader_of(with_synthetic, "--supcon_views", "2")
    batches = list(loader.epoch(0))
    indices = torch.cat([batch.indices for batch in batches])
    assert sorted(indices.tolist()) == sorted([*range(22)] * 2)
    assert [path.parts[-3] for path in loader.paths] == ["train"] * 16 + ["synthetic"] * 6
    for batch in batches:
        assert batch.real.tolist() == [index < 16 for index in batch.indices]
        assert batch.weights.tolist() == [1 if index < 16 else 0.5 for index in batch.indices]
        assert [loader.paths[index].parent.name for index in batch.indices] == [
            ("common", "medium", "rare")[target] for target in batch.targets
        ]
    (with_synthetic / "synthetic" / "manifest.jsonl").unlink()
    (batch, *_) = loader_of(with_synthetic, "--synthetic_weight", "0").epoch(0)
    assert batch.weights is None is batch.real


def test_mixed_images_carry_the_weights_of_both(with_synthetic):
    off = ["--add_supcon_loss", "False", "--add_rsg", "False"]
    for batch in loader_of(with_synthetic, "--mixup", "1", *off).epoch(0):
        partner = [*range(1, len(batch.images)), 0]
        assert torch.equal(batch.mixed_targets, batch.targets[partner])
        assert torch.equal(batch.mixed_weights, batch.weights[partner])
        assert torch.equal(batch.mixed_real, batch.real[partner])


@pytest.mark.parametrize(("counted", "chances"), [(False, [8, 5, 3]), (True, [8, 7, 7])])
def test_a_sampler_draws_a_class_by_its_real_images_unless_synthetic_ones_count(with_synthetic, counted, chances):
    loader = loader_of(with_synthetic, "--sampler", "sqrt", "--count_synthetic", str(counted))
    drawn = torch.cat(
        [epoch_order(loader.targets, "sqrt", 0, epoch, loader.class_counts) for epoch in range(400)]
    ).bincount(minlength=22)
    by_class = torch.zeros(3, dtype=torch.long).index_add_(0, loader.targets, drawn)
    expected = torch.tensor(chances).sqrt() / torch.tensor(chances).sqrt().sum()
    assert (by_class / by_class.sum() - expected).abs().max() < 0.02  # 4 standard deviations
    of_rare = drawn[loader.targets == 2] / by_class[2]
    assert (of_rare - 1 / 7).abs().max() < 0.04  # real and synthetic alike
    for epoch in range(3):
        seen = torch.cat([batch.indices for batch in loader.epoch(epoch, "sqrt")])
        assert torch.equal(seen, epoch_order(loader.targets, "sqrt", 0, epoch, loader.class_counts))


def test_training_accuracy_counts_real_images_only():
    logits = torch.eye(3)[torch.tensor([0, 1, 2, 0, 1])]  # what is predicted
    targets, real = torch.tensor([0, 1, 0, 0, 0]), torch.tensor([True, True, True, False, False])
    output = Output(torch.zeros(5, 2), {"main": logits}, {"main": 1.0}, targets, {})
    batch = Batch(torch.zeros(5, 3, 8, 8), targets, torch.arange(5), weights=torch.ones(5), real=real)
    model = torch.nn.Module()
    model.heads = torch.nn.ModuleDict({"main": torch.nn.Linear(2, 3)})

    def row_of(*batches: Batch) -> dict:
        state = TrainingState(model, None, None, seconds=1.0)
        for each in batches:
            state.sums = with_batch(state.sums, each, output, torch.tensor(2.0), {}, torch.zeros(()), len(each.images))
        return epoch_row(state, 1)

    row = row_of(batch, batch)
    assert row["train_accuracy"] == pytest.approx(2 / 3)
    assert row["train_loss"] == 2
    others = torch.tensor([1, 0, 0, 0, 0])
    mixed = batch._replace(mixed_targets=others, share=0.75, mixed_real=real.roll(-1))
    # the other images of rows 0, 1 and 4 are real, and none of them is of the predicted class
    assert row_of(mixed)["train_accuracy"] == pytest.approx(0.75 * 2 / 3)
    mixed = mixed._replace(mixed_targets=torch.tensor([1, 1, 2, 0, 1]))  # rows 1 and 4 now are; 2 and 3 are not real
    assert row_of(mixed)["train_accuracy"] == pytest.approx((0.75 * 2 + 0.25 * 2) / 3)
    assert row_of(batch._replace(weights=None, real=None))["train_accuracy"] == pytest.approx(3 / 5)
    assert "train_accuracy" not in row_of(batch._replace(real=torch.zeros(5, dtype=torch.bool)))
