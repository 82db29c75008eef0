"""Comparing runs: groups, means and paired tests against hand cases and slow loops, on folders as the scripts leave
them."""

import csv
import json
import shutil
from html.parser import HTMLParser
from math import comb
from pathlib import Path
from statistics import mean, variance

import numpy as np
import pytest
from PIL import Image
from scipy.stats import false_discovery_control
from scipy.stats import t as student
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import imagenet_lt_test
import imagenet_lt_train
from engine.compare import (
    grouped,
    holm,
    mcnemar,
    mean_and_deviation,
    paired_tests,
    read_run,
    resampled_accuracies,
    what_is_missing,
)
from engine.compare_page import group_table, markdown, pair_table
from engine.errors import Refused
from engine.metrics import bootstrap_intervals, confusion_matrix, group_means, per_class, shot_groups
from engine.report import write_predictions
from engine.run import HPARAM_METRICS
from scripts import compare_runs, sweep

COUNTS = [200, 50, 7]  # one class each of many, medium and few


@pytest.fixture(scope="module")
def real_run(tmp_path_factory) -> Path:
    """What the two entry scripts leave of one short run."""
    folder = tmp_path_factory.mktemp("real")
    random = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for name in ("a", "b", "c"):
            (folder / "data" / split / name).mkdir(parents=True)
            for index in range(4):
                pixels = random.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "data" / split / name / f"{index}.png")
    flags = ["--data_dir", str(folder / "data"), "--root_model", str(folder), "--root_log", str(folder / "log")]
    flags += ["--arch", "resnet8", "--max_steps", "1", "--seed", "0", "--run_name", "run_seed0"]
    imagenet_lt_train.main(imagenet_lt_train.parse_args(flags))
    imagenet_lt_test.main(imagenet_lt_test.parse_args(["--model_dir", str(folder / "run_seed0")]))
    return folder / "run_seed0"


@pytest.fixture
def make_run(real_run, tmp_path):
    """A run like the real one, told something else, with other predictions of 30 images of each class."""

    def made(name: str, seed: int, wrong: int = 0, record: dict | None = None, **flags) -> Path:
        folder = tmp_path / "runs" / name
        shutil.copytree(real_run, folder, ignore=shutil.ignore_patterns("*.safetensors", "state*"))
        content = json.loads((folder / "args.json").read_text())
        content |= {"class_counts": COUNTS, "seed": seed, **(record or {})}
        content["flags"] |= {"seed": seed, "run_name": name, **flags}
        (folder / "args.json").write_text(json.dumps(content))
        targets = np.repeat([0, 1, 2], 30)
        predicted = np.where(np.random.default_rng(seed).permutation(90) < wrong, (targets + 1) % 3, targets)
        write_test(folder, targets, predicted, content["split_hash"])
        return folder

    return made


def write_test(folder: Path, targets: np.ndarray, predicted: np.ndarray, split_hash: str) -> None:
    test, logits = folder / "test", 5.0 * np.eye(3)[predicted]
    np.savez_compressed(test / "logits.npz", logits=logits, targets=targets)
    files = [f"test/{target}/{index}.png" for index, target in enumerate(targets)]
    write_predictions(test / "predictions.csv", files, targets, logits, ["a", "b", "c"])
    recall = per_class(confusion_matrix(targets, predicted, 3))[0]
    result = {"balanced_accuracy": recall.mean(), "top1": (targets == predicted).mean(), "split_hash": split_hash}
    result |= group_means(recall, shot_groups(COUNTS)) | {"last": {"epoch": 0, "balanced_accuracy": recall.mean()}}
    result["shot_thresholds"] = [100, 20]
    (test / "metrics.json").write_text(json.dumps(result))


def compare(*words: str | Path) -> None:
    compare_runs.main(compare_runs.parse_args([str(word) for word in words]))


def refusal(capsys, *words: str | Path) -> str:
    """The one line of a comparison that exits with 2."""
    with pytest.raises(SystemExit) as error:
        compare(*words)
    assert error.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


# --- statistics


