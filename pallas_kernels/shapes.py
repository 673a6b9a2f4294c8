"""Named real shapes, which tests, compile checks and benchmarks share."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one training step.

    Attributes:
      d: width of the activations.
      n: latents.
      k: latents kept per token.
      tokens: in a batch.
      k_aux: dead latents kept per token by AuxK.
    """

    d: int
    n: int
    k: int
    tokens: int
    k_aux: int


# What a newcomer's machine runs first; the figures demanded of a CPU are of these.
CPU = {
    "quickstart": Shape(d=256, n=4096, k=16, tokens=1024, k_aux=128),
    "cpu_race": Shape(d=512, n=8192, k=32, tokens=1024, k_aux=256),
    "cpu": Shape(d=512, n=16384, k=32, tokens=2048, k_aux=256),
    "cpu_wide": Shape(d=768, n=32768, k=32, tokens=2048, k_aux=512),
}

# OpenAI's v5_32k and v5_128k autoencoders of GPT-2 small, a wider model, and one shard of the
# 16-million-latent run on 512 chips.
ACCELERATOR = {
    "gpt2_32k_small_batch": Shape(d=768, n=32768, k=32, tokens=8192, k_aux=512),
    "gpt2_32k": Shape(d=768, n=32768, k=32, tokens=131072, k_aux=512),
    "gpt2_128k_small_batch": Shape(d=768, n=131072, k=32, tokens=8192, k_aux=512),
    "gpt2_128k": Shape(d=768, n=131072, k=32, tokens=131072, k_aux=512),
    "wide_128k": Shape(d=4096, n=131072, k=64, tokens=32768, k_aux=2048),
    "pod_shard": Shape(d=12288, n=32768, k=6, tokens=2048, k_aux=8),
}

NAMED = CPU | ACCELERATOR
