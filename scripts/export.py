__import__("sys").path.insert(0, str(__import__("pathlib").Path(__file__).resolve().parents[1]))
"""Write a run's model as ONNX, for use without PyTorch and without this code.

    python scripts/export.py --model_dir quickstart      # checkpoint/quickstart/export/model.onnx and model.json

model.onnx takes normalised images [N, 3, S, S] and gives the logits [N, C] that the test script judges; what only
training needs (the generator, margins, the projection) is not in it. model.json beside it says how an image becomes its
input and which class each column is. Before anything is written, onnxruntime answers for every image of --split, and
its logits must be those of PyTorch; only where the run's own images are gone is a model written unchecked, which the
script and model.json say.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.loaders import EvaluationLoader
from data.transforms import short_side
from engine.console import progress, say, warn
from engine.errors import Failed, one_line_errors
from engine.files import write_atomically, write_json
from engine.flags import Parser
from engine.options import add_loading_flags, add_question_flags
from engine.predictor import Predictor
from engine.record import check_finished
from engine.run import find_run

TOLERANCE = 1e-3  # of a logit, absolute and relative: both sides compute in float32 on the CPU


@one_line_errors
def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Parser("Write a run's model as ONNX, checked by onnxruntime on the images of --split.")
    add_question_flags(parser)
    add_loading_flags(parser)
    parser.set_defaults(amp="off", plot_features=False)  # for the predictor
    return parser.parse_args(argv)


class Answer(nn.Module):
    """Images [N, 3, S, S] to the logits [N, C] that `Predictor` gives."""

    def __init__(self, predictor: Predictor):
        super().__init__()
        self.model, self.head = predictor.model, predictor.head
        self.scale = predictor.record["flags"]["norm_scale"]
        shift = np.zeros(1) if predictor.shift is None else predictor.shift
        self.register_buffer("shift", torch.as_tensor(shift, dtype=torch.float32), persistent=False)
        if self.head == "ncm":
            means = torch.as_tensor(predictor.class_means, dtype=torch.float32)
            self.register_buffer("class_directions", F.normalize(means), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits(images) + self.shift

    def logits(self, images: Tensor) -> Tensor:
        output = self.model(images)
        if self.head == "ncm":
            return self.scale * F.linear(F.normalize(output.features), self.class_directions)
        if self.head == "mean":
            heads = torch.stack([logits.log_softmax(dim=1) for logits in output.logits.values()])
            return heads.logsumexp(dim=0) - math.log(len(heads))
        return output.logits[self.head]


def onnx_bytes(answer: Answer, size: int) -> bytes:
    """The model for any number of images of ``size`` px."""
    images = torch.zeros(2, 3, size, size)
    program = torch.onnx.export(
        answer.eval(),
        (images,),
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        verbose=False,
    )
    model = program.model_proto
    for part in (model.graph, *model.graph.node, *model.graph.value_info):
        part.ClearField("metadata_props")  # where on this machine the code lies
    return model.SerializeToString()


def checked(content: bytes, predictor: Predictor, loader: EvaluationLoader) -> dict:
    """How far onnxruntime's logits are from PyTorch's on the loader's images; `Failed` when further than rounding."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    batches = progress(loader, "onnxruntime", "batch")
    logits = np.concatenate([session.run(["logits"], {"images": batch.images.numpy()})[0] for batch in batches])
    expected = predictor(loader, "PyTorch").logits
    difference = float(np.abs(logits - expected).max())
    same = int((logits.argmax(axis=1) == expected.argmax(axis=1)).sum())
    if not np.allclose(logits, expected, rtol=TOLERANCE, atol=TOLERANCE):
        raise Failed(f"onnxruntime's logits are up to {difference:.3g} from PyTorch's; nothing was written")
    return {"images": len(logits), "same_prediction": same, "largest_logit_difference": difference}


def description(predictor: Predictor) -> dict:
    """All that is needed beside the weights: how to make an input, and what the output means."""
    record, size = predictor.record, predictor.record["img_size"]
    return {
        "input": f"images: float32 [N, 3, {size}, {size}], RGB, (value / 255 - mean) / std by channel",
        "resize": "grey of 16 bits divided by 257, of more bits or in floating point stretched from its minimum to its "
        f"maximum; turned by EXIF, transparent parts white; unless the short side is {short_side(size)} px, resized to"
        f" that with Pillow's BILINEAR, which smooths; then the centre square of {size} px",
        "output": f"logits: float32 [N, {len(record['classes'])}]; softmax gives probabilities",
        **{key: record[key] for key in ("img_size", "mean", "std", "classes", "readable_names", "split_hash")},
        **{key: getattr(predictor, key) for key in ("weights", "epoch")},
        **predictor.answers_by(),
        "weights_hash": predictor.weights_hash,
    }


def images_are_gone(args: argparse.Namespace, flags: dict) -> bool:
    """Whether the run's own data lack --split, and no other data are named."""
    named = args.data_dir or args.list_dir or flags["list_dir"]
    return not named and not any((Path(flags["data_dir"]) / name).exists() for name in (args.split, "train.txt"))


@one_line_errors
def main(args: argparse.Namespace) -> dict:
    """Write model.onnx and model.json into ``RUN/export/``; returns what model.json holds."""
    predictor = Predictor(args, find_run(args.model_dir, args.root_model), torch.device("cpu"))
    warn(*check_finished(predictor.run, predictor.record))
    about = description(predictor)
    content = onnx_bytes(Answer(predictor), about["img_size"])
    if images_are_gone(args, predictor.record["flags"]):
        warn(f"the run's data have no {args.split}/ images here: onnxruntime's answers are not checked")
        about["checked"] = None
    else:
        loader = predictor.loader(predictor.folders(args.split).splits[args.split])
        about["checked"] = {"split": args.split, **checked(content, predictor, loader)}
    folder = predictor.run / f"export{predictor.suffix()}"
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "model.onnx", lambda file: file.write(content))
    write_json(folder / "model.json", about)
    say(f"{folder / 'model.onnx'}, {len(content) / 1e6:.1f} MB; checked: {json.dumps(about['checked'])}")
    return about


if __name__ == "__main__":
    main(parse_args())
