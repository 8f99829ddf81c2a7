"""Hugging Face, both ways.

Mixtral and Llama folders, for transformers, vLLM and llama.cpp. Read ``hugging_face.py`` first.
"""
