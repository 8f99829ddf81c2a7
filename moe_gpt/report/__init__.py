"""Draws pictures and writes pages about runs.

This room reads the files that a run wrote, but loads no model. Read ``report.py`` first.
"""
