"""`python -m saejax.main --gin_file=gin/quickstart.gin`: flags, parse, run; see `run.py`."""

import logging
import sys
import traceback
from pathlib import Path

from absl import app, flags
from absl import logging as absl_logging

from saejax import allocator, processes

FLAGS = flags.FLAGS
flags.DEFINE_multi_string("gin_file", [], "Configuration file; a later one overrides.")
flags.DEFINE_multi_string("gin_bindings", [], "One binding, 'SAE.k = 32'; overrides every file.")
flags.DEFINE_string("workdir", None, "Run directory; default runs/<name of the first gin file>.")
flags.DEFINE_bool("dry_run", False, "Print the configuration, shapes and costs, and stop.")
flags.DEFINE_string("topology", None, "With --dry_run: plan for v5p:8x8x8, gpu:H100x512, cpu:8 ...")
flags.DEFINE_bool("list_configurables", False, "Print everything a gin file can set, and stop.")
flags.DEFINE_bool("debug", False, "Tracebacks of user errors and every library's log.")


def run(argv: list[str]) -> int:
    """Does what the flags say and returns the exit code; user errors are raised."""
    from saejax import config, plan  # here, so that `--help` and a mistyped flag answer at once

    if len(argv) > 1:
        raise ValueError(f"unexpected argument {argv[1]!r}; for a file write --gin_file={argv[1]}")
    if FLAGS.list_configurables:
        print(config.list_configurables(), end="")
        return 0
    if not FLAGS.gin_file:
        shipped = ", ".join(config.shipped_files())
        raise ValueError(f"--gin_file is missing; name a file of yours or one of {shipped}")
    if FLAGS.topology:
        plan.only_cpus(FLAGS.topology, dry_run=FLAGS.dry_run)
    experiment, operative, as_json = config.load_experiment(FLAGS.gin_file, FLAGS.gin_bindings)
    if FLAGS.dry_run:
        print(operative, experiment.plan(FLAGS.topology), sep="\n")
        return 0
    workdir = Path(FLAGS.workdir or Path("runs") / Path(FLAGS.gin_file[0]).stem)
    return experiment.run(workdir, operative_gin=operative, config_json=as_json, argv=sys.argv)


def main(argv: list[str]) -> int:
    """`run` with user errors as one line on stderr and exit code 1; 130 when interrupted."""
    if not FLAGS.debug:  # our progress lines, and of the libraries only what is wrong
        absl_logging.set_verbosity(absl_logging.WARNING)
        absl_logging.get_absl_handler().setFormatter(logging.Formatter("%(message)s"))
        logging.getLogger("saejax").setLevel(logging.INFO)
    allocator.keep_freed_memory()
    try:
        return run(argv)
    except KeyboardInterrupt:
        print("saejax: interrupted; the same command continues", file=sys.stderr)
        return 130
    except (ValueError, OSError, FloatingPointError, NotImplementedError) as error:
        if FLAGS.debug:
            raise
        print(f"saejax: error: {_one_line(error)}", file=sys.stderr)
        return 1


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    origin = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    root = Path(__file__).resolve().parents[1]
    ours = any(root / name in origin.parents for name in ("saejax", "pallas_kernels"))
    # A library's ValueError may be our fault, not the user's: say how to see where it came from.
    return text + ("" if ours or isinstance(error, OSError) else " (--debug shows where)")


def console() -> None:
    """The `saejax` command."""
    app.run(lambda argv: processes.watched(lambda: main(argv), verbose=FLAGS.debug))


if __name__ == "__main__":
    console()
