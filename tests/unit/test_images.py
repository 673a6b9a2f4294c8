"""Images as a source of a harvest: stored rows are the tower's vectors of the images named."""

import dataclasses
import hashlib
import importlib
import json
import struct
import zlib

import numpy as np
import pytest

from saejax.data import images as images_module
from saejax.data.corpus import TextConfig
from saejax.data.exporting import export
from saejax.data.images import Images, ImagesConfig
from saejax.data.loader import Loader, LoaderConfig
from saejax.data.shards import open_store
from saejax.data.splits import hash_fraction
from saejax.importing import ImportConfig, import_activations
from saejax.mesh import MeshShape, make_mesh
from saejax.model.sae import SAEConfig
from saejax.sources import StoredConfig, open_source
from saejax.subjects.harvest import HarvestConfig, harvest
from saejax.subjects.hf import load_subject

PIXELS = (3, 4, 4)
WIDTH = 8


class Tower:
    """A vision tower in numpy: [CLS] and four patches of 2 x 2; outside JAX, as the adapter is."""

    name, family, revision, fingerprint = "torch:tower", "tower", "", "0123456789abcdef"
    takes, tokenizer, max_context, pixels = "pixels", None, 5, PIXELS

    def __init__(self, settings="resize"):
        self.sites = {"block": 5, "patches": 4, "pooled": 1}
        self.weights = np.random.default_rng(0).normal(size=(12, WIDTH)).astype("f4")
        self.settings, self.batches = settings, []

    def resolve_site(self, site):
        assert site in self.sites
        return site

    check_site = resolve_site

    def width(self, site):
        return WIDTH

    def positions(self, site):
        return self.sites[site]

    def preprocess(self, image):
        return np.asarray(image.resize((4, 4)), "f4").transpose(2, 0, 1) / 255

    def preprocessing(self):
        return self.settings

    def vectors(self, pixels):
        patches = pixels.reshape(-1, 3, 2, 2, 2, 2).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 4, 12)
        return np.concatenate([patches.mean(1, keepdims=True) + 3, patches], axis=1) @ self.weights

    def capture_host(self, batch, sites, length=None):
        assert batch.dtype == np.float32 and batch.shape[1:] == PIXELS
        self.batches.append(len(batch))
        found = self.vectors(batch)
        return {site: found[:, 5 - self.sites[site] :] for site in sites}


@pytest.fixture
def arrays(tmp_path):
    """29 images in three arrays, one of them in a folder and one of a single image."""
    folder = tmp_path / "arrays"
    (folder / "deep").mkdir(parents=True)
    made = np.random.default_rng(1).normal(size=(29, *PIXELS)).astype("f4")
    np.save(folder / "deep" / "b.npy", made[:8].astype("f8"))
    np.save(folder / "m.npy", made[8:28])
    np.save(folder / "z.npy", made[28])
    (folder / "notes.txt").write_text("no image")
    names = [f"deep/b.npy#{i}" for i in range(8)] + [f"m.npy#{i}" for i in range(20)] + ["z.npy"]
    return folder, dict(zip(names, made, strict=True))


@pytest.fixture
def cfg(arrays):
    return HarvestConfig(
        subject="torch:tower",
        site="block",
        context_length=5,
        contexts_per_shard=4,
        batch_contexts=3,
        max_norm_ratio=None,
        text=ImagesConfig(source=str(arrays[0]), held_out_percent=20.0),
    )


def changed(cfg, **changes):
    return dataclasses.replace(cfg, text=dataclasses.replace(cfg.text, **changes))


def refused(cfg, tmp_path, match, error=ValueError, subject=None):
    with pytest.raises(error, match=match):
        harvest(cfg, tmp_path / "refused", str, subject=subject or Tower())
    assert not (tmp_path / "refused").exists(), "nothing is written"


def rounded(expected):
    return {"rtol": 2.0**-8, "atol": 1e-6, "desired": expected}


