import pytest
import torch
import torch.nn.functional as F

from engine.errors import Refused
from engine.flags import Parser
from losses import (
    CLASSIFICATION_LOSSES,
    SupConLoss,
    add_loss_flags,
    build_objective,
    check_loss_flags,
    class_balanced_weights,
    inverse_frequency_weights,
    predicts_by_class_means,
)
from losses.objective import Objective
from models import add_model_flags, build_model
from models.classifier import Output
from models.heads import MARGIN_HEADS
from rsg import add_rsg_flags

COUNTS = [40, 9, 4, 2]
MARGIN_HEADS_ON = "--add_arc_margin_loss --add_add_margin_loss --add_sphere_loss"
CLASSIFICATION_OFF = "--add_ldam_loss 0"
EVERYTHING_ON = f"--add_cross_entropy_loss --add_focal_loss {MARGIN_HEADS_ON} --supcon_projection_dim 5"


def flags(words=""):
    parser = Parser("test")
    for add_flags in (add_model_flags, add_rsg_flags, add_loss_flags):
        add_flags(parser)
    return parser.parse_args(["--arch", "resnet32", *words.split()])


def text_of(words="", epoch=None):
    return str(build_objective(flags(words), COUNTS, epoch))


def model_and_output(words="", generating=True):
    """The model that the flags describe and its output for 7 images, two of the head class."""
    args = flags(words)
    model = build_model(args, COUNTS, args.add_rsg)
    if args.add_rsg:
        model.generator.generating = generating
    return model, model(torch.randn(7, 3, 32, 32), torch.tensor([0, 1, 2, 3, 0, 1, 2]))


# What it prints


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "0.1 LDAM(normed; ICF weights) + 0.9 SupCon(features) + 0.1 CESC + 0.01 MV"),
        ("--add_rsg False", "0.1 LDAM(normed; ICF weights) + 0.9 SupCon(features)"),
        ("--add_rsg False --add_supcon_loss False", "0.1 LDAM(normed; ICF weights)"),
        ("--add_rsg False --add_ldam_loss False", "0.9 SupCon(features)"),
        ("--norm_out False --add_rsg False", "0.1 LDAM(linear; ICF weights) + 0.9 SupCon(features)"),
        ("--ldam_weight_type cbl --add_rsg 0 --add_supcon_loss 0", "0.1 LDAM(normed; CB weights)"),
        ("--ldam_weight_type none --add_rsg 0 --add_supcon_loss 0", "0.1 LDAM(normed)"),
        (
            "--add_ldam_loss 0 --add_supcon_loss 0 --add_rsg 0 --add_focal_loss --focal_weight_type cbl",
            "1 focal(normed; CB weights)",
        ),
        (
            "--add_ldam_loss 0 --add_supcon_loss 0 --add_cross_entropy_loss --cross_entropy_loss_weight .5",
            "0.5 CE(normed) + 0.1 CESC + 0.01 MV",
        ),
        (
            "--add_ldam_loss 0 --add_supcon_loss 0 --add_rsg 0 --add_arc_margin_loss",
            "1 CE(normed) + 1 CE(arc)",
        ),
        (
            f"--add_ldam_loss 0 --add_rsg 0 {MARGIN_HEADS_ON} --norm_out 0",
            "1 CE(linear) + 1 CE(arc) + 1 CE(add) + 1 CE(sphere) + 0.9 SupCon(features)",
        ),
        (
            "--add_arc_margin_loss --add_focal_loss --add_rsg 0 --add_supcon_loss 0",
            "0.1 LDAM(normed; ICF weights) + 1 focal(normed) + 0.1 LDAM(arc; ICF weights) + 1 focal(arc)",
        ),
        (
            "--supcon_generated keys --rsg_cesc_weight 0 --rsg_mv_weight .5",
            "0.1 LDAM(normed; ICF weights) + 0.9 SupCon(features; generated rows as keys) + 0.5 MV",
        ),
        ("--supcon_generated keys --add_rsg 0", "0.1 LDAM(normed; ICF weights) + 0.9 SupCon(features)"),
        (
            "--supcon_generated none --supcon_loss_weight 2",
            "0.1 LDAM(normed; ICF weights) + 2 SupCon(features; real rows) + 0.1 CESC + 0.01 MV",
        ),
        (
            "--add_ldam_loss 0 --add_rsg 0 --add_logit_adjusted_loss --supcon_balance --supcon_loss_weight .35",
            "1 logit-adjusted CE(normed) + 0.35 balanced SupCon(features)",
        ),
    ],
)
def test_the_objective_prints_the_formula_that_the_flags_mean(words, expected):
    assert text_of(words) == expected


