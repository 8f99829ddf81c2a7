"""The training loop, with evaluation, logging and checkpoints.

``saving/`` has the checkpoints, ``records/`` the metrics and events. Read ``loop.py`` first.
"""
