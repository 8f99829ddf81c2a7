"""The commands of ``moe-gpt``.

Each command is a function. The function's parameters are the command's arguments. Read ``train.py`` first.
"""
