"""Spreads a model over processes, compiles it, checkpoints activations.

Every collective is here. Read ``parallelize.py`` first.
"""
