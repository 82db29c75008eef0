"""Several processes on a CPU (gloo) compute what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import nn

import imagenet_lt_test
import imagenet_lt_train
from data.build import build_pixels, read_data
from data.loaders import Batch
from engine import distributed
from engine.errors import Refused
from engine.options import train_parser
from engine.train import renew_statistics, with_batch
from losses import (
    CLASSIFICATION_LOSSES,
    CrossEntropyLoss,
    FocalLoss,
    LogitAdjustedLoss,
    SupConLoss,
    inverse_frequency_weights,
)
from models import build_model
from models.classifier import Output
from rsg.generator import RareSampleGenerator

ROOT = Path(__file__).resolve().parents[1]
COUNTS = [40, 12, 3]
STEPS, ROWS = 20, 10


def center_loss(maps: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(3)
    return RareSampleGenerator(3, COUNTS).estimate_centers(maps, targets)[0]


def mv_loss(maps: torch.Tensor) -> torch.Tensor:
    torch.manual_seed(3)
    loss = RareSampleGenerator(3, COUNTS).maximized_vector_loss(maps.detach(), maps.roll(1, 1), maps.flip(1), 2 * maps)
    return 0.1 * loss  # as in training its steps are small: large ones magnify rounding


LOSSES = {
    **{
        f"default_{name}": build(train_parser().parse_args([]), COUNTS, inverse_frequency_weights(COUNTS))
        for name, (_, build) in CLASSIFICATION_LOSSES.items()
    },
    "cross_entropy": CrossEntropyLoss(),
    "supcon": SupConLoss(),
    "logit_adjusted": LogitAdjustedLoss(COUNTS, weight=inverse_frequency_weights(COUNTS), label_smoothing=0.1),
    "balanced_supcon": lambda rows, targets: SupConLoss()(rows, targets, prototypes=torch.eye(3) - 0.1),
    "row_weights": lambda logits, targets: CrossEntropyLoss()(logits, targets, 1 / (1 + targets)),
    "row_weights_focal": lambda logits, targets: FocalLoss()(logits, targets, 1 / (1 + targets)),
    "rsg_centre": lambda maps, targets: center_loss(maps[:, :, None, None], targets),
    "rsg_mv": lambda maps, targets: mv_loss(maps[:, :, None, None]),
    "row_weights_supcon": lambda rows, targets: SupConLoss()(rows, targets, row_weights=1 / (1 + targets)),
}


def contrast_loss(rows: slice) -> torch.Tensor:
    """Of the pairs among some rows of the first batch."""
    torch.manual_seed(3)
    features, targets = batches()[0]
    return RareSampleGenerator(6, COUNTS).contrast_loss(features[rows, :, None, None], targets[rows])


def network() -> nn.Module:
    """Batch normalisation would see each process's rows only; there is none."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    weights = torch.tensor([0.7, 0.2, 0.1])
    return [
        (torch.randn(ROWS, 6, generator=generator), torch.multinomial(weights, ROWS, True, generator=generator))
        for _ in range(STEPS)
    ]