def test_rows_are_the_towers_vectors_of_the_images_named(arrays, cfg, tmp_path):
    tower = Tower()
    alone = dataclasses.replace(cfg, batch_contexts=1)
    stores = harvest(alone, tmp_path / "s", str, subject=tower)["block"]
    assert set(tower.batches) == {1}, "no more pixels at once than a pass takes"
    for store in stores:
        seen = []
        for shard in store.committed():
            found = store.read_shard_rows(shard)
            for row, document, tokens in zip(found.rows, found.document, found.tokens, strict=True):
                name = store.documents[document]
                expected = tower.vectors(arrays[1][name][None])[0, 1:]  # [CLS] is left out
                np.testing.assert_allclose(row.astype("f4"), **rounded(expected))
                assert (tokens == list(arrays[1]).index(name)).all() and tokens.shape == (5,)
                seen.append(name)
            assert found.stored.all() and not found.offset.any()
        assert len(set(seen)) == len(seen) >= 0.95 * len(store.documents)
        assert store.n_rows == 4 * len(seen)
    train, held_out = (set(store.documents) for store in stores)
    assert train | held_out == set(arrays[1]) and not train & held_out
    assert held_out == {name for name in arrays[1] if hash_fraction(name) < 0.2}


def test_first_position_0_keeps_cls_and_sites_of_patches_have_none(arrays, cfg, tmp_path):
    tower = Tower()
    whole = dataclasses.replace(cfg, first_position=0)
    patches = dataclasses.replace(whole, site="patches", context_length=4)
    for asked, begin in ((whole, 0), (patches, 1)):
        (store,) = harvest(asked, tmp_path / asked.site, str, subject=tower, splits=("train",))[
            asked.site
        ]
        found = store.read_shard_rows(0)
        pixels = np.stack([arrays[1][store.documents[d]] for d in found.document])
        expected = tower.vectors(pixels)[:, begin:]
        np.testing.assert_allclose(found.rows.astype("f4"), **rounded(expected))


def test_a_killed_harvest_goes_on_and_a_whole_one_computes_nothing(cfg, tmp_path):
    first, second = Tower(), Tower()
    train, _ = harvest(cfg, tmp_path, str, subject=first)["block"]
    before = train.read_shard_rows(1).rows.copy()
    for name in ("commits/000001.json", "manifest.json"):
        (tmp_path / "train" / name).unlink()
    train, _ = harvest(cfg, tmp_path, str, subject=second)["block"]
    assert sum(second.batches) == train.spec.contexts_per_shard < sum(first.batches)
    np.testing.assert_array_equal(train.read_shard_rows(1).rows, before)
    harvest(cfg, tmp_path, str, subject=second)
    assert sum(second.batches) == train.spec.contexts_per_shard


def test_the_store_trains_without_the_tower(arrays, cfg, tmp_path):
    tower = Tower()
    harvest(cfg, tmp_path / "s", str, subject=tower)
    sae = SAEConfig(d_model=WIDTH, n_latents=16, k=2)
    stored, mesh = StoredConfig(path=str(tmp_path / "s")), make_mesh(MeshShape(1, 1))
    source = open_source(stored, sae, LoaderConfig(), 4, tmp_path / "none", mesh)
    assert source.site == "block" and source.inputs is None and source.subject is None
    rows, where, _ = Loader(open_store(tmp_path / "s" / "train"), 4).next(0)
    names = [open_store(tmp_path / "s" / "train").documents[d] for d in where.document]
    for row, name, position in zip(np.asarray(rows), names, where.position, strict=True):
        expected = tower.vectors(arrays[1][name][None])[0, position]
        np.testing.assert_allclose(row.astype("f4"), **rounded(expected))


def test_limits_take_images_in_the_order_of_their_hash(arrays, cfg):
    images = Images(changed(cfg, max_images=3).text, Tower())
    found = images.contexts("train", 5)
    names = sorted((n for n in arrays[1] if hash_fraction(n) >= 0.2), key=hash_fraction)
    assert sorted(found.names) == sorted(names[:3])
    assert found.left_out == {"documents_over_limit": len(names) - 3}
    assert found.tokens.shape == found.keep.shape == (3, 5) and found.tokens.dtype == np.uint32
    assert found.tokens.strides[1] == found.keep.strides[0] == 0, "no memory for each position"
    assert found.keep.all() and (found.length == 5).all() and found.lead == 0
    row = found.names.index(names[0])
    expected = hashlib.sha256(arrays[1][names[0]].tobytes()).digest()
    assert found.document_sha256[row].tobytes() == expected


