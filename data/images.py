"""Any image file as a person sees it: upright, on white where it is transparent, 8-bit RGB."""

import contextlib
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from engine.console import progress
from engine.errors import Refused

MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # 89,478,485: an RGB image of 256 MiB
# Pillow warns from there on and raises from twice as many; `read_image` refuses from the first, in one line.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", "Corrupt EXIF data")  # names no file; the pixels may be whole


def read_image(path: Path, at_least: int | None = None) -> Image.Image:
    """The first frame of ``path`` in RGB; `Refused`, with the file's name, when it cannot be read whole.

    ``at_least`` allows a JPEG to be decoded at 1/2, 1/4 or 1/8 of its size as long as both sides keep that many
    pixels: several times faster, and a truncated file is found all the same.
    """
    try:
        with Image.open(path) as image:
            if image.format == "EPS":
                raise Image.UnidentifiedImageError  # Pillow would start Ghostscript, a program, to load it
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            if at_least is not None:
                image.draft(None, (at_least, at_least))
            image.load()
            return as_seen(image)
    except Image.DecompressionBombError:
        raise Refused(
            f"{path} has more than {MAX_PIXELS:,} pixels: a decompression bomb; remove the file or make it smaller"
        ) from None
    except MemoryError:
        raise  # the file may be whole
    except Exception as error:  # decoders of malformed files raise OSError, SyntaxError, ValueError, struct.error ...
        reason = "it is no image in a known format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise Refused(f"{path} cannot be read ({reason}); replace or remove the file") from None


def as_seen(image: Image.Image) -> Image.Image:
    """``image`` turned as its EXIF tag says, in 8 bits, over white, in RGB."""
    with contextlib.suppress(Exception):  # a damaged tag, which raises anything, says nothing of the pixels
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F" or image.mode.startswith("I"):
        return eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits divided by 257; of more bits, or in floating point, stretched from its minimum to its maximum."""
    grey = np.asarray(image, dtype=np.float64)
    if not np.isfinite(grey).all():
        raise ValueError("it holds pixels that are not finite numbers")
    low, high = (0.0, 65535.0) if image.mode.startswith("I;16") else (grey.min(), grey.max())
    return Image.fromarray(np.rint((grey - low) * (255.0 / max(high - low, 1e-300))).astype(np.uint8))


def faults(paths: list[Path], look: Callable[[int, Path], object], workers: int, text: str) -> list[str]:
    """What is wrong with each image that ``look``, called with its position and path, refuses; "" with the others. In
    threads, since decoders leave Python's lock; ``text`` names the bar."""

    def fault(index: int, path: Path) -> str:
        try:
            look(index, path)
        except Refused as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(max(1, workers)) as pool:
        results = pool.map(fault, range(len(paths)), paths)
        return list(progress(results, text, "image", total=len(paths)))
