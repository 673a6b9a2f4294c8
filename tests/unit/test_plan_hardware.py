"""Names of topologies, what they stand for, and how fast their links are."""

import types

import pytest

from saejax.mesh import MeshShape
from saejax.plan.hardware import CHIPS, parse_topology, topology_of
from saejax.plan.hlo import Collective
from saejax.plan.traffic import bandwidth, seconds


@pytest.mark.parametrize(
    ("text", "chip", "devices", "sides"),
    [
        ("v5p:8x8x8", "v5p", 512, (8, 8, 8)),
        ("v5e:2x4", "v5e", 8, (2, 4)),
        ("v6e:16x16", "v6e", 256, (16, 16)),
        ("v4:2x2x1", "v4", 8, (2, 2, 1)),  # two devices a chip
        ("tpu7x:2x2x1", "tpu7x", 8, (2, 2, 1)),
        ("gpu:H100x512", "H100", 512, ()),
        ("gpu:B200x1", "B200", 1, ()),
        ("cpu:8", "cpu", 8, ()),
        ("V5P:4X4X4", "v5p", 64, (4, 4, 4)),
        ("GPU:h100x8", "H100", 8, ()),
    ],
)
def test_topologies(text, chip, devices, sides):
    found = parse_topology(text)
    assert (found.chip.name, found.devices, found.sides) == (chip, devices, sides)


@pytest.mark.parametrize(
    "text",
    ["", "v5p", "v9:8x8", "gpu:X100x8", "gpu:H100", "gpu:v5px8", "cpu:0", "cpu:two", "H100:2x2"],
)
def test_an_unknown_topology_names_the_known_ones(text):
    with pytest.raises(ValueError, match=r"v5p:8x8x8.*gpu:H100x512.*cpu:8") as error:
        parse_topology(text)
    assert "\n" not in str(error.value)
    assert all(chip in str(error.value) for chip in CHIPS)


@pytest.mark.parametrize(
    ("text", "meant"),
    [("v5pp:8x8x8", "v5p:8x8x8"), ("gpu:H10x512", "gpu:H100x512"), ("v6:16x16", "v6e:16x16")],
)
def test_the_nearest_topology_is_named(text, meant):
    with pytest.raises(ValueError, match=f"is not known; did you mean {meant}"):
        parse_topology(text)


def test_names_are_written_as_the_compiler_knows_them():
    assert parse_topology("GPU:h100X8").name == "gpu:H100x8"
    assert parse_topology("V5E:2X4").name == "v5e:2x4"


def test_sides_must_fit_the_chip():
    with pytest.raises(ValueError, match=r"v5p has 3 sides.*8x8 has 2"):
        parse_topology("v5p:8x8")


def device(kind, **attributes):
    return types.SimpleNamespace(platform="tpu", device_kind=kind, **attributes)


@pytest.mark.parametrize(
    ("kind", "chip"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
    ],
)
def test_present_devices_are_recognised(kind, chip):
    assert topology_of([device(kind)]).chip.name == chip


def test_the_sides_of_present_devices():
    devices = [device("TPU v5", coords=(x, y, 0)) for x in range(2) for y in range(4)]
    assert topology_of(devices).sides == (2, 4, 1)


def test_an_unknown_device_has_no_topology():
    assert topology_of([device("Radeon")]) is None


def test_a_whole_torus_is_faster_than_one_dimension():
    torus = parse_topology("v5p:8x8x8")
    link = torus.chip.link
    assert bandwidth(["latent"], torus, MeshShape(1, 512)) == 6 * link
    assert bandwidth(["latent"], torus, MeshShape(8, 64)) == 4 * link
    assert bandwidth(["data"], torus, MeshShape(8, 64)) == 2 * link
    # Short sides are no rings.
    assert bandwidth(["latent"], parse_topology("v5e:2x4"), MeshShape(1, 8)) == 2 * 45e9


@pytest.mark.parametrize(
    ("shape", "adapters"),
    [
        ((8, 8), 1),  # eight rings over the data, one GPU of each on every host
        ((16, 4), 2),  # four rings, which share eight adapters
        ((32, 2), 4),
        ((64, 1), 8),  # one ring, as fast as all adapters of a host together
    ],
)
def test_data_rings_share_the_adapters_of_a_host(shape, adapters):
    gpus = parse_topology("gpu:H100x64")
    expected = min(adapters * gpus.chip.network, gpus.chip.link)
    assert bandwidth(["data"], gpus, MeshShape(*shape)) == expected
    assert bandwidth(["latent"], gpus, MeshShape(*shape)) == gpus.chip.link


def test_gpus_of_several_hosts():
    gpus = parse_topology("gpu:H100x64")
    for axes, shape in ((["latent"], (1, 64)), (["latent"], (4, 16)), (["data", "latent"], (8, 8))):
        assert bandwidth(axes, gpus, MeshShape(*shape)) == 8 * gpus.chip.network
    assert bandwidth(["data"], gpus, MeshShape(4, 16)) == gpus.chip.network
    assert bandwidth(["data"], parse_topology("gpu:H100x8"), MeshShape(8, 1)) == gpus.chip.link


def test_an_all_reduce_takes_twice_an_all_gather():
    torus, shape = parse_topology("v5p:4x4x4"), MeshShape(1, 64)
    one = {"name": "", "axis": "latent", "calls": 1, "bytes": 64e9}
    gather = seconds(Collective(kind="all-gather", **one), torus, shape)
    assert gather == pytest.approx(63e9 / (6 * 90e9))
    assert seconds(Collective(kind="all-reduce", **one), torus, shape) == 2 * gather
