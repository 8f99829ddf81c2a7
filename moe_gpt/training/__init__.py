"""The loop: plan, batch, step; log, evaluate, save.

``saving/`` never loses a run, ``records/`` writes down what happened. Read ``loop.py`` first.
"""