def test_with_everything_on_each_classification_loss_stands_once_for_each_head():
    text = text_of(EVERYTHING_ON)
    for title in ("1 CE(normed)", "1 CE(arc)", "1 CE(add)", "1 CE(sphere)", "1 focal(normed)", "1 focal(sphere)"):
        assert text.count(title) == 1
    assert text.count("0.1 LDAM(") == 4
    assert text.endswith("+ 0.1 CESC + 0.01 MV")


def test_class_weights_are_off_before_the_drw_epoch():
    words = "--drw_epoch 3 --add_rsg 0 --add_supcon_loss 0"
    assert text_of(words, epoch=2) == "0.1 LDAM(normed)"
    assert text_of(words, epoch=3) == text_of(words, epoch=9) == text_of(words) == "0.1 LDAM(normed; ICF weights)"


def test_the_flags_of_the_losses_reach_them():
    on = "--add_cross_entropy_loss --add_focal_loss --add_logit_adjusted_loss"
    words = "--label_smoothing .2 --ldam_max_margin .5 --focal_gamma 1 --logit_adjust_tau 2 --supcon_temperature .1"
    objective = build_objective(flags(f"{on} {words}"), COUNTS)
    cross_entropy, ldam, focal, adjusted = (term.loss_fn for term in objective.head_terms)
    smoothed = (cross_entropy, ldam.cross_entropy, adjusted.cross_entropy)
    assert [loss.label_smoothing for loss in smoothed] == [0.2] * 3
    assert ldam.margins.max() == 0.5
    assert focal.gamma == 1
    torch.testing.assert_close(adjusted.adjustments, 2 * (torch.tensor(COUNTS) / sum(COUNTS)).log())
    assert objective.supcon.temperature == 0.1


# What it computes


def parts_by_hand(args, output, weight_of):
    """name -> (factor, value) of every term, with the losses written out."""
    targets, counts, terms = output.targets, torch.tensor(COUNTS), {}
    for head, logits in output.logits.items():
        margins = torch.zeros_like(logits)
        for row, target in enumerate(targets):
            margins[row, target] = 0.3 * (2 / counts[target]) ** 0.25
        p = logits.softmax(1)[torch.arange(len(targets)), targets]
        terms[f"cross_entropy_{head}"] = (1, F.cross_entropy(logits, targets, weight_of("cross_entropy")))
        shifted = logits - output.scales[head] * margins
        terms[f"ldam_{head}"] = (0.1, F.cross_entropy(shifted, targets, weight_of("ldam")))
        focal = (1 - p) ** 2 * F.cross_entropy(logits, targets, reduction="none")
        alpha = weight_of("focal")
        terms[f"focal_{head}"] = (1, (focal if alpha is None else alpha[targets] * focal).mean())
    terms["supcon"] = (0.9, SupConLoss(0.07)(output.auxiliary["projections"], targets))
    for name, factor in (("centre", 0.1), ("contrast", 0.1), ("mv", 0.01)):
        terms[name] = (factor, output.auxiliary[name])
    return terms


