"""From a base model to an assistant: fine-tuning, preferences, reinforcement, tools.

A conversation becomes tokens and a mask that says which of them are answers. Every stage is a step of the training
loop with other data or another loss. Read ``chat.py`` first.
"""
