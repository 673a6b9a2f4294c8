"""Evaluation of trained autoencoders: reconstruction, sparsity, baselines, downstream loss."""
