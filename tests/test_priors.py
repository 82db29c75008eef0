"""Priors: what the flags of a run imply, by hand, and files that state one."""

import os

import numpy as np
import pytest

from engine.errors import Refused
from engine.options import train_parser
from engine.priors import model_prior, read_prior, training_prior
from engine.record import real_class_counts
from losses import CrossEntropyLoss

CLASSES, COUNTS = ["common", "house finch", "rare"], [90, 9, 1]
TRAIN, UNIFORM = [0.9, 0.09, 0.01], [1 / 3] * 3
CE = ["--add_ldam_loss", "False", "--add_cross_entropy_loss"]
ICF = 3 / np.array(COUNTS) / (1 / np.array(COUNTS)).sum()  # focal is a mean over rows: its weights have any sum
CB = np.array([90, 9, 1]) * (1 - 0.9) / (1 - 0.9 ** np.array([90, 9, 1]))  # beta 0.9


def recorded(*flags, counts=COUNTS, **more) -> dict:
    return {"flags": vars(train_parser().parse_args(["--epochs", "10", *flags])), "class_counts": counts, **more}


@pytest.mark.parametrize(
    ("flags", "head", "epoch", "expected"),
    [
        (CE, "main", 9, TRAIN),
        (CE, "mean", 9, TRAIN),
        (CE, "ncm", 9, UNIFORM),
        ([*CE, "--sampler", "balanced"], "main", 9, UNIFORM),
        ([*CE, "--sampler", "sqrt"], "main", 9, np.sqrt(COUNTS) / np.sqrt(COUNTS).sum()),
        ([*CE, "--cross_entropy_weight_type", "icf"], "main", 9, UNIFORM),
        ([*CE, "--cross_entropy_weight_type", "cbl", "--cbl_beta", "0.9"], "main", 9, CB / CB.sum()),
        ([*CE, "--cross_entropy_weight_type", "icf", "--drw_epoch", "5"], "main", 4, TRAIN),
        ([*CE, "--cross_entropy_weight_type", "icf", "--drw_epoch", "5"], "main", 5, UNIFORM),
        ([*CE, "--drs_epoch", "5"], "main", 4, TRAIN),
        ([*CE, "--drs_epoch", "5"], "main", 5, UNIFORM),
        (["--add_cross_entropy_loss", "--ldam_loss_weight", "3"], "main", 9, (3 * np.array(UNIFORM) + TRAIN) / 4),
        (["--add_ldam_loss", "False", "--add_arc_margin_loss"], "arc", 9, TRAIN),
        (["--add_ldam_loss", "False", "--add_logit_adjusted_loss"], "main", 9, UNIFORM),
        (
            ["--add_ldam_loss", "0", "--add_logit_adjusted_loss", "--logit_adjust_tau", "0.5"],
            "main",
            9,
            np.sqrt(COUNTS),
        ),
        ([*CE, "--add_focal_loss", "--focal_weight_type", "icf"], "main", 9, np.array(TRAIN) + np.array(TRAIN) * ICF),
    ],
)
def test_the_prior_of_a_model_is_what_its_training_implies(flags, head, epoch, expected):
    np.testing.assert_allclose(model_prior(recorded(*flags), head, epoch), expected / np.sum(expected), rtol=1e-6)


def test_a_logit_adjusted_loss_beside_another_has_no_prior():
    with pytest.raises(Refused, match="no prior that is known"):
        model_prior(recorded(*CE, "--add_logit_adjusted_loss"), "main", 9)


def test_a_loss_that_does_not_say_so_has_no_prior(monkeypatch):
    monkeypatch.delattr(CrossEntropyLoss, "mean_over")
    with pytest.raises(Refused, match=r"of CE\(linear\) it is not known which prior"):
        model_prior(recorded(*CE, "--norm_out", "False"), "main", 9)


def test_label_smoothing_leaves_no_prior_but_in_focal():
    with pytest.raises(Refused, match="label_smoothing"):
        model_prior(recorded(*CE, "--label_smoothing", "0.1"), "main", 9)
    focal = recorded("--add_ldam_loss", "False", "--add_focal_loss", "--label_smoothing", "0.1")
    np.testing.assert_allclose(model_prior(focal, "main", 9), TRAIN, rtol=1e-6)


def test_real_counts_are_without_synthetic_images_where_these_are_counted():
    record = {"class_counts": [90, 29, 6], "synthetic_counts": [0, 20, 5], "flags": {"count_synthetic": True}}
    assert real_class_counts(record) == [90, 9, 1]
    assert real_class_counts(record | {"flags": {"count_synthetic": False}}) == [90, 29, 6]


