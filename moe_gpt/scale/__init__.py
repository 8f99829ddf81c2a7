"""Prepares text on many machines.

Read ``prepare.py`` first.
"""