def test_mcnemar_is_a_sum_of_binomial_terms():
    """2 images only the first gets right, 8 only the second: p = 2 (C(10,0) + C(10,1) + C(10,2)) / 2^10."""
    correct = np.array([1] * 5 + [1] * 2 + [0] * 8 + [0] * 3, dtype=bool)
    other = np.array([1] * 5 + [0] * 2 + [1] * 8 + [0] * 3, dtype=bool)
    first, second, p = mcnemar(correct, other)
    assert (first, second) == (2, 8)
    assert p == pytest.approx(2 * sum(comb(10, k) for k in range(3)) / 2**10, abs=1e-12)  # 0.109375


def test_mcnemar_of_equal_predictions_is_one():
    assert mcnemar(np.array([True, False]), np.array([True, False])) == (0, 0, 1.0)


def test_holm_is_its_definition():
    """Sorted .01, .02, .03, .04 times 4, 3, 2, 1: .04, .06, .06, and .04 that is lifted to .06."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    p = np.random.default_rng(0).random(20)
    assert (np.array(holm(p)) >= false_discovery_control(p) - 1e-12).all()  # family-wise is stricter than the FDR


def test_the_paired_bootstrap_is_a_slow_loop_over_drawn_images():
    random = np.random.default_rng(0)
    targets, correct = random.permutation(np.repeat([0, 2, 3], [6, 4, 9])), random.random((19, 2))
    groups = {"many": np.array([True, False, True, False]), "few": np.array([False, True, False, False])}
    accuracies = resampled_accuracies(correct, targets, groups, resamples=20, seed=3)
    assert set(accuracies) == {"balanced_accuracy", "top1", "many"}  # the only class of few has no test images
    generator = np.random.default_rng(3)
    times = {label: generator.multinomial(n, [1 / n] * n, size=20) for label, n in ((0, 6), (2, 4), (3, 9))}
    for draw in range(20):
        for column in (0, 1):
            drawn = {
                label: [
                    correct[row, column]
                    for row, number in zip(np.flatnonzero(targets == label), counts[draw], strict=True)
                    for _ in range(number)
                ]
                for label, counts in times.items()
            }
            means = {}
            for label, values in drawn.items():
                n, own = len(values), correct[targets == label, column]
                means[label] = own.mean() + (n / (n - 1)) ** 0.5 * (sum(values) / n - own.mean())
            top1 = sum(means[label] * len(values) for label, values in drawn.items()) / 19
            expected = [sum(means.values()) / 3, top1, (means[0] + means[2]) / 2]
            found = [accuracies[name][draw, column] for name in ("balanced_accuracy", "top1", "many")]
            assert found == pytest.approx(expected)


def test_the_bootstrap_of_one_classifier_has_the_interval_of_its_test():
    random = np.random.default_rng(0)
    targets = np.repeat(np.arange(3), 200)
    predicted = np.where(random.random(600) < 0.7, targets, (targets + 1) % 3)
    accuracies = resampled_accuracies((predicted == targets)[:, None], targets, {})
    interval = bootstrap_intervals(np.eye(3)[predicted], targets, {})["balanced_accuracy"]
    found = np.percentile(accuracies["balanced_accuracy"], [2.5, 97.5])
    assert found == pytest.approx(interval, abs=0.005)  # other draws


# --- runs and groups


def test_a_real_run_is_read_with_the_metrics_that_its_test_printed(real_run):
    run, result = read_run(real_run), json.loads((real_run / "test" / "metrics.json").read_text())
    assert what_is_missing(real_run) is None
    assert run.measures["balanced_accuracy"] == result["balanced_accuracy"]
    assert run.correct.mean() == pytest.approx(result["top1"])
    assert run.measures["parameters"] == json.loads((real_run / "args.json").read_text())["parameters"]
    assert run.files[0] == "test/a/0.png"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("logits.npz", b""),
        ("logits.npz", b"garbage"),
        ("predictions.csv", b"other\n1\n"),
        ("metrics.json", b'{"balanced_accuracy": "all"}'),
    ],
)
def test_a_damaged_test_is_refused(make_run, name, content):
    run = make_run("run0", 0)
    (run / "test" / name).write_bytes(content)
    with pytest.raises(Refused, match="is damaged; test the run again"):
        read_run(run)


def test_logits_that_are_no_numbers_are_refused(make_run):
    run = make_run("run0", 0)
    with np.load(run / "test" / "logits.npz") as content:
        np.savez(run / "test" / "logits.npz", logits=content["logits"] * np.nan, targets=content["targets"])
    with pytest.raises(Refused, match="is not what logits.npz"):
        read_run(run)


def test_tensorboards_hparams_tab_has_the_flags_and_a_scalar_for_each_metric(real_run):
    events = EventAccumulator(str(real_run.parent / "log" / "run_seed0")).Reload()
    contents = events.PluginTagToContent("hparams").items()
    data = {tag: HParamsPluginData.FromString(content) for tag, content in contents}
    session = data["_hparams_/session_start_info"].session_start_info.hparams
    flags = {flag: session[flag].string_value for flag in session}
    recorded = json.loads((real_run / "args.json").read_text())["flags"]
    assert (flags["lr"], flags["arch"]) == ("0.001", "resnet8")
    assert "run_name" not in flags
    assert all(str(recorded[flag]) == value for flag, value in flags.items())
    metrics = [info.name.tag for info in data["_hparams_/experiment"].experiment.metric_infos]
    assert metrics == list(HPARAM_METRICS)
    assert set(metrics) - set(events.Tags()["scalars"]) == {"val_many", "val_medium"}  # 4 images a class are few


def test_runs_that_differ_only_in_their_seed_are_one_group_named_by_what_differs(make_run):
    folders = [make_run(f"x{seed}", seed, wrong) for seed, wrong in ((1, 9), (0, 18))]
    folders += [make_run("other", 0, 27, add_rsg=False, lr=0.5, workers=1, data_dir="elsewhere")]
    first, second = grouped([read_run(folder) for folder in folders])
    assert [run.record["seed"] for run in first.runs] == [0, 1]
    assert (first.flags, second.flags) == ("the defaults", "add_rsg False, lr 0.5")
    assert (first.name, second.name) == (first.flags, second.flags)
    assert mean_and_deviation(first, "top1") == pytest.approx((0.85, 0.05 * 2**0.5))


def test_a_flag_that_is_gone_tells_older_runs_apart(make_run):
    folders = [make_run("older", 0, gone="mean"), make_run("newer", 0)]
    for order in (folders, folders[::-1]):
        assert {group.flags for group in grouped([read_run(folder) for folder in order])} == {
            "gone mean",
            "the defaults",
        }


def test_folders_named_by_setting_and_seed_name_the_groups(make_run):
    folders = [make_run("on_seed0", 0), make_run("on_seed1", 1), make_run("off_seed0", 0, add_rsg=False)]
    assert [group.name for group in grouped([read_run(folder) for folder in folders])] == ["on", "off"]


def test_second_stages_on_the_seeds_of_one_setting_are_one_group(make_run):
    names = ["runs/first_seed0", "runs/first_seed_1"]
    weights = [f"{name}/best.safetensors" for name in names]
    parents = [{"parent": name} for name in names]
    made = [make_run(f"crt_seed{k}", k, record=parents[k], weights=weights[k]) for k in (0, 1)]
    other = make_run("other_seed0", 0, record={"parent": "runs/second_seed0"}, weights="runs/second_seed0/x")
    assert [len(group.runs) for group in grouped([read_run(folder) for folder in [*made, other]])] == [2, 1]


def test_runs_on_other_synthetic_images_are_another_group(make_run):
    hashes = ["a" * 64, "a" * 64, "b" * 64]
    folders = [make_run(f"run{k}", k, record={"synthetic_hash": hashes[k]}) for k in range(3)]
    assert [len(group.runs) for group in grouped([read_run(folder) for folder in folders])] == [2, 1]


def test_runs_that_mirror_by_the_word_of_their_data_are_told_apart(make_run):
    folders = [make_run(f"run{k}", k, record={"mirrored": k == 0}) for k in range(2)]
    assert [group.flags for group in grouped([read_run(folder) for folder in folders])] == ["hflip True", "hflip False"]


@pytest.mark.parametrize("other", [{"split_hash": "0" * 64}, {"shot_thresholds": [50, 10]}])
def test_a_sweep_tests_a_run_again_that_was_tested_on_other_images_or_groups(make_run, other):
    run = sweep.Run("on_seed0", make_run("on_seed0", 0), [])
    assert sweep.is_done(run)
    path = run.folder / "test" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | other))
    assert not sweep.is_done(run)


def test_other_hardware_and_changed_code_are_remarked_on(make_run):
    records = [{"hardware": "H100", "commit": "a" * 40}, {"hardware": "T4", "commit": "a" * 40 + "-dirty"}]
    records[0]["resumed"] = [{"epoch": 1, "hardware": "L4"}]
    runs = [read_run(make_run(f"run{k}", k, record=record)) for k, record in enumerate(records)]
    speed, code = compare_runs.remarks_on(runs)
    assert "hardware H100" in speed
    assert "hardware T4" in speed
    assert "hardware L4" in speed  # where the first went on
    assert f"{'a' * 12}, {'a' * 12}-dirty" in code


def test_one_run_has_no_deviation(make_run):
    (group,) = grouped([read_run(make_run("single", 0, 9))])
    assert mean_and_deviation(group, "top1") == (0.9, None)
    text = markdown(group_table([group]))
    assert "90.0" in text
    assert "±" not in text


def test_the_difference_of_groups_is_that_of_their_means_on_the_same_images(make_run):
    folders = [make_run(f"a_seed{seed}", seed, wrong=18 + seed) for seed in (0, 1)]
    folders += [make_run(f"b_seed{seed}", seed, wrong=3, add_rsg=False) for seed in (0, 1)]
    (pair,) = paired_tests(grouped([read_run(folder) for folder in folders]))
    value, low, high = pair.differences["top1"]
    assert value == pytest.approx((18 + 19 - 3 - 3) / 2 / 90)
    one, two = (np.mean([run.correct for run in group.runs], axis=0) for group in (pair.first, pair.second))
    random, rows = np.random.default_rng(5), [np.flatnonzero(pair.first.runs[0].targets == label) for label in range(3)]
    draws = [np.concatenate([(two - one)[random.choice(each, len(each))] for each in rows]) for _ in range(4000)]
    assert (low, high) == pytest.approx(np.percentile(np.mean(draws, axis=1), [2.5, 97.5]), abs=0.01)
    assert set(pair.differences) == {"balanced_accuracy", "top1", "many", "medium", "few"}
    assert pair.discordant == [(0, 15), (0, 16)]  # fewer wrong ones of the same permutation
    assert pair.p == pytest.approx(2 * 2 / 2**16)  # the smaller of two, twice
    assert (pair.p_holm, pair.p_seeds_holm) == (pair.p, pair.p_seeds)
    assert pair.p_seeds == pytest.approx(welch([1 - 18 / 90, 1 - 19 / 90], [1 - 3 / 90] * 2))


def test_p_values_over_seeds_are_corrected_for_the_pairs_that_have_one(make_run):
    wrong = {"a": (18, 19), "b": (3, 4), "c": (10, 15), "d": (9,)}
    folders = [
        make_run(f"{name}_seed{seed}", seed, wrong=number, lr=1.0 + index)
        for index, (name, numbers) in enumerate(wrong.items())
        for seed, number in enumerate(numbers)
    ]
    pairs = paired_tests(grouped([read_run(folder) for folder in folders]))
    known = [pair for pair in pairs if pair.p_seeds is not None]
    assert [(pair.first.name, pair.second.name) for pair in known] == [("a", "b"), ("a", "c"), ("b", "c")]
    assert [pair.p_seeds_holm for pair in known] == holm([pair.p_seeds for pair in known])
    assert all(pair.p_seeds_holm is None for pair in pairs if pair.p_seeds is None)


def test_runs_of_one_seed_are_compared_with_each_other_whatever_other_seeds_there_are(make_run):
    first = [make_run(f"a_seed{seed}", seed, wrong=9, lr=0.1) for seed in (0, 1)]
    second = make_run("b_seed1", 1, wrong=9, lr=0.2)  # the images that a_seed1 gets wrong, too
    pairs = paired_tests(grouped([read_run(folder) for folder in [*first, second]]))
    assert [pair.discordant for pair in pairs] == [[(0, 0)]]
    other = make_run("c_seed2", 2, wrong=9, lr=0.3)  # no seed in common: k-th with k-th
    (pair,) = paired_tests(grouped([read_run(folder) for folder in (first[0], other)]))
    assert pair.discordant != [(0, 0)]


def welch(values: list[float], others: list[float]) -> float:
    """Welch's t-test by its formulas: t over the standard error, degrees of freedom by Satterthwaite."""
    errors = [variance(each) / len(each) for each in (values, others)]
    freedom = sum(errors) ** 2 / sum(e**2 / (len(each) - 1) for e, each in zip(errors, (values, others), strict=True))
    return 2 * student.sf(abs(mean(values) - mean(others)) / sum(errors) ** 0.5, freedom)


