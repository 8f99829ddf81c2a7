"""Writes files completely or not at all; reads safetensors one tensor at a time.

Read ``durable.py`` first.
"""