def test_the_fingerprint_follows_content_split_and_tower(arrays, cfg):
    def fingerprint(split="train", tower=None, text=cfg.text):
        return Images(text, tower or Tower()).contexts(split, 5).fingerprint

    before = fingerprint()
    assert fingerprint() == before != fingerprint("held_out")
    assert fingerprint(text=changed(cfg, max_images=4).text) != before
    # what says how image files become pixels does not touch arrays
    assert fingerprint(tower=Tower("crop")) == before
    pixels = np.load(arrays[0] / "m.npy")
    pixels[:, 0, 0, 0] += 1e-3
    np.save(arrays[0] / "m.npy", pixels)
    assert fingerprint() != before


def test_an_image_that_changes_while_it_is_harvested_is_told(arrays, cfg):
    images = Images(cfg.text, Tower())
    numbers = images.contexts("train", 5).tokens[:, 0]
    np.testing.assert_array_equal(images.pixels(numbers[:2])[0], arrays[1][images.name(numbers[0])])
    for name in ("deep/b.npy", "m.npy"):
        np.save(arrays[0] / name, np.load(arrays[0] / name) + 1)
    with pytest.raises(ValueError, match=r"#\d+ changed while it was being harvested; start again"):
        images.pixels(numbers[:2])


def test_a_context_is_an_image(cfg, tmp_path):
    message = r"context_length = 6: an image has 5 positions at site 'block' .*context_length = 5\."
    refused(dataclasses.replace(cfg, context_length=6), tmp_path, message)
    both = dataclasses.replace(cfg, sites=("patches",))
    refused(both, tmp_path, r"5 at 'block', 4 at 'patches' positions an image; harvest .* apart")
    pooled = dataclasses.replace(cfg, site="pooled")
    refused(pooled, tmp_path, r"'pooled' has 1 position an image .* for each patch")


def test_text_is_not_for_towers_nor_images_for_language_models(cfg, tmp_path):
    text = dataclasses.replace(cfg, text=TextConfig())
    refused(text, tmp_path, r"takes pixels, and Harvest.text = @Text\(\): .*Harvest.text = @Images")
    model = load_subject("embedded")
    words = dataclasses.replace(cfg, subject="embedded", site="1.resid_post")
    message = r"'embedded' takes tokens, and Harvest.text = @Images\(\): give @Text.*'torch:\.\.\.'"
    refused(words, tmp_path, message, subject=model)


def test_where_there_are_no_images(arrays, cfg, tmp_path):
    missing = changed(cfg, source=str(tmp_path / "gone"))
    refused(missing, tmp_path, r"Images.source = .*gone': no such file", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("no image")
    np.save(tmp_path / "empty" / "none.npy", np.zeros((0, *PIXELS), "f4"))
    refused(changed(cfg, source=str(tmp_path / "empty")), tmp_path, "holds no images: give a file")
    notes = str(tmp_path / "empty" / "notes.txt")
    refused(changed(cfg, source=notes), tmp_path, r"notes.txt': a file must end in \.png, .*\.npy")
    alone = changed(cfg, source=str(arrays[0] / "z.npy"))
    refused(alone, tmp_path, r"has 1 image\(s\) and .* leaves the train split empty")
    refused(changed(cfg, held_out_percent=0.0), tmp_path, "leaves the held_out split empty")


def test_linked_folders_are_read(arrays, cfg, tmp_path):
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "more").symlink_to(arrays[0] / "deep")
    (tmp_path / "linked" / "up").symlink_to(tmp_path / "linked")
    linked = Images(changed(cfg, source=str(tmp_path / "linked")).text, Tower())
    assert {linked.name(i).partition("#")[0] for i in range(linked.vocab_size)} == {"more/b.npy"}
    (tmp_path / "linked" / "gone.PNG").symlink_to("nowhere")
    with pytest.raises(
        FileNotFoundError, match=r"Images\.source = .*gone\.PNG' leads to 'nowhere'"
    ):
        Images(changed(cfg, source=str(tmp_path / "linked")).text, Tower())


