"""How fast text becomes tokens, against ``datasets.map``, and how fast the stream is read, against training."""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from moe_gpt.bench.contenders import Ours, workload_of
from moe_gpt.bench.processes import measure
from moe_gpt.bench.results import Result
from moe_gpt.config import DataConfig, RunConfig, SourceConfig, TokenizerConfig
from moe_gpt.data.builtin_corpus import iterate_builtin
from moe_gpt.data.encode import available_cores
from moe_gpt.data.prepare import prepare_data
from moe_gpt.data.stream import TrainingStream
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.ops.device import pick_precision
from moe_gpt.training.setup import fill_in
from moe_gpt.training.stage import build_stream

_STREAM_BATCHES = 200
_TRAIN_STEPS = 8


def bench_data(config: RunConfig, gigabytes: float, folder: Path, say: Callable[[str], None]) -> list[Result]:
    """Measure preparation and stream with the config's tokenizer and training step; return a result for each.

    The text is the built-in corpus, shuffled and repeated, as JSON lines; the folder needs five times its size.
    """
    tokenizer = prepare_data(config.data, say=lambda text: None).tokenizer
    tokenizer_file = folder / "tokenizer.json"
    tokenizer_file.write_text(tokenizer.to_json(), encoding="utf-8")
    corpus = folder / "corpus.jsonl"
    n_documents = write_corpus(corpus, round(gigabytes * 1e9))
    say(f"prepare   {gigabytes:g} GB, {n_documents:,} documents; {available_cores()} processes each")
    results: list[Result] = []
    for name, prepare in (("moe_gpt", _prepare_here), ("datasets.map", _prepare_with_datasets)):
        measured = measure(prepare, corpus, tokenizer_file, folder / name, available_cores())
        speed, peak = measured.value / measured.seconds, measured.peak_memory_bytes
        results.append(
            {"name": f"prepare/{name}", "tokens_per_second": speed, "peak_memory_bytes": peak, "tokens": measured.value}
        )
        memory = "" if peak is None else f"{peak / 1e9:>8.2f} GB"
        say(f"          {name:<14}{speed:>14,.0f} tokens/s{memory}"
            f"{measured.seconds:>9.1f} s for {measured.value:,} tokens")  # fmt: skip
    ratio = results[0]["tokens_per_second"] / results[1]["tokens_per_second"]
    say(f"          ratio {ratio:.2f}")
    large = _data_config(corpus, tokenizer_file, folder / "moe_gpt")
    return results + _bench_stream(dataclasses.replace(config, data=large), say)


def write_corpus(path: Path, n_bytes: int) -> int:
    """Write about ``n_bytes`` of the built-in corpus's documents, shuffled and repeated; return their number."""
    texts = [document.text for kind in ("prose", "code") for document in iterate_builtin(kind)]
    generator, n_written, n_documents = random.Random(0), 0, 0
    with open(path, "w", encoding="utf-8") as file:
        while n_written < n_bytes:
            for text in generator.sample(texts, len(texts)):
                n_written += file.write(json.dumps({"text": text}) + "\n")
                n_documents += 1
                if n_written >= n_bytes:
                    break
    return n_documents


def _data_config(corpus: Path, tokenizer_file: Path, cache: Path) -> DataConfig:
    source = SourceConfig(name="corpus", files=str(corpus))
    return DataConfig(
        tokenizer=TokenizerConfig(file=str(tokenizer_file)),
        sources=(source,),
        cache_dir=str(cache),
        validation_fraction=0.1,
    )


def _prepare_here(corpus: Path, tokenizer_file: Path, cache: Path, processes: int) -> int:
    config = dataclasses.replace(_data_config(corpus, tokenizer_file, cache), processes=processes)
    (source,) = prepare_data(config, say=lambda text: None).sources
    return sum(len(split) - len(split.document_ends) for split in (source.train, source.validation))


def _prepare_with_datasets(corpus: Path, tokenizer_file: Path, cache: Path, processes: int) -> int:
    """Do what most training codes do: ``datasets.map`` in as many processes, ids of two bytes in Arrow files."""
    import datasets
    import pyarrow.compute

    tokenizer = Tokenizer.load(tokenizer_file)

    def encode(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": tokenizer.encode_batch(rows["text"])}

    datasets.disable_progress_bars()
    text = datasets.load_dataset("json", data_files=str(corpus), split="train", cache_dir=str(cache))
    features = datasets.Features({"ids": datasets.List(datasets.Value("uint16"))})
    tokens = text.map(encode, batched=True, num_proc=processes, remove_columns=["text"], features=features)
    return pyarrow.compute.sum(pyarrow.compute.list_value_length(tokens.data.column("ids"))).as_py()


def _bench_stream(config: RunConfig, say: Callable[[str], None]) -> list[Result]:
    started = time.perf_counter()
    data = prepare_data(config.data, say=lambda text: None)
    config, schedule, shares = fill_in(config, data, None)
    stream = build_stream(config, data, shares)
    stages = [stage.config for stage in schedule.stages]
    stream.batch(0, stages[0].seq_len, stages[0].batch_range[0])
    start = time.perf_counter() - started
    seq_len, batch_tokens = stages[-1].seq_len, stages[-1].batch_range[1]
    read = _stream_speed(stream, seq_len, batch_tokens, len(data.sources[0].train))
    trained = _training_speed(config)
    say(f"stream    first batch {start:.3f} s after opening {len(data.sources[0].train):,} tokens")
    say(f"          {read:,.0f} tokens/s read, {trained:,.0f} tokens/s trained on: ratio {read / trained:.0f}")
    return [
        {"name": "stream/moe_gpt", "tokens_per_second": read, "seconds_to_first_batch": start},
        {"name": "train/moe_gpt", "tokens_per_second": trained},
    ]


def _stream_speed(stream: TrainingStream, seq_len: int, batch_tokens: int, n_tokens: int) -> float:
    """Read batches from all over the first epoch, so that most meet text whose digest is still to be compared."""
    starts = random.Random(0).sample(range(0, n_tokens // batch_tokens), min(_STREAM_BATCHES, n_tokens // batch_tokens))
    started = time.perf_counter()
    for index in starts:
        stream.batch(index * batch_tokens, seq_len, batch_tokens)
    return len(starts) * batch_tokens / (time.perf_counter() - started)


def _training_speed(config: RunConfig) -> float:
    """Return tokens per second of training steps in the config's last stage."""
    device = torch.device("cpu")
    workload = workload_of(config, device, pick_precision(config.train.precision, device, config.model.d_model))
    contender = Ours(dataclasses.replace(workload, micro_batch_tokens=config.train.micro_batch_tokens))
    return workload.batch_tokens / statistics.median(contender.step().total for _ in range(_TRAIN_STEPS))
