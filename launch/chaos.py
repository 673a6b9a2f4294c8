"""A training under random faults must end as a quiet one does, bit by bit.

    python -m launch.chaos --minutes 10 --processes 2 --seed 0 -- --gin_file=gin/synthetic.gin

Round after round, until the time is up, the training that follows `--` (a synthetic one by default)
is started in a folder of its own and killed (SIGKILL), preempted (SIGTERM), paused (SIGSTOP and
SIGCONT) and damaged (a flipped bit in its newest checkpoint, or in a store of activations) at
random, and started again, until it is done. Then the digests of all arrays of its last checkpoint
and its metrics must be those of a quiet run. Prints how often each fault was tried; exits with 0 if
all was as it must be, and with 1 otherwise.
"""

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from launch.local import environment, free_port
from saejax import exits

_TRAINING = [
    "--gin_file=gin/synthetic.gin",
    *(
        f"--gin_bindings={binding}"
        for binding in (
            "Synthetic.held_out_rows = 256",
            "Train.tokens = 640_000",
            "Train.batch_size = 256",
            "Train.sample_rows = 2048",
            "Train.log_every = 20",
            "Optimizer.warmup_steps = 10",
            "Loss.dead_tokens = 5000",
            "Checkpoint.every_steps = 25",
            "Checkpoint.keep = 3",
            "Experiment.evaluation = None",
            "Experiment.report = None",
        )
    ),
]
_FAULTS = {"kill": 4, "preempt": 3, "pause": 2}  # weights; damage is done in between
_TIMES = ("tokens_per_second", "wait_share")  # of a record: not of the training but of the clock
_LAST_WORDS_SECONDS = 30.0  # after one process of several has ended
_END_SECONDS = 900.0


class Unexpected(Exception):
    """What must not be; the message tells."""


@dataclasses.dataclass
class Run:
    """One training, started as often as it takes.

    Attributes:
      workdir: its run directory.
      command: what starts it.
      processes: how many it has.
      running: those of them that were started last.
    """

    workdir: pathlib.Path
    command: list[str]
    processes: int
    running: list[subprocess.Popen] = dataclasses.field(default_factory=list)

    @property
    def log(self) -> pathlib.Path:
        """What all starts printed."""
        return self.workdir.with_name(f"{self.workdir.name}.log")

    def start(self) -> None:
        """Starts it, or starts it again."""
        port, environments = free_port(), [dict(os.environ)]
        if self.processes > 1:
            environments = [environment(i, self.processes, 1, port) for i in range(self.processes)]
        with self.log.open("a") as log:
            self.running = [
                subprocess.Popen(
                    [*self.command, f"--workdir={self.workdir}"],
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    start_new_session=True,
                )
                for env in environments
            ]

    def ended(self) -> bool:
        """Whether any of the processes has."""
        return any(process.poll() is not None for process in self.running)

    def wait(self, seconds: float) -> list[int]:
        """Exit codes of all; a cluster ends those that are left when one has failed."""
        deadline = time.monotonic() + seconds
        for process in self.running:
            try:
                process.wait(timeout=max(deadline - time.monotonic(), 0.1))
            except subprocess.TimeoutExpired:
                self.signal(signal.SIGKILL)
        return [process.wait() for process in self.running]

    def signal(self, number: int, among: Sequence[subprocess.Popen] | None = None) -> None:
        """Sends a signal: one that a process cannot handle to its child, too."""
        for process in self.running if among is None else among:
            if process.poll() is None:
                if number in (signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT):
                    os.killpg(process.pid, number)
                    for child in _children(process.pid):  # it leads a group of its own
                        os.kill(child, number)
                else:
                    process.send_signal(number)

    def records(self) -> list[dict[str, Any]]:
        """The whole lines of metrics.jsonl, without times."""
        path = self.workdir / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [{k: v for k, v in json.loads(s).items() if k not in _TIMES} for s in lines]

    def steps(self) -> list[int]:
        """Whole checkpoints, in order."""
        folder = self.workdir / "checkpoints"
        names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
        return sorted(int(name) for name in names if name.isdigit())

    def end(self) -> tuple[int, dict[str, Any], list[dict[str, Any]]]:
        """The last step, its arrays' digests, and the records."""
        step = self.steps()[-1]
        sealed = json.loads((self.workdir / f"checkpoints/{step}/metadata.json").read_text())
        return step, sealed["content"]["arrays"], self.records()

    def verify(self) -> subprocess.CompletedProcess:
        """`--verify`: compares every byte with its checksums."""
        command = [sys.executable, "-m", "saejax.main", "--verify", f"--workdir={self.workdir}"]
        return subprocess.run(command, capture_output=True, text=True)


