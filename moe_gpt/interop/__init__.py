"""Import from and export to Hugging Face.

Mixtral and Llama folders, for transformers, vLLM and llama.cpp. Read ``hugging_face.py`` first.
"""
