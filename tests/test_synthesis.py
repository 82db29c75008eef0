"""Synthetic images: planned, drawn by a tiny random Stable Diffusion, killed, resumed, judged, trained on, reported."""

import csv
import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from sklearn.datasets import load_digits

import imagenet_lt_test
import imagenet_lt_train
from data import generation
from data.build import build_training_loader, read_data
from data.diffusion import Diffusion
from data.duplicates import near_duplicates
from data.folders import read_image_folders
from data.loaders import Batch, Pixels, TrainingLoader
from data.preparation import locked
from data.samplers import epoch_order
from data.synthesis import Manifest, Plan, Recipe, prompt_names, wanted_images
from data.synthetic_filters import Agreement, Filters
from engine.errors import Refused
from engine.run import load_run
from engine.state import TrainingState
from engine.train import epoch_row, with_batch
from losses import CrossEntropyLoss, FocalLoss, LDAMLoss, SupConLoss, build_objective
from losses.balanced_supcon import BalancedSupConLoss
from losses.logit_adjusted import LogitAdjustedLoss
from models import build_model
from models.classifier import Output
from scripts import synthesize_tail

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
OURS = ("data", "engine", "losses", "models", "rsg", "imagenet_lt_train", "imagenet_lt_test")


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory) -> Path:
    """A pipeline of random weights that draws 16x16 px, saved as diffusers does; it knows letters and digits."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("diffusion")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=len(tokens) - 2,
        eos_token_id=len(tokens) - 1,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    )
    pipeline = StableDiffusionPipeline(
        vae,
        CLIPTextModel(text),
        CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77),
        unet,
        DDIMScheduler(steps_offset=1, clip_sample=False),
        None,
        None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder / "model")
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) < 2e6
    return folder / "model"


@pytest.fixture
def flags(tiny_dataset, stable_diffusion) -> list[str]:
    return [str(tiny_dataset), "--model", str(stable_diffusion), "--steps", "2", "--target", "10", "--workers", "1"]


def synthesize(flags: list[str], *more: str) -> None:
    synthesize_tail.main(synthesize_tail.parse_args([*flags, *more]))


def rows_in(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def images_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/*.png"))}


def error_of(call, code: int, capsys) -> str:
    """The last line on stderr of a call that exits with ``code``."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        call()
    assert error.value.code == code
    return capsys.readouterr().err.strip().splitlines()[-1]


def train(data: Path, folder: Path, *more: str) -> Path:
    """A run of ResNet-32 on ``data``; its folder."""
    base = [
        "--data_dir",
        str(data),
        "--root_model",
        str(folder),
        "--root_log",
        str(folder / "log"),
        "--run_name",
        "run",
    ]
    base += ["--arch", "resnet32", "--epochs", "2", "--batch_size", "8", "--lr", "0.01", "--seed", "0"]
    imagenet_lt_train.main(imagenet_lt_train.parse_args([*base, "--epoch_thresh", "0", *more]))
    return folder / "run"


# --- the plan


def test_a_target_is_a_number_or_the_median_or_the_largest_class():
    counts = [9, 4, 2, 1]
    assert wanted_images(counts, 5) == [0, 1, 3, 4]
    assert wanted_images(counts, "median") == [0, 0, 1, 2]
    assert wanted_images(counts, "max") == [0, 5, 7, 8]


def test_prompts_hold_the_name_in_the_file_then_the_data_sets_then_wordnets_then_the_folders(tiny_dataset):
    folders = read_image_folders(tiny_dataset)
    about = {"readable_names": {"b": "of the data set", "a": "not this"}}
    folders = dataclasses.replace(folders, classes=["a", "b", "n01704323", "a_folder"], about=about)
    (tiny_dataset / "classes.json").write_text('{"a": "of the file", "elsewhere": "unused"}')
    names, unnamed = prompt_names(folders, tiny_dataset / "classes.json")
    assert names == ["of the file", "of the data set", "triceratops", "a folder"]
    assert unnamed == ["a_folder"]


def plan_of(root: Path, wanted: list[int], max_candidates: float = 2, **recipe) -> Plan:
    folders = read_image_folders(root)
    recipe = Recipe("model", recipe.pop("mode", "text2img"), "a {}, drawn", **recipe)
    return Plan(folders, folders.classes, wanted, max_candidates, recipe)


