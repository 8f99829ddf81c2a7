"""Computes metrics for training, plans and reports.

These are routing statistics, problems of routers, parameters, FLOPs and memory. Read ``routing.py`` first.
"""
