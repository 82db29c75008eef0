"""Models: backbone, heads and generator, built from flags. A new backbone is one line in `ARCHITECTURES`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from engine.errors import Refused
from engine.flags import add_switch, given_path
from models.backbones import Backbone, torchvision_resnet
from models.classifier import LongTailClassifier
from models.heads import add_head_flags, build_heads
from models.resnet_cifar import resnet_cifar
from rsg import build_generator

FROM_TORCHVISION = ("resnext50_32x4d", "resnet50", "resnet18")
ARCHITECTURES = {
    **dict.fromkeys(FROM_TORCHVISION, lambda args: torchvision_resnet(args.arch, args.stem, args.pretrained)),
    "resnet32": lambda args: resnet_cifar(32, 16),
    "resnet32_x4": lambda args: resnet_cifar(32, 64),
}


NECKS = {  # name: layers [B, D] -> [B, D] at the end of the backbone
    "bn": lambda width: nn.Sequential(nn.BatchNorm1d(width)),
    "fc": lambda width: nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, width), nn.BatchNorm1d(width)),
}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("-a", "--arch", choices=ARCHITECTURES, default="resnext50_32x4d", help="backbone")
    group.add_argument(
        "--stem",
        choices=("imagenet", "small"),
        default="imagenet",
        help="first layers: 7x7 stride 2 and pooling, or 3x3 stride 1; resnet32 has its own",
    )
    group.add_argument(
        "--neck",
        choices=NECKS,
        help="layers behind the pooled features, seen by heads, SupCon and class means: batch normalisation; or it, a "
        "linear layer and it again, ArcFace's without dropout",
    )
    add_switch(group, "--pretrained", False, "start from torchvision's weights, which it downloads")
    group.add_argument(
        "--weights", type=given_path, metavar="FILE", help="start from this state dict (.safetensors, .pt, .pth)"
    )
    add_switch(group, "--freeze_backbone", False, "train heads only, on the features of --weights or --pretrained")
    add_head_flags(parser)


def check_model_flags(args: argparse.Namespace) -> list[str]:
    """Warnings; `Refused` for starts that cannot be had."""
    if args.pretrained and args.arch not in FROM_TORCHVISION:
        raise Refused(
            f"--pretrained: torchvision has no weights for {args.arch}; leave it out or choose another --arch"
        )
    if args.pretrained and args.weights:
        raise Refused("--pretrained and --weights both say where to start from; give one")
    if args.neck and args.freeze_backbone and not args.weights:
        raise Refused(f"--freeze_backbone keeps --neck {args.neck} as it begins; leave one of them out")
    if args.pretrained and args.freeze_backbone and args.stem == "small":
        raise Refused(
            "--freeze_backbone keeps the first layers of --stem small as they are drawn; leave one of them out"
        )
    warnings = []
    if args.stem != "imagenet" and args.arch not in FROM_TORCHVISION:
        warnings.append(f"--stem {args.stem} changes nothing: {args.arch} has its own")
    if args.pretrained and args.stem == "small":
        warnings.append("--stem small replaces the first layers: their pretrained weights are not used")
    if args.freeze_backbone and not (args.pretrained or args.weights):
        warnings.append("--freeze_backbone without --weights or --pretrained: the features stay as they are drawn")
    return warnings


def build_model(args: argparse.Namespace, class_counts: Sequence[int], with_generator: bool) -> LongTailClassifier:
    """The model that the flags describe. ``with_generator`` is for training; the generator is built last, so that
    the other initial weights do not depend on it."""
    backbone = ARCHITECTURES[args.arch](args)
    width = backbone.num_features
    if args.neck:
        backbone.upper.add_module("neck", NECKS[args.neck](width))
    heads = build_heads(args, width, len(class_counts))
    projection = prototypes = None
    if args.add_supcon_loss and args.supcon_projection_dim:
        projection = _projection(width, args.supcon_projection_dim)
    if args.supcon_balance:  # through layers of their own, as in BCL; without a projection as they are
        prototypes = _projection(width, args.supcon_projection_dim) if args.supcon_projection_dim else nn.Identity()
    generator = build_generator(args, backbone.map_channels, class_counts) if with_generator else None
    return LongTailClassifier(backbone, heads, projection, generator, prototypes, args.freeze_backbone)


def _projection(width: int, size: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, size))


def load_backbone_weights(backbone: Backbone, path: Path, whole: bool = False) -> list[str]:
    """Copy a state dict in torchvision's names, or of a run of this suite, into the backbone; no pickle is executed.

    Returns what did not match, in words; `Refused` when nothing did, or, to have the ``whole`` backbone, not all did.
    """
    try:
        state = (
            safetensors.torch.load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception:  # zip, pickle and safetensors errors share no base class
        raise Refused(
            f"--weights {path} cannot be read as a state dict of tensors and nothing else; give one, or a .safetensors"
        ) from None
    if not isinstance(state, dict):
        raise Refused(f"--weights {path} holds a {type(state).__name__}, not a state dict")
    state = next((state[key] for key in ("model", "state_dict") if isinstance(state.get(key), dict)), state)
    state = {_bare_name(str(name)): value for name, value in state.items() if isinstance(value, torch.Tensor)}
    own = {_bare_name(name): value for name, value in backbone.state_dict().items()}
    matching = {name for name, value in own.items() if name in state and state[name].shape == value.shape}
    if not matching:
        raise Refused(f"--weights {path} has no tensor that fits this backbone; was it saved from another --arch?")
    lacking = sorted(name for name in own.keys() - matching if not name.endswith("num_batches_tracked"))
    if whole and lacking:
        raise Refused(
            f"--freeze_backbone keeps {lacking[0]} as it is drawn, one of {len(lacking)} tensors for which --weights "
            f"{path} has none that fits; leave it out, or was the file saved from another --arch, --stem or --neck?"
        )
    for name in matching:
        own[name].copy_(state[name])
    shapes = sorted(name for name in own.keys() & state.keys() if name not in matching)
    return [
        f"{title}: {', '.join(names)}"
        for title, names in (
            ("missing in the file", sorted(own.keys() - state.keys())),
            ("not used", sorted(state.keys() - own.keys())),
            ("of another shape", shapes),
        )
        if names
    ]


def _bare_name(name: str) -> str:
    for prefix in ("module.", "backbone.", "lower.", "upper."):
        name = name.removeprefix(prefix)
    return name
