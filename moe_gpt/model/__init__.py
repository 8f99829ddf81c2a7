"""What is computed: the decoder, in plain PyTorch.

How an operation is computed, on which device, is ``moe_gpt.ops``. Read ``transformer.py`` first.
"""
