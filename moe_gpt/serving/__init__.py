"""Serves a model over HTTP, with a page.

Read ``server.py`` first.
"""
