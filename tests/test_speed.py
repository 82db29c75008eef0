"""What makes it fast changes no number: memory formats, compiled parts, fused updates; and no step waits."""

import argparse
import copy
import json
import platform
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses as metric_learning
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import imagenet_lt_train
from data import build, loaders
from data.folders import read_image_folders
from data.loaders import Batch, Pixels, TrainingLoader
from data.transforms import DRAWS, POLICY_DRAWS, cutout
from engine import precision
from engine.guard import NonFiniteGuard
from engine.hardware import masks_updates
from engine.optim import build_average, build_optimizer
from engine.precision import build_scaler, is_channels_last
from engine.state import TrainingState
from engine.train import NonFiniteLoss, train_one_epoch
from losses import build_objective, inverse_frequency_weights
from models.backbones import Backbone, Part
from models.classifier import Output
from scripts.benchmarks.steps import TrainingSteps, flags

ROOT = Path(__file__).resolve().parents[1]
COUNTS = [40, 9, 4, 2]
CPU = torch.device("cpu")


def batches(number: int = 3, rows: int = 7, device: torch.device = CPU) -> list[Batch]:
    return [
        Batch(torch.randn(rows, 3, 16, 16, device=device), torch.arange(rows, device=device) % 4, torch.arange(rows))
        for _ in range(number)
    ]


def train(folder, data, *more: str):
    words = f"--data_dir {data} --root_model {folder} --root_log {folder}/log --run_name run --arch resnet32"
    words += " --epochs 1 --max_steps 1 --seed 0 --add_rsg False --amp off"
    imagenet_lt_train.main(imagenet_lt_train.parse_args([*words.split(), *more]))
    return folder / "run"


# The plain path


def test_three_steps_are_those_of_a_plain_loop():
    """Normalised features and weights, a margin by class, metric-learning's SupCon, SGD by its formula; in float64."""
    steps = TrainingSteps(flags("--arch resnet32 --img_size 16 --lr 0.02 --add_rsg False"), COUNTS, CPU, False)
    fast = steps.state.model.double()
    for state in steps.state.optimizer.state.values():
        state["momentum_buffer"] = state["momentum_buffer"].double()
    plain = copy.deepcopy(fast).train()
    shown = [batch._replace(images=batch.images.double()) for batch in batches()]
    steps(shown, len(shown))

    class_weights = inverse_frequency_weights(COUNTS).double()
    margins = torch.tensor([0.3 * (min(COUNTS) / count) ** 0.25 for count in COUNTS], dtype=torch.float64)
    velocities = [torch.zeros_like(parameter) for parameter in plain.parameters()]
    for images, targets, *_ in shown:
        features = plain.backbone.upper(plain.backbone.lower(images))
        cosines = F.normalize(features) @ F.normalize(plain.heads["main"].weight).T
        logits = 30 * (cosines - F.one_hot(targets, 4) * margins[targets, None])
        loss = 0.1 * F.cross_entropy(logits, targets, class_weights)
        loss = loss + 0.9 * metric_learning.SupConLoss(0.07)(features, targets)
        gradients = torch.autograd.grad(loss, list(plain.parameters()))
        with torch.no_grad():
            for parameter, gradient, velocity in zip(plain.parameters(), gradients, velocities, strict=True):
                velocity.mul_(0.9).add_(gradient + 5e-4 * parameter)
                parameter -= 0.02 * velocity
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(fast.state_dict()[name], value, rtol=0, atol=1e-9, msg=name)


def test_shares_and_weights_of_mixed_images_reach_the_loss():
    words = "--arch resnet32 --img_size 16 --amp off --add_rsg 0 --add_supcon_loss 0 --add_ldam_loss 0"
    steps = TrainingSteps(flags(f"{words} --add_cross_entropy_loss"), COUNTS, CPU, False)
    plain, (batch,) = copy.deepcopy(steps.state.model).train(), batches(1, 4)
    others, w, v = batch.targets.roll(-1), torch.tensor([1, 0.5, 1, 0.25]), torch.tensor([0.5, 1, 0.25, 1])
    steps([batch._replace(mixed_targets=others, share=0.3, weights=w, mixed_weights=v)], 1)
    logits = plain(batch.images).logits["main"]
    own, mixed = (F.cross_entropy(logits, targets, reduction="none") for targets in (batch.targets, others))
    expected = 0.3 * (w * own).sum() / w.sum() + 0.7 * (v * mixed).sum() / v.sum()
    torch.testing.assert_close(steps.state.sums["train_loss"] / 4, expected.detach())


