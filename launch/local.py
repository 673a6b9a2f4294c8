"""Several processes on this machine, as on a pod: a rehearsal without accelerators.

    python -m launch.local --processes 4 --devices_per_process 2 -- --gin_file=gin/x.gin

What follows `--` goes to `python -m saejax.main` in every process. Each has its own CPU devices and
finds the others at a free port of this machine. The output of process 0 is passed on; of another
one, its errors when it fails. If one fails, all are ended, and its exit code is returned: see
`saejax/exits.py`. Signals go to all of them.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from saejax import exits

_HEARTBEAT_SECONDS = 10  # those that lose another one notice after so long, and say so
_GRACE_SECONDS = 15  # longer than that
_LOST = " lost another process"  # saejax.processes says so
_LINES_KEPT = 1000
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; exits with 2 and one line if it is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.local",
        description=__doc__.split("\n")[0],
        usage="%(prog)s [--processes N] [--devices_per_process N] [--port N] -- FLAGS OF SAEJAX",
        allow_abbrev=False,
    )
    parser.error = lambda message: parser.exit(2, f"launch.local: error: {message}\n")
    parser.add_argument("--processes", type=_positive, default=2, help="how many (default 2)")
    parser.add_argument(
        "--devices_per_process", type=_positive, default=1, help="CPU devices of each (default 1)"
    )
    parser.add_argument("--port", type=_port, help="where they meet; a free one by default")
    split = list(argv).index("--") if "--" in argv else len(argv)
    options, unknown = parser.parse_known_args(argv[:split])
    if unknown:
        parser.error(
            f"{unknown[0]} is none of its flags; those of saejax.main go after --, as in "
            f"python -m launch.local --processes 2 -- --gin_file=gin/synthetic.gin"
        )
    options.arguments = list(argv[split + 1 :])
    return options


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return int(text)


def _port(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number in [1, 65535]")
    return int(text)


def environment(index: int, count: int, devices: int, port: int) -> dict[str, str]:
    """What tells a process its place and its devices."""
    own = {
        "SAEJAX_PROCESSES": str(count),
        "SAEJAX_PROCESS_ID": str(index),
        "SAEJAX_COORDINATOR": f"localhost:{port}",
        "SAEJAX_LOCAL": "1",
        "SAEJAX_HEARTBEAT_SECONDS": str(_HEARTBEAT_SECONDS),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    # Threads for every device to meet at a collective, however few the cores.
    return {"NPROC": str(max(16, 2 * devices)), **os.environ, **own}


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def _meant(code: int) -> int:
    """The exit code that a process would have given for the signal that ended it."""
    if code == -signal.SIGTERM:  # it came before its handler was there: nothing had begun
        return exits.PREEMPTED
    return 128 - code if code < 0 else code


class Group:
    """The processes of one run."""

    def __init__(self):
        """Starts nothing yet."""
        self._errors: list[list[str]] = []
        self._readers: list[threading.Thread] = []
        self._processes: list[subprocess.Popen] = []
        self._asked: int | None = None  # the last signal to be passed on

    def start(self, options: argparse.Namespace) -> None:
        """Starts all of them, or as many as there are when a signal comes.

        Raises:
          OSError: one could not be started; those before it were ended.
        """
        port = options.port or free_port()
        command = [sys.executable, "-m", "saejax.main", *options.arguments]
        for index in range(options.processes):
            if self._asked is not None:
                break
            env = environment(index, options.processes, options.devices_per_process, port)
            try:
                process = subprocess.Popen(
                    command,
                    env=env,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL if index else None,
                    stderr=subprocess.PIPE,
                    text=True,
                    errors="replace",
                    start_new_session=True,
                )
            except OSError as error:
                self.send(signal.SIGKILL)
                for started in self._processes:
                    started.wait()
                raise OSError(f"process {index} could not be started ({error})") from error
            self._processes.append(process)
            self._errors.append([])
            self._readers.append(threading.Thread(target=self._read, args=(index,), daemon=True))
            self._readers[-1].start()
            if self._asked is not None:  # it came after the fork and before the list
                process.send_signal(self._asked)

    def _read(self, index: int) -> None:
        """Keeps the errors of one process, and passes on those of process 0."""
        for line in self._processes[index].stderr:
            self._errors[index].append(line)
            del self._errors[index][:-_LINES_KEPT]
            if index == 0:
                sys.stderr.write(line)
                sys.stderr.flush()

    def send(self, number: int, frame: object = None) -> None:
        """Sends a signal to those that run; none is started after it."""
        self._asked = number
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def wait(self) -> int:
        """Waits for the end of all, which is near when one has failed; returns the exit code."""
        failed: list[int] = []  # in order
        deadline = None
        if not self._processes:
            return _meant(-self._asked)
        running = set(range(len(self._processes)))
        while running:
            time.sleep(0.05)
            for index in sorted(running):
                code = self._processes[index].poll()
                if code is not None:
                    running.remove(index)
                    failed += [index] if _meant(code) not in (exits.DONE, exits.PREEMPTED) else []
            if failed and deadline is None:
                deadline = time.monotonic() + _GRACE_SECONDS
            if deadline is not None and time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                break
        codes = [process.wait() for process in self._processes]
        stopped = exits.PREEMPTED in map(_meant, codes)
        for reader in self._readers:
            reader.join(timeout=1)
        # One that failed by itself, rather than because of another, if there is one.
        causes = [i for i in failed if not any(_LOST in line for line in self._errors[i])]
        if not causes and stopped:  # the others lost the one that was preempted
            return exits.PREEMPTED
        causes = causes or failed
        self._tell(causes, codes)
        return _meant(codes[causes[0]]) if causes else max(map(_meant, codes))

    def _tell(self, causes: list[int], codes: list[int]) -> None:
        """Prints what they failed of, each message once; that of process 0 was passed on."""
        told = {"".join(self._errors[0])}
        for index in causes:
            text = "".join(self._errors[index]) if index else ""
            if codes[index] < 0:
                text += f"ended by {signal.Signals(-codes[index]).name}\n"
            if text and not any(text in before for before in told):
                print(f"[process {index}] {text}", end="", file=sys.stderr)
            told.add(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Starts the processes and waits for their end."""
    options = parse(sys.argv[1:] if argv is None else argv)
    group = Group()
    for number in _FORWARDED:
        signal.signal(number, group.send)
    try:
        group.start(options)
    except OSError as error:
        print(f"launch.local: error: {error}", file=sys.stderr)
        return 1
    return group.wait()


if __name__ == "__main__":
    sys.exit(main())
