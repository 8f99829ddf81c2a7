"""Estimates memory, time and cost before training.

Each estimate for GPT-4 stands beside the reported number. Read ``plan.py`` first.
"""
