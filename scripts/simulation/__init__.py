"""Simulation of how long collecting a batch takes; ``scripts/simulate_throughput.py`` is its command."""