def test_the_training_prior_counts_synthetic_images_by_their_weight():
    flags = "--synthetic_weight", "0.5", "--count_synthetic"
    record = recorded(*flags, counts=[90, 29, 6], synthetic_counts=[0, 20, 5])
    np.testing.assert_allclose(training_prior(record), np.array([90, 19, 3.5]) / 112.5)


@pytest.mark.parametrize(
    ("flags", "counts", "made", "expected"),
    [
        ("--synthetic_weight 1", [90, 9, 1], [0, 81, 89], UNIFORM),
        ("--synthetic_weight 0.5", [90, 9, 1], [0, 2, 18], [0.8, 0.1 * 8 / 9, 0.1 * 8 / 9]),
        ("--synthetic_weight 1 --count_synthetic", [90, 90, 90], [0, 81, 89], UNIFORM),
        ("--synthetic_weight 0.5 --sampler balanced", [90, 9, 1], [0, 9, 1], np.array([4, 3, 3]) / 10),
        ("--synthetic_weight 0 --sampler balanced", [90, 9, 1], [0, 0, 0], UNIFORM),
    ],
)
def test_synthetic_images_count_by_their_weight_in_the_prior(flags, counts, made, expected):
    """By hand: 90, 9 + 1, 1 + 9 of 112.5 images and so on; half-weight rows make half of a class count 3/4."""
    record = recorded(*CE, *flags.split(), counts=counts, synthetic_counts=made)
    np.testing.assert_allclose(model_prior(record, "main", 9), np.array(expected) / np.sum(expected), rtol=1e-6)


@pytest.mark.parametrize(("word", "expected"), [("uniform", UNIFORM), ("train", TRAIN)])
def test_priors_have_names(word, expected):
    np.testing.assert_allclose(read_prior(word, CLASSES, COUNTS), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prior.txt", "rare 1\n\nhouse finch  2.5\ncommon 6.5\n"),
        ("prior.txt", "\N{BYTE ORDER MARK}common 65\nhouse finch 25\nrare 10\n"),
        ("prior.json", '{"rare": 10, "common": 65, "house finch": 25.0}'),
    ],
)
def test_a_file_gives_each_class_a_value_in_any_order(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    np.testing.assert_allclose(read_prior(str(tmp_path / name), CLASSES, COUNTS), [0.65, 0.25, 0.1], rtol=1e-12)


def test_a_class_whose_name_is_not_utf8_can_be_named(tmp_path):
    (tmp_path / "prior").write_bytes(b"caf\xe9 1\ntea 3\n")
    np.testing.assert_allclose(
        read_prior(str(tmp_path / "prior"), [os.fsdecode(b"caf\xe9"), "tea"], [1, 1]), [0.25, 0.75]
    )


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.txt", "common 1\nrare 1\n", "no value for house finch"),
        ("a.txt", "common 1\nrare 1\nhouse finch 1\nsparrow 1\n", "'sparrow', which is no class"),
        ("a.txt", "common 1\nrare 1\nhouse finch 1\nrare 2\n", "'rare' twice"),
        ("a.txt", "common 1\nrare\n", "line 2"),
        ("a.txt", "common 1\nrare 0\nhouse finch 1\n", "not a number above 0"),
        ("a.txt", "common 1\nrare -1\nhouse finch 1\n", "not a number above 0"),
        ("a.txt", "common 1\nrare nan\nhouse finch 1\n", "not a number above 0"),
        ("a.txt", "common 1\nrare inf\nhouse finch 1\n", "not a number above 0"),
        ("a.txt", "", "no value for common, house finch, rare"),
        ("a.json", '{"common": 1, "rare": "1", "house finch": 1}', "not a number above 0"),
        ("a.json", '{"common": 1, "rare": true, "house finch": 1}', "not a number above 0"),
        ("a.json", '{"common": 1, "rare": 1, "rare": 2, "house finch": 1}', "'rare' twice"),
        ("a.json", f'{{"common": 1{400 * "0"}, "rare": 1, "house finch": 1}}', "not a number above 0"),
        ("a.json", 100_000 * "[", "is not JSON"),
        ("a.json", "[1, 2, 3]", "no JSON object"),
        ("a.json", "{", "is not JSON"),
    ],
)
def test_a_file_that_states_no_prior_is_refused_in_one_line(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(Refused) as error:
        read_prior(str(tmp_path / name), CLASSES, COUNTS)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(Refused, match="uniform, or train"):
        read_prior(str(tmp_path / "none.txt"), CLASSES, COUNTS)
