"""The recipes, through the parser that reads them."""

from pathlib import Path

import pytest

import imagenet_lt_train
from data.build import sampler_of
from engine.optim import learning_rate
from losses import build_objective
from rsg import generates

RECIPES = sorted((Path(__file__).resolve().parents[1] / "scripts" / "recipes").glob("*.txt"))
COUNTS = [5000, 500, 50]
OBJECTIVES = {
    "cifar_ce": "1 CE(linear)",
    "cifar_ldam_drw": "1 LDAM(normed; CB weights)",
    "cifar_rsg": "1 LDAM(normed; CB weights) + 0.1 CESC + 0.01 MV",
    "cifar_mixup_drw": "1 CE(linear; CB weights)",
    "cifar_best": "1 logit-adjusted CE(normed) + 0.35 balanced SupCon(projections)",
    "cifar_best_x4": "1 logit-adjusted CE(normed) + 0.35 balanced SupCon(projections)",
    "mini_imagenet": "1 logit-adjusted CE(normed)",
    "any_folder": "1 logit-adjusted CE(normed)",
    "original": "0.1 LDAM(normed; ICF weights) + 0.9 SupCon(features) + 0.1 CESC + 0.01 MV",
}
SETTING_S = ("cifar_ce", "cifar_ldam_drw", "cifar_rsg", "cifar_mixup_drw")


def parse(name: str, *more: str):
    (path,) = [path for path in RECIPES if path.stem == name]
    return imagenet_lt_train.parse_args([f"@{path}", *more])


def test_the_recipes_are_the_ones_that_are_known():
    assert {path.stem for path in RECIPES} == OBJECTIVES.keys()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_recipe_parses_without_a_warning_and_minimises_what_it_says(name, capsys):
    args = parse(name)
    assert capsys.readouterr().err == ""
    assert str(build_objective(args, COUNTS)) == OBJECTIVES[name]


@pytest.mark.parametrize(
    ("name", "words", "off"),
    [("cifar_mixup_drw", "--mixup 0", {"mixup": 0}), ("cifar_best", "--augment --lr 1", {"augment": [], "lr": 1})],
)
def test_what_a_recipe_switches_on_can_be_switched_off(name, words, off):
    assert vars(parse(name, *words.split())) == vars(parse(name)) | off


def test_the_wide_recipe_differs_from_cifar_best_in_its_network_alone():
    assert vars(parse("cifar_best_x4")) == vars(parse("cifar_best")) | {"arch": "resnet32_x4"}


def test_the_original_recipe_is_the_defaults_at_224_px():
    changed = {"img_size": 224}
    assert vars(parse("original")) == vars(imagenet_lt_train.parse_args([])) | changed


@pytest.mark.parametrize("name", SETTING_S)
def test_the_cifar_baselines_follow_the_fields_setting(name):
    args = parse(name)
    assert (args.arch, args.epochs, args.batch_size, args.lr, args.wd) == ("resnet32", 200, 128, 0.1, 2e-4)
    rates = [learning_rate(args, epoch) for epoch in (0, 4, 5, 159, 160, 179, 180)]
    assert rates == pytest.approx([0.02, 0.1, 0.1, 0.1, 1e-3, 1e-3, 1e-5])
    assert (args.augment, args.hflip, sampler_of(args, 199)) == ([], None, "uniform")


def test_deferred_sampling_begins_at_its_share_of_the_epochs():
    args = imagenet_lt_train.parse_args(["--drs_epoch", "0.8", "--epochs", "10", "--ldam_weight_type", "none"])
    assert [sampler_of(args, epoch) for epoch in (1, 7, 8)] == ["uniform", "uniform", "balanced"]


@pytest.mark.parametrize(("epochs", "start"), [(200, 160), (30, 24)])
def test_a_shorter_run_keeps_the_proportions(epochs, start):
    args = parse("cifar_rsg", "--epochs", str(epochs))
    for epoch, begun in ((start - 1, False), (start, True)):
        assert ("CB weights" in str(build_objective(args, COUNTS, epoch))) is begun
        assert generates(args, epoch) is begun
        assert (learning_rate(args, epoch) < 0.01) is begun
    assert (args.ldam_max_margin, args.cbl_beta, args.norm_scale) == (0.5, 0.9999, 30)
