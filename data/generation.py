"""Drawing what a plan asks for, image by image, and having it judged."""

import io
import math
import time
from collections.abc import Callable
from hashlib import sha256

import torch
from tqdm import tqdm

from data.diffusion import Diffusion, Drawn
from data.synthesis import Job, Manifest, Plan
from data.synthetic_filters import Filters
from engine.console import warn
from engine.errors import Failed, is_out_of_memory
from engine.files import write_atomically


def fill(plan: Plan, manifest: Manifest, filters: Filters, diffusion: Callable[[], Diffusion], batch_size: int) -> None:
    """Round by round, draw what is missing and judge it, until every class has what it wants or all its candidates."""
    # by the filters as they are now; but not the rows of a round that was interrupted, which must end as it began
    filters.judge([row for row in manifest.rows if row["kept"] is not None], plan.wanted)
    while jobs := plan.next_jobs(manifest.rows):
        draw_missing(jobs, batch_size, plan, manifest, diffusion)
        filters.judge(manifest.rows, plan.wanted)
        manifest.save()
    filters.judge(manifest.rows, plan.wanted)
    manifest.save()


def draw_missing(
    jobs: list[Job], batch_size: int, plan: Plan, manifest: Manifest, diffusion: Callable[[], Diffusion]
) -> None:
    """Draw and note those of ``jobs`` that the manifest lacks.

    A batch that lacks one is drawn whole: the last bits of an image depend on the size of its batch, which must not
    depend on interruptions. Out of memory, batches are halved once.
    """
    bar = tqdm(total=len(manifest.missing(jobs)), desc="drawing", unit="image", disable=None)
    start, halved = 0, False
    while start < len(jobs):
        batch = jobs[start : start + batch_size]
        missing = manifest.missing(batch)
        images = drawn_or_none(batch, diffusion) if missing else [None] * len(batch)
        if images is not None:
            for job, image in zip(batch, images, strict=True):
                if job in missing:
                    note(job, image, len(batch), plan, manifest)
                    bar.update()
            start += batch_size
        elif halved or batch_size == 1:
            raise Failed(f"out of memory with batches of {batch_size}; try a smaller --batch_size or --size")
        else:
            batch_size, halved = batch_size // 2, True
            warn(f"out of memory: going on with batches of {batch_size}")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    bar.close()


def drawn_or_none(batch: list[Job], diffusion: Callable[[], Diffusion]) -> list[Drawn] | None:
    """The images; None when they do not fit into memory."""
    try:
        return diffusion().draw(batch)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None


def note(job: Job, drawn: Drawn, batch_size: int, plan: Plan, manifest: Manifest) -> None:
    """Write the image and then its row, so that a row never names an image that is not there."""
    buffer = io.BytesIO()
    drawn.image.save(buffer, "PNG")
    content = buffer.getvalue()
    name = f"{job.class_name}/{job.index:05d}.png"
    try:
        (manifest.folder / job.class_name).mkdir(exist_ok=True)
    except OSError as error:
        raise Failed(f"cannot write to {manifest.folder}: {error.strerror}") from None
    write_atomically(manifest.folder / name, lambda file: file.write(content))
    made = {"file": name, "sha256": sha256(content).hexdigest(), "batch_size": batch_size, "precision": drawn.precision}
    manifest.add(plan.facts(job) | made | {"flagged": drawn.flagged, "kept": None, "why": None})


def seconds_an_image(plan: Plan, batch: list[Job], diffusion: Diffusion) -> float:
    """Measured on one batch, after one of a single step that pays for starting up. Nothing is written."""
    diffusion.draw(batch, steps=math.ceil(1 / (plan.recipe.strength or 1)))
    begun = time.perf_counter()
    diffusion.draw(batch)
    return (time.perf_counter() - begun) / len(batch)
