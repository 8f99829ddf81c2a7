"""Studies: arms, seeds and intervals over ordinary runs, and laws that predict.

A study is a YAML file. Its runs are ordinary run folders, which say what is done. Read ``plan.py`` first.
"""
