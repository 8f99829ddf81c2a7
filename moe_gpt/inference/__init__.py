"""Generates tokens.

Read ``generate.py`` first.
"""