def test_names_end_in_any_case(arrays, cfg, tmp_path):
    for before, name in (("m.npy", "m.Npy"), ("z.npy", "z.NPY")):
        (arrays[0] / before).rename(arrays[0] / name)
    images = Images(cfg.text, Tower())
    assert {images.name(i).partition("#")[0] for i in range(29)} == {"deep/b.npy", "m.Npy", "z.NPY"}
    assert Images(changed(cfg, source=str(arrays[0] / "m.Npy")).text, Tower()).vocab_size == 20


@pytest.mark.parametrize(
    ("made", "match"),
    [
        (np.zeros((2, 3, 4, 5), "f4"), r"x.npy: shape \(2, 3, 4, 5\), .*takes \(3, 4, 4\)"),
        (np.zeros((4, 4), "f4"), r"x.npy: shape \(4, 4\), but subject 'torch:tower' takes"),
        (np.zeros((2, *PIXELS), "u1"), r"x.npy: dtype uint8, not floats; .*preprocessed"),
        (np.full(PIXELS, np.inf, "f4"), r"x.npy: NaN or infinite pixels"),
        (np.full((1, *PIXELS), 1e39), r"x.npy, image 0: NaN or infinite pixels"),
        (np.array([None, "text"]), r"x.npy is no sound .npy array"),
    ],
)
def test_arrays_that_are_no_pixels(arrays, cfg, tmp_path, made, match):
    np.save(arrays[0] / "x.npy", made)
    refused(cfg, tmp_path, match)


def test_one_bad_image_among_many_is_named_before_anything_is_stored(arrays, cfg, tmp_path):
    pixels = np.load(arrays[0] / "m.npy")
    pixels[17, 0, 0, 0] = np.nan
    np.save(arrays[0] / "m.npy", pixels)
    refused(cfg, tmp_path, r"m.npy, image 17: NaN or infinite pixels; make it again")


def test_settings_are_checked():
    for settings, match in (
        ({"source": ""}, "Images.source is empty"),
        ({"source": "x", "held_out_percent": 100.0}, "Images.held_out_percent = 100.0: allowed"),
        ({"source": "x", "max_images": 0}, "Images.max_images = 0: give a positive number"),
    ):
        with pytest.raises(ValueError, match=match):
            ImagesConfig(**settings)


