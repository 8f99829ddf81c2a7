"""Measures speed against other libraries.

Read ``train.py`` first.
"""
