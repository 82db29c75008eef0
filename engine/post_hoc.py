"""Corrections of a trained model for the long tail, without training it again: fitted on val/, judged on the test."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.optimize import minimize_scalar
from torch import nn

from data.folders import Split
from engine import distributed, metrics
from engine.files import write_json
from engine.predictor import Answers, Predictor
from engine.priors import logit_adjusted, training_prior
from models.heads import Linear

TAUS = np.arange(41) / 20  # 0, 0.05 ... 2
TEMPERATURES = (0.02, 50.0)
SHOWN = ("top1", "balanced_accuracy", "many", "medium", "few", "nll", "ece")


def tau_normalised(logits: np.ndarray, norms: np.ndarray, bias: np.ndarray, tau: float) -> np.ndarray:
    """Logits of the classifier ``W_j / |W_j|^tau`` without bias (Kang et al., Decoupling, 2020, eq. 5), from those of
    a linear one with the row norms and the bias [C]. The scale of the logits changes too, and with it NLL and ECE."""
    return (logits - bias) / norms**tau


def tau_normalising(head: Linear) -> Callable[[np.ndarray, float], np.ndarray]:
    """`tau_normalised` for logits of ``head``."""
    norms = head.weight.detach().cpu().double().norm(dim=1).numpy()
    bias = head.bias.detach().cpu().double().numpy()
    return lambda logits, tau: tau_normalised(logits, norms, bias, tau)


def scores_by_tau(corrected: Callable[[np.ndarray, float], np.ndarray], val: Answers) -> dict[float, float]:
    """The balanced accuracy on val with each of `TAUS`."""
    return {tau: _balanced_accuracy(corrected(val.logits, tau), val.targets) for tau in TAUS.tolist()}


def best_tau(scores: dict[float, float]) -> float:
    """The tau with the highest balanced accuracy, the smallest of equals.

    A mean over classes does not lean to any class, however many images each has in val. But where val is long-tailed
    like training, the recall of a rare class comes from a handful of images, and tau is as uncertain as that.
    """
    return max(scores, key=scores.get)


def best_temperature(val: Answers) -> tuple[float, float]:
    """T in `TEMPERATURES` with the lowest mean NLL of ``z / T`` over val (Guo et al., 2017); and that NLL.

    The mean is over images: it calibrates for a population with val's class shares. Fitted on a long-tailed val it
    answers for the head, which is not what a balanced test asks.
    """

    def loss(log_temperature: float) -> float:
        return metrics.negative_log_likelihood(val.logits / np.exp(log_temperature), val.targets).mean()

    found = minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x)), float(found.fun)


def write_comparison(
    folder: Path, result: dict, predictor: Predictor, val_split: Split, test: Answers, groups: dict[str, np.ndarray]
) -> str:
    """Let the predictor see val, write post_hoc.json into ``folder`` and return `table`. ``result`` says what was
    tested: metrics.json."""
    val = predictor(predictor.loader(val_split), "validation")
    head = dict(predictor.model.heads.items()).get(predictor.head)
    record = predictor.record
    rows = compare(val, test, record["class_counts"], groups, head, training_prior(record))
    if distributed.is_main():
        about = {key: result[key] for key in ("split", "weights", "predict_with", "split_hash", "weights_hash")}
        write_json(folder / "post_hoc.json", about | {"val_images": len(val.targets), "rows": rows})
    return table(rows, val)


def compare(
    val: Answers,
    test: Answers,
    class_counts: list[int],
    groups: dict[str, np.ndarray],
    head: nn.Module | None,
    prior: np.ndarray,
) -> dict[str, dict]:
    """The metrics of the test, plain and under each correction, with the fitted value and what it reached on val.

    ``head`` is the one that predicts, None for a mean of heads or class means. Only a `Linear` head can be
    tau-normalised: the rows of a cosine head have norm 1 already. ``prior`` [C] is that of what was trained on.
    """
    by_tau = {"logit_adjustment": lambda logits, tau: logit_adjusted(logits, prior, tau)}
    if isinstance(head, Linear):
        by_tau["tau_normalisation"] = tau_normalising(head)

    def row(logits: np.ndarray, **fitted: float) -> dict:
        return fitted | metrics.summary(logits, test.targets, class_counts, groups)

    temperature, val_nll = best_temperature(val)
    rows = {
        "plain": row(test.logits),
        "temperature": row(test.logits / temperature, temperature=temperature, val_nll=val_nll),
    }
    for name, corrected in by_tau.items():
        scores = scores_by_tau(corrected, val)
        tau = best_tau(scores)
        rows[name] = row(corrected(test.logits, tau), tau=tau, val_balanced_accuracy=scores[tau])
    return rows


def table(rows: dict[str, dict], val: Answers) -> str:
    """The rows of `compare` as text: accuracies and ECE in per cent, NLL in nats, and how they were fitted."""
    shown = [name for name in SHOWN if name in rows["plain"]]
    lines = [f"{'':18s} {'fitted':10s}" + "".join(f" {name.removesuffix('_accuracy'):>8s}" for name in shown)]
    for name, row in rows.items():
        fitted = (
            f"T {row['temperature']:.3f}" if "temperature" in row else f"tau {row['tau']:.2f}" if "tau" in row else ""
        )
        values = [f"{row[key]:8.3f}" if key == "nll" else f"{100 * row[key]:8.2f}" for key in shown]
        lines.append(f"{name.replace('_', ' '):18s} {fitted:10s} {' '.join(values)}")
    images = np.bincount(val.targets, minlength=val.logits.shape[1])
    lines.append(
        f"per cent, NLL in nats; fitted on {len(val.targets)} val images ({images.max()} to {images.min()} a class): "
        f"tau of 0, {TAUS[1]:g} ... {TAUS[-1]:g} by balanced accuracy, T by NLL"
    )
    if missing := int((images == 0).sum()):
        lines.append(f"{missing} of {len(images)} classes have no val image: they have no say in tau and T")
    if (val.logits.argmax(axis=1) == val.targets).all():
        lines.append("val has no mistake: the smaller T, the better, and the one above is none to use")
    elif not TEMPERATURES[0] * 1.01 < rows["temperature"]["temperature"] < TEMPERATURES[1] / 1.01:
        lines.append("T is at the end of its range: val has too few images, or too few mistakes, to fit it")
    for name in [name for name, row in rows.items() if row.get("tau") == TAUS[-1]]:
        lines.append(f"tau of the {name.replace('_', ' ')} is at the end of its range")
    if tau := rows["logit_adjustment"]["tau"]:
        lines.append(f"--logit_adjust {tau:.4g} predicts so; --images and scripts/export.py take it, too")
    if "tau_normalisation" in rows:
        lines.append("tau-normalised logits have another scale: their NLL and ECE do not compare")
    else:
        lines.append("no tau-normalisation: only a Linear head has norms to divide by")
    return "\n".join(lines)


def _balanced_accuracy(logits: np.ndarray, targets: np.ndarray) -> float:
    confusion = metrics.confusion_matrix(targets, logits.argmax(axis=1), logits.shape[1])
    return float(np.nanmean(metrics.per_class(confusion)[0]))