def test_without_pillow_it_says_what_to_install(cfg, tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(b"")
    real = importlib.import_module

    def without(name):
        if name.startswith("PIL"):
            raise ModuleNotFoundError("no PIL", name="PIL")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", without)
    message = r"needs the package pillow: pip install pillow \(or saejax\[images\]\)"
    refused(changed(cfg, source=str(tmp_path / "x.png")), tmp_path, message)


# --- Image files, which need Pillow --------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    """12 images of every format and several modes, and one that lies on its side."""
    image = pytest.importorskip("PIL.Image")
    folder, generator = tmp_path / "files", np.random.default_rng(2)
    (folder / "deep").mkdir(parents=True)
    for i in range(12):
        height, width = generator.integers(4, 40, 2)
        made = image.fromarray((generator.random((height, width, 3)) * 255).astype("u1"))
        mode = ("RGB", "L", "RGBA", "P")[i % 4]
        suffix = ("png", "JPG", "jpeg", "webp", "bmp", "png")[i % 6]
        made = made.convert(mode if suffix in ("png", "webp") else "RGB")
        made.save(folder / ("deep" if i % 3 else ".") / f"i{i:02}.{suffix}")
    lying = image.fromarray(np.zeros((8, 4, 3), "u1"))
    exif = image.Exif()
    exif[0x0112] = 6  # turn by a quarter to see it upright
    lying.save(folder / "lying.png", exif=exif)
    return folder


def test_files_are_decoded_and_preprocessed(files, cfg, tmp_path):
    image = pytest.importorskip("PIL.Image")

    seen = []

    class Sizes(Tower):
        def preprocess(self, image):
            seen.append((image.mode, image.size))
            return super().preprocess(image)

    tower = Sizes()
    asked = changed(cfg, source=str(files))
    stores = harvest(asked, tmp_path / "s", str, subject=tower)["block"]
    assert {mode for mode, _ in seen} == {"RGB"}
    assert ("RGB", (8, 4)) in seen, "4 wide and 8 high as stored, turned by its EXIF data"
    checked = 0
    for store in stores:
        found = store.read_shard_rows(0)
        for row, document in zip(found.rows, found.document, strict=True):
            name = store.documents[document]
            if name.startswith("lying"):
                continue
            with image.open(files / name) as opened:
                opened = opened.convert("RGBA" if opened.mode == "P" else opened.mode)
                pixels = np.asarray(opened.convert("RGB").resize((4, 4)), "f4")
            expected = tower.vectors(pixels.transpose(2, 0, 1)[None] / 255)[0, 1:]
            np.testing.assert_allclose(row.astype("f4"), **rounded(expected))
            checked += 1
    assert checked >= 3
    record = json.loads((tmp_path / "s" / "train" / "commits" / "000000.json").read_text())
    assert "pillow" in record["computation"]
    same = Images(asked.text, Tower()).contexts("train", 5).fingerprint
    assert same == stores[0].spec.text_fingerprint
    assert Images(asked.text, Tower("crop")).contexts("train", 5).fingerprint != same


def chunk(kind, content):
    """A part of a PNG file."""
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


def test_files_that_are_no_images_are_named(files, cfg, tmp_path):
    image = pytest.importorskip("PIL.Image")
    asked, whole = changed(cfg, source=str(files)), files / "i00.png"
    bad = files / "deep" / "bad.png"
    bad.write_bytes(whole.read_bytes()[:-30])
    refused(asked, tmp_path, r"deep/bad.png is no sound image: .*; fetch it again, or move it away")
    bad.write_bytes(b"these are words")
    refused(asked, tmp_path, r"deep/bad.png is no sound image: Pillow does not know the format")
    image.fromarray(np.zeros((5, 5), "u2")).save(bad)
    refused(asked, tmp_path, r"deep/bad.png: Pillow's mode 'I;16' has more than 8 bits a channel")
    header, data = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0), zlib.compress(bytes(4 * 25))
    bad.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )
    refused(asked, tmp_path, "deep/bad.png: 16 bits a channel, more than 8; convert the image")
    bad.unlink()
    tower = Tower()
    tower.preprocess = lambda image: np.zeros((3, 8, 8), "f4")
    message = r"preprocessed to shape \(3, 8, 8\), but subject .* takes \(3, 4, 4\); set size"
    refused(asked, tmp_path, message, subject=tower)
    tower = Tower()
    tower.pixels = (4, 4, 4)
    refused(asked, tmp_path, "takes 4 channels, and image files have 3 or 1", subject=tower)


def test_many_images_are_read_a_few_at_a_time(cfg, monkeypatch):
    monkeypatch.setattr(images_module, "_AT_ONCE", 4)
    images = Images(cfg.text, Tower())
    read = []
    real = Images._read
    monkeypatch.setattr(Images, "_read", lambda self, n: read.append(n) or real(self, n))
    found = images.contexts("train", 5)
    assert sorted(read) == found.tokens[:, 0].tolist() and len(read) > 8
    assert found.document_sha256.any(axis=1).all()