def _children(pid: int) -> list[int]:
    path = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
    try:
        return [int(child) for child in path.read_text().split()]
    except OSError:
        return []


class Chaos:
    """Faults drawn from a seed, and their counts."""

    def __init__(self, seed: int):
        """Nothing was done yet."""
        self.chance = random.Random(seed)
        self.counts: collections.Counter[str] = collections.Counter()

    def round(self, run: Run, deadline: float) -> None:
        """One training from its start to its end, with faults until the deadline.

        Raises:
          Unexpected: an exit code that the fault does not explain.
        """
        while True:
            run.start()
            fault = None
            if time.monotonic() < deadline and self._reach_a_moment(run):
                fault = self.chance.choices(list(_FAULTS), list(_FAULTS.values()))[0]
            codes = run.wait(_END_SECONDS) if fault is None else getattr(self, f"_{fault}")(run)
            if codes == [exits.DONE] * run.processes:
                return
            _require(fault is not None and exits.ERROR not in codes, run, codes, fault)
            if self.chance.random() < 0.3 and time.monotonic() < deadline:
                self._damage(run)

    def _reach_a_moment(self, run: Run) -> bool:
        """Waits for a random one, in the start or in training; whether all are still there."""
        seen, deadline = len(run.records()), time.monotonic() + 120
        if self.chance.random() < 0.75:
            while len(run.records()) == seen and time.monotonic() < deadline and not run.ended():
                time.sleep(0.02)
            seconds = self.chance.uniform(0, 2)
        else:
            seconds = self.chance.uniform(0.5, 8)
        until = time.monotonic() + seconds
        while time.monotonic() < until and not run.ended():
            time.sleep(0.02)
        return not run.ended()

    def _some(self, run: Run) -> list[subprocess.Popen]:
        return self.chance.sample(run.running, self.chance.randint(1, run.processes))

    def _kill(self, run: Run) -> list[int]:
        self.counts["kill"] += 1
        run.signal(signal.SIGKILL, self._some(run))
        return run.wait(_LAST_WORDS_SECONDS)

    def _preempt(self, run: Run) -> list[int]:
        self.counts["preempt"] += 1
        some = self._some(run)
        run.signal(signal.SIGTERM, some)
        for process in some:
            code = process.wait(timeout=_LAST_WORDS_SECONDS)
            # Before Python runs, and after it has ended, a signal has its own way.
            heard = (exits.PREEMPTED, exits.DONE, exits.STUCK, -signal.SIGTERM)
            _require(code in heard, run, [code], "preempt")
        return run.wait(_LAST_WORDS_SECONDS)

    def _pause(self, run: Run) -> list[int]:
        self.counts["pause"] += 1
        some = self._some(run)
        run.signal(signal.SIGSTOP, some)
        time.sleep(self.chance.uniform(0.2, 3))
        run.signal(signal.SIGCONT, some)
        while not run.ended() and self.chance.random() < 0.9:
            time.sleep(0.5)
        if not run.ended():
            return self._kill(run)
        return run.wait(_LAST_WORDS_SECONDS)

    def _damage(self, run: Run) -> None:
        """Flips a bit of the newest checkpoint, if there is an older one; or of a store."""
        shards = [p for p in (run.workdir / "activations").rglob("*") if p.is_file()]
        if shards and self.chance.random() < 0.5:
            path, byte = self._flip(shards)
            self.counts["damage to a store"] += 1
            told = run.verify()
            if told.returncode != exits.ERROR:
                raise Unexpected(f"bit flipped in {path}, and --verify says: {told.stdout}")
            path.write_bytes(byte)
        elif len(run.steps()) > 1:
            folder = run.workdir / "checkpoints" / str(run.steps()[-1])
            path, _ = self._flip([p for p in folder.rglob("*") if p.is_file()])
            self.counts["damage to a checkpoint"] += 1
            run.start()
            until = time.monotonic() + 120
            while folder.exists() and _is_whole(folder, path) and not run.ended():
                if time.monotonic() > until:
                    raise Unexpected(f"bit flipped in {path}, and nobody minds: {_tail(run.log)}")
                time.sleep(0.05)
            run.signal(signal.SIGKILL)
            codes = run.wait(_LAST_WORDS_SECONDS)
            aside = list(folder.parent.glob(f"{folder.name}.damaged-*"))
            _require(bool(aside) and exits.ERROR not in codes, run, codes, f"damage to {path}")

    def _flip(self, files: list[pathlib.Path]) -> tuple[pathlib.Path, bytes]:
        """Changes one bit of one file; the file, and what it held."""
        path = self.chance.choice([p for p in files if p.stat().st_size])
        before = path.read_bytes()
        data = bytearray(before)
        data[self.chance.randrange(len(data))] ^= 1 << self.chance.randrange(8)
        path.write_bytes(data)
        return path, before


