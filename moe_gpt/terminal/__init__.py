"""Numbers, tables and progress for people.

Read ``tables.py`` first.
"""
