"""Before JAX joins processes: do they all reach process 0, and were they told the same?

JAX waits for all of them with one deadline, and what is wrong ends in an abort that names nobody.
Here process 0 listens first at the coordinator's port, in plain Python, until each of the others
has told it who it is; then it frees the port for JAX. What one of them was told wrongly, all say.
"""

import contextlib
import ipaddress
import json
import logging
import os
import platform
import selectors
import socket
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from saejax.processes.losses import LostError
from saejax.processes.settings import Settings

_LOG = logging.getLogger(__name__)
_PROGRESS_SECONDS = 15.0
_LINGER_SECONDS = 3.0  # those that come late are told, too
_PAUSE_SECONDS = 0.5
_MOST_BYTES = 65536


def preflight(found: Settings, facts: Mapping[str, str]) -> float:
    """Waits until all processes can begin.

    Args:
      found: this process; its coordinator is known.
      facts: what must be the same in all of them: name -> value.

    Returns:
      Seconds that are left of `wait_seconds`.

    Raises:
      ValueError: what a process was told cannot be, or is not what another one was told.
      LostError: one is missing; it is named.
    """
    clock = _Clock(found)
    _resolve(found, clock)
    (_receive if found.index == 0 else _report)(found, facts, clock)
    return clock.left()


def differences(facts: Mapping[int, Mapping[str, str]]) -> str:
    """What some processes have otherwise than process 0; empty if nothing."""
    wrong = []
    for name, want in facts[0].items():
        for i in sorted(set(facts) - {0}):
            if (has := facts[i].get(name)) != want:
                wrong.append(f"process {i} has {name} {has}, and process 0 {want}")
    text = "; ".join(wrong[:6]) + ("; ..." if len(wrong) > 6 else "")
    return text and f"{text}; start all of them with the same installation and configuration"


class _Clock:
    """How long a process has waited, and a line about it now and then."""

    def __init__(self, found: Settings):
        self._found, self._began, self._told = found, time.monotonic(), 0

    def waited(self) -> float:
        return time.monotonic() - self._began

    def left(self) -> float:
        return self._found.wait_seconds - self.waited()

    def tell(self, what: str) -> None:
        """Logs what is waited for, every 15 s."""
        due = int(self.waited() / _PROGRESS_SECONDS)
        if due > self._told:
            self._told = due
            waited, left = round(self.waited()), max(round(self.left()), 0)
            _LOG.warning("%s waits for %s: %d s, at most %d more", self._found, what, waited, left)


def _resolve(found: Settings, clock: _Clock) -> None:
    """Waits until the coordinator's host has an address, which a cluster may give it late."""
    host, port = found.address
    while True:
        try:
            there = {item[4][0] for item in socket.getaddrinfo(host, port)}
            break
        except OSError as error:
            text = f"the host of SAEJAX_COORDINATOR = {found.coordinator!r} cannot be resolved"
            if clock.left() <= 0:
                raise LostError(
                    f"{found}: {text} ({error}); correct it in all processes"
                ) from error
            clock.tell(f"an address: {text}")
        time.sleep(_PAUSE_SECONDS)
    if not found.local and all(ipaddress.ip_address(a.split("%")[0]).is_loopback for a in there):
        raise ValueError(
            f"SAEJAX_COORDINATOR = {found.coordinator!r} is this machine itself ({sorted(there)[0]}"
            f"), where processes on other ones cannot find process 0; give a name or address that "
            f"all of them reach, or set SAEJAX_LOCAL=1 if all of them run on this machine"
        )


# --- Process 0 ------------------------------------------------------------------------------------


class _Peer(NamedTuple):
    """Who is at the other end of a connection."""

    index: int
    count: int
    host: str
    pid: int
    facts: dict[str, str]

    def __str__(self) -> str:
        return f"on {self.host} (pid {self.pid})"


def _receive(found: Settings, facts: Mapping[str, str], clock: _Clock) -> None:
    """Listens until every other process has reported."""
    with contextlib.ExitStack() as stack:
        desk = stack.enter_context(contextlib.closing(_Desk(found)))
        while True:
            present = desk.peers()
            own = _Peer(0, found.count, platform.node(), os.getpid(), dict(facts))
            wrong = _fault([own, *present])
            missing = sorted(set(range(1, found.count)) - {peer.index for peer in present})
            if wrong:
                desk.dismiss({"error": wrong}, _LINGER_SECONDS)
                raise ValueError(wrong)
            if not missing:
                break
            who = f"process{'es' if len(missing) > 1 else ''} {_listed(missing)}"
            if clock.left() <= 0:
                lost = (
                    f"waited {found.wait_seconds} s for {who} to start; start all of them with the "
                    f"same SAEJAX_COORDINATOR and SAEJAX_PROCESSES, or wait longer with "
                    f"SAEJAX_WAIT_SECONDS"
                )
                desk.dismiss({"lost": f"process 0 {lost}"}, 0)
                raise LostError(f"{found} {lost}")
            clock.tell(who)
            desk.wait(min(_PAUSE_SECONDS, max(clock.left(), 0.01)))
        desk.dismiss({"go": True}, 0)


