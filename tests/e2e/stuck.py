"""The program with one place that never returns: `python stuck.py PLACE INDEX -- FLAGS`."""

import os
import sys
import time

PLACE, INDEX = sys.argv[1:3]
del sys.argv[1:4]


def stuck_here(*args, **kwargs):
    """What the stack must show."""
    time.sleep(1000)


def put(owner, name: str) -> None:
    """Makes a method of a class the place, in the process that is to be stuck."""
    if os.environ.get("SAEJAX_PROCESS_ID", "0") == INDEX:
        setattr(owner, name, stuck_here)


def main() -> None:
    """Runs it."""
    from saejax import main as program

    def place() -> None:
        from saejax import checkpoint, fit, run, rundir
        from saejax.data import synthetic

        if PLACE == "start":
            put(rundir.RunDirectory, "require_claim")
        elif PLACE == "restore":
            put(checkpoint.Checkpoints, "restore_newest")
        elif PLACE == "save":
            put(checkpoint.Checkpoints, "save")
        elif PLACE == "evaluation":
            put(run.Experiment, "_measure")
        elif PLACE == "compile":
            fit.jit_step = lambda *args: stuck_here  # what compiles when it is first called
        elif PLACE == "step":
            whole = synthetic.Synthetic.iterate

            def iterate(*args, **kwargs):
                for i, rows in enumerate(whole(*args, **kwargs)):
                    if i == 4 and os.environ.get("SAEJAX_PROCESS_ID", "0") == INDEX:
                        stuck_here()
                    yield rows

            synthetic.Synthetic.iterate = iterate

    work = program.run
    program.run = lambda argv: (place(), work(argv))[1]
    program.console()


if __name__ == "__main__":
    main()
