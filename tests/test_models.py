import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from engine.errors import Refused
from engine.flags import Parser
from losses import add_loss_flags
from models import ARCHITECTURES, add_model_flags, build_model, check_model_flags, load_backbone_weights
from models.backbones import Backbone, Part, torchvision_resnet
from models.resnet_cifar import resnet_cifar
from rsg import add_rsg_flags

COUNTS = [9, 4, 2]


def flags(words=""):
    parser = Parser("test")
    for add_flags in (add_model_flags, add_rsg_flags, add_loss_flags):
        add_flags(parser)
    return parser.parse_args(words.split())


def millions(module):
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.fixture
def saved(tmp_path):
    """Saves an object with `torch.save` and returns the file."""

    def save(something, name="weights.pt") -> Path:
        torch.save(something, tmp_path / name)
        return tmp_path / name

    return save


# Architectures


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_builds_from_default_flags_and_says_its_sizes(arch):
    backbone = ARCHITECTURES[arch](flags(f"--arch {arch}")).eval()
    with torch.no_grad():
        maps = backbone.lower(torch.randn(1, 3, 32, 32))
        features = backbone.upper(maps)
    assert maps.shape[:2] == (1, backbone.map_channels)
    assert features.shape == (1, backbone.num_features)


@pytest.mark.parametrize(("width", "expected"), [(16, 0.47), (64, 7.41)])
def test_resnet32_has_the_parameters_of_its_papers_with_a_linear_head_of_100_classes(width, expected):
    backbone = resnet_cifar(32, width)
    assert round(millions(backbone) + millions(nn.Linear(backbone.num_features, 100)), 2) == expected


@pytest.mark.parametrize(("depth", "convolutions"), [(20, 19), (32, 31), (56, 55)])
def test_the_depth_of_a_cifar_network_counts_its_convolutions_and_the_head(depth, convolutions):
    layers = resnet_cifar(depth, 4).modules()
    assert sum(isinstance(layer, nn.Conv2d) for layer in layers) == convolutions


def test_the_convolutions_of_the_cifar_network_begin_with_the_deviation_of_he_et_al():
    for layer in resnet_cifar().modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.std().item() == pytest.approx((2 / layer.weight[0].numel()) ** 0.5, rel=0.15)


def test_the_cifar_network_cuts_32_px_images_at_16_px():
    backbone = resnet_cifar(32, 16)
    maps = backbone.lower(torch.randn(2, 3, 32, 32))
    assert maps.shape == (2, 32, 16, 16)
    assert backbone.upper[:-2](maps).shape == (2, 64, 8, 8)


def test_the_shortcut_of_a_cifar_block_takes_every_other_pixel_and_pads_the_channels_with_zeros():
    block = resnet_cifar(8, 4).lower[4].eval()  # the first of the second stage: 4 -> 8 channels
    nn.init.zeros_(block.bn2.weight)  # the shortcut alone is left
    maps = torch.rand(1, 4, 6, 6)
    out = block(maps)
    assert torch.equal(out[:, 2:6], maps[:, :, ::2, ::2])
    assert not out[:, :2].any()
    assert not out[:, 6:].any()


