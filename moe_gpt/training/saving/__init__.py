"""Checkpoints, and what a run needs to go on from one as if it had never stopped.

Read ``checkpoint.py`` first.
"""