# --- The adapter for PyTorch ----------------------------------------------------------------------

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 24, "initializer_range": 0.3, "image_size": 12, "patch_size": 4}


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """Folders of random models with the preprocessing that their families have."""
    pytest.importorskip("torch")
    pytest.importorskip("PIL.Image")
    tf = pytest.importorskip("transformers")
    words = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "eos_token_id": 1}
    words |= {"num_hidden_layers": 1, "num_attention_heads": 2, "bos_token_id": 0}
    clip = tf.CLIPImageProcessor(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12})
    vit = tf.ViTImageProcessor(size={"height": 12, "width": 12})
    both = tf.CLIPConfig(text_config=words, vision_config=SMALL, projection_dim=8)
    made = {
        "vit": (tf.ViTModel(tf.ViTConfig(**SMALL)), vit),
        "tower of clip": (tf.CLIPVisionModel(tf.CLIPVisionConfig(**SMALL)), clip),
        "clip": (tf.CLIPModel(both), clip),
    }
    folders = {}
    for name, (model, processor) in made.items():
        folders[name] = tmp_path_factory.mktemp(name.replace(" ", "_"))
        model.eval().save_pretrained(folders[name])
        processor.save_pretrained(folders[name])
    return {name: (made[name][0], folder) for name, folder in folders.items()}


def resized(folder, side):
    tf = pytest.importorskip("transformers")
    size = {"height": side, "width": side}
    tf.BitImageProcessor(size={"shortest_edge": side + 2}, crop_size=size).save_pretrained(folder)


def test_a_tower_that_interpolates_takes_the_size_of_its_processor(files, cfg, tmp_path):
    torch, tf = pytest.importorskip("torch"), pytest.importorskip("transformers")
    small = {k: v for k, v in SMALL.items() if k != "intermediate_size"} | {"image_size": 20}
    model = tf.Dinov2Model(tf.Dinov2Config(**small)).eval()
    model.save_pretrained(tmp_path / "model")
    name, site = f"torch:{tmp_path / 'model'}", "encoder.layer.0"
    subject = load_subject(name)
    assert (subject.pixels, subject.positions(site)) == ((3, 20, 20), 26), "as config.json says"
    resized(tmp_path / "model", 12)
    subject = load_subject(name)
    assert (subject.pixels, subject.positions(site), subject.max_context) == ((3, 12, 12), 10, 10)
    asked = dataclasses.replace(cfg, subject=name, site=site, context_length=10)
    harvest(changed(asked, source=str(files)), tmp_path / "files", subject=subject)
    pixels = np.random.default_rng(0).normal(size=(9, 3, 12, 12)).astype("f4")
    np.save(tmp_path / "pixels.npy", pixels)
    stores = harvest(changed(asked, source=str(tmp_path / "pixels.npy")), tmp_path / "s")[site]
    found = stores[0].read_shard_rows(0)
    with torch.no_grad():
        states = model(torch.tensor(pixels), output_hidden_states=True).hidden_states[1].numpy()
    rows = [int(stores[0].documents[d].partition("#")[2]) for d in found.document]
    error = np.abs(found.rows.astype("f4") - states[rows, 1:])
    assert (error <= 2.0**-8 * np.abs(states[rows, 1:]) + 1e-5).all()


def test_a_tower_that_does_not_take_the_size_of_its_processor(towers, files, cfg, tmp_path):
    import shutil

    copy = tmp_path / "model"
    shutil.copytree(towers["vit"][1], copy)
    resized(copy, 16)
    subject = load_subject(f"torch:{copy}")
    assert subject.pixels == (3, 12, 12)
    asked = dataclasses.replace(changed(cfg, source=str(files)), site="layers.0", context_length=10)
    message = r"to shape \(3, 16, 16\), .* takes \(3, 12, 12\); set size \(and crop_size\)"
    refused(asked, tmp_path, message, subject=subject)


def test_a_processor_saved_with_the_texts(towers, files, cfg, tmp_path):
    import shutil

    copy = tmp_path / "model"
    shutil.copytree(towers["clip"][1], copy)
    settings = json.loads((copy / "preprocessor_config.json").read_text())
    (copy / "preprocessor_config.json").unlink()
    both = {"processor_class": "CLIPProcessor", "image_processor": settings}
    (copy / "processor_config.json").write_text(json.dumps(both))
    site, told = "encoder.layers.0", []
    for folder in (towers["clip"][1], copy):
        asked = dataclasses.replace(
            changed(cfg, source=str(files)), subject=f"torch:{folder}", site=site, context_length=10
        )
        told.append(harvest(asked, tmp_path / f"s{len(told)}")[site][0].spec.text_fingerprint)
    assert told[0] == told[1]


