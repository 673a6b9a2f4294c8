"""Every run file that is shipped: its own command builds it; a dry run tells its costs."""

import re
import shlex
from pathlib import Path

import pytest
from absl import flags

from saejax import config, main
from saejax.data.shards import StoreSpec, open_store
from saejax.plan.hardware import parse_topology

SHIPPED = config.shipped_files()
HARVEST = "gin/harvest.gin"  # the one that trains nothing
TRAINING = [name for name in SHIPPED if name != HARVEST]
HARDWARE = sorted(
    f"gin/hardware/{f.name}" for f in config.find_file("gin/base.gin").parent.glob("hardware/*.gin")
)
SIZES = {  # d_model, latents, k, devices along 'latent', microbatches a step
    "gin/gpt2_small_32k.gin": (768, 32_768, 32, 1, 4),
    "gin/gpt2_small_128k.gin": (768, 131_072, 32, 1, 8),
    "gin/gpt4_16m.gin": (12_288, 16_777_216, 256, 512, 16),
    "gin/quickstart.gin": (192, 4096, 16, 1, 1),
}


def header(name: str) -> str:
    """The comment that opens a file."""
    lines = config.find_file(name).read_text(encoding="utf-8").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(lines[:end])


def own_command(name: str) -> list[str]:
    """The flags of the command in the file's header."""
    (command,) = re.findall(r"^#   python -m saejax\.main (.*)$", header(name), re.MULTILINE)
    return shlex.split(command)


@pytest.fixture
def dry_run(capsys, tmp_path, monkeypatch):
    """Stdout of a dry run in an empty directory, which stays empty."""
    monkeypatch.chdir(tmp_path)

    def run(given: list[str]) -> str:
        flags.FLAGS.unparse_flags()
        try:
            code = main.main(flags.FLAGS(["saejax", *given, "--dry_run"]))
        finally:
            for name in ("gin_file", "gin_bindings", "workdir", "dry_run", "topology"):
                flags.FLAGS[name].unparse()
        out, err = capsys.readouterr()
        assert code == 0 and err == "", err
        assert list(tmp_path.iterdir()) == []
        return out

    return run


@pytest.mark.parametrize("name", SHIPPED)
def test_the_header_says_what_it_is_and_how_to_run_it(name, dry_run):
    first = header(name).splitlines()[0]
    assert re.match(r"# [A-Z].*[.:?]", first), first
    command = own_command(name)
    assert command[0] == f"--gin_file={name}"
    # For hardware that is not there the plan may compile for minutes, where a compiler is.
    left_out = ("--dry_run", "--topology")
    heading = "activations stored" if name == HARVEST else "parameters"
    assert heading in dry_run([flag for flag in command if not flag.startswith(left_out)])


@pytest.mark.parametrize("name", HARDWARE)
def test_a_hardware_file_overrides_the_run_files_it_names(name, tmp_path):
    (command,) = re.findall(r"^#   (--gin_file=.*)$", header(name), re.MULTILINE)
    given = shlex.split(command)
    files = [flag.removeprefix("--gin_file=") for flag in given if flag.startswith("--gin_file=")]
    bindings = [f.removeprefix("--gin_bindings=") for f in given if f.startswith("--gin_bindings=")]
    assert files[-1] == name
    built, _, _ = config.load_experiment(files, bindings)
    devices = int(re.search(r"_(\d+)\.gin$", name)[1])
    assert built.mesh.shape.size == devices
    topologies = re.findall(r"\((\w+:\w+)\)", header(name).splitlines()[0])
    assert [parse_topology(t).devices for t in topologies] == [devices]
    # A part of runs, not one.
    with pytest.raises(ValueError, match=r"Experiment.\w+|SAE\.\w+|never"):
        config.load_experiment([name])


@pytest.mark.parametrize("name", TRAINING)
def test_a_dry_run_prints_the_configuration_and_the_costs(name, dry_run, tmp_path):
    operative, plan = re.split(
        r"\n\n(?=mesh |\w+:\nmesh )", dry_run([f"--gin_file={name}"]), maxsplit=1
    )
    built, text, _ = config.load_experiment([name])
    assert operative.strip() == text.strip()
    (tmp_path / "again.gin").write_text(operative)
    assert config.load_experiment([str(tmp_path / "again.gin")])[0] == built
    for heading in ("parameters", "bytes per device", "FLOPs per token", "training", "rate"):
        assert re.search(rf"^{heading}", plan, re.MULTILINE), heading


def test_the_data_of_a_run_is_planned_beside_it(dry_run):
    plan = dry_run(["--gin_file=gin/gpt4_16m.gin", "--gin_bindings=Mesh.mesh_shape = (1, 512)"])
    assert re.search(r"^  bytes +983 TB: activations 983 TB", plan, re.MULTILINE)
    assert re.search(r"^  swap buffer +8,388,608 rows .*: 206 GB$", plan, re.MULTILINE)
    assert "the encoder takes 412 GFLOP a token" in plan
    assert "activations stored" not in dry_run(["--gin_file=gin/synthetic.gin"])


