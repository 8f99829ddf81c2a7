"""The records of a run: metrics, events, arrays of evaluations, and points for trackers.

Read ``run_log.py`` first.
"""