def _is_whole(folder: pathlib.Path, path: pathlib.Path) -> bool:
    return path.exists() and not list(folder.parent.glob(f"{folder.name}.damaged-*"))


def _require(holds: bool, run: Run, codes: list[int], fault: str | None) -> None:
    if not holds:
        raise Unexpected(f"exit codes {codes} after {fault}; it said last: {_tail(run.log)}")


def _tail(log: pathlib.Path) -> str:
    return "\n" + "\n".join(log.read_text(errors="replace").splitlines()[-20:])


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; exits with 2 if it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.chaos",
        description=__doc__.split("\n")[0],
        usage="%(prog)s [--minutes M] [--processes N] [--seed S] [-- FLAGS OF SAEJAX]",
        allow_abbrev=False,
    )
    parser.add_argument("--minutes", type=float, default=5.0, help="of faults (default 5)")
    parser.add_argument("--processes", type=int, default=1, choices=[1, 2], help="(default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (default 0)")
    parser.add_argument("--folder", type=pathlib.Path, help="kept; a temporary one by default")
    split = list(argv).index("--") if "--" in argv else len(argv)
    options = parser.parse_args(argv[:split])
    options.training = list(argv[split + 1 :]) or _TRAINING
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs rounds until the time is up; 0 if all ended as the quiet run did."""
    options = parse(sys.argv[1:] if argv is None else argv)
    command = [sys.executable, "-m", "saejax.main", *options.training]
    folder = options.folder or pathlib.Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    chaos, rounds, run = Chaos(options.seed), 0, None
    try:
        run = Run(folder / "quiet", command, options.processes)
        run.start()
        codes = run.wait(_END_SECONDS)
        _require(codes == [exits.DONE] * options.processes, run, codes, "nothing")
        wanted = run.end()
        deadline = time.monotonic() + 60 * options.minutes
        while time.monotonic() < deadline:
            run = Run(folder / f"round{rounds}", command, options.processes)
            chaos.round(run, deadline)
            rounds += 1
            _compare(run, wanted)
            print(f"round {rounds}: as quiet; {_counted(chaos)}", flush=True)
            shutil.rmtree(run.workdir)
    except (Unexpected, subprocess.TimeoutExpired) as error:
        print(f"launch.chaos: error: in round {rounds + 1}, seed {options.seed}: {error}")
        print(f"left in {folder}; {_counted(chaos)}")
        return 1
    finally:
        if run is not None:
            run.signal(signal.SIGKILL)
    if options.folder is None:
        shutil.rmtree(folder)
    print(f"{rounds} trainings ended bit by bit as the quiet one, through {_counted(chaos)}")
    return 0


def _compare(run: Run, wanted: tuple) -> None:
    found = run.end()
    for name, one, other in zip(("last step", "digests", "records"), found, wanted):
        if one != other:
            raise Unexpected(f"{name} of {run.workdir} are {one}, and of the quiet run {other}")
    told = run.verify()
    if told.returncode != exits.DONE:
        raise Unexpected(f"--verify: {told.stdout}{told.stderr}")


def _counted(chaos: Chaos) -> str:
    return ", ".join(f"{n} x {name}" for name, n in sorted(chaos.counts.items())) or "no faults"


if __name__ == "__main__":
    sys.exit(main())
