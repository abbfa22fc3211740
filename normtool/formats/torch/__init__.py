"""PyTorch: modules, exported programs and checkpoints."""