def test_a_cifar_block_is_two_convolutions_and_a_shortcut_written_out():
    block, maps = resnet_cifar(8, 4).lower[4].train(), torch.randn(3, 4, 6, 6)
    out = F.batch_norm(F.conv2d(maps, block.conv1.weight, stride=2, padding=1), None, None, training=True).relu()
    out = F.batch_norm(F.conv2d(out, block.conv2.weight, padding=1), None, None, training=True)
    shortcut = F.pad(maps[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
    torch.testing.assert_close(block(maps), (out + shortcut).relu())


@pytest.mark.parametrize("arch", ["resnext50_32x4d", "resnet50", "resnet18"])
def test_the_features_are_those_of_torchvisions_forward_with_the_same_weights(arch):
    torch.manual_seed(3)
    ours = torchvision_resnet(arch).eval()
    torch.manual_seed(3)
    theirs = torchvision.models.get_model(arch).eval()
    theirs.fc = nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours.upper(ours.lower(images)), theirs(images))


def test_parts_with_a_name_in_common_are_no_backbone():
    """--weights knows tensors without the part that they are in: it would give both the same."""
    with pytest.raises(ValueError, match="lower and upper both have a tensor named 0.bias"):
        Backbone(Part(nn.Linear(2, 2)), Part(nn.Linear(2, 2)), 2, 2)


def test_the_imagenet_stem_divides_the_size_by_16_before_the_generator_and_the_small_one_by_4():
    images = torch.randn(1, 3, 64, 64)
    assert torchvision_resnet("resnet18", "imagenet").lower(images).shape == (1, 256, 4, 4)
    assert torchvision_resnet("resnet18", "small").lower(images).shape == (1, 256, 16, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_strided_convolution_of_one_pixel_teaches_its_middle_tap_alone(dtype):
    """In bfloat16 the gradient of the others was what the memory held, here NaN."""
    layers = Part(nn.Conv2d(128, 256, 3, 2, 1, bias=False), nn.Flatten())
    convolution, pixels = Backbone(layers[:1], layers[1:], 256, 256).lower[0], torch.randn(4, 128, 1, 1)
    for _ in range(10):
        for size in (1000, 10_000, 100_000, 1_000_000):
            torch.full((size,), torch.nan)
        convolution.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = layers(pixels)
        out.sum().backward()
        expected = torch.zeros_like(convolution.weight)
        expected[:, :, 1, 1] = pixels.sum(dim=0).flatten()
        torch.testing.assert_close(convolution.weight.grad, expected, rtol=0.02, atol=0.02)
        torch.testing.assert_close(out.float(), pixels.flatten(1) @ convolution.weight[:, :, 1, 1].T, atol=0.1, rtol=0)


def test_the_small_stem_is_a_3x3_convolution_with_stride_1_and_no_pooling():
    lower = torchvision_resnet("resnet18", "small").lower
    assert (lower.conv1.kernel_size, lower.conv1.stride, lower.conv1.bias) == ((3, 3), (1, 1), None)
    assert lower[:4](torch.randn(1, 3, 8, 8)).shape == (1, 64, 8, 8)
    assert lower.conv1.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.05)  # as torchvision's begin


def test_no_parameter_of_torchvision_is_lost_by_the_cut():
    theirs = torchvision.models.resnet18()
    assert millions(torchvision_resnet("resnet18")) == pytest.approx(millions(theirs) - millions(theirs.fc))


def test_a_neck_that_would_stay_as_it_begins_is_refused():
    with pytest.raises(Refused, match="--neck"):
        check_model_flags(flags("--arch resnet18 --pretrained --freeze_backbone --neck fc"))
    check_model_flags(flags("--freeze_backbone --neck fc --weights run/last.safetensors"))
    with pytest.raises(Refused, match="--stem small"):
        check_model_flags(flags("--arch resnet18 --pretrained --freeze_backbone --stem small"))


@pytest.mark.parametrize("words", ["--arch resnet32 --pretrained", "--arch resnet18 --pretrained --weights some.pt"])
def test_weights_that_cannot_be_had_are_refused(words):
    with pytest.raises(Refused, match="--pretrained"):
        check_model_flags(flags(words))


@pytest.mark.parametrize("kind", ["bn", "fc"])
def test_a_neck_normalises_the_features_that_heads_and_losses_see(kind):
    model = build_model(flags(f"--arch resnet32 --neck {kind}"), COUNTS, with_generator=False)
    plain = build_model(flags("--arch resnet32"), COUNTS, with_generator=False)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if ".neck." not in name})
    images = torch.randn(8, 3, 16, 16)

    def normalised(rows):
        return (rows - rows.mean(dim=0)) / (rows.var(dim=0, unbiased=False) + 1e-5).sqrt()

    expected = normalised(plain(images).features)
    if kind == "fc":
        linear = model.backbone.upper.neck[1]
        expected = normalised(expected @ linear.weight.T + linear.bias)
    output = model(images)
    torch.testing.assert_close(output.features, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(output.logits["main"], model.heads["main"](output.features))
    assert output.features.min() < 0 <= plain(images).features.min()


# The whole model


@pytest.mark.parametrize("words", ["", "--norm_out False --add_arc_margin_loss --supcon_projection_dim 8"])
def test_the_presence_of_the_generator_does_not_change_the_other_initial_weights(words):
    states = []
    for with_generator in (False, True):
        torch.manual_seed(5)
        states.append(build_model(flags(f"--arch resnet18 {words}"), COUNTS, with_generator).state_dict())
    without, with_it = states
    assert all(torch.equal(value, with_it[name]) for name, value in without.items())
    assert {name.split(".")[0] for name in with_it.keys() - without.keys()} == {"generator"}


def test_an_output_has_the_features_and_logits_and_scales_of_every_head():
    model = build_model(flags("--arch resnet32 --add_arc_margin_loss --add_sphere_loss"), COUNTS, False)
    output = model(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0]))
    assert output.features.shape == (4, 64)
    assert {name: logits.shape for name, logits in output.logits.items()} == dict.fromkeys(
        ["main", "arc", "sphere"], (4, 3)
    )
    assert output.scales["main"] == output.scales["arc"] == 30
    torch.testing.assert_close(output.scales["sphere"], output.features.norm(dim=1, keepdim=True))


