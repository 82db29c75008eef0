"""Synthetic images: planned, drawn by a tiny random Stable Diffusion, killed, resumed, judged, reported."""

import csv
import dataclasses
import json
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
from PIL import Image

import imagenet_lt_test
import imagenet_lt_train
from data import generation
from data.diffusion import Diffusion
from data.folders import read_image_folders
from data.synthesis import Manifest, Plan, Recipe, prompt_names, wanted_images
from scripts import synthesize_tail

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


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
    """A run of ResNet-8 on ``data``; its folder."""
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
    base += ["--arch", "resnet8", "--epochs", "2", "--batch_size", "8", "--lr", "0.01", "--seed", "0"]
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
    yielding = ["nice", "-n", "15", sys.executable]  # to this process, which has to find it at work
    command = [*yielding, "scripts/synthesize_tail.py", *flags, "--target", "16"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
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
    hold = "import sys, pathlib, engine.files\nwith engine.files.locked(pathlib.Path(sys.argv[1])): print(), input()"
    command = [sys.executable, "-u", "-c", hold, str(tiny_dataset / "synthetic")]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    assert "another process is at work" in error_of(lambda: synthesize(flags), 1, capsys)
    process.communicate(b"end\n")


def test_a_broken_line_of_the_manifest_is_named(tiny_dataset, flags, capsys):
    (tiny_dataset / "synthetic").mkdir()
    (tiny_dataset / "synthetic" / "manifest.jsonl").write_text('{"class": "rare"}\n{"class": "rare"}\n')
    assert "manifest.jsonl, line 1, is no row" in error_of(lambda: synthesize(flags), 2, capsys)
