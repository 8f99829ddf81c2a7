"""From text to batches.

Corpora, tokenizer and token store; and the training stream, which is a pure function of the tokens seen. Read
``stream.py`` first.
"""
