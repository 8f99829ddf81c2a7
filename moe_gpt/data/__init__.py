"""From text to batches.

Corpora, tokenizer, token store, and the training stream, a function of the tokens seen. Read ``stream.py`` first.
"""
