"""Applies compilation and activation checkpointing to a model.

Checkpointing comes first. Read ``parallelize.py`` first.
"""
