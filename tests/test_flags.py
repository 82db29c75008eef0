"""The command line: booleans, ranges, files of flags, and every prescribed flag with its default."""

import argparse
from pathlib import Path

import pytest

import imagenet_lt_test
import imagenet_lt_train
from engine.flags import Parser, add_switch, epoch_or_share, number_in, resolved_epoch


def parser() -> Parser:
    parser = Parser("of a test")
    add_switch(parser, "--on", True, "help")
    add_switch(parser, "--off", False, "help")
    parser.add_argument("--share", type=number_in(0, 1))
    parser.add_argument("--decay", type=number_in(0, 1, open_high=True))
    parser.add_argument("--rate", type=number_in(0, open_low=True))
    parser.add_argument("--count", type=number_in(2, kind=int))
    parser.add_argument("--many", type=float, nargs="+")
    parser.add_argument("--word", help="default: in words")
    return parser


def parse(*words: str) -> argparse.Namespace:
    return parser().parse_args(words)


def refused(capsys, *words: str) -> str:
    """What is said in one line, with exit code 2."""
    with pytest.raises(SystemExit) as error:
        parse(*words)
    assert error.value.code == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert not captured.out
    assert line.startswith("error: ")
    assert line.endswith("(see --help)")
    return line


# --- booleans


def test_a_switch_that_is_not_given_is_its_default():
    assert (parse().on, parse().off) == (True, False)


@pytest.mark.parametrize("flag", ["--on", "--off"])
def test_a_bare_switch_is_on(flag):
    assert vars(parse(flag))[flag.strip("-")] is True


@pytest.mark.parametrize("word", ["True", "true", "TRUE", "1"])
def test_words_that_switch_on(word):
    assert parse("--off", word).off is True
    assert parse(f"--off={word}").off is True


@pytest.mark.parametrize("word", ["False", "false", "FALSE", "0"])
def test_words_that_switch_off(word):
    assert parse("--on", word).on is False
    assert parse(f"--on={word}").on is False


@pytest.mark.parametrize("word", ["perhaps", "2", "None", "", "yes", "no", "tru", "-1"])
def test_other_words_are_refused_by_name(word, capsys):
    line = refused(capsys, f"--on={word}")
    assert "--on" in line
    assert f"{word!r} is neither True nor False" in line


def test_a_bare_switch_does_not_swallow_the_next_flag():
    args = parse("--off", "--word", "x")
    assert (args.off, args.word) == (True, "x")


# --- numbers


@pytest.mark.parametrize(
    ("flag", "word", "value"),
    [("share", "0", 0), ("share", "1", 1), ("rate", "1e-9", 1e-9), ("rate", "1e9", 1e9), ("count", "2", 2)],
)
def test_the_ends_of_a_range_belong_to_it(flag, word, value):
    assert vars(parse(f"--{flag}", word))[flag] == value


@pytest.mark.parametrize(
    ("flag", "word", "bounds"),
    [
        ("share", "-0.1", "at least 0, at most 1"),
        ("share", "1.1", "at least 0, at most 1"),
        ("share", "nan", "at least 0, at most 1"),
        ("decay", "1", "at least 0, below 1"),
        ("decay", "-0.1", "at least 0, below 1"),
        ("decay", "nan", "at least 0, below 1"),
        ("rate", "0", "above 0"),
        ("rate", "-1", "above 0"),
        ("rate", "nan", "above 0"),
        ("count", "1", "at least 2, at most 1e+09"),
        ("count", "9" * 400, "at least 2, at most 1e+09"),
        ("rate", "inf", "above 0"),
    ],
)
def test_a_number_out_of_range_is_refused_with_the_range(flag, word, bounds, capsys):
    line = refused(capsys, f"--{flag}={word}")
    assert f"argument --{flag}: {word} is out of range: {bounds} " in line


@pytest.mark.parametrize(("flag", "word", "kind"), [("share", "half", "float"), ("count", "2.5", "int")])
def test_a_word_that_is_no_number_is_refused_by_kind(flag, word, kind, capsys):
    assert f"invalid {kind} value: {word!r}" in refused(capsys, f"--{flag}={word}")


