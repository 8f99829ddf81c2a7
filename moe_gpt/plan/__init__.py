"""The full-size system on paper.

Parameters, compute, memory, communication and costs, each beside what was reported. Read ``plan.py`` first.
"""
