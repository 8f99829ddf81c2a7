"""Files that are complete or absent; safetensors, one tensor at a time.

Read ``durable.py`` first.
"""
