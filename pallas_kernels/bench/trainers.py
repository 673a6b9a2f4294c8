"""What takes part in a race: this library's trainer and three public torch trainers.

Each of the three is driven as its own training loop drives it, by its own classes, with its own
optimizer at its own default rate. What had to be chosen is the same for all: AuxK is on, a latent
is dead after the same number of tokens, and warm-up and decay are shares of the race where a
library counts them in steps.
"""

import contextlib
import importlib.util
import math
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from pallas_kernels.bench import steps
from pallas_kernels.bench.settings import PEERS
from pallas_kernels.shapes import Shape

# Distribution -> the module it installs.
PACKAGES = {
    "torch": "torch",
    "eai-sparsify": "sparsify",
    "sae-lens": "sae_lens",
    "dictionary-learning": "dictionary_learning",
}
_AUXK = 1 / 32


class Terms(NamedTuple):
    """What all trainers of a race are told.

    Attributes:
      shape: sizes; `tokens` is the batch.
      steps: of the whole race.
      dead_tokens: a latent is dead once it has not fired for so many tokens.
      sample_ND: tokens to measure scale and mean on.
      rate_factor: multiplies every trainer's own learning rate.
    """

    shape: Shape
    steps: int
    dead_tokens: int
    sample_ND: np.ndarray
    rate_factor: float = 1.0

    @property
    def root_mean_square(self) -> float:
        """Of the tokens' norms."""
        return float(np.sqrt(np.square(self.sample_ND, dtype=np.float64).sum(1).mean()))

    @property
    def mean_norm(self) -> float:
        """Of the tokens."""
        return float(np.sqrt(np.square(self.sample_ND, dtype=np.float64).sum(1)).mean())


class Trainer(Protocol):
    """One that takes part.

    Attributes:
      name: as its package is called.
      recipe: its optimizer, in words.
    """

    name: str
    recipe: str

    def place(self, x_BD: np.ndarray) -> Any:
        """A batch on the device."""

    def update(self, x: Any) -> Any:
        """Trains on a placed batch; returns when it is done, or arrays to wait for."""

    def mark_dead(self, dead_L: np.ndarray) -> None:
        """Makes exactly these latents dead, as far as counters tell."""

    def dead(self) -> int:
        """Latents dead by the counters."""

    def reconstruct(self, x_BD: np.ndarray) -> np.ndarray:
        """By the trained model, in the space of the input."""


def missing(names: Sequence[str] = PEERS) -> str | None:
    """What to install for a race against these, or None."""
    needed = {name: PACKAGES[name] for name in ("torch", *names)}
    absent = [name for name, module in needed.items() if not importlib.util.find_spec(module)]
    if not absent:
        return None
    return (
        f"--against needs {', '.join(absent)}, which {'is' if len(absent) == 1 else 'are'} "
        f"not installed: pip install '.[bench]' && pip install --no-deps "
        f"dictionary-learning==0.1.0 (it pins an old nnsight, which nothing here uses)"
    )


def everyone(names: Sequence[str] = PEERS) -> tuple[Callable[[Terms], Trainer], ...]:
    """The trainers of a race against these, this library's first."""
    others = (Sparsify, SaeLens, DictionaryLearning)
    return Saejax, *(trainer for trainer in others if trainer.name in names)