def test_the_plan_heeds_the_settings_of_the_data(dry_run):
    bound = "--gin_bindings="
    plan = dry_run(
        ["--gin_file=gin/quickstart.gin", f"{bound}Harvest.first_position = 0",
         f"{bound}Harvest.contexts_per_shard = 300", f"{bound}Harvest.tokens = 20_480"]
    )  # fmt: skip
    assert re.search(r"^  rows +20,480 a site, of 20,480 tokens", plan, re.MULTILINE)
    assert re.search(r"^  shards +5 a site, of 64 contexts x 64 rows", plan, re.MULTILINE)
    plan = dry_run(["--gin_file=gin/several.gin", f"{bound}Stream.buffer_batches = 16"])
    assert re.findall(r"^site (.*):$", plan, re.MULTILINE) == ["1.resid_post", "1.mlp_out"]
    assert len(re.findall(r"^  swap buffer .*\(16 batches\)", plan, re.MULTILINE)) == 2


def test_the_plan_of_a_store_that_is_there_is_of_it(dry_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    command = ["--gin_file=gin/stored.gin", f"--gin_bindings=Stored.path = '{folder}'"]
    spec = StoreSpec(
        subject="s", subject_fingerprint="f", text_fingerprint="t", split="train", site="x",
        d_model=192, context_length=8, contexts_per_shard=4, n_shards=3, max_norm_ratio=10.0,
    )  # fmt: skip
    assert re.search(r"^  rows +3,032,064 a site", dry_run(command), re.MULTILINE)
    open_store(folder / "train", spec, mode="w")
    assert re.search(r"^  rows +84 a site", dry_run(command), re.MULTILINE)


def test_a_harvest_is_planned_on_paper(dry_run):
    """The command in the file's header for a store of 40 B x 12288."""
    (flags,) = re.findall(r"^# (--dry_run --gin_bindings.*)$", header(HARVEST), re.MULTILINE)
    given = shlex.split(flags.removeprefix("--dry_run "))
    operative, _, plan = dry_run([f"--gin_file={HARVEST}", *given]).partition("\n\ntrain: ")
    assert "HarvestRun.width = 12288" in operative and "983 TB" in plan and "1,860,120" in plan


@pytest.mark.parametrize("name", SIZES)
def test_the_promised_sizes(name, dry_run):
    d_model, n_latents, k, latent, chunks = SIZES[name]
    mesh = f"--gin_bindings=Mesh.mesh_shape = (1, {latent})"  # of 'auto', the tests' devices
    plan = dry_run([f"--gin_file={name}", mesh]).partition("\n\nmesh ")[2]
    built, _, _ = config.load_experiment([name])
    assert (built.sae.d_model, built.sae.n_latents, built.sae.k) == (d_model, n_latents, k)
    assert f"data 1 x latent {latent} = {latent} devices" in plan
    assert f", {chunks} microbatches a step" in plan
    assert re.search(rf"w_enc +{n_latents}x{d_model} +{n_latents * d_model:,}\n", plan)
    total = 2 * n_latents * d_model + n_latents + d_model
    assert re.search(rf"^  total +{total:,}$", plan, re.MULTILINE)
    encoder = 2 * n_latents * d_model
    assert re.search(rf"^  encoder forward +{encoder:,}$", plan, re.MULTILINE)


def test_the_papers_rates_and_k_aux(dry_run):
    """2e-4 at 2^14 latents, falling with the square root; k_aux a power of two near d_model / 2."""
    found = {}
    for name in sorted(SIZES)[:3]:
        plan = dry_run([f"--gin_file={name}"])
        found[name] = re.search(r"^rate +(\S+), k_aux (\d+)$", plan, re.MULTILINE).groups()
    assert found == {
        "gin/gpt2_small_32k.gin": ("0.000141", "512"),
        "gin/gpt2_small_128k.gin": ("7.07e-05", "512"),
        "gin/gpt4_16m.gin": ("6.25e-06", "512"),
    }


def test_the_base_is_no_run(tmp_path):
    assert "gin/base.gin" not in SHIPPED
    with pytest.raises(ValueError, match=r"Experiment.data|SAE\.\w+"):
        config.load_experiment(["gin/base.gin"])


def test_every_file_is_shipped():
    root = Path(__file__).resolve().parents[2]
    present = {f.relative_to(root).as_posix() for f in (root / "gin").rglob("*.gin")}
    assert present - {"gin/base.gin"} == set(SHIPPED) | set(HARDWARE)
