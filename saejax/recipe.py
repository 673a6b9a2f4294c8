"""What training reads of a configuration, checked together before anything is made."""

import dataclasses

from saejax import mesh as mesh_lib
from saejax.capacity import TopKConfig
from saejax.checkpoint import CheckpointConfig
from saejax.mesh import MeshConfig, MeshShape
from saejax.model.sae import SAEConfig
from saejax.train.guard import GuardConfig
from saejax.train.loop import TrainConfig
from saejax.train.loss import LossConfig
from saejax.train.optim import OptimizerConfig
from saejax.train.spec import KernelConfig, loss_spec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The parts of a configuration that training reads; checks that they fit each other.

    Attributes:
      sae, train, loss, optimizer, topk, mesh, kernels, checkpoint, guard: the configurations.
    """

    sae: SAEConfig
    train: TrainConfig
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    topk: TopKConfig = TopKConfig()
    mesh: MeshConfig = MeshConfig()
    kernels: KernelConfig = KernelConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()

    def __post_init__(self):
        self.check_mesh(self.mesh.shape or MeshShape())

    def check_mesh(self, shape: MeshShape) -> None:
        """Raises ValueError unless model, batch and microbatch split over a mesh of this shape."""
        mesh_lib.check_divisible(shape, self.sae.n_latents, self.train.batch_size)
        # Sizes alone are checked: naming a platform keeps JAX from starting its devices here.
        loss_spec(self.sae, self.loss, self.topk, shape.latent, platform="cpu")
        self.train.chunks(shape)