def numbers(jobs: list) -> list[tuple[str, int]]:
    return [(job.class_name, job.index) for job in jobs]


def test_rounds_replace_what_was_rejected_up_to_a_limit_and_ignore_what_is_not_judged(tiny_dataset):
    plan = plan_of(tiny_dataset, [0, 2, 3], max_candidates=1.5)  # common, medium, rare
    first = [("rare", 0), ("rare", 1), ("rare", 2), ("medium", 0), ("medium", 1)]
    assert numbers(plan.next_jobs([])) == first
    rows = [{"class": name, "index": index, "kept": None} for name, index in first]
    assert numbers(plan.next_jobs(rows[:3])) == first
    for row, kept in zip(rows, (True, False, False, True, True), strict=True):
        row["kept"] = kept
    assert numbers(plan.next_jobs(rows)) == [("rare", 3), ("rare", 4)]
    rows += [{"class": "rare", "index": index, "kept": False} for index in (3, 4)]
    assert numbers(plan.next_jobs(rows)) == []  # 5 of 3 x 1.5, rounded up


def test_every_image_has_a_seed_of_its_own_and_the_starts_take_turns(tiny_dataset):
    plan = plan_of(tiny_dataset, [0, 20, 20], mode="img2img", strength=0.5)
    jobs = plan.next_jobs([])
    assert len({job.seed for job in jobs}) == 40
    assert {job.prompt for job in jobs} == {"a medium, drawn", "a rare, drawn"}
    digest = sha256(b"0/rare/3").digest()
    assert next(job.seed for job in jobs if job[:2] == ("rare", 3)) == int.from_bytes(digest[:8], "big") // 2
    for name, number in (("rare", 3), ("medium", 5)):
        starts = [job.start for job in jobs if job.class_name == name]
        assert set(starts) == set((tiny_dataset / "train" / name).iterdir())
        assert starts == [starts[index % number] for index in range(20)]
    other = plan_of(tiny_dataset, [0, 20, 20], mode="img2img", strength=0.5, seed=1).next_jobs([])
    assert not {job.seed for job in jobs} & {job.seed for job in other}


# --- from the plan to the report


def test_the_whole_path_with_a_kill_in_the_middle(tiny_dataset, flags, tmp_path, capsys):
    before = {path: path.stat().st_mtime_ns for path in tiny_dataset.rglob("*")}
    synthesize(flags, "--target", "16", "--dry_run")
    out = capsys.readouterr().out
    assert "no readable name for 3 classes (common, medium, rare)" in out
    assert "32 synthetic images are wanted" in out  # 8 + 11 + 13
    assert "s an image on cpu, measured on one batch" in out
    assert {path: path.stat().st_mtime_ns for path in tiny_dataset.rglob("*")} == before

    killed = tiny_dataset / "synthetic"
    command = [sys.executable, "scripts/synthesize_tail.py", *flags, "--target", "16"]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if (killed / "manifest.jsonl").exists() and len((killed / "manifest.jsonl").read_text().splitlines()) > 5:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.02)
    assert process.wait() == -signal.SIGKILL
    done = rows_in(killed)
    assert 5 < len(done) < 32
    first_images = {name: (killed / name).stat().st_mtime_ns for name in (row["file"] for row in done)}
    with (killed / "manifest.jsonl").open("a") as file:
        file.write('{"class": "medium", "ind')  # as a kill in the middle of a line leaves it
    synthesize(flags, "--target", "16")
    assert all((killed / name).stat().st_mtime_ns == first_images[name] for name in first_images)  # not drawn again

    whole = tmp_path / "whole"
    synthesize(flags, "--target", "16", "--output", str(whole))
    assert images_in(killed) == images_in(whole)
    rows = rows_in(killed)
    assert rows == rows_in(whole)
    assert Counter(row["class"] for row in rows) == {"common": 8, "medium": 11, "rare": 13}
    assert len({row["file"] for row in rows}) == len(rows) == len(images_in(killed))
    for row in rows:
        assert row["kept"] is True
        assert row["sha256"] == sha256((killed / row["file"]).read_bytes()).hexdigest()
        assert row["prompt"] == f"a photo of a {row['class']}"
        assert (row["steps"], row["strength"], row["precision"], row["why"]) == (2, None, "float32", None)
    assert Image.open(killed / rows[0]["file"]).size == (16, 16)
    sheet = Image.open(killed / "synthetic.png")
    assert sheet.height > 3 * 64

    capsys.readouterr()
    before = {path: path.stat().st_mtime_ns for path in whole.glob("*/*.png")}
    synthesize(flags, "--target", "16", "--output", str(whole))  # nothing is left to do
    assert {path: path.stat().st_mtime_ns for path in whole.glob("*/*.png")} == before
    assert "kept 32 of 32 images" in capsys.readouterr().out

    run = train(tiny_dataset, tmp_path / "runs", "--synthetic_weight", "0.5", "--max_steps", "1")
    assert "32 images of 3 classes, 66.7% of the images to train on; weight 0.5" in capsys.readouterr().out
    result = imagenet_lt_test.main(imagenet_lt_test.parse_args(["--model_dir", str(run)]))
    assert result["synthetic"] == {"images": 32, "share": 32 / 48, "weight": 0.5}
    assert "trained with 32 synthetic images, 66.7% of all, of weight 0.5" in capsys.readouterr().out
    table = list(csv.DictReader((run / "test" / "per_class.csv").open()))
    assert [(row["train_images"], row["synthetic_images"]) for row in table] == [("8", "8"), ("5", "11"), ("3", "13")]


