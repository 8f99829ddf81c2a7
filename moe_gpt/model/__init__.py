"""The decoder, in plain PyTorch.

``moe_gpt.ops`` chooses how each operation is computed on a device. Read ``transformer.py`` first.
"""
