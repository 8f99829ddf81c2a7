"""Generation.

Read ``generate.py`` first.
"""