@pytest.mark.parametrize("generating", [False, True])
def test_with_everything_on_the_loss_is_the_sum_of_its_parts_computed_by_hand(generating):
    words = f"{EVERYTHING_ON} --focal_weight_type icf"
    _, output = model_and_output(words, generating)
    icf = inverse_frequency_weights(COUNTS)
    terms = parts_by_hand(flags(words), output, {"cross_entropy": None, "ldam": icf, "focal": icf}.get)
    loss, parts = build_objective(flags(words), COUNTS)(output, 7)
    assert parts.keys() == terms.keys()
    for name, (_, value) in terms.items():
        torch.testing.assert_close(parts[name], value.detach(), rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(loss, sum(factor * value for factor, value in terms.values()), rtol=1e-4, atol=1e-5)


def test_cesc_is_centre_and_contrast_under_one_factor_and_mv_has_its_own():
    parts = {"centre": torch.tensor(3.0), "contrast": torch.tensor(5.0), "mv": torch.tensor(11.0)}
    loss, _ = Objective([], cesc_factor=2.0, mv_factor=7.0)(Output(torch.zeros(1, 2), {}, {}, None, parts), 1)
    assert loss == 2 * (3 + 5) + 7 * 11


def test_the_weight_type_of_a_loss_chooses_its_class_weights_and_cbl_takes_its_beta():
    words = "--add_cross_entropy_loss --cross_entropy_weight_type cbl --cbl_beta .9 --add_ldam_loss 0 --add_rsg 0"
    _, output = model_and_output(words)
    _, parts = build_objective(flags(words), COUNTS)(output, 7)
    weight = class_balanced_weights(COUNTS, 0.9)
    torch.testing.assert_close(
        parts["cross_entropy_main"], F.cross_entropy(output.logits["main"], output.targets, weight).detach()
    )


def test_before_the_drw_epoch_the_loss_is_the_unweighted_one():
    words = (
        "--add_cross_entropy_loss --add_focal_loss --cross_entropy_weight_type icf --focal_weight_type cbl --add_rsg 0"
    )
    _, output = model_and_output(words)
    unweighted = words.replace("icf", "none").replace("cbl", "none") + " --ldam_weight_type none"
    before, _ = build_objective(flags(f"{words} --drw_epoch 5"), COUNTS, epoch=4)(output, 7)
    after, _ = build_objective(flags(f"{words} --drw_epoch 5"), COUNTS, epoch=5)(output, 7)
    assert torch.equal(before, build_objective(flags(unweighted), COUNTS)(output, 7)[0])
    assert torch.equal(after, build_objective(flags(words), COUNTS)(output, 7)[0])
    assert before != after


@pytest.mark.parametrize("head", MARGIN_HEADS)
def test_a_margin_head_without_a_classification_loss_trains_with_cross_entropy_and_so_does_the_main_head(head):
    words = f"--{MARGIN_HEADS[head][0]} --add_ldam_loss 0 --add_supcon_loss 0 --add_rsg 0"
    model, output = model_and_output(words)
    loss, parts = build_objective(flags(words), COUNTS)(output, 7)
    expected = [F.cross_entropy(output.logits[name], output.targets) for name in ("main", head)]
    torch.testing.assert_close(loss, sum(expected))
    assert list(parts) == ["cross_entropy_main", f"cross_entropy_{head}"]
    loss.backward()
    assert model.heads[head].weight.grad.any()
    assert model.heads["main"].weight.grad.any()


@pytest.mark.parametrize("name", CLASSIFICATION_LOSSES)
def test_every_classification_loss_builds_from_default_flags_and_trains_backbone_and_head(name):
    words = f"--add_ldam_loss 0 --add_supcon_loss 0 --add_rsg 0 --add_{name}_loss"
    model, output = model_and_output(words)
    loss, parts = build_objective(flags(words), COUNTS)(output, 7)
    loss.backward()
    assert list(parts) == [f"{name}_main"]
    assert model.heads["main"].weight.grad.any()
    assert model.backbone.lower[0].weight.grad.any()


def test_a_factor_multiplies_its_own_part():
    words = "--add_rsg 0 --ldam_loss_weight 3 --supcon_loss_weight 5 --add_focal_loss --focal_loss_weight 7"
    _, output = model_and_output(words)
    loss, parts = build_objective(flags(words), COUNTS)(output, 7)
    torch.testing.assert_close(loss, 3 * parts["ldam_main"] + 5 * parts["supcon"] + 7 * parts["focal_main"])


def test_ldam_is_told_the_scale_of_each_head():
    words = f"--norm_scale 20 --arc_scale 10 {MARGIN_HEADS_ON} --ldam_weight_type none --add_supcon_loss 0 --add_rsg 0"
    _, output = model_and_output(words)
    _, parts = build_objective(flags(words), COUNTS)(output, 7)
    for head, scale in (("main", 20), ("arc", 10), ("add", 30), ("sphere", output.features.norm(dim=1))):
        margins = 0.3 * (2 / torch.tensor(COUNTS)[output.targets]) ** 0.25 * scale
        shifted = output.logits[head] - margins[:, None] * F.one_hot(output.targets, 4)
        torch.testing.assert_close(parts[f"ldam_{head}"], F.cross_entropy(shifted, output.targets).detach())


def test_without_the_generator_its_losses_have_no_part():
    _, output = model_and_output("--add_rsg 0")
    assert build_objective(flags("--add_rsg 0"), COUNTS)(output, 7)[1].keys() == {"ldam_main", "supcon"}


def test_supcon_sees_the_features_or_the_projections():
    for words, rows_of in (
        ("", lambda o: o.features),
        ("--supcon_projection_dim 5", lambda o: o.auxiliary["projections"]),
    ):
        _, output = model_and_output(words)
        parts = build_objective(flags(words), COUNTS)(output, 7)[1]
        torch.testing.assert_close(parts["supcon"], SupConLoss(0.07)(rows_of(output), output.targets).detach())


@pytest.mark.parametrize("generated", ["all", "keys", "none"])
@pytest.mark.parametrize("projection", [0, 5])
def test_balanced_supcon_takes_the_classifiers_weights_as_prototypes(generated, projection):
    words = f"--supcon_balance --supcon_generated {generated} --supcon_projection_dim {projection}"
    model, output = model_and_output(words)
    loss = build_objective(flags(words), COUNTS).supcon_loss(output, 7)
    weight = model.heads["main"].weight
    rows, prototypes = output.features, weight
    if projection:
        rows, prototypes = output.auxiliary["projections"], model.prototypes(prototypes)
        assert model.prototypes is not model.projection
    rows = rows if generated != "none" else rows[:7]
    expected = SupConLoss(0.07)(
        rows, output.targets[: len(rows)], 7 if generated == "keys" else None, prototypes=prototypes
    )
    torch.testing.assert_close(loss, expected)
    own, by_hand = (torch.autograd.grad(each, weight, retain_graph=True)[0] for each in (loss, expected))
    assert by_hand.any()
    torch.testing.assert_close(own, by_hand)


def test_every_classification_loss_of_mixed_images_is_that_of_both_targets_in_their_shares():
    words = (
        f"--add_cross_entropy_loss --add_focal_loss --add_logit_adjusted_loss {MARGIN_HEADS_ON} --add_rsg 0 "
        "--add_supcon_loss 0 --cross_entropy_weight_type icf"
    )
    model = build_model(flags(words), COUNTS, False).eval()
    images, targets, others = torch.randn(5, 3, 32, 32), torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 2, 3, 0, 0])
    objective = build_objective(flags(words), COUNTS)
    loss, parts = objective(model(images, targets, others), 5, 0.3)
    (one, parts_of_one), (other, parts_of_other) = (objective(model(images, each), 5) for each in (targets, others))
    torch.testing.assert_close(loss, 0.3 * one + 0.7 * other)
    assert len(parts) == 16  # four losses on four heads
    for part, value in parts.items():
        torch.testing.assert_close(value, 0.3 * parts_of_one[part] + 0.7 * parts_of_other[part])
        assert parts_of_one[part] != parts_of_other[part]


