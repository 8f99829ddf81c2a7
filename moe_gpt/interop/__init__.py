"""Reads and writes Hugging Face folders.

Exported Mixtral and Llama folders work in transformers, vLLM and llama.cpp. Folders of quantised weights are
our own. Read ``hugging_face.py`` first.
"""
