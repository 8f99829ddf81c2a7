"""Measurements against peers.

Read ``train.py`` first.
"""
