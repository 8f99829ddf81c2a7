"""A Whisper with random weights, saved as a folder of transformers."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

END, START = "<|endoftext|>", "<|startoftranscript|>"


def save_tiny_whisper(folder: Path, languages: tuple[str, ...] = (), **changes: object) -> Path:
    """Save it with letters as tokens; it takes 2 seconds at once, and its text has no sense."""
    vocab = {token: number for number, token in enumerate([END, START, *"abcdefghijklmnopqrstuvwxyz "])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=END))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokens = {"bos_token_id": 1, "decoder_start_token_id": 1, "eos_token_id": 0, "pad_token_id": 0}
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 80}
    limits = {"vocab_size": len(vocab), "max_source_positions": 100, "max_target_positions": 16}
    quiet = {"suppress_tokens": None, "begin_suppress_tokens": None}
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(**tokens, **sizes, **limits, **quiet)
    )
    model.generation_config = transformers.GenerationConfig(**tokens, max_length=16)
    if languages:
        model.generation_config.lang_to_id = {f"<|{name}|>": 2 + number for number, name in enumerate(languages)}
    model.save_pretrained(folder)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=END
    )
    fast.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(chunk_length=2, **changes).save_pretrained(folder)
    return folder
