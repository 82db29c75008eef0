"""Several processes on a CPU (gloo) compute what one does."""

import contextlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from torch import nn

import imagenet_lt_test
import imagenet_lt_train
from data.build import build_pixels, build_training_loader, read_data
from data.loaders import Batch, Pixels
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


def rows_of_batches(folder: str) -> list[int]:
    """This process's images in each batch of 4 of the 7 images in ``folder``."""
    args = train_parser().parse_args(["--data_dir", folder, "--img_size", "8", "--workers", "0", "--batch_size", "4"])
    loader = build_training_loader(args, read_data(args), Pixels(8), 0, torch.device("cpu"))
    return [len(batch.images) for batch in loader.epoch(0)]


def renewed_statistics(rank: int) -> list[torch.Tensor]:
    """Of a network that has seen one batch, another one in each process."""
    torch.manual_seed(4)
    model = build_model(train_parser().parse_args(["--arch", "resnet32"]), COUNTS, with_generator=False)
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(rank))
    renew_statistics(model, iter([Batch(images, None, None)]), 1, None)
    return [buffer for name, buffer in model.named_buffers() if ".running_" in name]


def _worker(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    results = {name: history(name, rank, world) for name in LOSSES}
    results["gathered"] = distributed.gather_rows(torch.arange(2 + rank) + 10 * rank)
    results["logged"] = logged_loss(rank, world)
    results["contrast"] = contrast_loss((slice(0, 7), slice(7, ROWS))[rank]).detach()
    results["pixels"] = pixels_of_images(folder)
    results["statistics"] = renewed_statistics(rank)
    results["refused"] = refused_by_one(rank)
    results["rows"] = rows_of_batches(folder)
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


def test_the_last_batch_is_kept_unless_a_process_would_get_one_image_of_it(two_processes):
    assert [results["rows"] for results in two_processes] == [[4], [3]]  # not [2, 2] and [2, 1]


def test_gathered_rows_begin_with_the_own_ones(two_processes):
    assert two_processes[0]["gathered"].tolist() == [0, 1, 10, 11, 12]
    assert two_processes[1]["gathered"].tolist() == [10, 11, 12, 0, 1]


# --- the scripts


def launch(rank: int, script: ModuleType, *words: str) -> tuple[int, str]:
    """The exit code and stderr of a script in one of two processes that torchrun might have started."""
    rendezvous = Path(f"rendezvous{next(LAUNCHES)}").absolute().as_uri()
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2, timeout=timedelta(minutes=2))
    code, said = 0, io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(None):
        try:
            script.main(script.parse_args(words))
        except SystemExit as end:
            code = end.code
    distributed.stop()
    return code, said.getvalue()


LAUNCHES = itertools.count()
RUN = ["--run_name", "run", "--arch", "resnet32", "--epochs", "2", "--batch_size", "4", "--lr", "0.02", "--seed", "0"]
RUN += ["--device", "cpu", "--data_dir", "tiny", "--root_log", "log"]
TEST = ["--root_model", "0", "--model_dir", "run", "--device", "cpu"]


def _launched(rank: int, folder: str) -> None:
    """What several launches in turn leave and say; ``folder`` holds a data set and a run of one process."""
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    said = {"uneven": launch(rank, imagenet_lt_train, *RUN, "--root_model", "uneven", "--batch_size", "5")}
    said["few"] = launch(rank, imagenet_lt_train, *RUN, "--root_model", "few", "--data_dir", "three")
    said["own disks"] = launch(rank, imagenet_lt_train, *RUN, "--root_model", f"{rank}", "--resume")
    saving = (*RUN, "--save_every_steps", "3", "--ema_decay", "0.5")
    launch(rank, imagenet_lt_train, *saving, "--root_model", "whole")
    if rank == 0:  # as a kill in the last epoch leaves it
        shutil.copytree("whole", "killed")
        Path("killed/run/state.previous.pt").replace("killed/run/state.pt")
        Path("killed/run/last.safetensors").unlink()
    said["resumed"] = launch(rank, imagenet_lt_train, *saving, "--root_model", "killed", "--resume")
    launch(rank, imagenet_lt_train, *RUN, "--root_model", "plain")
    said["images"] = launch(rank, imagenet_lt_test, *TEST, "--images", "photos")
    if rank == 0:
        sorted(Path("tiny/test").glob("*/*"))[1].write_bytes(b"no image")
    said["broken"] = launch(rank, imagenet_lt_test, *TEST)
    said["one image"] = launch(rank, imagenet_lt_test, *TEST, "--images", "one")
    Path(f"said{rank}.json").write_text(json.dumps(said))


def all_but_the_first(folder: str, names: list[str]) -> list[str]:
    return sorted(names)[1:]


