"""Shows pictures to a text model.

Picture files become pixels, an encoder turns pixels into rows of features, and gated cross-attention between the blocks
of a finished decoder reads them. Read ``cross_attention.py`` first.
"""
