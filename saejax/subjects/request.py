"""What a harvest is asked for, and the subject as it needs it."""

import dataclasses
import os
from typing import Literal

from jax.sharding import Mesh

from saejax.data.corpus import TextConfig
from saejax.data.images import Images, ImagesConfig
from saejax.data.token_arrays import IdsOnly, TokensConfig
from saejax.subjects.base import Subject
from saejax.subjects.filling import FIRST_POSITION, own_mesh
from saejax.subjects.hf import TORCH, load_subject
from saejax.subjects.towers import ImageSubject, check_positions


@dataclasses.dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """Which activations of which subject model on which text are stored.

    Attributes:
      subject: 'embedded', a folder in the Hugging Face layout, or a hub id; 'torch:' before either
        has PyTorch run it. It must take tokens, or pixels where `text` is images.
      site: where the subject is tapped; `Subject.sites()` lists the names. Of an alias the
        canonical name is what stores and folders carry.
      sites: further sites to store from the same forward passes. With any of them the stores of
        each site, `site` too, are in a folder of its name. No two names of one site.
      context_length: tokens a context, T; each gives T - `first_position` activations but for
        masked ones (BOS, special tokens, padding). Of images, the positions that the sites have
        for each; a message names the number where it is another.
      first_position: positions before it are not stored. 1, because the first position's norm is
        unlike all others; 0 keeps it. Of images that leaves out [CLS]; give 0 for towers
        and sites that have only patches.
      keep_special: store the activations of BOS and other special tokens, too (attention sinks,
        [CLS]); those of padding never are. A first position, or one of a large norm, is still left
        out unless `first_position` = 0 and `max_norm_ratio` = None keep it. Images have none.
      max_norm_ratio: activations whose norm is above this multiple of the median norm of their
        shard are left out, because a few positions of some models are hundreds of times larger
        than the rest; None keeps them.
      tokens: activations to store for training, before masked ones come off; None stores all of
        the text.
      held_out_tokens: the same for the held-out split.
      contexts_per_shard: at most so many contexts a shard (a power of two is used: the largest
        that leaves out no more than 5 % of the contexts). A chunk has as many rows, and a batch
        must be a multiple or a divisor of it.
      batch_contexts: contexts a forward pass, on each device of a process (or each group of
        `subject_shards`).
      subject_shards: devices that share one copy of the subject's weights; 1 for a 'torch:' one.
      max_bytes: refuse to store more than this, and to be asked for more by `tokens`, whatever
        the text holds; None asks only for free space.
      dtype: precision of the forward pass; what is stored is always bfloat16. 'float32' is that on
        accelerators, too, which are made for 'bfloat16'. The weights of a 'torch:' subject are
        held in it, too.
      weights_dtype: precision in which the weights are held, of any subject but a 'torch:' one;
        'bfloat16' halves their memory, and loses nothing of weights that are bfloat16 in their
        file. They are cast to `dtype` where they are used. Stores and streams of either are
        different ones: the subject's fingerprint follows it.
      allow_other_computation: go on with a store that was begun on another kind of device, with
        other versions of jax or with passes of another size, whose shards are rounded otherwise;
        the commit records and the manifest say how each was computed. One after the other: of two
        such writers at once, one ends with an error when they meet at a shard.
      seed: seed of the permutation of contexts and of the rows' order in a shard.
      text: the text, or token ids made elsewhere, or images.
    """

    subject: str = "embedded"
    site: str = "1.resid_post"
    sites: tuple[str, ...] = ()
    context_length: int = 64
    first_position: int = FIRST_POSITION
    keep_special: bool = False
    tokens: int | None = None
    held_out_tokens: int | None = None
    max_norm_ratio: float | None = 10.0
    contexts_per_shard: int = 1024
    batch_contexts: int = 64
    subject_shards: int = 1
    max_bytes: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    weights_dtype: Literal["float32", "bfloat16"] = "float32"
    allow_other_computation: bool = False
    seed: int = 0
    text: TextConfig | TokensConfig | ImagesConfig = dataclasses.field(default_factory=TextConfig)

    def __post_init__(self) -> None:
        if self.context_length < 2:
            raise ValueError(
                f"Harvest.context_length = {self.context_length}: at least 2, because the first "
                "position is not stored."
            )
        if not 0 <= self.first_position < self.context_length:
            raise ValueError(
                f"Harvest.first_position = {self.first_position}: at least 0 (all positions are "
                f"stored), and below Harvest.context_length = {self.context_length}."
            )
        for name in ("contexts_per_shard", "batch_contexts", "subject_shards"):
            if getattr(self, name) < 1:
                raise ValueError(f"Harvest.{name} = {getattr(self, name)}: must be at least 1.")
        for name in ("tokens", "held_out_tokens", "max_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"Harvest.{name} = {value}: must be at least 1, or None.")
        if self.max_norm_ratio is not None and not self.max_norm_ratio > 1:
            raise ValueError(
                f"Harvest.max_norm_ratio = {self.max_norm_ratio}: must be above 1, or None."
            )
        for name in ("dtype", "weights_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16"):
                raise ValueError(
                    f"Harvest.{name} = {getattr(self, name)!r}: 'float32' or 'bfloat16'."
                )
        if self.subject.startswith(TORCH) and "bfloat16" == self.weights_dtype != self.dtype:
            raise ValueError(
                f"Harvest.weights_dtype = 'bfloat16' with Harvest.dtype = {self.dtype!r}: PyTorch "
                f"computes in the type of the weights; set Harvest.dtype = 'bfloat16' alone."
            )
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"Harvest.seed = {self.seed}: must be in [0, 2**63).")

    @property
    def all_sites(self) -> tuple[str, ...]:
        """`site` and `sites`, each once."""
        return tuple(dict.fromkeys((self.site, *self.sites)))

    def folder(self, root: str | os.PathLike[str], site: str) -> str:
        """Where the stores 'train' and 'held_out' of a site are, under the harvest's own place."""
        root = os.fspath(root).rstrip("/")
        return f"{root}/{site}" if len(self.all_sites) > 1 else root


