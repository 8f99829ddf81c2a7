"""The command lines.

Each command is a function whose parameters are its arguments; it builds what they name and calls the library. Read
``train.py`` first.
"""
