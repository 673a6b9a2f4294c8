"""Activation stores at the command line: import, export, look at, verify.

  python -m saejax.stores import SOURCE STORE --width 768
  python -m saejax.stores export STORE OUT --order text
  python -m saejax.stores info STORE
  python -m saejax.stores verify STORE

`import` makes the stores STORE/train and STORE/held_out of activations that another program made,
in the form in which a harvest stores them; `Stored.path = 'STORE'` (gin/stored.gin) trains on them.
SOURCE is a file or a folder of

  npy                  rows [N, D] or contexts [N, T, D] in each file
  safetensors          one tensor of that shape in each file (--field names it), token ids beside it
  parquet              a column of lists [D], or of lists of lists [T, D] (package pyarrow)
  torch                .pt files: a tensor, or a dictionary of tensors; pickles are never run
  saelens              a dataset of SAELens' CacheActivationsRunner (package pyarrow)
  activault            the folder of one hook: metadata.json and .pt files
  llamascopium         the folder of one hook point: chunk-*.safetensors; its masks are honoured
  dictionary_learning  the folder of one submodule of an ActivationCache
  saejax               what `export` wrote

float16, bfloat16, float32 or float64; bfloat16 is stored. The format is found out unless --format
names it. Contexts are permuted, and some held out (--held_out_percent), by --seed; --split=train or
--split=held_out puts everything into one split, where the files are split already. Rows without
contexts are contexts of one token each. Masked positions (--bos, --special, --pad, the format's
own) and outlying norms (--max_norm_ratio, 10 by default) are not stored, but counted. With
--subject, the model that the activations are of, its special tokens are masked too, and
`Stored.subject` can evaluate the loss. An import that was killed is continued by the same command;
several at once share the work.

`export` writes safetensors files of at most --max_bytes with an index.json, of one store or of both
splits below STORE; `data.exporting` has the layout. `verify` reads every byte.
"""

import argparse
import dataclasses
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from saejax.data.exporting import export
from saejax.data.foreign.formats import FORMATS
from saejax.data.foreign.interface import FLOATS
from saejax.data.shards import NoStoreError, Store, open_store
from saejax.data.storage import size
from saejax.importing import ImportConfig, import_activations
from saejax.subjects.harvest import SPLITS

_FOLDERS = ("spec.json", "*/spec.json", "*/*/spec.json")


def find_stores(path: str) -> list[Store]:
    """The store at a path, or those below it: splits, or sites and splits.

    Raises:
      FileNotFoundError: there is none.
    """
    root = path.rstrip("/")
    if "://" in root:
        try:
            return [open_store(root)]
        except NoStoreError:
            return [open_store(f"{root}/{split}") for split in SPLITS]
    folder = pathlib.Path(root).expanduser()
    found = sorted({file.parent for pattern in _FOLDERS for file in folder.glob(pattern)})
    if not found:
        raise FileNotFoundError(f"{path}: no store there; give the folder of a store or of splits")
    return [open_store(place) for place in found]


def describe(store: Store) -> str:
    """What a store is, as a table; of an unfinished one, what is known."""
    spec = store.spec
    committed = len(store.committed())
    lines = [
        store.path,
        _row("subject", f"{spec.subject} ({spec.subject_fingerprint})"),
        _row("site", f"{spec.site}, {spec.d_model} wide, {spec.dtype}"),
        _row("split", f"{spec.split} of text {spec.text_fingerprint}"),
        _row(
            "contexts",
            f"{spec.context_length} tokens each, stored from position {spec.first_position}",
        ),
        _row(
            "shards",
            f"{committed:,} of {spec.n_shards:,}, of {spec.contexts_per_shard:,} contexts each",
        ),
    ]
    if committed < spec.n_shards:
        return "\n".join([*lines, _row("", "unfinished: run the same command again")])
    manifest = store.manifest
    rows = manifest["rows"]
    table = manifest["contexts"] * spec.columns * 4
    counts = [manifest["left_out"], manifest["provenance"].get("left_out_before", {})]
    left_out = [
        f"{n:,} {reason.replace('_', ' ')}" for some in counts for reason, n in some.items() if n
    ]
    lines += [
        _row("rows", f"{rows:,} of {manifest['contexts']:,} contexts"),
        _row("left out", ", ".join(left_out) or "nothing"),
        _row("documents", f"{manifest['documents']:,}"),
        _row("bytes", f"{size(rows * spec.d_model * 2)} activations, {size(table)} contexts"),
        _row(
            "norm", f"mean {manifest['mean_norm']:.5g}, rms {manifest['mean_sq_norm'] ** 0.5:.5g}"
        ),
        _row("variance", f"{manifest['total_variance']:.5g} in all"),
        _row("sha256", manifest["sha256"]),
        *(
            _row("computed" if i == 0 else "", ", ".join(f"{k} {v}" for k, v in how.items()))
            for i, how in enumerate(manifest.get("computations", ()))
        ),
        *(_row("origin" if i == 0 else "", text) for i, text in enumerate(_origin(manifest))),
        "",
        f"  {'position':<18}{'rows':>14}{'mean norm':>14}",
    ]
    return "\n".join([*lines, *_norms(manifest, spec.first_position)])


