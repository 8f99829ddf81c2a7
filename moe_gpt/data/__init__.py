"""From text to batches: corpora, tokenizer, token store and the training stream."""
