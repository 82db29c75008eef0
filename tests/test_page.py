"""report.html: the figures it shows against metrics.json, predictions.csv and slow loops; names that would break it;
runs that lack something; and a browser that opens it."""

import csv
import html
import json
import re
import shlex
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import precision_recall_fscore_support

import imagenet_lt_test
import imagenet_lt_train
from engine import metrics
from engine.flags import command_line
from engine.metrics import confusion_matrix
from engine.options import train_parser
from engine.page import JudgedImages, write_page
from engine.record import plain_flags

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
COMMAND = "python imagenet_lt_test.py --model_dir run"
LOG = [{"epoch": epoch, "train_loss": 9.0 - epoch, "val_balanced_accuracy": 0.25 * epoch} for epoch in range(4)]
HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "{{ 7 * 7 }}", "a & b &amp; c", "' onload='x"]
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """What a reader gets: elements with their attributes, tables as rows of cells, preformatted lines, all text."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text()
        self.elements, self.tables, self.open, self.text, self.pre = [], [], [], "", []
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open += [] if tag in VOID else [tag]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        elif tag == "pre":
            self.pre.append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        data = data.replace("\N{NO-BREAK SPACE}", " ")
        if "style" not in self.open:
            self.text += data
        if {"th", "td"} & set(self.open):
            self.tables[-1][-1][-1] += data
        if "pre" in self.open:
            self.pre[-1] += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]


def write(
    folder: Path,
    counts,
    targets,
    predicted,
    names=None,
    log=LOG,
    confidence=None,
    files=None,
    feature_map=None,
    **extra,
) -> tuple[Page, dict]:
    """The page of these predictions and its metrics.json; all images are the same picture, `gone.png` is missing."""
    names = names or [f"class {index}" for index in range(len(counts))]
    targets, predicted = np.array(targets), np.array(predicted)
    random = np.random.default_rng(0)
    if confidence is None:
        confidence = random.uniform(0.5, 1, len(targets))
    logits = np.eye(len(counts))[predicted] * np.log(confidence * (len(counts) - 1) / (1 - confidence))[:, None]
    groups = metrics.shot_groups(counts)
    result = {"split": "test", "weights": "best", "predict_with": "main", "epoch": 2, "split_hash": "ab12"}
    result |= metrics.summary(logits, targets, counts, groups) | {"weights_hash": "cd34"}
    result["intervals"] = metrics.bootstrap_intervals(logits, targets, groups, resamples=20)
    result["counts"] = {name: int(members.sum()) for name, members in groups.items() if name in result}
    result["last"] = result | {"epoch": 3}
    record = {
        "flags": plain_flags(train_parser().parse_args(["--data_dir", "some folder", "--add_rsg", "0"])),
        "classes": [f"n{index}" for index in range(len(counts))],
        "class_counts": list(counts),
        "readable_names": names,
        "split_hash": "ab12",
        "seed": 7,
        "objective": "1 CE(linear) + 0.9 <b>SupCon</b>",
        "device": "cpu",
        "threads": 2,
        "versions": {"torch": "2.14"},
        **extra,
    }
    folder = folder / "a run" / "test"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(random.integers(0, 256, (90, 70, 3), dtype=np.uint8)).save(folder / "noise.png")
    files = files or [f"test/image {row}.png" for row in range(len(targets))]
    paths = [folder / ("gone.png" if "gone" in file else "noise.png") for file in files]
    confusion = confusion_matrix(targets, predicted, len(counts))
    images = JudgedImages(paths, files, targets, predicted, np.array(confidence), confusion)
    write_page(folder / "report.html", result, images, record, groups, log, COMMAND, feature_map)
    return Page(folder / "report.html"), result


def random_test(num_classes: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    targets = np.arange(num_classes).repeat(images)
    return targets, np.where(random.random(len(targets)) < 0.6, targets, random.integers(0, num_classes, len(targets)))


FOUR = {"counts": [200, 50, 150, 7], "targets": random_test(4, 12)[0], "predicted": random_test(4, 12)[1]}


# --- figures


def test_the_figures_are_those_of_metrics_json(tmp_path):
    page, result = write(tmp_path, **FOUR)
    rows = {row[0]: row[1:] for row in page.tables[1][1:]}
    for name, key in (("balanced accuracy", "balanced_accuracy"), ("accuracy, few", "few"), ("macro F1", "macro_f1")):
        low, high = (f"{100 * value:.2f} %" for value in result["intervals"][key])
        assert rows[name][:3] == [f"{100 * result[key]:.2f} %", f"{low} to {high}", f"{100 * result[key]:.2f} %"]
    assert rows["negative log-likelihood, nats"][0] == f"{result['nll']:.3f}"
    assert len(rows) == 12  # all but head and tail, which this test has not
    assert f"{100 * result['balanced_accuracy']:.1f} % balanced accuracy" in page.text
    assert "On 48 test images of 4 classes" in page.text


def test_the_table_of_classes_is_scikit_learn_s_from_head_to_tail(tmp_path):
    page, _ = write(tmp_path, **FOUR)
    precision, recall, f1, _ = precision_recall_fscore_support(FOUR["targets"], FOUR["predicted"])
    wrong = [
        Counter(p for t, p in zip(FOUR["targets"], FOUR["predicted"], strict=True) if t == k != p) for k in range(4)
    ]
    header, *rows = page.tables[0]
    assert header[:5] == ["class", "group", "training", "test", "accuracy"]
    assert [row[0] for row in rows] == ["class 0", "class 2", "class 1", "class 3"]
    for row, k in zip(rows, (0, 2, 1, 3), strict=True):
        scores = [f"{100 * value:.1f} %" for value in (recall[k], precision[k], f1[k])]
        most = max(range(4), key=lambda other: wrong[k][other])  # noqa: B023
        assert row[1:4] == [{0: "many", 1: "medium", 2: "many", 3: "few"}[k], str(FOUR["counts"][k]), "12"]
        assert row[4:] == [*scores, f"class {most} ({wrong[k][most]})"]


def test_the_most_frequent_confusions_come_first(tmp_path):
    page, _ = write(tmp_path, **FOUR)
    found = re.findall(r"(class \d) taken for (class \d)(\d+) of 12 images", re.sub(r"\n", "", page.text))
    true = Counter(
        (f"class {t}", f"class {p}") for t, p in zip(FOUR["targets"], FOUR["predicted"], strict=True) if t != p
    )
    assert {(t, p): int(number) for t, p, number in found} == dict(true)
    assert [int(number) for *_, number in found] == sorted(true.values(), reverse=True)


def test_the_surest_mistakes_are_a_sorted_loop_over_the_images(tmp_path):
    targets, predicted = random_test(10, 10)
    confidence = np.random.default_rng(1).uniform(0.3, 0.99, 100)
    page, _ = write(tmp_path, [500] * 10, targets, predicted, confidence=confidence)
    wrong = sorted((-confidence[row], row) for row in range(100) if targets[row] != predicted[row])[:21]
    captions = page.text[page.text.index("Look for wrong labels") :]
    found = re.findall(r"class (\d)taken for class (\d), ([\d.]+) %test/image (\d+).png", captions)
    assert found == [(str(targets[r]), str(predicted[r]), f"{-100 * c:.1f}", str(r)) for c, r in wrong]


def test_the_matrix_holds_every_cell_that_an_image_fell_into(tmp_path):
    page, _ = write(tmp_path, **FOUR)
    cells = Counter((f"class {t}", f"class {p}") for t, p in zip(FOUR["targets"], FOUR["predicted"], strict=True))
    titles = re.findall(r"(class \d) taken for (class \d): (\d+) of 12, ", page.text)
    assert {(true, guess): int(number) for true, guess, number in titles} == dict(cells)


def test_the_bins_of_the_reliability_diagram_hold_all_images(tmp_path):
    confidence = np.array([0.31, 0.32, 0.97, 0.98, 1 - 1e-9])
    page, _ = write(tmp_path, [5, 5, 5], [0, 1, 2, 0, 1], [0, 0, 2, 0, 1], confidence=confidence)
    assert "2 images: confidence 31.5 %, accuracy 50.0 %" in page.text
    assert "3 images: confidence 98.3 %, accuracy 100.0 %" in page.text
    assert page.text.count("images: confidence") == 2


# --- what names and files may hold


def test_names_and_files_are_text_whatever_they_hold(tmp_path):
    files = [f"test/{name}/\udcff.png" for name in HOSTILE]  # not UTF-8 on the disk
    page, _ = write(tmp_path, [9] * 5, range(5), [1, 2, 3, 4, 0], names=HOSTILE, files=files)
    assert not page.all("script")
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert [row[0] for row in page.tables[0][1:]] == HOSTILE
    assert f"test/{HOSTILE[0]}/\\udcff.png" in page.text
    assert "0.9 <b>SupCon</b>" in page.text


@pytest.mark.parametrize("names", [None, HOSTILE])
def test_nothing_is_requested(tmp_path, names):
    page, _ = write(tmp_path, [9] * 5, range(5), [1, 2, 3, 4, 0], names=names)
    policy = next(meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert {attributes["src"][:23] for attributes in page.all("img")} == {"data:image/jpeg;base64,"}
    assert all(attributes["href"].startswith("#") for attributes in page.all("a"))
    assert not page.all("link")
    assert not re.search(r"https?:|url\(|@import", page.source)


def test_every_image_says_what_it_shows_and_every_anchor_has_a_target(tmp_path):
    page, _ = write(tmp_path, **FOUR)
    assert all(attributes["alt"] for attributes in page.all("img"))
    assert all(attributes["aria-label"] for attributes in page.all("svg"))
    targets = {attributes["id"] for _, attributes in page.elements if "id" in attributes}
    assert {attributes["href"][1:] for attributes in page.all("a")} <= targets
    assert not page.open  # every element was closed


# --- runs that lack something


def test_absent_groups_are_not_shown(tmp_path):
    page, _ = write(tmp_path, [500, 400], [0, 1, 1], [0, 0, 1])
    assert "Many, 2 classes" in page.text
    assert not re.search("Medium, |Few, |accuracy, medium|accuracy, few", page.text)
    assert {row[1] for row in page.tables[0][1:]} == {"many"}


def test_without_mistakes_the_page_says_so(tmp_path):
    page, _ = write(tmp_path, [5, 5], [0, 1], [0, 1])
    assert "None: all 2 images were classified correctly." in page.text
    assert not page.all("img")


def test_one_mistake_is_one_confusion_and_one_picture_in_each_list(tmp_path):
    page, _ = write(tmp_path, [5, 5], [0, 1, 1], [0, 1, 0])
    assert "1 of 3 images were taken" in page.text
    assert len(page.all("img")) == 2


def test_an_image_that_is_gone_is_named(tmp_path):
    page, _ = write(tmp_path, [5, 5], [0, 1, 1], [1, 0, 1], files=["a.png", "gone <1>.png", "b.png"])
    assert len(page.all("img")) == 2
    assert [a["title"] for tag, a in page.elements if tag == "div" and a.get("class") == "gone"] == ["gone <1>.png"] * 2


def test_a_class_without_test_images_has_no_figures(tmp_path):
    page, _ = write(tmp_path, [50, 40, 30], [0, 1, 1], [0, 2, 1])
    assert page.tables[0][3] == ["class 2", "medium", "30", "0", "no images", "", "", ""]
    assert "1 of the 3 classes have none" in page.text


def test_a_run_without_val_or_log_shows_what_there_is(tmp_path):
    page, _ = write(tmp_path, **FOUR, log=[{"epoch": 0, "train_loss": 3.5, "train_accuracy": 0.5}])
    assert "Training loss: 3.5 in epoch 0" in " ".join(a["aria-label"] for a in page.all("svg"))
    assert "Balanced accuracy on val" not in page.text
    page, _ = write(tmp_path, **FOUR, log=[])
    assert "Training loss" not in page.text


def test_curves_rise_and_fall_as_the_log_does(tmp_path):
    page, _ = write(tmp_path, **FOUR)
    lines = [a["d"].removeprefix("M").split() for a in page.all("path") if a.get("class") == "line"]
    loss, accuracy = ([float(value) for value in line[1::2]] for line in lines)
    assert loss == [100.0, 88.89, 77.78, 66.67]  # 9, 8, 7, 6 of 9
    assert accuracy == [0.0, 25.0, 50.0, 75.0]


def test_a_loss_that_falls_far_is_drawn_on_a_logarithmic_axis(tmp_path):
    log = [{"epoch": epoch, "train_loss": loss} for epoch, loss in enumerate([1000.0, 10.0, 1.0, float("nan")])]
    page, _ = write(tmp_path, **FOUR, log=log)
    line = next(a["d"] for a in page.all("path") if a.get("class") == "line")
    assert line == "M0.0 100.0 50.0 33.33 100.0 0.0 "
    assert "Training loss, logarithmic" in page.text


def test_a_run_with_the_generator_shows_the_losses_that_train_the_network(tmp_path):
    parts = {"loss_ldam_main": 2.0, "loss_supcon": 1.5, "loss_centre": 9e4, "loss_contrast": 0.7, "loss_mv": 0.0}
    page, _ = write(tmp_path, **FOUR, log=[{"epoch": 0, "train_loss": 9002.0} | parts])
    said = " ".join(a["aria-label"] for a in page.all("svg"))
    assert "Training loss ldam_main, before its factor: 2 in epoch 0" in said
    assert "Training loss supcon, before its factor: 1.5 in epoch 0" in said
    assert said.count("Training loss") == 2


def test_the_command_of_a_run_of_several_processes_starts_as_many(tmp_path):
    page, _ = write(tmp_path, **FOUR, processes=2)
    assert "torchrun --nproc_per_node 2 imagenet_lt_train.py --" in page.text


def test_synthetic_images_are_shown_by_class(tmp_path):
    page, _ = write(tmp_path, **FOUR, synthetic_counts=[0, 0, 0, 21])
    assert page.tables[0][4][:4] == ["class 3", "few", "28", "21 (75 %)"]
    assert "synthetic images, 21 of 428 to train on" in page.text
    flags = plain_flags(train_parser().parse_args([])) | {"count_synthetic": True}
    page, _ = write(tmp_path, **FOUR, synthetic_counts=[50, 0, 0, 0], flags=flags)
    assert page.tables[0][1][:4] == ["class 0", "many", "200", "50 (25 %)"]


def test_a_map_of_features_is_embedded(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "features.png")
    page, _ = write(tmp_path, **FOUR, feature_map=tmp_path / "features.png")
    assert page.all("img")[-1]["src"].startswith("data:image/png;base64,")


# --- many classes, and the weight of the page


def test_a_page_of_100_classes_and_2000_images_is_light(tmp_path):
    page, _ = write(tmp_path, np.geomspace(500, 5, 100).astype(int).tolist(), *random_test(100, 20))
    assert len(page.source) < 1_500_000  # of the most that thumbnails can weigh: noise
    assert page.source.count('class="r"') + page.source.count('class="w"') > 500
    assert len(page.tables[0]) == 101


def test_hundreds_of_classes_have_no_matrix(tmp_path):
    page, _ = write(tmp_path, np.geomspace(1000, 5, 400).astype(int).tolist(), *random_test(400, 2))
    assert "The matrix of 400 classes is left out" in page.text
    assert len(page.tables[0]) == 401
    assert len(page.source) < 1_500_000


# --- doing it again


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--data_dir", "it's a folder", "--add_rsg", "False", "--lr", "1e-05", "--lr_milestones", "0.5", "0.75"],
        ["--seed", "3", "--run_name=-x", "--norm_out", "0", "--drw_epoch", "4"],
        ["--run_name=@x"],
    ],
)
def test_the_training_command_gives_the_same_flags(tmp_path, flags):
    wanted = plain_flags(train_parser().parse_args(flags))
    given = command_line("imagenet_lt_train.py", wanted, plain_flags(train_parser().parse_args([])))
    python, script, *words = shlex.split(given)
    assert (python, script) == ("python", "imagenet_lt_train.py")
    assert plain_flags(train_parser().parse_args(words)) == wanted


def test_the_page_says_how_to_do_it_again(tmp_path):
    page, _ = write(tmp_path, **FOUR)
    again = "python imagenet_lt_train.py --data_dir 'some folder' --add_rsg False --run_name 'a run' --seed 7"
    assert page.pre == ["1 CE(linear) + 0.9 <b>SupCon</b>", again, COMMAND]
    changed = re.findall(r'class="set"><dt>(\w+)</dt><dd>(.*?)</dd>', page.source)
    assert changed == [("data_dir", "some folder"), ("add_rsg", "False")]
    assert all(text in page.text for text in ("ab12", "cd34", "torch 2.14", "bit for bit with 2 threads"))
    resumed, _ = write(tmp_path / "resumed", **FOUR, resumed=[{"epoch": 3, "threads": 1}])
    assert "bit for bit" not in resumed.text
    assert "epoch 3, threads 1" in resumed.text


def test_the_test_script_writes_the_page_beside_its_files(tmp_path, tiny_dataset):
    flags = ["--data_dir", tiny_dataset, "--root_model", tmp_path, "--root_log", tmp_path, "--run_name", "run"]
    flags += ["--arch", "resnet8", "--max_steps", 1, "--workers", 0, "--add_rsg", 0, "--add_supcon_loss", 0]
    imagenet_lt_train.main(imagenet_lt_train.parse_args([str(flag) for flag in flags]))
    imagenet_lt_test.main(imagenet_lt_test.parse_args(["--model_dir", str(tmp_path / "run"), "--workers", "0"]))
    page, folder = Page(tmp_path / "run" / "test" / "report.html"), tmp_path / "run" / "test"
    result, record = (
        json.loads(path.read_text()) for path in (folder / "metrics.json", tmp_path / "run" / "args.json")
    )
    assert f"{100 * result['balanced_accuracy']:.1f} % balanced accuracy" in page.text
    assert all(text in page.text for text in (result["split_hash"], result["weights_hash"], record["objective"]))
    assert page.pre[2] == f"python imagenet_lt_test.py --model_dir {tmp_path / 'run'} --workers 0"
    assert f"--seed {record['seed']}" in page.pre[1]
    with (folder / "predictions.csv").open() as file:
        wrong = {row["file"] for row in csv.DictReader(file) if row["true"] != row["predicted"]}
    assert {a["title"] for a in page.all("img")} == wrong


# --- in a browser


def opened(path: Path) -> tuple[str, list[str]]:
    """The document as chromium built it, and what it complained of: a blocked request is an error on the console."""
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-dev-shm-usage",
    ]
    flags.append(f"--user-data-dir={path.parent / 'profile'}")  # its own, as two may run at once
    command = [CHROMIUM, *flags, "--enable-logging=stderr", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_browser_shows_the_figures_without_complaint(tmp_path):
    page, result = write(tmp_path, [200, 150, 50, 40, 7], range(5), [1, 1, 2, 4, 0], names=HOSTILE)
    document, complaints = opened(tmp_path / "a run" / "test" / "report.html")
    assert complaints == []
    text = html.unescape(re.sub(r"<[^>]*>", "", document)).replace("\N{NO-BREAK SPACE}", " ")
    for key in ("balanced_accuracy", "top1", "many", "medium", "few", "macro_f1", "ece"):
        assert f"{100 * result[key]:.2f} %" in text
    assert document.count("<tr>") == sum(map(len, page.tables))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_a_browser_would_complain_of_a_request(tmp_path):
    page, _ = write(tmp_path, [5, 5], [0, 1], [0, 1])
    path = tmp_path / "bad.html"
    path.write_text(page.source.replace("</main>", '<img src="http://127.0.0.1:9/x.png"><script>1</script></main>'))
    assert len(opened(path)[1]) == 2
