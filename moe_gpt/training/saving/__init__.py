"""Saves checkpoints, and resumes a run from a checkpoint bit for bit.

Read ``checkpoint.py`` first.
"""