def history(loss_name: str, rank: int, world: int) -> list[tuple[float, list[torch.Tensor]]]:
    """Loss and gradients of each step; the first process gets 7 of 10 rows, the second 3."""
    model = network()
    forward = distributed.data_parallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    rows = slice(None) if world == 1 else (slice(0, 7), slice(7, ROWS))[rank]
    out = []
    for features, targets in batches():
        loss = LOSSES[loss_name](forward(features[rows]), targets[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        value = distributed.summed(loss).item() / world
        out.append((value, [parameter.grad.clone() for parameter in model.parameters()]))
    return out


def logged_loss(rank: int, world: int) -> float:
    """What log.jsonl says of batches of 5 and 4 rows that alternate between the processes."""
    sums, model = {}, network()
    for size, (features, targets) in zip((5, 4), batches(), strict=False):
        features, targets = features[rank:size:world], targets[rank:size:world]
        logits = model(features)
        loss = LOSSES["cross_entropy"](logits, targets).detach()
        output = Output(features, {"main": logits}, {}, targets, {})
        sums = with_batch(sums, Batch(features, targets, targets), output, loss, {}, torch.zeros(()), size)
    total, images = distributed.summed(torch.stack([sums["train_loss"], sums["images"]])).tolist()
    return total / images


def pixels_of_images(folder: str) -> list[float]:
    """Mean and deviation, by channel, of the images in ``folder``."""
    flags = ["--data_dir", folder, "--normalize", "dataset", "--img_size", "8", "--workers", "0", "--batch_size", "4"]
    args = train_parser().parse_args(flags)
    _, mean, deviation = build_pixels(args, read_data(args))
    return [*mean, *deviation]


def refused_by_one(rank: int) -> str | None:
    """What a process is told when the second one alone refuses."""

    def look() -> None:
        if rank == 1:
            raise Refused("the second lacks a file")

    try:
        distributed.together(look)
    except Refused as refusal:
        return str(refusal)
    return None


def renewed_statistics(rank: int) -> list[torch.Tensor]:
    """Of a network that has seen one batch, another one in each process."""
    torch.manual_seed(4)
    model = build_model(train_parser().parse_args(["--arch", "resnet32"]), COUNTS, with_generator=False)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(rank))
    renew_statistics(model, iter([Batch(images, None, None)]), 1, None)
    return [buffer for name, buffer in model.named_buffers() if ".running_" in name]


def _worker(rank: int, world: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    results = {name: history(name, rank, world) for name in LOSSES}
    results["gathered"] = distributed.gather_rows(torch.arange(2 + rank) + 10 * rank)
    results["logged"] = logged_loss(rank, world)
    results["contrast"] = contrast_loss((slice(0, 7), slice(7, ROWS))[rank]).detach()
    results["pixels"] = pixels_of_images(folder)
    results["statistics"] = renewed_statistics(rank)
    results["refused"] = refused_by_one(rank)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("gloo")
    random = np.random.default_rng(0)
    for index in range(7):
        path = folder / "train" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
    mp.spawn(_worker, (2, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", LOSSES)
def test_two_processes_with_uneven_rows_equal_one(two_processes, name):
    for (value, gradients), (value_of_two, gradients_of_two) in zip(
        history(name, 0, 1), two_processes[0][name], strict=True
    ):
        assert value_of_two == pytest.approx(value, rel=1e-6, abs=1e-6)
        for gradient, gradient_of_two in zip(gradients, gradients_of_two, strict=True):
            torch.testing.assert_close(gradient_of_two, gradient, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_both_processes_have_the_same_gradients(two_processes, name):
    for (_, first), (_, second) in zip(two_processes[0][name], two_processes[1][name], strict=True):
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_the_logged_loss_of_uneven_batches_is_that_of_one_process(two_processes):
    assert two_processes[0]["logged"] == pytest.approx(logged_loss(0, 1), rel=1e-6)


def test_the_contrast_loss_is_the_mean_over_the_pairs_of_all_processes(two_processes):
    expected = (3 * contrast_loss(slice(0, 7)) + contrast_loss(slice(7, ROWS))) / 4  # 7 rows are 3 pairs, 3 are one
    mean = (two_processes[0]["contrast"] + two_processes[1]["contrast"]) / 2
    torch.testing.assert_close(mean, expected.detach())


def test_the_normalisation_is_that_of_all_images_on_every_process(two_processes, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "gloo0"
    pixels = np.stack([np.asarray(Image.open(path)) for path in folder.glob("train/*/*.png")]) / 255
    expected = [*pixels.mean((0, 1, 2)), *pixels.std((0, 1, 2))]
    for results in two_processes:
        assert results["pixels"] == pytest.approx(expected, abs=1e-6)


def test_renewed_statistics_are_the_means_of_those_of_both_processes(two_processes):
    alone = zip(renewed_statistics(0), renewed_statistics(1), strict=True)
    expected = [(one + other) / 2 for one, other in alone]
    for results in two_processes:
        torch.testing.assert_close(results["statistics"], expected)


def test_what_one_process_refuses_all_refuse(two_processes):
    assert [results["refused"] for results in two_processes] == ["the second lacks a file"] * 2


def test_gathered_rows_begin_with_the_own_ones(two_processes):
    assert two_processes[0]["gathered"].tolist() == [0, 1, 10, 11, 12]
    assert two_processes[1]["gathered"].tolist() == [10, 11, 12, 0, 1]


def torchrun(processes: int, *arguments: str) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *launcher, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_torchrun_trains_through_the_generators_threshold_and_counts_every_image_once(tmp_path, tiny_dataset):
    flags = ["--data_dir", str(tiny_dataset), "--root_model", str(tmp_path), "--root_log", str(tmp_path / "log")]
    flags += ["--arch", "resnet32", "--epochs", "13", "--batch_size", "4", "--epoch_thresh", "6", "--run_name", "two"]
    flags += ["--device", "cpu", "--lr", "0.01", "--add_arc_margin_loss", "--supcon_generated", "keys", "--seed", "0"]
    flags += ["--supcon_balance", "--ema_decay", "0.5", "--augment", "autoaugment"]
    result = torchrun(2, "imagenet_lt_train.py", *flags)
    assert result.returncode == 0, result.stderr
    rows = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert len(rows) == 13  # of 4 steps each
    assert sum(row["generated_rows"] for row in rows[:7]) == 0
    assert sum(row["generated_rows"] for row in rows[7:]) > 0
    assert result.stdout.count("epoch  12") == 1
    # 9 images of val in 3 classes: balanced accuracy is a multiple of 1/9 only if each is counted once
    for row in rows:
        assert (9 * row["val_balanced_accuracy"]) == pytest.approx(round(9 * row["val_balanced_accuracy"]), abs=1e-9)


def test_a_refusal_under_torchrun_is_one_line(tmp_path, tiny_dataset):
    flags = ["--data_dir", str(tiny_dataset), "--batch_size", "5", "--root_model", str(tmp_path)]
    result = torchrun(2, "imagenet_lt_train.py", *flags, "--root_log", str(tmp_path / "log"), "--device", "cpu")
    assert result.returncode == 1  # the launcher's; it prints a report of its own behind our line
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "divide by their number" in lines[0]


def test_processes_that_find_different_states_refuse_to_go_on(tmp_path, tiny_dataset):
    """As on two machines whose disks are their own."""
    script = tmp_path / "on_its_own_disk.py"
    script.write_text(
        "import os, sys; sys.path.insert(0, os.getcwd()); import imagenet_lt_train as script\n"
        "own = ['--root_model', sys.argv[1] + '/' + os.environ['RANK']]\n"
        "script.main(script.parse_args(sys.argv[2:] + own))\n"
    )
    flags = ["--data_dir", str(tiny_dataset), "--root_log", str(tmp_path / "log"), "--run_name", "run", "--resume"]
    flags += ["--arch", "resnet32", "--epochs", "1", "--batch_size", "4", "--seed", "0", "--device", "cpu"]
    imagenet_lt_train.main(imagenet_lt_train.parse_args([*flags, "--root_model", str(tmp_path / "0")]))
    result = torchrun(2, str(script), str(tmp_path), *flags)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "do not find the same state" in line


@pytest.fixture
def run_in_one_step(tmp_path, tiny_dataset):
    """The test script's flags for a run of one step."""
    flags = ["--root_model", str(tmp_path), "--device", "cpu"]
    train = ["--data_dir", str(tiny_dataset), "--root_log", str(tmp_path / "log"), "--run_name", "run", "--seed", "0"]
    train += ["--arch", "resnet32", "--epochs", "1", "--max_steps", "1"]
    imagenet_lt_train.main(imagenet_lt_train.parse_args([*flags, *train]))
    return [*flags, "--model_dir", "run"]


def test_unlabelled_images_are_shared_out_and_come_together_in_their_order(tmp_path, tiny_dataset, run_in_one_step):
    folder = tiny_dataset / "test" / "rare"
    for name in ("a.png", "test_1.png"):
        (folder / name).write_bytes(b"no image")
    asked = [*run_in_one_step, "--images", str(folder)]
    with pytest.raises(SystemExit, match="1"):
        imagenet_lt_test.main(imagenet_lt_test.parse_args(asked))
    table = tmp_path / "run" / "predict" / "rare.csv"
    alone = table.read_text()
    table.unlink()
    assert torchrun(2, "imagenet_lt_test.py", *asked).returncode == 1
    assert [line.split(",")[:2] for line in table.read_text().splitlines()] == [
        line.split(",")[:2] for line in alone.splitlines()
    ]
    assert alone.count("\n") == 5


def test_a_broken_image_in_the_share_of_one_process_is_said_by_the_first(tmp_path, tiny_dataset, run_in_one_step):
    broken = sorted((tiny_dataset / "test").glob("*/*"))[1]
    broken.write_bytes(b"no image")
    result = torchrun(2, "imagenet_lt_test.py", *run_in_one_step)
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert str(broken) in line
