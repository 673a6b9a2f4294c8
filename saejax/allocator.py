"""Keeps the host memory that a step frees, for the next step.

On CPU, XLA asks for a step's temporaries anew every time. The C library gives blocks of that size
back to the system and gets them as pages that are made one by one when first touched, which can
take longer than computing what goes into them: a quarter of the step, where it was measured.
"""

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8


def keep_freed_memory() -> bool:
    """Stops the C library from returning freed memory; call it before threads start.

    The process then holds on to the most it ever used.

    Returns:
      Whether it did: only glibc can be told so.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    # One arena: those of other threads give back what is free at their end, whatever is asked.
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_ARENA_MAX: 1}
    return min(mallopt(name, value) for name, value in settings.items()) == 1