def test_the_size_of_the_batch_moves_images_by_two_grey_levels_at_most(tiny_dataset, stable_diffusion):
    recipe = Recipe(str(stable_diffusion), "text2img", "a {}", steps=3, scheduler="euler_ancestral")  # noise each step
    jobs, diffusion = plan_of(tiny_dataset, [0, 3, 4]).next_jobs([]), Diffusion(recipe, CPU)
    together = [np.asarray(drawn.image, dtype=int) for drawn in diffusion.draw(jobs)]
    for size in (1, 3):
        drawn = [each for start in range(0, 7, size) for each in diffusion.draw(jobs[start : start + size])]
        for one, other in zip(together, drawn, strict=True):
            assert np.abs(one - np.asarray(other.image, dtype=int)).max() <= 2
    assert all(np.abs(one - other).max() > 20 for one, other in zip(together, together[1:], strict=False))


OPENED: list[str] | None = None


def _note_opened(event: str, arguments: tuple) -> None:
    if OPENED is not None and event == "open":
        OPENED.append(str(arguments[0]))


def test_img2img_starts_from_training_images_of_the_class_and_opens_no_val_or_test_image(
    tiny_dataset, flags, monkeypatch
):
    def watched(*arguments) -> None:
        global OPENED
        OPENED = []
        draw_missing(*arguments)
        opened.extend(OPENED)
        OPENED = None

    draw_missing, opened = generation.draw_missing, []
    sys.addaudithook(_note_opened)
    monkeypatch.setattr(generation, "draw_missing", watched)
    synthesize(flags, "--mode", "img2img", "--strength", "0.6", "--max_candidates", "1")
    inside = {name for name in opened if name.startswith(str(tiny_dataset)) and "/synthetic" not in name}
    rows = rows_in(tiny_dataset / "synthetic")
    assert inside == {str(tiny_dataset / row["start"]) for row in rows}
    assert {(Path(row["start"]).parent, row["strength"]) for row in rows} == {
        (Path("train") / name, 0.6) for name in ("common", "medium", "rare")
    }


# --- the filters


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
    run = train(tmp_path / "digits", tmp_path, *losses, "--epochs", "10", "--batch_size", "20", "--lr", "0.05")
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


def test_rejected_images_are_replaced_and_judged_again_without_drawing(tiny_dataset, flags, monkeypatch):
    def flagging(self, jobs, steps=None):
        images = draw(self, jobs, steps)
        return [image._replace(flagged=job.index == 1) for job, image in zip(jobs, images, strict=True)]

    draw, output = Diffusion.draw, tiny_dataset / "synthetic"
    monkeypatch.setattr(Diffusion, "draw", flagging)
    synthesize(flags)
    rows = rows_in(output)
    assert Counter(row["class"] for row in rows) == {"common": 3, "medium": 6, "rare": 8}  # 2, 5, 7 and one more
    assert Counter(row["class"] for row in rows if row["kept"]) == {"common": 2, "medium": 5, "rare": 7}
    before = images_in(output)
    manifest = output / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"flagged": true', '"flagged": false'))
    monkeypatch.setattr(Diffusion, "draw", None)
    synthesize(flags)
    rows = rows_in(output)
    assert [row["kept"] for row in rows if row["index"] == 1] == [True] * 3
    assert Counter(row["why"] for row in rows if not row["kept"]) == {"its class has all that it needs": 3}
    assert images_in(output) == before