class Flat(nn.Linear):
    """A classifier without batch statistics."""

    def forward(self, images, targets, mixed_targets):
        features = images.flatten(1)
        return Output(features, {"main": super().forward(features)}, {"main": 1.0}, targets, {})


def test_batches_of_one_update_count_by_their_images():
    """7, 7 and 2 images in one update, and 5 that are left: the steps of 16 and of 5 at once."""
    shown = [batch._replace(images=batch.images.double()) for rows in (7, 7, 2, 5) for batch in batches(1, rows)]
    names = ("images", "targets", "indices")
    whole = Batch(*(torch.cat([getattr(batch, name) for batch in shown[:3]]) for name in names))
    weights = []
    for accumulated, given in ((3, shown), (1, [whole, shown[3]])):
        torch.manual_seed(0)
        model = Flat(3 * 16 * 16, 4).double()
        model.generator = None
        optimizer = build_optimizer(flags("--lr 0.1"), model, 16)
        state = TrainingState(model, optimizer, build_scaler(None, CPU))
        objective = build_objective(flags("--add_ldam_loss 0 --add_supcon_loss 0 --add_cross_entropy_loss"), COUNTS)
        guard = NonFiniteGuard(model, optimizer, False, accumulated)
        train_one_epoch(model, objective, state, guard, iter(given), [len(batch.targets) for batch in given], seed=0)
        weights.append(model.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [2, 3])
def test_a_bad_batch_takes_back_the_whole_update_it_belongs_to(bad):
    words = "--arch resnet32 --img_size 16 --amp off --add_rsg 0 --add_supcon_loss 0 --accumulate_steps 2"
    (steps, before), shown = (TrainingSteps(flags(words), COUNTS, CPU, False) for _ in range(2)), batches(6)
    before(shown[:2], 2)
    shown[bad].images.fill_(torch.nan)
    with pytest.raises(NonFiniteLoss, match=f"in step {bad}"):
        steps(shown, 6)
    assert steps.state.step == 2
    expected = before.state.model.state_dict()
    for name, value in steps.state.model.state_dict().items():
        assert torch.equal(value, expected[name]), name


# Precision and the order of maps in memory


@pytest.mark.parametrize(
    ("cpu", "capabilities", "expected"),
    [
        ("AMD EPYC", {"avx512_bf16": True, "amx_bf16": False}, torch.bfloat16),
        ("Intel(R) Xeon(R)", {"avx512_bf16": True, "amx_bf16": True}, torch.bfloat16),
        ("Intel(R) Xeon(R)", {"avx512_bf16": True, "amx_bf16": False}, None),
        ("AMD EPYC", {"avx512_bf16": False}, None),
        ("Apple M1", {}, None),
    ],
)
def test_bfloat16_is_automatic_where_it_is_faster(monkeypatch, cpu, capabilities, expected):
    monkeypatch.setattr(precision, "cpu_name", lambda: cpu)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert precision.autocast_dtype("auto", CPU) is expected
    assert is_channels_last("auto", precision.autocast_dtype("auto", CPU), CPU) is (expected is not None)


@pytest.mark.parametrize(
    ("choice", "amp_dtype", "expected"),
    [("auto", None, False), ("off", torch.bfloat16, False), ("on", None, True)],
)
def test_channels_last_is_what_was_asked_for_and_never_automatic_in_float32(choice, amp_dtype, expected):
    assert is_channels_last(choice, amp_dtype, CPU) is expected


