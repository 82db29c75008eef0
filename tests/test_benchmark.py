"""The benchmark's arithmetic, and that its groups run; no test asks how fast anything is."""

import functools
import json
import math

import pytest
import torch
import torch.nn.functional as F

from scripts import benchmark
from scripts.benchmarks.heads import pairs, saved_bytes
from scripts.benchmarks.inputs import image_folder_loader, make_images
from scripts.benchmarks.measuring import Bench, Row, interleaved, quotients
from scripts.benchmarks.steps import COUNTS, BareSteps, class_mix, flags, operations

pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__")  # numpy about pytorch-metric-learning
BENCH = Bench(torch.device("cpu"), 3, 2, True, "off", "auto", False)


def test_the_median_of_a_row_is_judged_by_its_bound():
    row = Row("group", "name", [0.7, 1.4, 0.9], {}, at_least=0.9)
    assert (row.median, row.verdict, row.target) == (0.9, "met", ">= 0.9")
    assert row._replace(at_least=0.91).verdict == "missed"
    assert row._replace(at_least=None, at_most=0.89).verdict == "missed"
    assert row._replace(at_least=None).verdict == ""


def test_ratios_are_taken_repeat_by_repeat():
    assert quotients([2, 9], [1, 3]) == [2, 3]


@pytest.fixture
def clock(monkeypatch):
    """The time of measurements, which passes when a test says so."""
    now = [0.0]
    monkeypatch.setattr("scripts.benchmarks.measuring.time.perf_counter", lambda: now[0])
    return now


def test_every_candidate_runs_in_every_repeat_after_one_call_that_is_not_measured(clock):
    calls = []

    def candidate(name, seconds):
        calls.append(name)
        clock[0] += seconds

    candidates = {name: functools.partial(candidate, name, 10.0**k) for k, name in enumerate("abc")}
    seconds = interleaved(candidates, BENCH)
    assert calls == ["a", "b", "c", "a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert seconds == {name: [10.0**k] * BENCH.repeats for k, name in enumerate("abc")}


def test_what_is_called_fast_is_called_often_and_its_time_is_that_of_one_call(clock, monkeypatch):
    monkeypatch.setattr("scripts.benchmarks.measuring.LEAST_SECONDS", 8.0)
    seconds = interleaved({"fast": lambda: clock.__setitem__(0, clock[0] + 1)}, BENCH._replace(quick=False))
    assert seconds == {"fast": [1.0] * BENCH.repeats}
    assert clock[0] == 1 + 1 + 8 * BENCH.repeats


def test_bytes_kept_for_the_backward_pass_of_a_linear_layer_with_cross_entropy():
    """Features, weights and log-probabilities of 4 x 3 x 5 in float32, and targets of 8 bytes."""
    weight = torch.randn(5, 3, requires_grad=True)
    features, targets = torch.randn(4, 3, requires_grad=True), torch.tensor([0, 1, 2, 3])
    kept = saved_bytes(lambda x, y: F.nll_loss((x @ weight.T).log_softmax(1), y), features, targets)
    total_weight = 4  # a number that nll_loss keeps
    assert kept == 4 * (4 * 3 + 5 * 3 + 4 * 5) + 8 * 4 + total_weight


def test_both_sides_of_a_head_compute_the_same_loss():
    features, targets = torch.randn(6, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    for name, (ours, theirs) in pairs(8, 3).items():
        if name not in ("SupCon", "SphereFace"):
            theirs.W.data.copy_(ours.head.weight.T)
        if name != "SphereFace":
            torch.testing.assert_close(ours(features, targets), theirs(features, targets), msg=name)


def test_operations_of_the_bare_network_are_those_of_its_formula():
    """A multiplication and an addition for each weight and place in forward, twice in backward, but for the gradient
    of the images. ResNet-18 on one 32 px image."""
    args = flags("--arch resnet18 --img_size 32 -b 2")
    bare, forward, first = BareSteps(args, len(COUNTS), torch.device("cpu")), [], []

    def count(layer, inputs, output):
        forward.append(2 * layer.weight.numel() * output[0, 0].numel() * len(output))
        first.append(forward[0])

    for layer in bare.model.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layer.register_forward_hook(count)
    batches = class_mix(args, torch.device("cpu"), num_batches=1)
    bare(batches, 1)
    expected = 3 * sum(forward) - first[0]
    forward.clear()
    assert operations(bare, batches) == expected


def test_targets_are_drawn_as_the_classes_are_large():
    batches = class_mix(flags("--img_size 8 -b 500"), torch.device("cpu"), num_batches=8)
    share = torch.cat([batch.targets < 20 for batch in batches]).float().mean()
    assert share == pytest.approx(sum(COUNTS[:20]) / sum(COUNTS), abs=0.03)


def test_the_other_side_reads_every_made_up_image(tmp_path):
    make_images(tmp_path / "train", [3, 2], (84, 90), ".jpg")
    loader = image_folder_loader(flags(f"--data_dir {tmp_path} -j 0 -b 2 --img_size 80"), torch.device("cpu"))
    batches = list(loader)
    assert sorted(torch.cat([targets for _, targets in batches]).tolist()) == [0, 0, 0, 1, 1]
    assert batches[0][0].shape == (2, 3, 80, 80)


def test_the_table_and_the_file_hold_the_same_rows(tmp_path, capsys):
    words = f"--quick --repeats 1 --device cpu --rows heads step --json {tmp_path / 'out.json'}"
    result = benchmark.main(benchmark.parse_args(words.split()))
    saved = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in saved["rows"]] == [row["name"] for row in result["rows"]]
    lines = capsys.readouterr().out.splitlines()[2:]
    assert len(lines) == len(saved["rows"]) == 10 + 5
    for line, row in zip(lines, saved["rows"], strict=True):
        assert row["name"] in line
        assert all(math.isfinite(ratio) and ratio > 0 for ratio in row["ratios"])
    assert saved["threads"] == torch.get_num_threads()
    generating = saved["rows"][-1]["figures"]
    assert generating["generated rows a step"] > 0
    assert 0 < generating["extra layers, % of operations"] < 100


def test_an_unknown_group_is_refused(capsys):
    with pytest.raises(SystemExit) as error:
        benchmark.parse_args(["--rows", "nothing"])
    assert error.value.code == 2
    assert "'nothing'" in capsys.readouterr().err