class Saejax:
    """This library, with the quickstart's optimizer: Adam at a high rate that decays, short EMA."""

    name = "saejax"

    def __init__(self, terms: Terms):
        """Compiles the step and draws the weights."""
        from saejax.model import normalizer as normalizer_lib
        from saejax.model.sae import SAEConfig
        from saejax.train import state as state_lib
        from saejax.train.loss import LossConfig
        from saejax.train.optim import OptimizerConfig

        shape = terms.shape
        # One scale for all tokens, as the others have: no side information about each.
        self._sae = SAEConfig(d_model=shape.d, n_latents=shape.n, k=shape.k, normalization="scalar")
        self._normalizer = normalizer_lib.measure("scalar", terms.sample_ND)
        self._optimizer = OptimizerConfig(
            learning_rate=4e-3 * math.sqrt(4096 / shape.n) * terms.rate_factor,
            warmup_steps=min(50, terms.steps // 10),
            decay="linear",
            ema_decay=0.99,
        )
        loss = LossConfig(auxk_coefficient=_AUXK, k_aux=shape.k_aux, dead_tokens=terms.dead_tokens)
        self._compiled = steps.program(
            self._sae,
            loss,
            self._optimizer,
            self._normalizer,
            terms.steps,
            terms.sample_ND[: shape.tokens],
        )
        sample_ND = np.asarray(self._normalizer.apply(jax.numpy.asarray(terms.sample_ND))[0])
        self._state = state_lib.create(
            0, self._sae, self._optimizer, terms.steps, sample_ND, self._compiled.mesh
        )
        self._dead_tokens = terms.dead_tokens
        self.recipe = (
            f"Adam, rate {self._optimizer.learning_rate:.1e}, warm-up "
            f"{self._optimizer.warmup_steps}, linear decay over the last fifth, EMA 0.99"
        )

    def place(self, x_BD: np.ndarray) -> jax.Array:
        """See `Trainer`."""
        return jax.device_put(x_BD, self._compiled.token_sharding)

    def update(self, x: jax.Array) -> Any:
        """See `Trainer`."""
        self._state, metrics = self._compiled.step(self._state, x)
        return self._state, metrics

    def mark_dead(self, dead_L: np.ndarray) -> None:
        """See `Trainer`."""
        since_L = np.where(dead_L, self._dead_tokens, 0).astype(np.int32)
        self._state = steps.with_counters(self._state, since_L, self._compiled)

    def dead(self) -> int:
        """See `Trainer`."""
        return int((np.asarray(self._state.tokens_since_fired) >= self._dead_tokens).sum())

    def reconstruct(self, x_BD: np.ndarray) -> np.ndarray:
        """See `Trainer`."""
        from saejax.train.state import export

        model = export(
            self._state, self._sae, self._optimizer, self._normalizer, self._compiled.mesh
        )
        return np.asarray(model.decode(model.encode(x_BD)))


class _Torch:
    """What the torch trainers share: the device, and the way there and back."""

    def __init__(self):
        import torch

        cuda = jax.default_backend() == "gpu" and torch.cuda.is_available()
        self.torch, self.device = torch, torch.device("cuda" if cuda else "cpu")
        torch.manual_seed(0)
        if cuda:
            torch.set_float32_matmul_precision("high")

    def place(self, x_BD: np.ndarray) -> Any:
        """See `Trainer`."""
        return self.torch.tensor(x_BD, dtype=self.torch.float32, device=self.device)

    def mixed_precision(self) -> Any:
        """bfloat16 multiplications on a GPU, as for this library; float32 on CPU."""
        return self.torch.autocast(
            self.device.type, self.torch.bfloat16, enabled=self.device.type == "cuda"
        )

    def wait(self) -> None:
        """Until the device is done; `jax.block_until_ready` does not know torch."""
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()


class Sparsify(_Torch):
    """eai-sparsify: `Trainer.fit` without the language model around it."""

    name = "eai-sparsify"

    def __init__(self, terms: Terms):
        """Builds coder and optimizer as `sparsify.trainer.Trainer` does."""
        super().__init__()
        if self.device.type == "cpu":
            os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
        from schedulefree import ScheduleFreeWrapper
        from sparsify import SparseCoder, SparseCoderConfig
        from sparsify.sign_sgd import SignSGD

        shape = terms.shape
        config = SparseCoderConfig(num_latents=shape.n, k=shape.k)
        self.coder = SparseCoder(shape.d, config, self.device, dtype=self.torch.float32)
        rate = 5e-3 / (shape.n / 2**14) ** 0.5 * terms.rate_factor
        self.optimizer = ScheduleFreeWrapper(SignSGD(self.coder.parameters(), rate), momentum=0.95)
        self.optimizer.train()
        self.dead_tokens, self.started = terms.dead_tokens, False
        self.since_L = self.torch.zeros(shape.n, dtype=self.torch.long, device=self.device)
        self.recipe = f"schedule-free sign SGD, rate {rate:.1e}, momentum 0.95"

    def update(self, x: Any) -> None:
        """See `Trainer`."""
        torch, coder = self.torch, self.coder
        if not self.started:
            coder.b_dec.data = x.mean(0)
            self.started = True
        coder.set_decoder_norm_to_unit_norm()
        out = coder(x, dead_mask=self.since_L > self.dead_tokens)
        (out.fvu + _AUXK * out.auxk_loss).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.since_L += len(x)
            self.since_L[out.latent_indices.flatten()] = 0
        self.wait()

    def mark_dead(self, dead_L: np.ndarray) -> None:
        """See `Trainer`."""
        dead = self.torch.tensor(dead_L, device=self.device)
        self.since_L[:] = self.torch.where(dead, self.dead_tokens + 1, 0)

    def dead(self) -> int:
        """See `Trainer`."""
        return int((self.since_L > self.dead_tokens).sum())

    def reconstruct(self, x_BD: np.ndarray) -> np.ndarray:
        """See `Trainer`."""
        self.optimizer.eval()  # the average that schedule-free methods evaluate
        with self.torch.no_grad():
            out = self.coder(self.place(x_BD)).sae_out.float().cpu().numpy()
        self.optimizer.train()
        return out


class SaeLens(_Torch):
    """sae-lens: `SAETrainer.step` on its TopK autoencoder."""

    name = "sae-lens"

    def __init__(self, terms: Terms):
        """Builds model and trainer; the scale it would measure itself is handed to it."""
        super().__init__()
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        shape, warm_up, decay = terms.shape, terms.steps // 20, terms.steps // 5
        model = TopKTrainingSAE(
            TopKTrainingSAEConfig(
                d_in=shape.d,
                d_sae=shape.n,
                k=shape.k,
                device=self.device.type,
                normalize_activations="expected_average_only_in",
            )
        )
        config = SAETrainerConfig(
            total_training_samples=terms.steps * shape.tokens,
            train_batch_size_samples=shape.tokens,
            lr=3e-4 * terms.rate_factor,
            lr_end=3e-5 * terms.rate_factor,  # of schedules that this one is not; must be there
            lr_warm_up_steps=warm_up,
            lr_decay_steps=decay,
            device=self.device.type,
            autocast=self.device.type == "cuda",
            dead_feature_window=max(terms.dead_tokens // shape.tokens, 1),
        )
        self.trainer = SAETrainer(config, model, data_provider=iter(()))
        self.trainer.activation_scaler.scaling_factor = shape.d**0.5 / terms.mean_norm
        self.recipe = f"Adam, rate {config.lr:.1e}, warm-up {warm_up}, decay over {decay}"

    def update(self, x: Any) -> None:
        """See `Trainer`."""
        self.trainer.step(x)
        self.trainer.n_training_steps += 1
        self.wait()

    def mark_dead(self, dead_L: np.ndarray) -> None:
        """See `Trainer`."""
        window = self.trainer.cfg.dead_feature_window
        dead = self.torch.tensor(dead_L, device=self.device)
        self.trainer.n_forward_passes_since_fired[:] = self.torch.where(dead, window + 1.0, 0.0)

    def dead(self) -> int:
        """See `Trainer`."""
        return int(self.trainer.dead_neurons.sum())

    def reconstruct(self, x_BD: np.ndarray) -> np.ndarray:
        """See `Trainer`."""
        scaler, model = self.trainer.activation_scaler, self.trainer.sae
        with self.torch.no_grad(), self.mixed_precision():
            out = scaler.unscale(model.decode(model.encode(scaler.scale(self.place(x_BD)))))
        return out.float().cpu().numpy()


@contextlib.contextmanager
def _stub(name: str, **attributes: Any) -> Iterator[None]:
    """Inside, an import of a module that is not installed finds these attributes."""
    if importlib.util.find_spec(name) is not None:
        yield
        return
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(attributes)
    try:
        yield
    finally:
        del sys.modules[name]


class DictionaryLearning(_Torch):
    """dictionary-learning: `TopKTrainer.update` on tokens scaled to unit mean square."""

    name = "dictionary-learning"

    def __init__(self, terms: Terms):
        """Builds the trainer."""
        super().__init__()
        with _stub("nnsight", LanguageModel=object):  # traces models for data; unused here
            from dictionary_learning.trainers.top_k import TopKTrainer

        shape, warm_up, decay = terms.shape, terms.steps // 20, int(0.8 * terms.steps)
        rate = 2e-4 / (shape.n / 2**14) ** 0.5 * terms.rate_factor
        self.trainer = TopKTrainer(
            steps=terms.steps,
            activation_dim=shape.d,
            dict_size=shape.n,
            k=shape.k,
            layer=0,
            lm_name="",
            lr=rate,
            auxk_alpha=_AUXK,
            warmup_steps=warm_up,
            decay_start=decay,
            device=self.device.type,
        )
        self.trainer.dead_feature_threshold = terms.dead_tokens
        self.scale, self.step = terms.root_mean_square, 0
        self.recipe = f"Adam, rate {rate:.1e}, warm-up {warm_up}, linear decay from step {decay}"

    def update(self, x: Any) -> None:
        """See `Trainer`."""
        with self.mixed_precision():
            self.trainer.update(self.step, x / self.scale)
        self.step += 1
        self.wait()

    def mark_dead(self, dead_L: np.ndarray) -> None:
        """See `Trainer`."""
        dead = self.torch.tensor(dead_L, device=self.device)
        threshold = self.trainer.dead_feature_threshold
        self.trainer.num_tokens_since_fired[:] = self.torch.where(dead, threshold, 0)

    def dead(self) -> int:
        """See `Trainer`."""
        since_L = self.trainer.num_tokens_since_fired
        return int((since_L >= self.trainer.dead_feature_threshold).sum())

    def reconstruct(self, x_BD: np.ndarray) -> np.ndarray:
        """See `Trainer`."""
        with self.torch.no_grad(), self.mixed_precision():
            out = self.trainer.ae(self.place(x_BD) / self.scale) * self.scale
        return out.float().cpu().numpy()
