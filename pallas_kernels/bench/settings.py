"""The command line: names of shapes and operations, and what is wrong with others."""

import argparse
import dataclasses
import difflib
import math
import pathlib
import re
from collections.abc import Sequence

from pallas_kernels.bench.ops import CASES, IMPLEMENTATIONS
from pallas_kernels.shapes import NAMED, Shape

OPS = (*CASES, "step")
PEERS = ("eai-sparsify", "sae-lens", "dictionary-learning")
_WRITTEN = re.compile(r"(\d+)x(\d+)x(\d+)x(\d+)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure.

    Attributes:
      shapes: by name; none are those that suit the device.
      ops, implementations: names; no implementations are all that can run, but the reference.
      repeats: of every timing.
      dtype: of the multiplications: "float32", "bfloat16" or "auto".
      microbatch_size: tokens that the step processes at once; None is the whole batch.
      json: where to write the figures, or None.
      against: trainers to race, by name; none for no race.
      race_tokens: that every trainer of the race trains on; 0 times single steps only.
      keep_memory: do not give freed memory back to the system, as `saejax.main` does not.
      race_rates: factors of the trainers' own learning rates; each is a run of its own.
    """

    shapes: dict[str, Shape]
    ops: tuple[str, ...]
    implementations: tuple[str, ...]
    repeats: int
    dtype: str
    microbatch_size: int | None
    json: pathlib.Path | None
    against: tuple[str, ...]
    race_tokens: int
    keep_memory: bool
    race_rates: tuple[float, ...]


def parse(arguments: Sequence[str] | None) -> Settings | None:
    """Reads the command line; None if it only asked for a list, which is printed.

    Raises:
      SystemExit: something is wrong; the flag, its value and what is allowed are named.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.list:
        print(listing())
        return None
    try:
        return _check(given)
    except ValueError as error:
        parser.error(str(error))


def listing() -> str:
    """Every shape, operation and implementation."""
    shapes = [
        f"  {name:<24} d={s.d} n={s.n} k={s.k} B={s.tokens} k_aux={s.k_aux}"
        for name, s in NAMED.items()
    ]
    return "\n".join(
        [
            "shapes (or D x N x K x B, written like 512x16384x32x2048):",
            *shapes,
            f"operations: {', '.join(OPS)}",
            f"implementations: {', '.join(IMPLEMENTATIONS)}",
        ]
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m pallas_kernels.bench",
        description="Times the operations and the whole training step, side by side.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--list", action="store_true", help="print shapes, operations and implementations")
    add("--shapes", default="", help="names, or sizes like 512x16384x32x2048; comma separated")
    add("--ops", default=",".join(OPS), help="comma separated; all by default")
    add("--implementations", default="", help="all that can run but the reference, by default")
    add("--repeats", type=int, default=30, help="repetitions of every timing")
    add("--dtype", default="auto", help="float32, bfloat16, or auto: bfloat16 on accelerators")
    add(
        "--microbatch_size", type=int, help="tokens that the step processes at once; all by default"
    )
    add("--json", type=pathlib.Path, metavar="FILE", help="write all figures and samples there")
    add("--against", help=f"race public trainers: 'torch' for all, or some of {', '.join(PEERS)}")
    add("--race_tokens", type=int, default=2_000_000, help="of the race; 0 times single steps only")
    add("--race_rates", default="1", help="factors of every trainer's own learning rate")
    add(
        "--keep_memory",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep freed memory in this process, as training does; also for what is raced against",
    )
    return parser


def _check(given: argparse.Namespace) -> Settings:
    if given.repeats < 1:
        raise ValueError(f"--repeats={given.repeats}: must be at least 1")
    if given.race_tokens < 0:
        raise ValueError(f"--race_tokens={given.race_tokens}: must be at least 0 (0: no race)")
    named = [_known("--against", name, ("torch", *PEERS)) for name in _split(given.against or "")]
    against = PEERS if "torch" in named else tuple(named)
    if given.json is not None and given.json.is_dir():
        raise ValueError(f"--json={given.json}: is a folder; name a file")
    if given.json is not None and not given.json.parent.is_dir():
        raise ValueError(f"--json={given.json}: the folder {given.json.parent} does not exist")
    if not against and not _split(given.ops):
        raise ValueError(f"--ops={given.ops!r}: names none; there are {', '.join(OPS)}")
    shapes = {text: _shape(text) for text in _split(given.shapes)}
    for text, shape in shapes.items():
        size = given.microbatch_size
        if size is not None and (size < 1 or shape.tokens % size):
            raise ValueError(
                f"--microbatch_size={size}: must be a positive divisor of the {shape.tokens} "
                f"tokens of --shapes={text}"
            )
        if against and given.race_tokens and given.race_tokens < shape.tokens:
            raise ValueError(
                f"--race_tokens={given.race_tokens}: must be 0, or at least the {shape.tokens} "
                f"tokens of a batch of --shapes={text}"
            )
    return Settings(
        shapes=shapes,
        ops=tuple(_known("--ops", op, OPS) for op in _split(given.ops)),
        implementations=tuple(
            _known("--implementations", name, IMPLEMENTATIONS)
            for name in _split(given.implementations)
        ),
        repeats=given.repeats,
        dtype=_known("--dtype", given.dtype, ("auto", "float32", "bfloat16")),
        microbatch_size=given.microbatch_size,
        json=given.json,
        against=against,
        race_tokens=given.race_tokens,
        keep_memory=given.keep_memory,
        race_rates=tuple(map(_factor, _split(given.race_rates))),
    )


def _split(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _known(flag: str, value: str, allowed: Sequence[str]) -> str:
    if value in allowed:
        return value
    near = difflib.get_close_matches(value, allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{flag}: {value!r} is not one of {', '.join(allowed)}.{hint}")


def _factor(text: str) -> float:
    try:
        factor = float(text)
    except ValueError:
        factor = 0.0
    if not 0 < factor < math.inf:
        raise ValueError(f"--race_rates: {text!r} must be a positive number, such as 1 or 0.3")
    return factor


def _shape(text: str) -> Shape:
    sizes = _WRITTEN.fullmatch(text)
    if sizes is None:
        try:
            return NAMED[_known("--shapes", text, tuple(NAMED))]
        except ValueError as error:
            raise ValueError(f"{error} Sizes are written like 512x16384x32x2048.") from None
    d, n, k, tokens = map(int, sizes.groups())
    if min(d, n, k, tokens) < 1 or k > n:
        raise ValueError(f"--shapes: {text!r} is d x n x k x tokens, each at least 1, and k <= n")
    if max(n * d, tokens * d, tokens * k) >= 2**31:
        raise ValueError(
            f"--shapes: {text!r} has n * d, tokens * d or tokens * k of 2**31 or more, which no "
            "operation takes on one device"
        )
    return Shape(d=d, n=n, k=k, tokens=tokens, k_aux=min(max(d // 2, 1), n))
