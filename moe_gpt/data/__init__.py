"""Turns text into batches.

The training stream is a pure function of the number of tokens seen. Read ``stream.py`` first.
"""
