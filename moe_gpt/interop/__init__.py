"""Reads and writes Hugging Face folders.

Exported Mixtral and Llama folders work in transformers, vLLM and llama.cpp. Read ``hugging_face.py`` first.
"""