# --- what goes wrong


@pytest.mark.parametrize("name", ["/nowhere/sd", "a/b/c"])
def test_a_model_that_is_not_there_is_one_line_that_asks_for_a_folder(name, tiny_dataset, flags, capsys):
    line = error_of(lambda: synthesize([*flags, "--model", name]), 2, capsys)
    assert not (tiny_dataset / "synthetic").exists()
    assert "cannot be loaded" in line
    assert "without a network give a folder that diffusers saved" in line


def test_a_name_on_the_hub_needs_a_network(flags, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    line = error_of(lambda: synthesize([*flags, "--model", "nobody/nothing"]), 2, capsys)
    assert "nobody/nothing cannot be loaded" in line
    assert "without a network give a folder" in line


def test_another_kind_of_pipeline_is_named(flags, tmp_path, capsys):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert "holds a FluxPipeline" in error_of(lambda: synthesize([*flags, "--model", str(tmp_path)]), 2, capsys)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--target", "many"], "--target many"),
        (["--prompt", "a photo"], "has no {}"),
        (["--size", "20"], "multiple of 8"),
        (["--mode", "img2img", "--strength", "0.2"], "not one step"),
        (["--filter_model", "nowhere"], "no run at nowhere"),
    ],
)
def test_flags_that_cannot_work(more, words, flags, capsys):
    assert words in error_of(lambda: synthesize([*flags, *more]), 2, capsys)


def test_images_of_another_recipe_are_not_mixed(tiny_dataset, flags, capsys):
    synthesize([*flags, "--target", "9"])
    line = error_of(lambda: synthesize([*flags, "--guidance", "3"]), 2, capsys)
    assert "was made with guidance 7.5, now it would be 3.0" in line
    synthesize([*flags, "--target", "10"])  # more of the same is welcome
    assert len(rows_in(tiny_dataset / "synthetic")) == 14


def test_out_of_memory_halves_the_batch_once(tiny_dataset, flags, tmp_path, monkeypatch, capsys):
    draw = Diffusion.draw

    def small_memory(limit: int):
        def fitting(self, jobs, steps=None):
            if len(jobs) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
            return draw(self, jobs, steps)

        return fitting

    monkeypatch.setattr(Diffusion, "draw", small_memory(2))
    synthesize([*flags, "--output", str(tmp_path / "halved")])
    assert "going on with batches of 2" in capsys.readouterr().err
    assert {row["batch_size"] for row in rows_in(tmp_path / "halved")} == {2}
    monkeypatch.setattr(Diffusion, "draw", small_memory(1))
    line = error_of(lambda: synthesize([*flags, "--output", str(tmp_path / "small")]), 1, capsys)
    assert "out of memory with batches of 2; try a smaller --batch_size" in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is full")
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(tiny_dataset, flags, tmp_path, capsys):
    Manifest(tmp_path / "made").folder.mkdir()
    (tmp_path / "made" / "manifest.jsonl").touch()
    (tmp_path / "made" / "rare").mkdir()
    (tmp_path / "made" / "rare" / ".00002.png.tmp").symlink_to("/dev/full")
    line = error_of(lambda: synthesize([*flags, "--output", str(tmp_path / "made")]), 1, capsys)
    assert "No space left on device" in line
    assert [row["file"] for row in rows_in(tmp_path / "made")] == ["rare/00000.png", "rare/00001.png"]
    synthesize([*flags, "--output", str(tmp_path / "made")])
    synthesize([*flags, "--output", str(tmp_path / "whole")])
    assert images_in(tmp_path / "made") == images_in(tmp_path / "whole")