def test_parts_carry_no_graph():
    _, output = model_and_output()
    assert not any(value.requires_grad for value in build_objective(flags(), COUNTS)(output, 7)[1].values())


def test_twenty_steps_with_the_generator_overfit_one_batch():
    words = "--ldam_loss_weight 1 --ldam_weight_type none"  # ICF weights would leave the head class for later
    model, objective = model_and_output(words)[0], build_objective(flags(words), COUNTS)
    images, targets = torch.randn(8, 3, 16, 16), torch.arange(4).repeat(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(20):
        output = model(images, targets)
        loss, _ = objective(output, 8)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(output.logits["main"][:8].argmax(1), targets)


# What it refuses and warns of


def test_no_loss_on_is_refused():
    with pytest.raises(Refused, match="no loss is on"):
        check_loss_flags(flags("--add_ldam_loss 0 --add_supcon_loss 0"), "uniform")


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--add_supcon_loss 0 --supcon_balance", "which is off"),
        ("--add_ldam_loss 0 --supcon_balance", "as prototypes"),
        ("--add_ldam_loss 0 --freeze_backbone", "nothing to train"),
    ],
)
def test_what_needs_a_loss_that_is_off_is_refused(words, reason):
    with pytest.raises(Refused, match=reason):
        check_loss_flags(flags(words), "uniform")


