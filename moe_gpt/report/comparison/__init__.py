"""Compares runs: validation loss over text, compute and time, last scores, and differences between settings.

Runs that differ only in their seed form a group. Runs with different tokenizers are compared in bits per byte only,
because loss per token depends on the tokenizer. The notes list data that a run lacks. Read
``compare.py`` first.
"""
