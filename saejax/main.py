"""`python -m saejax.main --gin_file=gin/quickstart.gin`: see `run.py` and `harvest_run.py`."""

import logging
import os
import signal
import sys
from pathlib import Path

if __name__ == "__main__":  # the first process of a container hears no signal without a handler
    signal.signal(signal.SIGTERM, lambda *_: os._exit(42))  # exits.PREEMPTED; nothing has begun

from absl import app, flags
from absl import logging as absl_logging

from saejax import allocator, ending, processes, watchdog

FLAGS = flags.FLAGS
flags.DEFINE_multi_string("gin_file", [], "Configuration file; a later one overrides.")
flags.DEFINE_multi_string("gin_bindings", [], "One binding, 'SAE.k = 32'; overrides every file.")
flags.DEFINE_string("workdir", None, "Run directory; default runs/<name of the first gin file>.")
flags.DEFINE_bool("dry_run", False, "Print the configuration, shapes and costs, and stop.")
flags.DEFINE_string("topology", None, "With --dry_run: plan for v5p:8x8x8, gpu:H100x512, cpu:8 ...")
flags.DEFINE_bool("verify", False, "Check every byte of the run directory, print a table, stop.")
flags.DEFINE_bool("allow_config_change", False, "Go on with a run of another configuration.")
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
    workdir = FLAGS.workdir or (FLAGS.gin_file and Path("runs") / Path(FLAGS.gin_file[0]).stem)
    if FLAGS.verify and workdir:
        from saejax import verify

        return verify.verify(Path(workdir))
    if not FLAGS.gin_file:
        shipped = ", ".join(config.shipped_files())
        raise ValueError(f"--gin_file is missing; name a file of yours or one of {shipped}")
    if FLAGS.topology:
        plan.only_cpus(FLAGS.topology, dry_run=FLAGS.dry_run)
    experiment, operative, as_json = config.load_experiment(FLAGS.gin_file, FLAGS.gin_bindings)
    if FLAGS.dry_run:
        print(operative, experiment.plan(FLAGS.topology), sep="\n")
        return 0
    change = {"allow_config_change": True} if FLAGS.allow_config_change else {}
    about = {"operative_gin": operative, "config_json": as_json, "argv": sys.argv}
    return experiment.run(Path(workdir), **about, **change)


def main(argv: list[str]) -> int:
    """`run` with user errors as one line on stderr; the codes of `exits.py`."""
    if not FLAGS.debug:  # our progress lines, and of the libraries only what is wrong
        absl_logging.set_verbosity(absl_logging.WARNING)
        absl_logging.get_absl_handler().setFormatter(logging.Formatter("%(message)s"))
        logging.getLogger("saejax").setLevel(logging.INFO)
    allocator.keep_freed_memory()
    if not (FLAGS.dry_run or FLAGS.verify):
        watchdog.start()
    try:
        return ending.code_of(lambda: run(argv), debug=FLAGS.debug)
    finally:
        watchdog.stop()


def console() -> None:
    """The `saejax` command."""
    app.run(lambda argv: processes.watched(lambda: main(argv), verbose=FLAGS.debug))


if __name__ == "__main__":
    console()
