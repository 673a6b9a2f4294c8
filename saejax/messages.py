"""What a user is told of an error: one line."""

import traceback
from pathlib import Path


def one_line(error: Exception) -> str:
    """The message of an error; a library's, which may be our fault, with how to see its origin."""
    text = " ".join(str(error).split()) or type(error).__name__
    origin = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    root = Path(__file__).resolve().parents[1]
    ours = any(root / name in origin.parents for name in ("saejax", "pallas_kernels"))
    return text + ("" if ours or isinstance(error, OSError) else " (--debug shows where)")
