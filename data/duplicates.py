"""Images that look alike without being equal."""

import numpy as np
from scipy.fft import dctn

from engine.console import progress

# Bits of 63: a thousand CIFAR-10 images made 2 % brighter and saved again at JPEG quality 50 moved by 6 at most.
MAX_DISTANCE = 6
MIN_CORRELATION = 0.97  # between thumbnails: nine of ten pairs with near hashes on CIFAR-10 are only alike


def perceptual_hashes(thumbnails: np.ndarray) -> np.ndarray:
    """63 bits (uint64) of each grey thumbnail [N, 32, 32]: which of its lowest 8 x 8 frequencies, but the mean, lie
    above their median. Brightness, size and compression hardly change them."""
    hashes = np.empty(len(thumbnails), np.uint64)
    for start in range(0, len(thumbnails), 4096):
        frequencies = dctn(thumbnails[start : start + 4096].astype(np.float32), axes=(1, 2))[:, :8, :8].reshape(-1, 64)
        bits = frequencies > np.median(frequencies[:, 1:], axis=1, keepdims=True)
        bits[:, 0] = False
        hashes[start : start + 4096] = np.packbits(bits, axis=1).view(np.uint64)[:, 0]
    return hashes


def near_duplicates(thumbnails: np.ndarray, first: int | None = None) -> list[tuple[int, int]]:
    """Pairs (i < j) of thumbnails [N, 32, 32] with near hashes and nearly the same pixels; only those of the ``first``
    thumbnails if given. Time grows with N squared: 8 s for 60,000 on one core."""
    hashes = perceptual_hashes(thumbnails)
    first = len(hashes) if first is None else first
    pairs = []
    for start in progress(range(0, first, 256), "near-duplicates", "block"):
        distances = np.bitwise_count(hashes[start : min(start + 256, first), None] ^ hashes[None, start:])
        rows, columns = np.nonzero(distances <= MAX_DISTANCE)
        later = columns > rows
        pairs.append(np.stack([rows[later], columns[later]], axis=1) + start)
    pairs = np.concatenate(pairs) if pairs else np.empty((0, 2), int)
    return [(int(i), int(j)) for i, j in pairs if correlation(thumbnails[i], thumbnails[j]) > MIN_CORRELATION]


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Of the pixels; 0 when one image is flat."""
    one, other = one - one.mean(), other - other.mean()
    return float((one * other).sum() / max(np.sqrt((one**2).sum() * (other**2).sum()), 1e-9))
