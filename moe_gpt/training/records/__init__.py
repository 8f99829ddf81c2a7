"""What a run writes down: metrics, events, arrays of evaluations, and what it sends to trackers.

Read ``run_log.py`` first.
"""
