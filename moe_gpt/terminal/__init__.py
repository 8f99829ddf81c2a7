"""Formats numbers, tables and progress bars.

Read ``tables.py`` first.
"""
