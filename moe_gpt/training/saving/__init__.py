"""Checkpoints, and resuming a run from one bit for bit.

Read ``checkpoint.py`` first.
"""
