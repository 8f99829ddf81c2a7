"""The command lines.

Each parses its arguments, builds what they name and calls the library. Read ``train.py`` first.
"""
