"""Several runs side by side: validation curves over text, compute and time, where they end, how their settings differ.

Runs that differ in their seed alone are one group. Loss per token depends on what a token is, so runs that were
tokenised differently are compared in bits per byte only. What a run lacks is left out and named in the notes. Read
``compare.py`` first.
"""
