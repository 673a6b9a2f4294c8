"""Per-latent statistics and examples: exact, mergeable, independent of order."""
