"""What is applied to a model from outside.

Activation checkpointing, then compilation. Read ``parallelize.py`` first.
"""
