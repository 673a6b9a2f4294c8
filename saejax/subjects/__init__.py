"""Subject models: the networks whose activations are explained."""
