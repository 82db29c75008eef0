"""Class priors: the one that a model's softmax stands for, and the one that a deployment is stated to have."""

import argparse
import json
import math
from pathlib import Path

import numpy as np

from data.build import sampler_of
from data.samplers import SAMPLERS
from engine.errors import Refused
from losses import CLASS_WEIGHTS, CLASSIFICATION_LOSSES


def reweighted(logits: np.ndarray, model_prior: np.ndarray, test_prior: np.ndarray) -> np.ndarray:
    """``z_j + log q_j - log p_j``: by Bayes' rule the logits of a model whose classes had the prior q [C] in place of
    p [C], while each class looks as it did (Saerens et al., 2002, eq. 2.4)."""
    return logits + np.log(test_prior) - np.log(model_prior)


def model_prior(flags: dict, class_counts: list[int], head: str, epoch: int) -> np.ndarray:
    """The class prior [C] that training to ``epoch`` put into the softmax of ``head``.

    With d_j ~ n_j^power the share of class j in what the sampler drew (power 1 without one) and w_lj the class weights
    of loss l, which has the factor f_l: p_j ~ d_j sum_l f_l w_lj / sum_k d_k w_lk. Plain cross-entropy gives the
    training prior, inverse-frequency weights or a balanced sampler a uniform one. Exact for cross-entropy that is
    fitted perfectly; margins, focusing, SupCon and generated rows are taken to leave the prior alone. The nearest
    class mean knows no prior: uniform.
    """
    uniform = np.full(len(class_counts), 1 / len(class_counts))
    if head == "ncm":
        return uniform
    args = argparse.Namespace(**flags)
    power = SAMPLERS[sampler_of(args, epoch)]
    drawn = _normalised(np.array(class_counts, dtype=float) ** (1 if power is None else power))
    deferred = args.drw_epoch is not None and epoch < args.drw_epoch
    shares = []
    for name in CLASSIFICATION_LOSSES:
        if getattr(args, f"add_{name}_loss"):
            weights_of = CLASS_WEIGHTS["none" if deferred else getattr(args, f"{name}_weight_type")][1]
            weights = weights_of(args, class_counts)
            share = drawn if weights is None else _normalised(drawn * weights.double().numpy())
            shares.append(getattr(args, f"{name}_loss_weight") * share)
    return _normalised(sum(shares)) if shares else drawn  # margin heads alone train with plain cross-entropy


def read_prior(word: str, classes: list[str], class_counts: list[int]) -> np.ndarray:
    """The prior [C], sum 1, that ``word`` names: ``uniform``, ``train`` (the training images' shares), or a file.

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
    text = path.read_text(errors="surrogateescape")  # class names are names of folders: bytes
    pairs = _json_pairs(path, text) if path.suffix.lower() == ".json" else _line_pairs(path, text)
    names = [name for name, _ in pairs]
    if unknown := [name for name in names if name not in set(classes)]:
        raise Refused(f"{path} names {unknown[0]!r}, which is no class of the run; remove it")
    if twice := [name for name in classes if names.count(name) > 1]:
        raise Refused(f"{path} names {twice[0]!r} twice; remove one")
    if missing := [name for name in classes if name not in set(names)]:
        raise Refused(f"{path} has no value for {', '.join(missing)}; give every class one")
    for name, value in pairs:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
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
        pairs = json.loads(text, object_pairs_hook=list)  # a dict would hide a class that is named twice
    except ValueError as error:
        raise Refused(f"{path} is not JSON ({error}); mend it") from None
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise Refused(f"{path} holds no JSON object {{class: value}}; mend it")
    return pairs


def _normalised(values: np.ndarray) -> np.ndarray:
    return values / values.sum()
