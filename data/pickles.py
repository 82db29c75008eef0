"""Pickles of arrays, opened without running anything: only NumPy arrays and built-in containers are admitted."""

import codecs
import pickle
from pathlib import Path

import numpy as np

from engine.errors import Refused

# What a pickled array names, in the spelling of NumPy 1 and 2. The functions are taken from NumPy's own answers.
_ARRAY_RECONSTRUCT, _SCALAR = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
_ARRAY_FROM_BUFFER = np.empty(1).__reduce_ex__(5)[0]


def number_type(spec: str | bytes, *flags: int) -> np.dtype:
    """`numpy.dtype` for numbers alone: arrays of objects could be forged to point anywhere."""
    dtype = np.dtype(spec, *flags)
    if dtype.kind not in "biuf":
        raise Refused(f"its pickle asks for an array of type {dtype}")
    return dtype


ADMITTED = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): number_type,
    ("_codecs", "encode"): codecs.encode,  # how protocol 2 spells bytes
} | {
    (f"numpy.{core}.{module}", name): function
    for core in ("core", "_core")
    for module, name, function in (
        ("multiarray", "_reconstruct", _ARRAY_RECONSTRUCT),
        ("multiarray", "scalar", _SCALAR),
        ("numeric", "_frombuffer", _ARRAY_FROM_BUFFER),
    )
}


class ArrayUnpickler(pickle.Unpickler):
    """Refuses every global that a pickled array does not need, before it is imported."""

    def find_class(self, module: str, name: str):
        if (module, name) not in ADMITTED:
            raise Refused(f"its pickle asks for {module}.{name}")
        return ADMITTED[module, name]


def load_arrays(path: Path):
    """The object pickled in ``path``; strings written by Python 2 come as bytes."""
    try:
        with path.open("rb") as file:
            return ArrayUnpickler(file, encoding="bytes").load()
    except Refused as refusal:
        raise Refused(f"{path} is not opened: {refusal}, which data files do not hold; get the original file") from None
    except Exception as error:  # a damaged pickle raises almost anything
        raise Refused(f"{path} is no readable pickle ({error}); get the original file again") from None
