"""One module per kin of model families; registry.py lists the architectures."""