def test_a_network_with_channels_last_makes_such_maps_and_the_same_numbers():
    words = "--arch resnet32 --img_size 16 --amp off --channels_last"
    last, first = (TrainingSteps(flags(f"{words} {choice}"), COUNTS, CPU, True) for choice in ("on", "off"))
    maps = last.state.model.backbone.lower(torch.randn(2, 3, 16, 16))
    assert maps.is_contiguous(memory_format=torch.channels_last)
    assert not maps.is_contiguous()
    last.state.model.load_state_dict(first.state.model.state_dict())
    shown = batches(1)
    for steps in (first, last):
        steps(shown, 1)
    for name, value in first.state.sums.items():
        torch.testing.assert_close(last.state.sums[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_state_saved_in_one_order_goes_on_in_the_other(tmp_path):
    """A resumed run may have another device, whose order of maps is another. Fused updates go through memory."""
    args, after = flags("--lr 0.1"), []
    gradient = torch.randn(4, 3, 3, 3)
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        layers = nn.ModuleDict({"layer": nn.Conv2d(3, 4, 3, bias=False)})
        layers.generator = None
        layers = layers.to(memory_format=layout)
        state = TrainingState(layers, build_optimizer(args, layers, 8), torch.amp.GradScaler("cpu", enabled=False))
        if not after:
            state.optimizer.state[layers["layer"].weight]["momentum_buffer"].copy_(torch.randn(4, 3, 3, 3))
            state.save(tmp_path)
        else:
            state.load(torch.load(tmp_path / "state.pt", weights_only=True))
        layers["layer"].weight.grad = torch.empty_like(layers["layer"].weight).copy_(gradient)
        state.optimizer.step()
        after.append(layers["layer"].weight.detach())
    assert after[0].stride() != after[1].stride()
    assert torch.equal(*after)


def test_the_start_line_and_the_record_say_precision_and_order(tmp_path, tiny_dataset, capsys):
    run = train(tmp_path, tiny_dataset, "--channels_last", "on")
    record = json.loads((run / "args.json").read_text())
    assert (record["precision"], record["channels_last"], record["compiled"]) == ("float32", True, False)
    assert "float32, channels last on cpu" in capsys.readouterr().out


# Compiled parts


def tiny_backbone(*last: nn.Module) -> Backbone:
    sizes = ((3, 4), (4, 5))
    convolutions = [(nn.Conv2d(*size, 3, padding=1), nn.BatchNorm2d(size[1]), nn.ReLU()) for size in sizes]
    layers = Part(*convolutions[0], *convolutions[1], *last)
    return Backbone(layers[:3], layers[3:], 4, 5)


def test_compiled_parts_are_compiled_once_for_any_number_of_rows_and_change_neither_numbers_nor_names():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    backbone = tiny_backbone(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    plain, names = copy.deepcopy(backbone), list(backbone.state_dict())
    backbone.compile(backend=backend)
    for rows, generated in ((6, 2), (6, 0), (4, 3), (3, 5)):
        images, extra = torch.randn(rows, 3, 8, 8), torch.randn(generated, 4, 8, 8)
        features = [each.upper(torch.cat([each.lower(images), extra])) for each in (backbone, plain)]
        torch.testing.assert_close(*features)
    assert len(graphs) == 2  # one a part
    assert list(backbone.state_dict()) == names
    copy.deepcopy(backbone).lower(torch.randn(2, 3, 10, 10))
    assert len(graphs) == 2  # a copy is not compiled


def test_a_compiled_part_can_go_backward_twice_as_generated_keys_ask():
    backbone = tiny_backbone()
    backbone.compile(backend="aot_eager")
    maps = torch.randn(2, 4, 8, 8, requires_grad=True)
    loss = backbone.upper(maps).square().sum()
    once, again = (torch.autograd.grad(loss, maps, retain_graph=retain)[0] for retain in (True, False))
    torch.testing.assert_close(once, again)


def test_compile_is_refused_in_a_line_where_there_is_no_compiler(tmp_path, tiny_dataset, capsys, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(SystemExit) as error:
        train(tmp_path, tiny_dataset, "--compile", "--device", "cpu")
    assert error.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning")]
    assert "no-such-compiler" in line
    assert not (tmp_path / "run").exists()


# Reading


def test_a_batch_that_is_augmented_in_parts_is_the_whole_one(tiny_dataset, monkeypatch):
    folders = read_image_folders(tiny_dataset, None)
    loader = TrainingLoader(folders.splits["train"], Pixels(72), batch_size=8, seed=0, device=CPU)
    images, draws = torch.randint(256, (5, 3, 72, 72), dtype=torch.uint8), torch.rand(5, len(DRAWS))
    whole = loader.coloured(images, draws)
    monkeypatch.setattr(loaders, "IN_CACHE", 2 * 12 * 72**2)
    parts = []

    def coloured(images, draws):
        parts.append(len(images))
        return loader.coloured(images, draws)

    assert torch.equal(loader.in_parts(coloured, images, draws), whole)
    assert parts == [2, 2, 1]


@pytest.mark.parametrize(
    ("processes", "workers", "expected"), [(1, 4, 4), (1, 16, 8), (4, 4, 2), (16, 4, 1), (4, 0, 0)]
)
def test_the_processes_of_a_machine_share_out_its_cores(monkeypatch, processes, workers, expected):
    monkeypatch.setattr(build.os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert build.workers_in_use(argparse.Namespace(workers=workers)) == expected


FAULTS = """
import resource, sys
import numpy as np
from engine.hardware import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for call in range(2):  # the first one gets the memory
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [np.ones(2**24, dtype=np.uint8) for _ in range(8)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_freed_memory_comes_again_without_page_faults():
    faults = {}
    for word in ("return", "keep"):
        command = [sys.executable, "-c", FAULTS, word]
        faults[word] = int(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)
    assert faults["keep"] < faults["return"] / 10


# Waiting


class Waits(TorchDispatchMode):
    """Counts what needs a value on the CPU before it can go on."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket._qualified_op_name.split("::")[1] in WAITING:
            self.counts[func.overloadpacket._qualified_op_name.split("::")[1]] += 1
        return func(*args, **(kwargs or {}))


WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount", "equal", "is_nonzero"}
EVERYTHING = "--add_cross_entropy_loss --add_focal_loss --add_arc_margin_loss --add_add_margin_loss --add_sphere_loss"


@pytest.mark.parametrize("generating", [False, True])
def test_a_step_asks_for_no_value_but_the_guards_and_the_kinds_of_rows(generating):
    steps = TrainingSteps(flags(f"--arch resnet32 --img_size 16 {EVERYTHING}"), COUNTS, CPU, generating)
    with Waits() as waits:
        steps(batches(4), 4)
    # the guard asks once a step, for what was sent a step before; the bar, on a terminal, at step 0
    expected = {"_local_scalar_dense": 4}
    if generating:
        expected["nonzero"] = 2 * 4  # of the kinds of rows, which were sent before the maps were computed
    assert dict(waits.counts) == expected


def test_fused_optimisers_mask_updates_that_are_not_finite():
    for device in ["cpu", *["cuda"] * torch.cuda.is_available()]:
        assert masks_updates(torch.device(device))


class Unmasked(torch.optim.AdamW):
    def step(self):
        del self.found_inf
        super().step()


class Unable(torch.optim.SGD):
    def step(self):
        raise RuntimeError("not for this device")


@pytest.mark.parametrize("optimizer", [Unmasked, Unable])
def test_an_optimiser_that_applies_what_is_not_finite_or_cannot_work_is_found_out(monkeypatch, optimizer):
    monkeypatch.setattr(torch.optim, optimizer.__base__.__name__, optimizer)
    assert not masks_updates(CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("generating", [False, True])
def test_no_step_waits_for_the_gpu(generating):
    device = torch.device("cuda", 0)
    steps = TrainingSteps(flags(f"--arch resnet32 --img_size 16 {EVERYTHING}"), COUNTS, device, generating)
    steps.state.averaged = build_average(steps.state.model, 0.9)
    steps(batches(2, device=device), 2)
    shown, draws = batches(4, device=device), torch.rand(7, len((*DRAWS, *POLICY_DRAWS)), device=device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        steps(shown, 4)
        cutout(shown[0].images, draws)
    finally:
        torch.cuda.set_sync_debug_mode("default")
