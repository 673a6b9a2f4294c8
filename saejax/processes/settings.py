"""What the environment says of a process: which one it is, of how many, and where they meet."""

import dataclasses
import re
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How this process joins the others; fields that JAX detects by itself are None.

    Attributes:
      coordinator: host and port of process 0, where all meet.
      count, index: number of processes; which one this is.
      wait_seconds: how long to wait for the others to start.
      heartbeat_seconds: one that was silent for so long is taken for dead.
      local: all of them run on this machine.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    wait_seconds: int = 900
    heartbeat_seconds: int = 60
    local: bool = False

    def __str__(self) -> str:
        if self.count is None:
            return "this process"
        return f"process {self.index} of {self.count} (coordinator {self.coordinator})"

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the coordinator."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)


def settings(env: Mapping[str, str]) -> Settings | None:
    """What the environment says about other processes; None for a run of one.

    Raises:
      ValueError: a variable is missing or holds no value that fits.
    """
    times = {
        "wait_seconds": _whole(env, "SAEJAX_WAIT_SECONDS", 1, 10**6, default="900"),
        "heartbeat_seconds": _whole(env, "SAEJAX_HEARTBEAT_SECONDS", 1, 10**6, default="60"),
    }
    slices(env)
    if env.get("SAEJAX_PROCESSES", "").strip() == "auto":
        return Settings(**times)
    if "SAEJAX_PROCESSES" not in env:
        for name in sorted({"SAEJAX_COORDINATOR", "SAEJAX_PROCESS_ID"} & set(env)):
            says = f"{name} = {env[name]!r} is set, but SAEJAX_PROCESSES is not"
            raise ValueError(f"{says}; set it to the number of processes, or unset {name}")
        return Settings(**times) if _detected(env) else None
    count = _whole(env, "SAEJAX_PROCESSES", 1, 10**6)
    if count == 1:
        _whole(env, "SAEJAX_PROCESS_ID", 0, 0, default="0")  # one of several was told a wrong count
        return None
    coordinator = env.get("SAEJAX_COORDINATOR", "")
    place = re.fullmatch(r"\S+:(\d{1,5})", coordinator)
    if place is None or not 1 <= int(place[1]) <= 65535:
        raise ValueError(
            f"SAEJAX_COORDINATOR = {coordinator!r} must be host:port of process 0, port at most "
            f"65535, the same in all {count} processes, as in host0:8476"
        )
    return Settings(
        coordinator=coordinator,
        count=count,
        index=_whole(env, "SAEJAX_PROCESS_ID", 0, count - 1),
        local=_whole(env, "SAEJAX_LOCAL", 0, 1, default="0") == 1,
        **times,
    )


def slices(env: Mapping[str, str]) -> int | None:
    """How many TPU slices the environment says there are, or None.

    Raises:
      ValueError: the variables contradict each other. Where a start before left some of them, JAX
        waits for slices that never come.
    """
    names = ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")
    given = {name: env[name] for name in names if env.get(name)}
    if not given:
        return None
    if absent := [name for name in names if name not in given]:
        seen = ", ".join(f"{name} = {value!r}" for name, value in given.items())
        raise ValueError(
            f"{seen}, but {' and '.join(absent)} not set: left from an earlier start? Set all of "
            f"{', '.join(names)}, as GKE does, or none of them"
        )
    count = _whole(env, "MEGASCALE_NUM_SLICES", 1, 10**6)
    _whole(env, "MEGASCALE_SLICE_ID", 0, count - 1)
    return count


def _whole(env: Mapping[str, str], name: str, least: int, most: int, default: str = "") -> int:
    text = env.get(name, default).strip()
    if not text.isdigit() or not least <= int(text) <= most:
        has = f"{name} = {env[name]!r}" if name in env else f"{name} is not set; it"
        auto = ", or 'auto'" if name == "SAEJAX_PROCESSES" else ""
        raise ValueError(f"{has} must be a whole number in [{least}, {most}]{auto}")
    return int(text)


def _detected(env: Mapping[str, str]) -> bool:
    """Whether the environment is a cluster job of several processes that JAX can join by itself."""

    def number(name: str) -> int:
        return int(env[name]) if env.get(name, "").isdigit() else 1

    slurm = {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"} <= set(env)
    return (
        # The step's tasks: an interactive shell of a larger job is one task and runs alone.
        (slurm and number("SLURM_STEP_NUM_TASKS") > 1 and number("SLURM_NTASKS") > 1)
        or ("OMPI_MCA_orte_hnp_uri" in env and number("OMPI_COMM_WORLD_SIZE") > 1)
        or ("TPU_WORKER_ID" in env and "," in env.get("TPU_WORKER_HOSTNAMES", ""))
        or number("MEGASCALE_NUM_SLICES") > 1
    )
