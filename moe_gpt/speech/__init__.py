"""Turns speech into text to train on.

Sound files become samples at 16 kHz, samples become windows cut at pauses, and any Whisper-like model in a
transformers folder writes down each window. A small model of this kind can be trained from scratch on synthesised
speech. Read ``transcribe.py`` first.
"""
