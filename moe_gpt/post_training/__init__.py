"""From a base model to an assistant: conversations, fine-tuning, preferences, reinforcement, adapters, tools.

A conversation becomes tokens and a mask that says which of them are answers. Every stage is a step of the training
loop with other data or another loss. Read ``chat.py`` first.
"""
