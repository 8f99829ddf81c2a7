"""How an operation is computed.

Read ``device.py`` first.
"""
