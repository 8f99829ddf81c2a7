"""Writes the metrics, events and evaluation arrays of a run, and sends metrics to trackers.

Read ``run_log.py`` first.
"""