def open_subject(
    cfg: HarvestConfig, *, on_devices: bool = False, mesh: Mesh | None = None
) -> Subject:
    """The subject of a harvest, loaded as it needs it.

    Weights go to the host or, read slice by slice, onto devices. Those of our own decoders are held
    in `Harvest.weights_dtype` and cast in the pass; the fingerprint follows their type. PyTorch
    computes in the type of the weights, `Harvest.dtype`, wherever it sees fit.

    Args:
      cfg: the harvest.
      on_devices: onto those of this process, where its pass will have them, unless the text is so
        short that it takes fewer.
      mesh: onto these, for a stream; `mesh.subject_mesh` of the training's.

    Raises:
      ValueError: fewer devices in this process than `subject_shards`: it could not harvest.
    """
    ids_only = not isinstance(cfg.text, TextConfig)
    if cfg.subject.startswith(TORCH):
        return load_subject(cfg.subject, dtype=cfg.dtype, mesh=None, ids_only=ids_only)
    if on_devices or mesh is not None:
        own = own_mesh(cfg.subject_shards, -(-cfg.contexts_per_shard // cfg.batch_contexts))
        mesh = own if mesh is None else mesh
    return load_subject(cfg.subject, dtype=cfg.weights_dtype, mesh=mesh, ids_only=ids_only)


def resolve_request(cfg: HarvestConfig, subject: Subject) -> tuple[HarvestConfig, Subject]:
    """The same request with canonical names of sites, and the subject that reads its text.

    Raises:
      ValueError: the subject has no such site, or fewer positions than a context; one site by two
        names; a subject that reads no text, or sees no images, or such as are not there; one on the
        host that is to run otherwise than it does.
      FileNotFoundError: the images, or what says how they are preprocessed, are not there.
    """
    subject = _reading(cfg, subject)
    _check_host(cfg, subject)
    names: dict[str, str] = {}
    for site in cfg.all_sites:
        name = subject.resolve_site(site)
        if name in names:
            raise ValueError(
                f"Harvest.sites: {names[name]!r} and {site!r} are the same site of subject "
                f"{subject.name!r}, {name}; give one of them."
            )
        names[name] = site
    if isinstance(subject, ImageSubject):
        check_positions(subject, tuple(names), cfg.context_length)
    if cfg.context_length > subject.max_context:
        raise ValueError(
            f"Harvest.context_length = {cfg.context_length}: subject {subject.name!r} has "
            f"{subject.max_context} positions; give at most that."
        )
    site, *sites = names
    return dataclasses.replace(cfg, site=site, sites=tuple(sites)), subject


def _reading(cfg: HarvestConfig, subject: Subject) -> Subject:
    """The subject with something that reads the text, ids or images; ValueError if it cannot."""
    if isinstance(subject, ImageSubject):
        if subject.tokenizer.cfg == cfg.text:
            return subject
        subject = subject.tower
    takes, given = getattr(subject, "takes", "tokens"), type(cfg.text).__name__
    if isinstance(cfg.text, ImagesConfig):
        if takes != "pixels":
            raise ValueError(
                f"Harvest.subject = {subject.name!r} takes {takes}, and Harvest.text = @Images(): "
                f"give @Text() or @Tokens(), or a vision tower, Harvest.subject = '{TORCH}...'."
            )
        return ImageSubject(tower=subject, tokenizer=Images(cfg.text, subject))
    if takes != "tokens":
        raise ValueError(
            f"Harvest.subject = {subject.name!r} takes {takes}, and Harvest.text = "
            f"@{given.removesuffix('Config')}(): give it images, Harvest.text = @Images() with "
            "Images.source, or a subject that takes tokens."
        )
    if subject.tokenizer is not None:
        return subject
    if isinstance(cfg.text, TokensConfig):
        return dataclasses.replace(subject, tokenizer=IdsOnly(subject.vocab_size))
    raise ValueError(
        f"Harvest.subject = {subject.name!r} was loaded without a tokenizer, so Harvest.text "
        "cannot be encoded: load it with one, or give ids made elsewhere: Harvest.text = @Tokens()."
    )


def _check_host(cfg: HarvestConfig, subject: Subject) -> None:
    """ValueError when a subject outside JAX is to be split, or computes in another precision."""
    if isinstance(subject, Subject):
        return
    if cfg.subject_shards > 1:
        raise ValueError(
            f"Harvest.subject_shards = {cfg.subject_shards}: subject {subject.name!r} runs outside "
            "JAX and is not split over devices; set it to 1."
        )
    dtype = getattr(subject, "dtype", cfg.dtype)
    if dtype != cfg.dtype:
        raise ValueError(
            f"Harvest.dtype = {cfg.dtype!r}: subject {subject.name!r} was loaded in {dtype} and "
            f"computes in it; load it with dtype={cfg.dtype!r}, or set Harvest.dtype = {dtype!r}."
        )