def test_an_import_that_names_its_tower(towers, cfg, tmp_path):
    np.save(tmp_path / "pixels.npy", np.zeros((9, 3, 12, 12), "f4"))
    name, site = f"torch:{towers['vit'][1]}", "layers.0"
    asked = dataclasses.replace(
        changed(cfg, source=str(tmp_path / "pixels.npy")),
        subject=name, site=site, context_length=10,
    )  # fmt: skip
    store, _ = harvest(asked, tmp_path / "s")[site]
    export(store, tmp_path / "exported")
    wanted = ImportConfig(source=str(tmp_path / "exported"), width=16, subject=name, split="train")
    taken = import_activations(wanted, tmp_path / "imported")["train"]
    assert taken.spec.subject_fingerprint == load_subject(name).fingerprint
    assert (taken.spec.subject, taken.n_rows) == (name, store.n_rows)
    np.save(tmp_path / "elsewhere.npy", np.ones((8, 10, 16), "f4"))
    wanted = dataclasses.replace(wanted, source=str(tmp_path / "elsewhere.npy"), site=site)
    taken = import_activations(wanted, tmp_path / "arrays")["train"]
    assert taken.spec.subject == name, "without numbers of images, too"
    with pytest.raises(ValueError, match=r"site = 'layers\.7' does not exist"):
        import_activations(dataclasses.replace(wanted, site="layers.7"), tmp_path / "x")


@pytest.mark.parametrize(
    ("kind", "site"),
    [("vit", "layers.0"), ("tower of clip", "encoder.layers.0"), ("clip", "encoder.layers.0")],
)
def test_a_tower_of_transformers_gives_its_hidden_states(towers, files, cfg, tmp_path, kind, site):
    import torch
    import transformers
    from PIL import Image, ImageOps

    model, folder = towers[kind]
    asked = dataclasses.replace(
        changed(cfg, source=str(files)), subject=f"torch:{folder}", site=site, context_length=10
    )
    processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    stores = harvest(asked, tmp_path / "s", str)[site]
    for store in stores:
        found = store.read_shard_rows(0)
        shown = []
        for document in found.document:
            with Image.open(files / store.documents[document]) as opened:
                opened = ImageOps.exif_transpose(opened)
                shown.append(opened.convert("RGBA").convert("RGB"))
        with torch.no_grad():
            pixels = processor(images=shown, return_tensors="pt")["pixel_values"]
            states = getattr(model, "vision_model", model)(pixels, output_hidden_states=True)
        expected = states.hidden_states[1].numpy()[:, 1:]
        error = np.abs(found.rows.astype("f4") - expected)
        assert (error <= 2.0**-8 * np.abs(expected) + 1e-5).all()
    described = stores[0].manifest["computations"][0]
    assert described["torch"] == torch.__version__ and described["pillow"]
    assert load_subject(f"torch:{folder}").tokenizer.token_bytes(0).decode() == "■"


def test_a_folder_that_does_not_say_how_images_become_pixels(towers, files, cfg, tmp_path):
    import shutil

    copy = tmp_path / "model"
    shutil.copytree(towers["vit"][1], copy)
    settings = copy / "preprocessor_config.json"
    asked = dataclasses.replace(
        changed(cfg, source=str(files)), subject="torch:x", site="layers.0", context_length=10
    )
    settings.write_text(json.dumps({"image_processor_type": "OddImageProcessor"}))
    subject = load_subject(f"torch:{copy}")
    refused(asked, tmp_path, "preprocessor_config.json cannot be used", subject=subject)
    settings.unlink()
    subject = load_subject(f"torch:{copy}")
    message = "has no preprocessor_config.json or processor_config.json, .* or give .npy arrays"
    refused(asked, tmp_path, message, FileNotFoundError, subject=subject)
    np.save(tmp_path / "pixels.npy", np.zeros((9, 3, 12, 12), "f4"))
    harvest(changed(asked, source=str(tmp_path / "pixels.npy")), tmp_path / "s", subject=subject)
    assert (tmp_path / "s" / "train" / "manifest.json").exists(), "arrays need no preprocessing"