@pytest.mark.parametrize(
    ("word", "epoch"), [("160", 160), ("0.8", 24), ("0.025", 1), ("0.", 0), ("1.0", 30), ("-1", -1), ("5e-05", 0)]
)
def test_an_epoch_with_a_point_is_a_share_of_all(word, epoch):
    args = argparse.Namespace(start=epoch_or_share(-1)(word), epochs=30)
    assert resolved_epoch(args, "start") == epoch


@pytest.mark.parametrize("word", ["1.5", "-2", "-0.1", "nan", "1e2", "half"])
def test_what_is_neither_an_epoch_nor_a_share_is_refused(word):
    with pytest.raises((ValueError, argparse.ArgumentTypeError)):
        epoch_or_share(-1)(word)


# --- errors


@pytest.mark.parametrize("words", [["--wor", "x"], ["--o"], ["stray"], ["--word"], ["--unknown", "1"]])
def test_abbreviations_strays_and_unknown_flags_are_refused(words, capsys):
    refused(capsys, *words)


def test_an_error_is_said_by_the_first_process_of_a_machine(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit, match="2"):
        parse("--unknown")
    assert capsys.readouterr().err == ""


def test_help_shows_the_description_and_every_default():
    text = parser().format_help()
    assert "of a test" in text
    assert "(default: True)" in text
    assert "(default: False)" in text
    assert "default: in words (" not in text


# --- files of flags


def test_flags_are_read_from_a_file_with_comments_quotes_and_blank_lines(tmp_path):
    recipe = tmp_path / "recipe.txt"
    recipe.write_text(
        "\N{BYTE ORDER MARK}# a recipe\n\n--on False  # off\n--many 1 2.5\n--word 'two words'\n--count=7\n"
    )
    args = parse(f"@{recipe}")
    assert (args.on, args.many, args.word, args.count) == (False, [1, 2.5], "two words", 7)


def test_a_flag_after_the_file_overrides_it_and_one_before_does_not(tmp_path):
    recipe = tmp_path / "recipe.txt"
    recipe.write_text("--count 7\n")
    assert parse(f"@{recipe}", "--count", "9").count == 9
    assert parse("--count", "9", f"@{recipe}").count == 7


def test_a_file_may_name_another(tmp_path):
    (tmp_path / "inner.txt").write_text("--count 7\n")
    (tmp_path / "outer.txt").write_text(f"@{tmp_path / 'inner.txt'}\n--word x\n")
    args = parse(f"@{tmp_path / 'outer.txt'}")
    assert (args.count, args.word) == (7, "x")


def test_a_file_that_is_missing_or_wrong_is_one_line(tmp_path, capsys):
    assert "missing.txt" in refused(capsys, f"@{tmp_path / 'missing.txt'}")
    (tmp_path / "wrong.txt").write_text("--count 1\n")
    assert "at least 2" in refused(capsys, f"@{tmp_path / 'wrong.txt'}")


# --- what is prescribed