@pytest.mark.parametrize(
    ("words", "sampler", "number"),
    [
        ("--ldam_weight_type none", "balanced", 1),
        ("--ldam_weight_type none", "uniform", 0),
        ("--ldam_weight_type none --logit_adjust_tau 0", "balanced", 0),
        ("--logit_adjusted_weight_type icf", "uniform", 1),
        ("--logit_adjusted_weight_type icf", "sqrt", 2),
    ],
)
def test_a_logit_adjusted_loss_beside_another_correction_warns(words, sampler, number):
    warnings = check_loss_flags(flags(f"--add_logit_adjusted_loss {words}"), sampler)
    assert len(warnings) == number
    assert all("corrected twice" in warning and "logit" in warning for warning in warnings)


def test_a_loss_of_factor_0_is_not_warned_about():
    words = "--norm_out 0 --ldam_loss_weight 0 --add_cross_entropy_loss --add_logit_adjusted_loss"
    assert check_loss_flags(flags(f"{words} --logit_adjusted_loss_weight 0"), "balanced") == []


def test_class_balanced_weights_of_beta_0_are_none_in_words_too():
    words = "--ldam_weight_type cbl --cbl_beta 0 --add_supcon_loss 0 --add_rsg 0"
    assert str(build_objective(flags(words), [5, 2])) == "0.1 LDAM(normed)"


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        ("--add_ldam_loss 0", "nearest class mean"),
        ("--ldam_loss_weight 0", "nearest class mean"),
        ("--norm_out False", "Linear head"),
        ("", None),
        ("--add_ldam_loss 0 --add_arc_margin_loss", None),
        ("--norm_out False --add_ldam_loss 0 --add_focal_loss", None),
        ("--add_ldam_loss 0 --add_focal_loss --label_smoothing .1", "--label_smoothing changes nothing"),
        ("--add_ldam_loss 0 --add_arc_margin_loss --label_smoothing .1", None),
    ],
)
def test_doubtful_flags_warn(words, warning):
    warnings = check_loss_flags(flags(words), "uniform")
    assert len(warnings) == (warning is not None)
    assert all(warning in text for text in warnings)


def test_class_means_predict_when_no_loss_trains_a_classifier():
    assert predicts_by_class_means(flags("--add_ldam_loss 0"))
    assert predicts_by_class_means(flags("--ldam_loss_weight 0"))
    assert not predicts_by_class_means(flags("--add_ldam_loss 0 --add_sphere_loss"))
    assert not predicts_by_class_means(flags())


@pytest.mark.parametrize(
    "words",
    [
        "--focal_gamma -1",
        "--supcon_temperature 0",
        "--supcon_views 3",
        "--ldam_weight_type cb",
        "--ldam_loss_weight -1",
    ],
)
def test_a_value_that_cannot_be_is_an_error_of_the_command_line(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        flags(words)
    assert words.split()[0] in capsys.readouterr().err