def test_equal_groups_differ_by_chance_alone_however_many_their_runs(make_run):
    folders = [
        make_run(f"{name}_seed{seed}", seed, 9, lr=lr) for name, lr in (("a", 0.1), ("b", 0.2)) for seed in (0, 1)
    ]
    (pair,) = paired_tests(grouped([read_run(folder) for folder in folders]))
    assert (pair.p, pair.p_holm) == (1.0, 1.0)
    assert pair.differences["top1"] == (0.0, 0.0, 0.0)


def test_all_pairs_of_up_to_ten_groups_and_of_more_those_with_the_first_one(make_run):
    groups = grouped([read_run(make_run(f"group{index}", 0, lr=1.0 + index)) for index in range(11)])
    numbers = {group.name: index for index, group in enumerate(groups)}
    for count in (10, 11):
        pairs = [(numbers[pair.first.name], numbers[pair.second.name]) for pair in paired_tests(groups[:count])]
        expected = {
            10: [(one, two) for one in range(10) for two in range(one + 1, 10)],
            11: [(0, i) for i in range(1, 11)],
        }
        assert pairs == expected[count]


def test_one_run_says_nothing_of_other_seeds(make_run):
    folders = [make_run("a_seed0", 0), make_run("b_seed0", 0, 5, lr=0.5), make_run("b_seed1", 1, 5, lr=0.5)]
    (pair,) = paired_tests(grouped([read_run(folder) for folder in folders]))
    assert pair.p_seeds is None
    assert pair_table([pair]).rows[0][-1].text == "–"