PRESCRIBED = {  # every spelling: the default
    "--data_dir": Path("data/mini-ImageNet"),
    "--cls_num": None,
    "--epochs": 20,
    "-b --batch_size --batch-size": 32,
    "--lr --learning-rate": 1e-3,
    "--momentum": 0.9,
    "--wd --weight_decay --weight-decay": 5e-4,
    "-j --workers": 4,
    "--start_epoch --start-epoch": 0,
    "-p --print_freq --print-freq": 10,
    "--seed": None,
    "--root_log": Path("log"),
    "--root_model": Path("checkpoint"),
    "-a --arch": "resnext50_32x4d",
    "--norm_out": True,
    "--add_rsg": True,
    "--head_tail_ratio": 0.2,
    "--epoch_thresh": None,
    "--cbl_beta": 0.999,
    "--ldam_weight_type": "icf",
    "--ldam_loss_weight": 0.1,
    "--supcon_loss_weight": 0.9,
    "--add_cross_entropy_loss": False,
    "--add_ldam_loss": True,
    "--add_focal_loss": False,
    "--add_supcon_loss": True,
    "--add_arc_margin_loss": False,
    "--add_add_margin_loss": False,
    "--add_sphere_loss": False,
}
ADDED = {
    "--norm_scale": 30,
    "--arc_scale": 30,
    "--arc_margin": 0.5,
    "--am_scale": 30,
    "--am_margin": 0.35,
    "--sphere_margin": 4,
    "--sphere_lambda_min": 5,
    "--ldam_max_margin": 0.3,
    "--focal_gamma": 2,
    "--supcon_temperature": 0.07,
    "--supcon_views": 1,
    "--supcon_projection_dim": 0,
    "--supcon_generated": "all",
    "--rsg_centers": 15,
    "--rsg_contrast_dim": 256,
    "--rsg_strength": 1,
    "--rsg_center_lr": None,
    "--rsg_cesc_weight": 0.1,
    "--rsg_mv_weight": 0.01,
    "--device": "auto",
    "--max_steps": None,
    "--clip_grad_norm": None,
    "--accumulate_steps": 1,
    "--stem": "imagenet",
    "--neck": None,
    "--img_size": None,
    "--normalize": "imagenet",
    "--hflip": None,
    "--sampler": None,
    "--drw_epoch": None,
    "--drs_epoch": None,
    "--cross_entropy_weight_type": "none",
    "--focal_weight_type": "none",
    "--lr_schedule": "exponential",
    "--lr_decay": 0.9,
    "--lr_milestones": [0.8, 0.9],
    "--lr_factor": 0.01,
    "--warmup_epochs": 0,
    "--cache_limit": 2e9,
    "--resume": False,
    "--run_name": None,
    "--save_every_steps": None,
    "--add_logit_adjusted_loss": False,
    "--logit_adjust_tau": 1,
    "--logit_adjusted_weight_type": "none",
    "--label_smoothing": 0,
    "--supcon_balance": False,
    "--augment": [],
    "--mixup": None,
    "--cutmix": None,
    "--optimizer": "sgd",
    "--nesterov": False,
    "--backbone_lr": None,
    "--ema_decay": None,
    "--precise_bn": False,
    "--freeze_backbone": False,
}
TEST_SCRIPT = {
    "--data_dir": None,
    "--model_dir": "ImageNet_LT_CIFAR10_resnext50_32x4d_normout_rsg_ldam_supcon",
    "--root_model": Path("checkpoint"),
    "--device": "auto",
    "--split": "test",
    "--weights": None,
    "--predict_with": None,
    "--shot_thresholds": [100, 20],
}


def defaults(script, table: dict) -> dict:
    """What ``script`` takes each flag of ``table`` to be when nothing is said."""
    args = script.parse_args([])
    return {flags: getattr(args, name_of(flags)) for flags in table}


def name_of(flags: str) -> str:
    return next(flag for flag in flags.split() if flag.startswith("--")).strip("-")


def test_every_prescribed_flag_has_its_default():
    assert defaults(imagenet_lt_train, PRESCRIBED) == PRESCRIBED


def test_every_added_flag_has_its_default():
    assert defaults(imagenet_lt_train, ADDED) == ADDED


def test_every_flag_of_the_test_script_has_its_default():
    assert defaults(imagenet_lt_test, TEST_SCRIPT) == TEST_SCRIPT


ANOTHER_VALUE = {"-b": 6, "--lr": 0.5, "--wd": 0.25, "-j": 2, "--start_epoch": 3, "-p": 7, "-a": "resnet32"}


@pytest.mark.parametrize("flags", [flags for flags in PRESCRIBED if " " in flags])
def test_every_spelling_of_a_flag_sets_it(flags):
    value = ANOTHER_VALUE[flags.split()[0]]
    for spelling in flags.split():
        assert getattr(imagenet_lt_train.parse_args([spelling, str(value)]), name_of(flags)) == value


@pytest.mark.parametrize("flags", [flags for flags, value in (PRESCRIBED | ADDED).items() if isinstance(value, bool)])
def test_every_prescribed_switch_goes_both_ways(flags):
    for word, value in (("True", True), ("False", False)):
        assert getattr(imagenet_lt_train.parse_args([flags, word]), name_of(flags)) is value
    assert getattr(imagenet_lt_train.parse_args([flags]), name_of(flags)) is True


@pytest.mark.parametrize("script", [imagenet_lt_train, imagenet_lt_test])
def test_parsing_twice_gives_the_same(script):
    assert script.parse_args([]) == script.parse_args([])