def test_files_of_somebody_else_are_left_alone(tiny_dataset, flags, capsys):
    (tiny_dataset / "synthetic" / "rare").mkdir(parents=True)
    (tiny_dataset / "synthetic" / "rare" / "00000.png").write_text("mine")
    assert "holds files, but no manifest.jsonl" in error_of(lambda: synthesize(flags), 2, capsys)
    assert (tiny_dataset / "synthetic" / "rare" / "00000.png").read_text() == "mine"


def test_a_folder_belongs_to_one_process(tiny_dataset, flags, capsys):
    (tiny_dataset / "synthetic").mkdir()
    lock = locked(tiny_dataset / "synthetic")
    try:
        assert "another process is drawing" in error_of(lambda: synthesize(flags), 1, capsys)
    finally:
        os.close(lock)


def test_a_broken_line_of_the_manifest_is_named(tiny_dataset, flags, capsys):
    (tiny_dataset / "synthetic").mkdir()
    (tiny_dataset / "synthetic" / "manifest.jsonl").write_text('{"class": "rare"}\n{"class": "rare"}\n')
    assert "manifest.jsonl, line 1, is no row" in error_of(lambda: synthesize(flags), 2, capsys)


# --- training


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


def test_a_run_with_synthetic_images_resumes_exactly_and_refuses_others(with_synthetic, tmp_path, capsys):
    flags = ("--synthetic_weight", "0.5", "--save_every_steps", "1", "--supcon_generated", "keys")
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
    "cross_entropy": CrossEntropyLoss(),
    "weighted, smoothed": CrossEntropyLoss(torch.tensor([0.5, 1.0, 2.0]), label_smoothing=0.2),
    "ldam": LDAMLoss([9, 4, 2], weight=torch.tensor([0.5, 1.0, 2.0])),
    "focal": FocalLoss(weight=torch.tensor([0.5, 1.0, 2.0])),
    "logit_adjusted": LogitAdjustedLoss([9, 4, 2]),
}


@pytest.mark.parametrize("name", ROW_LOSSES)
def test_a_row_of_weight_r_counts_as_r_rows(name):
    loss_fn, repeats = ROW_LOSSES[name], torch.tensor([1, 3, 1, 2, 4])
    logits, targets = torch.randn(5, 3, dtype=torch.double), torch.tensor([0, 1, 2, 2, 0])
    repeated = loss_fn(logits.repeat_interleave(repeats, dim=0), targets.repeat_interleave(repeats))
    for scale in (1, 0.25):  # only their ratios matter
        torch.testing.assert_close(loss_fn(logits, targets, row_weights=scale * repeats), repeated)
    torch.testing.assert_close(loss_fn(logits, targets, row_weights=torch.ones(5)), loss_fn(logits, targets))


@pytest.mark.parametrize("anchors", [7, 4])
@pytest.mark.parametrize("balanced", [False, True])
def test_the_weights_of_rows_weigh_anchors_in_supcon_and_leave_the_keys(balanced, anchors):
    features, targets = torch.randn(7, 5, dtype=torch.double), torch.tensor([0, 0, 1, 0, 1, 2, 1])  # 5 is alone
    prototypes = (torch.randn(3, 5, dtype=torch.double),) if balanced else ()
    loss_fn, weights = BalancedSupConLoss() if balanced else SupConLoss(), torch.rand(7, dtype=torch.double)

    def loss(row_weights=None):
        return loss_fn(features, targets, *prototypes, num_anchors=anchors, row_weights=row_weights)

    each = [loss(torch.eye(7)[anchor]) for anchor in range(anchors)]
    counted = [anchor for anchor in range(anchors) if balanced or anchor != 5]
    torch.testing.assert_close(loss(), sum(each[anchor] for anchor in counted) / len(counted))
    expected = sum(weights[anchor] * each[anchor] for anchor in counted) / sum(weights[anchor] for anchor in counted)
    torch.testing.assert_close(loss(weights), expected)
    views = torch.stack([features, features.flip(0)], dim=1)
    twice = loss_fn(views, targets, *prototypes, row_weights=weights)
    flat = loss_fn(views.transpose(0, 1).flatten(0, 1), targets.repeat(2), *prototypes, row_weights=weights.repeat(2))
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
            state.sums = with_batch(state.sums, each, output, torch.tensor(2.0), {}, torch.zeros(()))
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
