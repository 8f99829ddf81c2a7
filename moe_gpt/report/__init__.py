"""Pictures and pages about runs.

It reads the files that a run wrote and never a model. Read ``report.py`` first.
"""