def test_seconds_are_the_mean_of_the_epochs_and_memory_their_peak(make_run):
    folder = make_run("run", 0)
    rows = [{"epoch": epoch, "seconds": epoch, "peak_memory_bytes": peak} for epoch, peak in ((0, 5), (1, 9), (2, 7))]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    measures = read_run(folder).measures
    assert (measures["seconds_per_epoch"], measures["peak_memory_bytes"]) == (1.0, 9)


# --- the script


def test_a_comparison_is_tables_a_figure_and_one_page_that_asks_for_nothing(make_run, tmp_path, capsys):
    make_run("<script>_seed0", 0, 20)
    make_run("<script>_seed1", 1, 10)
    make_run("few|wrong_seed0", 0, 2, lr=0.5)
    compare(tmp_path / "runs")
    output = tmp_path / "runs" / "comparison"
    assert {path.name for path in output.iterdir()} == set(compare_runs.FILES)
    compare_runs.refuse_foreign_files(output)  # its own it may replace
    printed = capsys.readouterr().out
    assert "| few\\|wrong" in printed
    assert "83.3 ± 7.9" in printed
    with (output / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [("<script>", "2", "0 1"), ("few|wrong", "1", "0")]
    assert [(row["setting"], row["n"], row["seeds"]) for row in rows] == expected
    assert float(rows[0]["top1_mean"]) == pytest.approx(5 / 6)
    assert rows[1]["top1_std"] == ""
    assert Image.open(output / "comparison.png").width > 500
    page = (output / "comparison.html").read_text()
    assert page.count("<script>") == 1
    assert "&lt;script&gt;" in page
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append((tag, dict(attributes)))
    parser.feed(page)
    (link,) = [value for _, attributes in found for name, value in attributes.items() if name in ("src", "href")]
    assert link.startswith("data:image/png;base64,")
    assert sum(tag == "button" for tag, _ in found) == sum(tag == "th" for tag, _ in found) > 10


def test_unfinished_and_untested_runs_are_named_in_one_line(make_run, tmp_path, capsys):
    make_run("done_seed0", 0)
    make_run("half_seed0", 0, max_steps=None)  # 20 epochs, one in the log
    (make_run("new_seed0", 0, lr=0.5) / "test" / "metrics.json").unlink()
    line = refusal(capsys, tmp_path / "runs")
    assert f"{tmp_path}/runs/half_seed0 is unfinished, {tmp_path}/runs/new_seed0 is untested" in line
    assert "done_seed0" not in line


def test_a_test_before_the_last_epoch_does_not_count(make_run):
    folder = make_run("again_seed0", 0, epochs=2, max_steps=None)
    row = json.loads((folder / "log.jsonl").read_text())
    assert what_is_missing(folder) == "unfinished"
    with (folder / "log.jsonl").open("a") as log:
        log.write(json.dumps(row | {"epoch": 1}) + "\n")
    assert what_is_missing(folder) == "untested"


def test_different_splits_are_refused_unless_told(make_run, tmp_path, capsys):
    one, other = make_run("a", 0), make_run("b", 0, 5, record={"split_hash": "f" * 64})
    assert "were trained on different splits" in refusal(capsys, one, other)
    compare(one, other, "--allow_different_splits", "--output", tmp_path / "out")
    printed = capsys.readouterr()
    assert "split ffffffffffff" in printed.out
    assert "saw different images" in printed.err
    assert (tmp_path / "out" / "pairs.csv").read_text().strip() == ""  # equal names are no equal images


def test_runs_of_other_training_images_are_paired_on_the_same_test(make_run, tmp_path):
    """Where classes are of other sizes, many, medium and few are left out."""
    other = {"split_hash": "f" * 64, "class_counts": [300, 60, 9]}
    runs = [make_run("a", 0, 9), make_run("b", 0, 5, lr=0.5), make_run("c", 0, 5, record=other)]
    for run in runs:
        path = run / "test" / "metrics.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"tested_hash": "the same"}))
    compare(*runs, "--allow_different_splits", "--output", tmp_path / "out")
    with (tmp_path / "out" / "pairs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(row["balanced_accuracy_difference"] for row in rows)
    assert [bool(row["few_difference"]) for row in rows] == [True, False, False]


def test_runs_of_other_classes_are_not_paired(make_run):
    folders = [make_run("a", 0), make_run("b", 0, lr=0.5, record={"classes": ["x", "b", "c"]})]
    assert paired_tests(grouped([read_run(folder) for folder in folders])) == []


def test_a_test_that_knows_its_images_is_paired_with_an_older_one_by_the_split(make_run):
    folders = [make_run("a", 0), make_run("b", 0, lr=0.5)]
    path = folders[0] / "test" / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tested_hash": "its own"}))
    assert len(paired_tests(grouped([read_run(folder) for folder in folders]))) == 1


def test_runs_tested_on_different_splits_are_refused(make_run, capsys):
    one, other = make_run("a", 0), make_run("b", 0, 5)
    metrics = json.loads((other / "test" / "metrics.json").read_text())
    (other / "test" / "metrics.json").write_text(json.dumps(metrics | {"split_hash": "f" * 64}))
    assert "were tested on different splits" in refusal(capsys, one, other)


def test_runs_that_make_no_comparison_are_refused(make_run, tmp_path, capsys):
    one, same = make_run("a", 0), make_run("b", 0)
    assert f"{one} and {same} have the same flags and seed" in refusal(capsys, one, same)
    metrics = json.loads((same / "test" / "metrics.json").read_text())
    (same / "test" / "metrics.json").write_text(json.dumps(metrics | {"few": 0.123}))
    assert "is not what logits.npz beside it gives" in refusal(capsys, same)
    assert "no run at nowhere" in refusal(capsys, "nowhere", "--root_model", tmp_path / "runs")


def test_nothing_of_somebody_else_is_overwritten(make_run, tmp_path, capsys):
    run, output = make_run("a", 0), tmp_path / "mine"
    output.mkdir()
    (output / "comparison.csv").write_text("my own notes")
    assert "is not of an earlier comparison" in refusal(capsys, run, "--output", output)
    assert "is no folder" in refusal(capsys, run, "--output", run / "args.json")
    assert [path.name for path in output.iterdir()] == ["comparison.csv"]
    assert (output / "comparison.csv").read_text() == "my own notes"