def _origin(manifest: dict[str, Any]) -> list[str]:
    return [
        f"{name} = {value}"
        for name, value in manifest["provenance"].items()
        if not isinstance(value, dict)
    ]


def _norms(manifest: dict[str, Any], first: int) -> list[str]:
    """Mean norms by position; from the fifth on, of twice as many positions a line."""
    counts, norms = manifest["count_by_position"], manifest["norm_by_position"]
    lines, start, step = [], 0, 1
    while start < len(counts):
        stop = min(len(counts), start + step)
        rows = sum(counts[start:stop])
        total = sum(n * x for n, x in zip(counts[start:stop], norms[start:stop]) if n)
        place = str(first + start) + ("" if stop == start + 1 else f" .. {first + stop - 1}")
        lines.append(f"  {place:<18}{rows:>14,}{total / rows if rows else 0:>14.5g}")
        start, step = stop, 1 if stop < 4 else 2 * step
    return lines


def _row(name: str, text: str) -> str:
    return f"  {name:<18}{text}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m saejax.stores",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("import", help="activations made elsewhere to stores").add_argument
    add("source", help="file or folder")
    add("store", help="folder (or URL) of the stores 'train' and 'held_out'")
    add("--width", type=int, required=True, help="that the activations must have")
    add("--format", choices=FORMATS, help="default: found out")
    add("--field", help="tensor or column with the activations")
    add("--tokens_field", dest="tokens", help="tensor or column with the token ids")
    add("--dtype", choices=FLOATS, help="that the source must have; default: any")
    add("--split", choices=("both", *SPLITS), help="default: both")
    add("--held_out_percent", type=float, help="default: 5")
    add("--subject", help="the model: 'embedded', a folder or a hub id")
    add("--site", help="default: what the format says")
    add("--first_position", type=int, help="leave out the positions before it; default: 0")
    add("--bos", type=int, help="token id that is not stored")
    add("--special", type=int, nargs="+", help="further ids that are not stored")
    add("--pad", type=int, help="id of padding")
    add("--max_norm_ratio", type=float, help="of the median; default: 10; 0 keeps all")
    add("--contexts_per_shard", type=int, help="exactly; default: fits the source")
    add("--max_bytes", type=int, help="refuse to store more")
    add("--memory", type=int, help="bytes held at once, about; default: 1 GiB")
    add("--seed", type=int, help="default: 0")
    add = commands.add_parser("export", help="a store to safetensors files").add_argument
    add("store", help="folder (or URL) of a store, or of its splits")
    add("out", help="new local folder")
    add("--order", choices=("text", "stored"), default="text")
    add("--max_bytes", type=int, default=2**30, help="of a file; default: 1 GiB")
    for name, what in (("info", "what a store is"), ("verify", "is a store what was written?")):
        add = commands.add_parser(name, help=what).add_argument
        add("store", help="folder (or URL) of a store, or of its splits")
    return parser


def _import(asked: argparse.Namespace) -> None:
    named = {field.name for field in dataclasses.fields(ImportConfig)}
    given = {k: v for k, v in vars(asked).items() if k in named and v is not None}
    given["special"] = tuple(given.get("special", ()))
    import_activations(ImportConfig(**given), asked.store, log=_say)


def _export(asked: argparse.Namespace) -> None:
    stores = find_stores(asked.store)
    for store in stores:
        below = store.path.removeprefix(_place(asked.store))
        place = asked.out.rstrip("/") + below
        index = export(store, place, order=asked.order, max_bytes=asked.max_bytes, log=_say)
        _say(f"{place}: {index['rows']:,} rows in {len(index['files'])} files")


def _place(path: str) -> str:
    """A path as `Store.path` begins with it."""
    root = path.rstrip("/")
    return root if "://" in root else os.path.abspath(os.path.expanduser(root))


def _verify(asked: argparse.Namespace) -> None:
    for store in find_stores(asked.store):
        store.verify()
        print(f"{store.path}: sound, {store.n_rows:,} rows in {store.spec.n_shards:,} shards")


def _info(asked: argparse.Namespace) -> None:
    print("\n\n".join(describe(store) for store in find_stores(asked.store)))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0, or 1 with one line on stderr after a user error."""
    asked = _parser().parse_args(argv)
    commands = {"import": _import, "export": _export, "info": _info, "verify": _verify}
    try:
        commands[asked.command](asked)
    except (ValueError, OSError) as error:
        print(f"saejax: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