def test_a_margin_is_applied_with_targets_and_not_without():
    model = build_model(flags("--arch resnet32 --add_add_margin_loss"), COUNTS, False).eval()
    images = torch.randn(3, 3, 32, 32)
    change = model(images, torch.tensor([0, 1, 2])).logits["add"] - model(images).logits["add"]
    torch.testing.assert_close(change, -30 * 0.35 * torch.eye(3), atol=1e-4, rtol=0)


def test_projections_are_made_in_training_alone():
    model = build_model(flags("--arch resnet32 --supcon_projection_dim 8"), COUNTS, False)
    images = torch.randn(3, 3, 32, 32)
    output = model(images)
    first, last = model.projection[0], model.projection[-1]
    hidden = (output.features @ first.weight.T + first.bias).clamp_min(0)
    torch.testing.assert_close(output.auxiliary["projections"], hidden @ last.weight.T + last.bias)
    assert output.auxiliary["projections"].shape == (3, 8)
    assert model.eval()(images).auxiliary == {}


def test_the_flags_of_the_generator_reach_it():
    words = "--rsg_centers 4 --rsg_contrast_dim 7 --rsg_strength 2 --head_tail_ratio .67 --supcon_views 2"
    generator = build_model(flags(f"--arch resnet32 {words}"), COUNTS, True).generator
    assert generator.centers.shape == (3, 4, 32)
    assert generator.contrast[0].out_channels == 7
    assert generator.strength == 2
    assert generator.is_head.tolist() == [True, True, False]
    assert generator.pair_shift == 1


def test_the_same_state_loads_again():
    words = "--arch resnet32 --add_sphere_loss --supcon_projection_dim 8"
    model, other = (build_model(flags(words), COUNTS, True) for _ in range(2))
    other.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.eval()(images).logits["main"], other.eval()(images).logits["main"])


# Weights from a file


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_in_torchvisions_names_load_and_the_classifier_is_named_as_not_used(saved, prefix):
    theirs, backbone = torchvision.models.resnet18().eval(), torchvision_resnet("resnet18").eval()
    path = saved({f"{prefix}{name}": value for name, value in theirs.state_dict().items()})
    assert load_backbone_weights(backbone, path) == ["not used: fc.bias, fc.weight"]
    theirs.fc, images = nn.Identity(), torch.randn(1, 3, 64, 64)
    assert torch.equal(backbone.upper(backbone.lower(images)), theirs(images))


