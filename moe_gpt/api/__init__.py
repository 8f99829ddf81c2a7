"""Python functions to train, load, save and read runs.

Each function does the same as a command, but returns values instead of printing them. Read ``loaded.py`` first.
"""
