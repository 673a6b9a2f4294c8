"""What splitting the latents of a trained run over shards would lose: a table, on one device.

  python -m saejax.truncation runs/quickstart --shards 8 64 512

The selection of training on that many shards is simulated on the run's held-out activations, for
the default capacity, the paper's bare capacity factor 2, and the exact one.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from saejax.data.shards import open_store
from saejax.data.synthetic import Synthetic, SyntheticConfig
from saejax.evals.truncation import format_table, truncation
from saejax.loading import load
from saejax.rundir import RunDirectory, read_object, write_json
from saejax.sources import contexts_of

_SHARDS = (8, 64, 512)


def held_out(run: RunDirectory, activations: str | None = None) -> Iterator[np.ndarray]:
    """Blocks of the held-out activations of a run.

    Args:
      run: the run directory.
      activations: folder (or URL) that holds a store 'held_out', where the run's own has been
        moved, or another one is meant.

    Raises:
      FileNotFoundError: there is no such store, or the run has kept none.
      ValueError: the run directory's config.json is damaged.
    """
    if activations is None and not run.activations.exists():
        data = dict(read_object(run.config_json).get("data", {}))
        kind = data.pop("class", "an array").removesuffix("Config")
        if kind == "Synthetic":
            # One row a batch: held-out rows do not depend on it.
            yield Synthetic(SyntheticConfig(**data), 1).held_out()[0]
            return
        if kind != "Stored":
            raise FileNotFoundError(
                f"{run.activations} is missing, and the data of the run ({kind}) cannot be made "
                f"from its configuration alone; give --activations"
            )
        activations = data["path"]
    root = str(run.activations if activations is None else activations).rstrip("/")
    for block in contexts_of(open_store(f"{root}/held_out")):
        yield block.stored_rows()


def measure(
    workdir: str | pathlib.Path,
    shards: Sequence[int] | None = None,
    *,
    activations: str | None = None,
    tokens: int | None = None,
):
    """`evals.truncation.truncation` of a run directory.

    Args:
      workdir: the run directory.
      shards: numbers of shards; None for those of 8, 64 and 512 that divide the latents.
      activations: see `held_out`.
      tokens: at most this many held-out tokens; None for all.

    Raises:
      FileNotFoundError: there is no checkpoint, or there are no activations.
      ValueError: a number of shards that does not divide the latents.
    """
    sae = load(workdir)
    if shards is None:
        shards = [count for count in _SHARDS if sae.config.n_latents % count == 0] or [1]
    blocks = held_out(RunDirectory(workdir), activations)
    return truncation(sae, blocks, shards=shards, limit=tokens)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; 0, or 1 with one line on stderr after a user error."""
    parser = argparse.ArgumentParser(
        prog="python -m saejax.truncation",
        description="What a trained run would lose of its exact top-k on latent shards.",
    )
    parser.add_argument("workdir", help="run directory, runs/quickstart")
    parser.add_argument("--shards", type=int, nargs="+", help="default: 8 64 512")
    parser.add_argument("--activations", help="folder of the stores; default: the run's own")
    parser.add_argument("--tokens", type=int, help="held-out tokens at most; default: all")
    parser.add_argument("--json", help="also write the figures to this file")
    asked = parser.parse_args(argv)
    try:
        measured = measure(
            asked.workdir, asked.shards, activations=asked.activations, tokens=asked.tokens
        )
        if asked.json:
            figures = [
                dataclasses.asdict(one) | {"nmse_change": one.nmse_change} for one in measured
            ]
            write_json(pathlib.Path(asked.json), figures)
    except (ValueError, OSError) as error:
        print(f"saejax: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(format_table(measured))
    return 0


if __name__ == "__main__":
    sys.exit(main())