def test_weights_load_from_safetensors(tmp_path):
    theirs, backbone = torchvision.models.resnet18(), torchvision_resnet("resnet18")
    safetensors.torch.save_file(theirs.state_dict(), tmp_path / "weights.safetensors")
    assert load_backbone_weights(backbone, tmp_path / "weights.safetensors") == ["not used: fc.bias, fc.weight"]
    assert torch.equal(backbone.upper.layer4[1].conv2.weight, theirs.layer4[1].conv2.weight)


@pytest.mark.parametrize("arch", ["resnet18", "resnet32"])
def test_the_weights_of_a_run_load_into_every_layer_of_the_backbone(saved, arch):
    model, other = (build_model(flags(f"--arch {arch}"), COUNTS, False) for _ in range(2))
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(1)
    assert load_backbone_weights(other.backbone, saved(model.state_dict())) == ["not used: heads.main.weight"]
    for name, tensor in model.backbone.state_dict().items():
        assert torch.equal(tensor, other.backbone.state_dict()[name]), name


def test_what_does_not_match_is_named(saved):
    state = torchvision.models.resnet18().state_dict()
    del state["fc.weight"], state["fc.bias"], state["bn1.bias"]
    state["conv1.weight"], state["extra"] = torch.ones(64, 3, 3, 3), torch.ones(1)
    backbone = torchvision_resnet("resnet18")
    before = backbone.lower.conv1.weight.clone()
    mismatches = load_backbone_weights(backbone, saved(state))
    assert mismatches == ["missing in the file: bn1.bias", "not used: extra", "of another shape: conv1.weight"]
    assert torch.equal(backbone.lower.conv1.weight, before)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("save", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state, protocol=2))])
def test_code_in_a_pickle_is_refused_and_not_executed(tmp_path, save):
    path, touched = tmp_path / "weights.pt", tmp_path / "executed"
    save({**torchvision_resnet("resnet18").state_dict(), "extra": Malicious(touched)}, path)
    with pytest.raises(Refused, match="weights.pt"):
        load_backbone_weights(torchvision_resnet("resnet18"), path)
    assert not touched.exists()


@pytest.mark.parametrize(
    ("of", "words", "lacking"),
    [
        ("resnet50", "--arch resnet18", "layer1.0.conv1.weight"),
        ("resnet18", "--arch resnet18 --stem small", "conv1.weight"),
        ("resnet18", "--arch resnet18 --neck fc", "neck.0.bias"),
    ],
)
def test_a_frozen_backbone_needs_weights_of_all_its_layers(saved, of, words, lacking):
    path = saved(torchvision.models.get_model(of).state_dict())
    backbone = build_model(flags(words), COUNTS, False).backbone
    with pytest.raises(Refused, match=f"keeps {lacking} as it is drawn"):
        load_backbone_weights(backbone, path, whole=True)
    assert load_backbone_weights(backbone, path)
    state = {name: value for name, value in backbone.state_dict().items() if "num_batches" not in name}
    load_backbone_weights(backbone, saved(state), whole=True)  # older files of torchvision lack this count


def test_weights_of_which_nothing_fits_are_refused(saved):
    with pytest.raises(Refused, match="no tensor that fits"):
        load_backbone_weights(torchvision_resnet("resnet18"), saved({"weight": torch.ones(3)}))


@pytest.mark.parametrize("something", [[1, 2], torch.ones(3), "text", {}, None])
def test_a_file_that_is_no_state_dict_is_refused(saved, something):
    with pytest.raises(Refused, match="weights.pt"):
        load_backbone_weights(torchvision_resnet("resnet18"), saved(something))


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"not a state dict"])
def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path, name, content):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(Refused, match=name):
        load_backbone_weights(torchvision_resnet("resnet18"), tmp_path / name)
