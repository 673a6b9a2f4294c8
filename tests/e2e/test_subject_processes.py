"""A subject split over the devices of two processes: each reads what its own devices hold."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "tests/fixtures/subjects/pythia"

PROGRAM = """
import sys
import jax
import numpy as np
from jax.sharding import Mesh

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
index, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{port}", 2, index, initialization_timeout=120)

from saejax import mesh as meshes
from saejax.subjects import hf, layout
from saejax.subjects.base import make_subject
from saejax.subjects.filling import own_mesh

sizes, read = [], layout.Piece.read

def spy(piece, stored, index):
    value = read(piece, stored, index)
    sizes.append(value.size)
    return value

layout.Piece.read = spy

def load(mesh=None):
    sizes.clear()
    return hf.load_subject(folder, tokenizer=False, mesh=mesh)

def query(subject):
    return subject.params["layers"][0]["q"]["kernel"]

def buffers(x):
    return {s.device: s.data.unsafe_buffer_pointer() for s in x.addressable_shards}

whole = load()
leaves, everything = jax.tree.leaves(whole.params), sum(sizes)
split_ones = sum(x.size for x in jax.tree.leaves(load(own_mesh(2)).params)
                 if not x.is_fully_replicated)
devices = np.array(jax.devices())
tokens = np.arange(24, dtype="i4").reshape(2, 12)
expected = whole.capture_host(tokens, ["1.resid_post"])["1.resid_post"]

def check(subject):
    jax.tree.map(np.testing.assert_array_equal, subject.params, whole.params)
    found = subject.capture_host(tokens, ["1.resid_post"])["1.resid_post"]
    np.testing.assert_allclose(found, expected, atol=2e-5)

# Each process holds a copy: what it has stays where it is, and nothing is read again.
within = load(Mesh(devices.reshape(2, 2), ("data", "latent")))
assert sum(sizes) == everything and not query(within).is_fully_addressable
assert within.fingerprint == whole.fingerprint
sizes.clear()
own = within.place(own_mesh(2))
assert sizes == [], "read again, though it was there"
for a, b in zip(jax.tree.leaves(own.params), jax.tree.leaves(within.params)):
    assert buffers(a) == buffers(b) and a.is_fully_addressable
check(own)

# Copies straddle the processes: each reads a half of what is split, and asks the file for the rest.
across = load(Mesh(devices.reshape(2, 2).T, ("data", "latent")))
assert sum(sizes) == everything - split_ones // 2, (sum(sizes), everything, split_ones)
assert across.fingerprint == whole.fingerprint
sizes.clear()
alone = across.place(own_mesh(2))
assert sum(sizes) == everything
check(alone)
nowhere = make_subject("made", across.config, across.params, None)
try:
    nowhere.place(own_mesh(2))
except ValueError as error:
    assert "of no folder that they could be read from" in str(error)
else:
    raise AssertionError("the half of a subject was placed")

# And back: from what each process has for itself, or on its host, onto all devices.
for subject in (alone, whole):
    back = subject.place(Mesh(devices.reshape(2, 2), ("data", "latent")))
    assert query(back).sharding == query(within).sharding
    check(back.place(own_mesh(2)))

if index == 0:  # the evaluation is the work of one
    check(within.without_weights().place(own_mesh(1, 1)))
jax.distributed.shutdown()
print("fine")
"""


def free_port() -> int:
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("localhost", 0))
        return sock.getsockname()[1]


def test_two_processes_share_a_subject(tmp_path):
    port = str(free_port())
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(index), port, str(FOLDER)],
            cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for process, text in zip(processes, said, strict=True):
        assert process.returncode == 0 and "fine" in text, text
