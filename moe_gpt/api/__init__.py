"""What users call in Python: train, load, save and read runs.

Each function does what a command does, and returns values instead of printing them. Read ``loaded.py`` first.
"""
