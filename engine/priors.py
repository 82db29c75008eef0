"""Class priors: the one that a model's softmax stands for, and the one that a deployment is stated to have."""

import argparse
import json
import math
from pathlib import Path

import numpy as np

from data.build import sampler_of
from data.samplers import SAMPLERS
from engine.errors import Refused
from engine.record import real_class_counts
from losses import build_objective


def reweighted(logits: np.ndarray, model_prior: np.ndarray, test_prior: np.ndarray) -> np.ndarray:
    """``z_j + log q_j - log p_j``: by Bayes' rule the logits of a model whose classes had the prior q [C] in place of
    p [C], while each class looks as it did (Saerens et al., 2002, eq. 2.4)."""
    return logits + np.log(test_prior) - np.log(model_prior)


def logit_adjusted(logits: np.ndarray, prior: np.ndarray, tau: float) -> np.ndarray:
    """``z_j - tau log pi_j`` with the training prior pi [C] (Menon et al., Long-tail learning via logit adjustment,
    2021, eq. 9). With tau 1 and a model that has learned the posterior, the decision of highest balanced accuracy."""
    return logits - tau * np.log(prior)


def model_prior(record: dict, head: str, epoch: int) -> np.ndarray:
    """The class prior [C], sum 1, that training up to ``epoch`` put into the softmax of ``head``.

    With d_j ~ n_j^power the share of class j in what the sampler drew (power 1 without one), its synthetic images
    counting by their weight, w_lj the class weights of loss l on the head and a_lj what it adds to the logits while
    training: p_j is the sum over the losses, by their factors, of d_j w_lj exp(-a_lj), each of sum 1 but where a loss
    has `mean_over` rows and not weights, as focal. Plain cross-entropy gives the training prior; inverse-frequency
    weights, a balanced sampler and a logit-adjusted loss with tau 1 give a uniform one. So says cross-entropy when it
    is fitted perfectly; margins, focusing, SupCon and generated rows are taken to leave the prior alone. The nearest
    class mean knows no prior: uniform. `Refused` for a logit-adjusted loss beside another: together they know none; for
    label smoothing, of which an equal share for each class stays, however rare it is; and without `mean_over`.
    """
    args, counts = argparse.Namespace(**record["flags"]), np.array(record["class_counts"], dtype=float)
    if head == "ncm":
        return np.full(len(counts), 1 / len(counts))
    power = SAMPLERS[sampler_of(args, epoch)]
    mass, images = _images(record)
    drawn = _normalised(mass if power is None else counts**power * mass / images)
    prior, adjustments = np.zeros(len(counts)), []
    for term in build_objective(args, record["class_counts"], epoch).head_terms:
        mean_over = getattr(term.loss_fn, "mean_over", None)
        if mean_over is None:
            raise Refused(f"--test_prior: of {term.text} it is not known which prior the softmax stands for")
        if any(getattr(part, "label_smoothing", 0) for part in term.loss_fn.modules()):
            raise Refused("--test_prior: after --label_smoothing the softmax stands for no prior that is known")
        if term.head == ("main" if head == "mean" else head):  # all heads have the same losses
            buffers = {name.split(".")[-1]: value.double().numpy() for name, value in term.loss_fn.named_buffers()}
            adjustments.append(buffers.get("adjustments", np.zeros(len(counts))))
            share = drawn * buffers.get("weight", 1) * np.exp(-adjustments[-1])
            prior += term.factor * (share if mean_over == "rows" else _normalised(share))
    if any(np.ptp(one - adjustments[0]) > 1e-9 for one in adjustments):
        raise Refused("--test_prior: a logit-adjusted loss and another one together stand for no prior that is known")
    return _normalised(prior) if prior.any() else drawn


def training_prior(record: dict) -> np.ndarray:
    """Each class's share [C], sum 1, of the images trained on, a synthetic one counting by its weight."""
    return _normalised(_images(record)[0])


def _images(record: dict) -> tuple[np.ndarray, np.ndarray]:
    """Images of each class: what they count, and their number."""
    real = np.array(real_class_counts(record), dtype=float)
    made = np.array(record.get("synthetic_counts", [0] * len(real)))
    return real + record["flags"]["synthetic_weight"] * made, real + made


def read_prior(word: str, classes: list[str], class_counts: list[int]) -> np.ndarray:
    """The prior [C], sum 1, that ``word`` names: ``uniform``, ``train`` (the shares of ``class_counts``), or a file.

    A file holds lines ``class value``, or one JSON object {class: value} if it is named ``.json``. Values are above 0
    and are divided by their sum, so that counts will do. `Refused` unless it names every class once.
    """
    if word == "uniform":
        return np.full(len(classes), 1 / len(classes))
    if word == "train":
        return _normalised(np.array(class_counts, dtype=float))
    path = Path(word)
    if not path.is_file():
        raise Refused(f"--test_prior {word} is no file; give one, or uniform, or train")
    text = path.read_text("utf-8-sig", errors="surrogateescape")  # class names are names of folders: bytes
    pairs = _json_pairs(path, text) if path.suffix.lower() == ".json" else _line_pairs(path, text)
    names = [name for name, _ in pairs]
    if unknown := [name for name in names if name not in set(classes)]:
        raise Refused(f"{path} names {unknown[0]!r}, which is no class of the run; remove it")
    if twice := [name for name in classes if names.count(name) > 1]:
        raise Refused(f"{path} names {twice[0]!r} twice; remove one")
    if missing := [name for name in classes if name not in set(names)]:
        raise Refused(f"{path} has no value for {', '.join(missing)}; give every class one")
    for name, value in pairs:
        if not isinstance(value, float) or not 0 < value < math.inf:
            raise Refused(f"{path}: the value of {name!r} is {value!r}, not a number above 0; 1e-6 says hardly ever")
    values = dict(pairs)
    return _normalised(np.array([values[name] for name in classes], dtype=float))


def _line_pairs(path: Path, text: str) -> list[tuple[str, float]]:
    pairs = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.rsplit(maxsplit=1)
        if words:
            try:
                name, value = words
                pairs.append((name.strip(), float(value)))
            except ValueError:
                raise Refused(f"{path}, line {number}, is not `class value` with a number: {line.strip()}") from None
    return pairs


def _json_pairs(path: Path, text: str) -> list[tuple[str, object]]:
    try:
        # a dict would hide a class that is named twice; as a float, a number of 400 digits is infinite and refused
        pairs = json.loads(text, object_pairs_hook=list, parse_int=float)
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path} is not JSON ({error}); mend it") from None
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise Refused(f"{path} holds no JSON object {{class: value}}; mend it")
    return pairs


def _normalised(values: np.ndarray) -> np.ndarray:
    return values / values.sum()
