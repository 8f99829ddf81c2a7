"""A trained model with its tokenizer: text in, text out."""

from __future__ import annotations

import dataclasses
import functools
import glob
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from moe_gpt.config import ModelConfig, RunConfig, SourceConfig
from moe_gpt.config.section import Count, Seed, require
from moe_gpt.data.corpus import iterate_documents
from moe_gpt.data.tokenizer import Tokenizer
from moe_gpt.errors import InputError
from moe_gpt.files.inside import inside
from moe_gpt.inference.generate import generate
from moe_gpt.inference.quantised import kind_of, quantise, weight_bytes
from moe_gpt.inference.request import Beside
from moe_gpt.inference.sampling import SamplingConfig
from moe_gpt.inference.speculation import Draft
from moe_gpt.interop import hugging_face, quantised_folder
from moe_gpt.interop.foreign_tokenizer import ANOTHER_KIND
from moe_gpt.measure.parameters import count_parameters
from moe_gpt.model.router import MakeRouter
from moe_gpt.model.transformer import MoEGPT
from moe_gpt.ops.device import Precision, pick_device, pick_precision, tune_process
from moe_gpt.post_training.seeing import load_seeing
from moe_gpt.terminal.numbers import format_value
from moe_gpt.training.evaluation import Score
from moe_gpt.training.saving.saved_model import load_saved, open_checkpoint
from moe_gpt.training.score_text import score_documents
from moe_gpt.vision.seeing import SeeingModel

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from moe_gpt.post_training.chat import Message
    from moe_gpt.post_training.eyes import Eyes, Looked, Source
    from moe_gpt.post_training.tools import Tool


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A model that reads and writes text; ``moe_gpt.load`` makes one."""

    model: MoEGPT
    tokenizer: Tokenizer | None
    """None for a Hugging Face folder without tokenizer.json; methods that need text then raise ``InputError``."""
    path: Path
    """The folder that the model was loaded from."""
    run_config: RunConfig | None = None
    """Config of the run that trained the model; None for a Hugging Face folder."""
    text_start: tuple[int, ...] = ()
    """Ids that a Hugging Face folder's tokenizer puts before every text, such as Llama's <s>."""
    precision: Precision = "fp32"
    """Compute type."""
    trained_length: int | None = None
    """The longest sequence that the model was trained on; None where nobody recorded it."""

    @property
    def setting(self) -> str:
        """Where and how the model computes, in a line."""
        line, kind = f"{self.path}, {self.model.embedding.weight.device}, {self.precision}", kind_of(self.model)
        n_bytes = format_value(weight_bytes(self.model), "bytes")
        return f"{line}; {kind} weights with bf16 activations, {n_bytes} in all" if kind else line

    @property
    def context(self) -> int:
        """Positions that generation and evaluation use by default."""
        return min(self.trained_length or self.config.max_seq_len, self.config.max_seq_len)

    @property
    def config(self) -> ModelConfig:
        """The shape of the model."""
        return self.model.config

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 200,
        *,
        images: Sequence[Source] = (),
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        bos: bool = False,
        special_tokens: bool = False,
        context: int | None = None,
    ) -> str:
        """Return the model's continuation of a prompt, without the prompt.

        The continuation ends at end-of-text, after ``max_new_tokens``, or where the context is full. Equal
        arguments give equal text.

        Args:
            prompt: the text to continue; see ``bos`` for a token before it.
            max_new_tokens: largest number of new tokens.
            images: paths, data URLs or bytes of pictures, at the markers <image> of the prompt; without any, before it.
            temperature: divides the logits; 0 chooses the most likely token each time.
            top_k: sample from this many most likely tokens; 0 samples from all.
            top_p: sample from the most likely tokens that together have this probability.
            seed: seed of the sampling.
            bos: put end-of-text before the prompt, as before a document in training.
            special_tokens: read special tokens that the prompt spells, such as <|fim_prefix|>, as those tokens.
            context: positions of prompt and continuation together; by default ``trained_length`` or, where that is
                unknown, the model's ``max_seq_len``.

        Raises:
            InputError: where the prompt has no token or fills the context, a setting is out of its range, the model
                sees no pictures, one cannot be read, or there are more or fewer markers.
        """
        return "".join(
            self.stream(
                prompt,
                max_new_tokens,
                images=images,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=seed,
                bos=bos,
                special_tokens=special_tokens,
                context=context,
            )
        )

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 200,
        *,
        images: Sequence[Source] = (),
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
        bos: bool = False,
        special_tokens: bool = False,
        context: int | None = None,
    ) -> Iterator[str]:
        """Yield what ``generate`` returns piece by piece, in whole characters.

        Arguments and errors are those of ``generate``. A setting out of its range raises at the call, a bad prompt at
        the first piece.
        """
        require(Count, max_new_tokens=max_new_tokens)
        require(Seed, seed=seed)
        sampling = SamplingConfig(temperature=temperature, top_k=top_k, top_p=top_p)
        ids, beside = self.look(prompt, images, bos, special_tokens)
        new = self.continue_ids(ids, max_new_tokens, sampling, seed, context, beside=beside)
        return self.require_tokenizer().decode_stream(new, context=ids)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[str | Tool] | None = None,
        max_new_tokens: int = 200,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> str:
        """Return the answer to messages, without special tokens; see ``moe_gpt.api.chatting.answer``."""
        from moe_gpt.api.chatting import answer

        require(Count, max_new_tokens=max_new_tokens)
        require(Seed, seed=seed)
        return answer(self, messages, tools or (), max_new_tokens, SamplingConfig(temperature=temperature), seed)

    def continue_ids(
        self,
        ids: Sequence[int],
        max_new_tokens: int,
        sampling: SamplingConfig,
        seed: int,
        context: int | None = None,
        draft: Draft | None = None,
        beside: Beside | None = None,
    ) -> Iterator[int]:
        """Yield the ids of new tokens that continue the given ids; see ``moe_gpt.generate``."""
        end = self.require_tokenizer().end_of_text_id
        limit = self.context if context is None else context
        return generate(self.model, ids, max_new_tokens, sampling, seed, end, self.precision, limit, draft, beside)

    @functools.cached_property
    def eyes(self) -> Eyes:
        """What opens pictures for the model; raises ``InputError`` where the model sees none."""
        from moe_gpt.post_training.eyes import Eyes

        if not isinstance(self.model, SeeingModel):
            raise InputError(
                f"{self.path} sees no pictures; leave them out, or give it eyes: moe-gpt finetune tiny-sees.yaml "
                "--init-from RUN"
            )
        return Eyes(self.model, self.require_tokenizer())

    def look(
        self, prompt: str, images: Sequence[Source] = (), bos: bool = False, special_tokens: bool = False
    ) -> Looked:
        """Return the tokens of a prompt, and its pictures for ``continue_ids``; ``generate`` explains the arguments."""
        from moe_gpt.post_training.eyes import Looked, open_all

        if not images:
            return Looked(self.encode(prompt, bos, special_tokens))
        pictures = open_all(self.eyes, images)
        self.encode(prompt)  # warns of what is lost
        return self.eyes.read_prompt(prompt, pictures, self.encode("", bos), special_tokens)

    def features(self, images: Sequence[Source]) -> Float[Tensor, "P S Dv"]:
        """Return what the model's encoder makes of pictures."""
        from moe_gpt.post_training.eyes import open_all

        return self.eyes.features(open_all(self.eyes, images))

    def encode(self, text: str, bos: bool = False, special_tokens: bool = False) -> list[int]:
        """Return the token ids of a text, as the model reads them. Warns where the tokenizer loses some of the text."""
        if not isinstance(text, str):
            raise InputError(f"the text must be a str, got {type(text).__name__}")
        tokenizer = self.require_tokenizer()
        if lost := tokenizer.first_loss(text):
            warnings.warn(f"the tokenizer loses text: {lost[0]!r} becomes {lost[1]!r}", stacklevel=2)
        start = list(self.text_start) or [tokenizer.end_of_text_id] * bos
        return start + (tokenizer.encode_with_special_tokens if special_tokens else tokenizer.encode)(text)

    def require_tokenizer(self) -> Tokenizer:
        """Return the tokenizer.

        Raises:
            InputError: where there is none.
        """
        if self.tokenizer is None:
            raise InputError(f"{self.path} has no tokenizer.json, so the model reads no text; {ANOTHER_KIND}")
        return self.tokenizer

    def evaluate(
        self,
        texts: str | Path | Sequence[str | Path],
        *,
        text_field: str = "text",
        stride: int | None = None,
        context: int | None = None,
        errors: str = "strict",
        format: str = "auto",
    ) -> Score:
        """Return the loss in nats per token, bits per byte and perplexity of texts or files.

        Each token is scored once, after at least context - ``stride`` earlier tokens, or after all of them.

        Args:
            texts: one or several. A ``Path``, or a string that is a glob of existing files, stands for files, as in
                ``moe-gpt evaluate --files``. Any other string is a text.
            text_field: the text column of files with rows.
            stride: tokens by which the window advances; half the context by default.
            context: length of the windows; by default ``trained_length`` or, where that is unknown, the model's
                ``max_seq_len``.
            errors: strict or replace, for bytes that are not UTF-8, as in a config.
            format: what the files are, as in a config.

        Raises:
            InputError: where there is no text, or a file cannot be read.
        """
        given = [texts] if isinstance(texts, str | Path) else texts
        context = self.context if context is None else context
        reading = {"text_field": text_field, "errors": errors, "format": format}
        documents = (text for each in given for text in _documents(each, reading))
        stride = stride or max(1, context // 2)
        return score_documents(self.model, self.require_tokenizer(), documents, self.precision, stride, context=context)

    def route(self, text: str) -> pandas.DataFrame:
        """Return the experts of each token: a row for each token, layer and choice.

        Columns: ``position``, ``token`` (its text), ``layer``, ``choice`` (0 is the first), ``expert`` and
        ``weight``, which multiplies the expert's output.

        Raises:
            InputError: where the model is dense, or the text has no token or more than the context.
        """
        from moe_gpt.api.routes import find_routes

        return find_routes(self, text)

    def plot_route(self, text: str) -> Figure:
        """Return a picture of ``route``: tokens from left to right, layers from bottom to top, experts as colours.

        The number in a cell is the first choice. A stronger colour means a larger weight.
        """
        from moe_gpt.api.routes import draw_route

        return draw_route(self.route(text))

    def __repr__(self) -> str:
        """Return path, size and vocabulary in a line."""
        n_parameters = count_parameters(self.config).total
        experts = "dense" if self.config.is_dense else f"{self.config.n_experts} experts"
        return f"LanguageModel({str(self.path)!r}, {n_parameters:,} parameters, {experts})"


def _documents(given: str | Path, reading: dict[str, str]) -> Iterator[str]:
    """Yield a text, or the documents of files."""
    if isinstance(given, str) and not _is_files(given):
        if re.fullmatch(r"\S*(/\S*|\.\w{1,8})", given):
            raise InputError(f"{given!r} looks like a path and matches no file; to score this text, add a line end")
        yield given
        return
    source = SourceConfig.from_mapping({"name": "files", "files": str(given), **reading})
    for document in iterate_documents(source):
        yield document.text


def _is_files(text: str) -> bool:
    return len(text) < 4096 and "\n" not in text and "\0" not in text and bool(glob.glob(text, recursive=True))


def load(
    path: str | Path,
    device: str = "auto",
    *,
    make_router: MakeRouter | None = None,
    precision: str | None = None,
    max_seq_len: int | None = None,
    quantize: str | None = None,
) -> LanguageModel:
    """Load a run (its newest checkpoint), a checkpoint, or a folder: quantised, or Mixtral, Mistral or Llama.

    Args:
        path: the folder.
        device: auto, cpu, cuda or mps.
        make_router: your own router, if the model was trained with one.
        precision: auto, bf16 or fp32; by default fp32 on a CPU, else auto.
        max_seq_len: the context in tokens to use instead of the model's own.
        quantize: int8 or int4, for weights in fewer bits, whose products take bf16 (docs/quantised.md).

    Raises:
        FileNotFoundError: where there is no model.
        InputError: where the model is damaged or quantised twice, or ``make_router`` is not that of its training.
    """
    if max_seq_len is not None:
        require(Count, max_seq_len=max_seq_len)
    place = pick_device(device)
    tune_process(place)
    chosen = pick_precision(precision or ("fp32" if place.type == "cpu" else "auto"), place)
    loaded = _load(Path(path), place, chosen, max_seq_len, make_router)
    if quantize is not None:
        quantise(loaded.model, quantize)
    return loaded


def _load(
    path: Path, place: torch.device, chosen: Precision, max_seq_len: int | None, make_router: MakeRouter | None
) -> LanguageModel:
    is_quantised = quantised_folder.is_quantised_folder(path)
    if is_quantised or hugging_face.is_model_folder(path):
        if make_router is not None:
            kind = "folder of quantised weights" if is_quantised else "Hugging Face folder"
            raise InputError(f"{path} is a {kind}, whose routers are Mixtral's; leave make_router out")
        return (_load_quantised if is_quantised else _load_hugging_face)(path, place, chosen, max_seq_len)
    saved = open_checkpoint(path)
    run = (load_seeing if saved.config.see else load_saved)(saved, place, make_router)
    _set_context(run.model, max_seq_len)
    return LanguageModel(
        run.model, run.tokenizer, run.path, run.config, precision=chosen, trained_length=run.trained_length
    )


def _set_context(model: MoEGPT, max_seq_len: int | None) -> None:
    if max_seq_len:
        model.config = dataclasses.replace(model.config, max_seq_len=max_seq_len)


def _load_quantised(path: Path, place: torch.device, chosen: Precision, max_seq_len: int | None) -> LanguageModel:
    model, tokenizer, settings = quantised_folder.load(path)
    _set_context(model, max_seq_len)
    return LanguageModel(model.to(place), tokenizer, path, None, settings.text_start, chosen, settings.trained_length)


def _load_hugging_face(path: Path, place: torch.device, chosen: Precision, max_seq_len: int | None) -> LanguageModel:
    if not inside(path, "tokenizer.json").is_file():
        return LanguageModel(hugging_face.load(path, max_seq_len).to(place), None, path, precision=chosen)
    found = hugging_face.load_with_tokenizer(path, place, max_seq_len)
    start = tuple(found.text_start)
    return LanguageModel(found.model, found.tokenizer, found.path, text_start=start, precision=chosen)
