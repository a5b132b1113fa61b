"""Single-stream Policy Optimization on PyTorch Lightning."""
