"""Measurements of speed and memory, each against what users would otherwise take; ``scripts/bench.py`` runs them."""
