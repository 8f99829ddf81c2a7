"""Generates tokens, for many requests at once.

Read ``generate.py`` first.
"""
