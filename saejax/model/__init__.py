"""The autoencoder: modules that own parameters, and the pure functions they call."""
