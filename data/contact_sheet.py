"""Real and synthetic images side by side, class by class: what a person looks at before training."""

import contextlib
from collections import Counter
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data.folders import ImageFolders
from data.images import read_image
from data.transforms import fixed_view
from engine.errors import Refused
from engine.files import write_atomically

SIDE, GAP, LINE = 64, 4, 18  # px of an image, between images, of a line of text
COLUMNS = 6  # images of each kind in a row
MOST_CLASSES = 60


def save_contact_sheet(path: Path, folders: ImageFolders, names: list[str], rows: list[dict], folder: Path) -> None:
    """A row for every class with synthetic images, the rarest first: its first real training images, and then its first
    synthetic ones that were kept."""
    real, readable = folders.by_class(folders.splits["train"]), dict(zip(folders.classes, names, strict=True))
    candidates = Counter(row["class"] for row in rows)
    order = sorted((name for name in real if candidates[name]), key=lambda name: len(real[name]))
    shown = order[:MOST_CLASSES]
    half, height = COLUMNS * (SIDE + GAP), SIDE + LINE + GAP
    sheet = Image.new("RGB", (2 * half + 6 * GAP, LINE + GAP + height * len(shown)), "white")
    text, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    which = f"the {len(shown)} rarest of {len(order)} classes" if len(shown) < len(order) else f"{len(order)} classes"
    text.text((GAP, GAP), f"{which}: real training images on the left", "black", font)
    text.text((half + 5 * GAP, GAP), "kept synthetic images on the right", "black", font)
    for number, name in enumerate(shown):
        made = [folder / row["file"] for row in rows if row["class"] == name and row["kept"]]
        top = LINE + GAP + number * height
        text.text((GAP, top), f"{readable[name]}: {len(real[name])} real", "black", font)
        text.text((half + 5 * GAP, top), f"{len(made)} synthetic kept of {candidates[name]}", "black", font)
        for left, images in ((GAP, real[name]), (half + 5 * GAP, made)):
            for column, image in enumerate(images[:COLUMNS]):
                with contextlib.suppress(Refused):  # its place stays white; the audit names broken images
                    sheet.paste(fixed_view(read_image(image), SIDE), (left + column * (SIDE + GAP), top + LINE))
    write_atomically(path, lambda file: sheet.save(file, "PNG"))