@pytest.fixture(scope="module")
def launched(tmp_path_factory, make_tiny_dataset) -> Path:
    folder = tmp_path_factory.mktemp("launched")
    make_tiny_dataset(folder / "tiny")
    shutil.copytree(folder / "tiny" / "test" / "rare", folder / "photos")
    for name in ("a.png", "test_1.png"):
        (folder / "photos" / name).write_bytes(b"no image")
    for name in ("common", "medium", "rare"):
        shutil.copytree(folder / "tiny" / "val" / name, folder / "three" / "train" / name, ignore=all_but_the_first)
    shutil.copytree(folder / "three" / "train" / "rare", folder / "one")
    with contextlib.chdir(folder):
        imagenet_lt_train.main(imagenet_lt_train.parse_args([*RUN, "--root_model", "0"]))
        with pytest.raises(SystemExit, match="1"):
            imagenet_lt_test.main(imagenet_lt_test.parse_args([*TEST, "--images", "photos"]))
        Path("0/run/predict/photos.csv").rename("alone.csv")
    mp.spawn(_launched, (str(folder),), nprocs=2)
    return folder


def errors_in(folder: Path, name: str) -> list[str]:
    """The lines of both processes that begin with error:, after codes that must be those of such an end."""
    said = [json.loads((folder / f"said{rank}.json").read_text())[name] for rank in range(2)]
    assert said[0][0] == said[1][0] > 0, said
    return [line for _, err in said for line in err.splitlines() if line.startswith("error: ")]


def log_of(run: Path) -> list[dict]:
    """The rows without what a clock or the operating system says."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [row | dict.fromkeys(("seconds", "images_per_second", "peak_memory_bytes")) for row in rows]


@pytest.mark.parametrize(("name", "words"), [("uneven", "--batch_size 5 and 16 "), ("few", "--batch_size 4 and 3 ")])
def test_batches_that_cannot_be_shared_are_refused_in_one_line(launched, name, words):
    (line,) = errors_in(launched, name)
    assert words in line


def test_processes_that_find_different_states_refuse_to_go_on(launched):
    """As on two machines whose disks are their own."""
    (line,) = errors_in(launched, "own disks")
    assert "do not find the same state" in line


def test_two_processes_go_on_exactly_from_the_middle_of_an_epoch(launched):
    whole, killed = launched / "whole" / "run", launched / "killed" / "run"
    assert json.loads((launched / "said0.json").read_text())["resumed"][0] == 0
    assert (killed / "last.safetensors").read_bytes() == (whole / "last.safetensors").read_bytes()
    assert log_of(killed) == log_of(whole)
    state = torch.load(whole / "state.previous.pt", weights_only=True)
    assert state["sums"]["images"] == 12  # of three steps: those of both processes


@pytest.mark.parametrize("name", ["plain", "whole"])
def test_what_two_processes_judged_is_the_model_that_was_saved(launched, name):
    """Also with averaged weights; each process has statistics of its own until the main one's are shared."""
    words = ["--model_dir", str(launched / name / "run"), "--split", "val", "--weights", "last", "--device", "cpu"]
    with contextlib.chdir(launched):
        result = imagenet_lt_test.main(imagenet_lt_test.parse_args(words))
    row = log_of(launched / name / "run")[-1]
    assert row["val_loss"] == pytest.approx(result["nll"], rel=1e-5)
    assert row["val_balanced_accuracy"] == pytest.approx(result["balanced_accuracy"], abs=1e-9)


def test_unlabelled_images_are_shared_out_and_come_together_in_their_order(launched):
    (line,) = errors_in(launched, "images")
    assert all(name in line for name in ("a.png", "test_1.png"))
    together, alone = (
        [line.split(",")[:2] for line in path.read_text().splitlines()]
        for path in (launched / "0" / "run" / "predict" / "photos.csv", launched / "alone.csv")
    )
    assert together == alone
    assert len(alone) == 5


def test_one_image_for_two_processes_is_counted_once(launched):
    assert [json.loads((launched / f"said{rank}.json").read_text())["one image"][0] for rank in range(2)] == [0, 0]
    assert len((launched / "0" / "run" / "predict" / "one.csv").read_text().splitlines()) == 2


def test_a_broken_image_in_the_share_of_one_process_is_said_by_the_first(launched):
    (line,) = errors_in(launched, "broken")
    assert str(sorted((launched / "tiny" / "test").glob("*/*"))[1].relative_to(launched)) in line


def test_torchrun_trains_through_the_generators_threshold_and_counts_every_image_once(tmp_path, tiny_dataset):
    flags = ["--data_dir", str(tiny_dataset), "--root_model", str(tmp_path), "--root_log", str(tmp_path / "log")]
    flags += ["--arch", "resnet32", "--epochs", "8", "--batch_size", "4", "--epoch_thresh", "2", "--run_name", "two"]
    flags += ["--device", "cpu", "--lr", "0.01", "--add_arc_margin_loss", "--supcon_generated", "keys", "--seed", "0"]
    flags += ["--supcon_balance", "--ema_decay", "0.5", "--augment", "autoaugment"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["imagenet_lt_train.py", *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    rows = log_of(tmp_path / "two")
    assert len(rows) == 8  # of 4 steps each
    assert sum(row["generated_rows"] for row in rows[:3]) == 0
    assert sum(row["generated_rows"] for row in rows[3:]) > 0
    assert result.stdout.count("epoch   7") == 1
    # 9 images of val in 3 classes: balanced accuracy is a multiple of 1/9 only if each is counted once
    for row in rows:
        assert (9 * row["val_balanced_accuracy"]) == pytest.approx(round(9 * row["val_balanced_accuracy"]), abs=1e-9)