def _fault(peers: list[_Peer]) -> str:
    """What is wrong among those present; empty if nothing."""
    seen: dict[int, _Peer] = {}
    for peer in peers:
        if peer.count != peers[0].count:
            return (
                f"process {peer.index} {peer} was told SAEJAX_PROCESSES = {peer.count}, but "
                f"process 0 {peers[0].count}; give all of them the same number"
            )
        if peer.index in seen:
            return (
                f"process {peer.index} was started twice, {seen[peer.index]} and {peer}; give each "
                f"process a SAEJAX_PROCESS_ID of its own"
            )
        seen[peer.index] = peer
    return differences({index: peer.facts for index, peer in seen.items()})


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:12])) + (", ..." if len(numbers) > 12 else "")


class _Desk:
    """Where processes report: a port, and the connections to it."""

    def __init__(self, found: Settings):
        """Listens.

        Raises:
          ValueError: the port is taken.
        """
        port = found.address[1]
        try:
            if socket.has_dualstack_ipv6():
                self._door = socket.create_server(
                    ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
                )
            else:
                self._door = socket.create_server(("", port), backlog=1024)
        except OSError as error:
            raise ValueError(
                f"{found} cannot listen at port {port} of SAEJAX_COORDINATOR ({error.strerror}): "
                f"another run or a second process 0 may be there; end it, or give all processes "
                f"another port"
            ) from error
        self._door.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._door, selectors.EVENT_READ)
        self._said: dict[socket.socket, bytes] = {}

    def wait(self, seconds: float) -> None:
        """Lets processes come, speak and go."""
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._door:
                with contextlib.suppress(OSError):
                    connection, _ = self._door.accept()
                    connection.setblocking(False)
                    self._selector.register(connection, selectors.EVENT_READ)
                    self._said[connection] = b""
                continue
            try:
                data = key.fileobj.recv(_MOST_BYTES)
            except OSError:
                data = b""
            self._said[key.fileobj] += data
            if not data or len(self._said[key.fileobj]) > _MOST_BYTES:
                self._drop(key.fileobj)

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        connection.close()
        del self._said[connection]

    def peers(self) -> list[_Peer]:
        """Those that have said who they are, and are still there."""
        found = []
        for said in self._said.values():
            with contextlib.suppress(ValueError, TypeError):  # a stranger, or not all of it yet
                found.append(_Peer(**json.loads(said)))
        return sorted(found, key=lambda peer: peer.index)

    def dismiss(self, answer: dict[str, Any], linger: float) -> None:
        """Answers all that are there, and for some seconds those that come."""
        until, answered = time.monotonic() + linger, set()
        while True:
            for connection in set(self._said) - answered:
                if self._said[connection].endswith(b"\n"):
                    answered.add(connection)
                    with contextlib.suppress(OSError):
                        connection.sendall(json.dumps(answer).encode() + b"\n")
            if time.monotonic() >= until:
                break
            self.wait(0.1)
        # They hang up first, so that the port is free at once.
        until = time.monotonic() + _LINGER_SECONDS
        while self._said and time.monotonic() < until:
            self.wait(0.1)

    def close(self) -> None:
        """Frees the port."""
        for connection in list(self._said):
            self._drop(connection)
        self._selector.close()
        self._door.close()


# --- The others -----------------------------------------------------------------------------------


def _report(found: Settings, facts: Mapping[str, str], clock: _Clock) -> None:
    """Tells process 0 who this is, and waits for its answer."""
    own = _Peer(found.index, found.count, platform.node(), os.getpid(), dict(facts))
    text, why = json.dumps(own._asdict()).encode() + b"\n", "no answer"
    while clock.left() > 0:
        try:
            with socket.create_connection(found.address, timeout=5) as connection:
                connection.sendall(text)
                answer = _answer(connection, clock)
        except OSError as error:
            why, answer = error.strerror or str(error), None
        if answer is not None:
            _heed(found, answer)
            return
        clock.tell(f"process 0 ({why})")
        time.sleep(_PAUSE_SECONDS)
    raise LostError(
        f"{found} waited {found.wait_seconds} s for process 0 to start ({why}); start it, open "
        f"port {found.address[1]} to all of them, or wait longer with SAEJAX_WAIT_SECONDS"
    )


def _answer(connection: socket.socket, clock: _Clock) -> bytes | None:
    """The line that process 0 sends; None if it is gone or time is up."""
    said = b""
    connection.settimeout(_PAUSE_SECONDS)
    while clock.left() > 0 and len(said) < _MOST_BYTES:
        try:
            data = connection.recv(_MOST_BYTES)
        except TimeoutError:
            clock.tell("processes that process 0 names")
            continue
        said += data
        if said.endswith(b"\n") or (said and not said.startswith(b"{")):
            return said
        if not data:
            return None
    return None


def _heed(found: Settings, answer: bytes) -> None:
    try:
        said = json.loads(answer)
    except ValueError:
        raise ValueError(
            f"{found}: what answers at {found.coordinator} is no process 0 that waits for others; "
            f"the run may have begun without this one (is its SAEJAX_PROCESS_ID another's?), or "
            f"the port is another program's"
        ) from None
    if "error" in said:
        raise ValueError(said["error"])
    if "lost" in said:
        raise LostError(f"{found}: {said['lost']}")
