"""Compares arms over seeds, with intervals, and predicts.

A study is a YAML file. Its runs are ordinary run folders, which say what is done. Read ``plan.py`` first.
"""
