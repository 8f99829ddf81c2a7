"""The command ``moe-gpt``: its commands, and how an error ends it.

Cyclopts builds each command line from a function's signature. A parameter can be given by position or as a flag, and
docstrings are the help. Cyclopts raises its errors, and this file prints each as one line. A function is imported when
its command is called.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

import cyclopts
from rich.console import Console

import moe_gpt
from moe_gpt.commands.output import discard, replace_closed_streams
from moe_gpt.errors import InputError
from moe_gpt.terminal.wrapping import terminal_width, wrap

_READER_GONE = 128 + 13
COMMANDS = {
    "train": "Train a model.",
    "finetune": "Go on from a base model: conversations (sft), pairs of answers (reward, dpo), rewarded prompts (rl), "
    "pictures (see).",
    "generate": "Continue a prompt.",
    "chat": "Talk to a model that was fine-tuned for it.",
    "serve": "Answer requests over HTTP, many at once, with a page for browsers.",
    "evaluate": "Measure loss, perplexity and bits per byte of held-out text or of files.",
    "transcribe": "Write down what is said in sound files, as text to train on.",
    "hear": "Train a small model from speech to text, on synthesised speech.",
    "prepare": "Tokenise the text of a config, and print a table of its sources.",
    "export": "Write a model as a Hugging Face folder.",
    "report": "Write a page about a run, or about several runs side by side.",
    "plan": "Estimate time, memory and cost of a run before paying for it.",
}
"""Each is the function of its name in the file of its name."""
FAMILIES = {
    "checkpoint": {
        "list": "Show each checkpoint's step, tokens, size and validation loss.",
        "verify": "Compare every file with the digest that was saved.",
        "merge": "Turn the shards of several ranks into the files that one process would have written, in place.",
        "prune": "Delete the checkpoints that the run's settings, or the options given here, do not keep.",
    },
    "study": {
        "run": "Train the runs of a study that are not finished, several at once, and print its tables.",
        "show": "Print the tables: arms, comparisons with intervals, the law.",
        "list": "Print the runs with their states, or one ordinary command for each.",
        "predict": "Predict the held-out run from the finished ladder.",
        "coordinates": "Measure how activations grow with the width, with and without muP.",
        "speeds": "Measure how fast arms train, in turns.",
        "documents": "Measure differences over held-out documents, drawn again.",
    },
    "bench": {
        "train": "Compare the time of whole optimizer steps with other libraries, in turns.",
        "layer": "Compare the time of one mixture-of-experts layer with a dense layer, for three kinds of routing.",
        "generate": "Compare the speed of decoding with that of transformers on the exported model.",
        "serve": "Compare serving with decoding one by one, in batches and with transformers; measure the server.",
        "scaling": "Measure how time and memory grow with experts, width, sequences and their length.",
        "data": "Compare two speeds: preparing text against datasets.map, and reading the stream against training.",
        "loop": "Measure the time to the first step, and the time that a run spends outside its steps.",
        "busy": "Measure how training keeps up beside other processes that want the same cores.",
        "devices": "Measure what several processes gain over one, and what their collectives cost.",
        "gpu": "Measure what there is to ask of a GPU, unattended and in ten minutes, and write it all to one file.",
    },
}
"""The functions of one file."""
FAMILY_HELP = {
    "checkpoint": "List, verify, merge or prune the checkpoints of a run.",
    "study": "Compare arms over seeds, with intervals, from one YAML file.",
    "bench": "Compare speed and memory with the libraries that users would otherwise choose.",
}
_TRAINING = (
    "exit status: 0 finished or stopped by a limit, 2 bad input, 3 training could not continue (the message "
    "has the reason and the newest checkpoint), 129, 130 or 143 saved and stopped by SIGHUP, SIGINT or SIGTERM"
)
EPILOGUES = {
    "train": _TRAINING,
    "finetune": _TRAINING,
    "checkpoint": "exit status: 0 done, 1 verify found a damaged checkpoint, 2 bad input",
    "study": "exit status: 0 done, 1 a run failed, 2 bad input, 130 interrupted (the same command continues)",
    "bench": "Machines are noisy, so compare only times of one call.",
    "plan": "The reported GPT-4: moe-gpt plan gpt4.yaml --n-gpus 25000 --tensor 8 --pipeline 15 --mfu 0.34 --price 1",
}


class _Pipe(Console):
    def on_broken_pipe(self) -> None:
        """Leave a reader who is gone to ``run_main``."""
        raise BrokenPipeError


def make_app() -> cyclopts.App:
    """Return the command line of all commands."""
    app = cyclopts.App(
        name="moe-gpt",
        help="The GPT-4 recipe as it was publicly reported, at a size for a laptop or one GPU.",
        help_epilogue="moe-gpt COMMAND --help lists its arguments. moe-gpt --install-completion adds shell completion.",
        help_format="markdown",  # breaks lines anew
        version=moe_gpt.__version__,
        result_action="return_value",
        console=_Pipe(width=terminal_width()),
        default_parameter=cyclopts.Parameter(allow_repeating=True),  # the last one counts, as it always did
    )
    for name, text in COMMANDS.items():
        place = f"moe_gpt.commands.{name}:{name}"
        app.command(place, name=name, help=text, help_epilogue=EPILOGUES.get(name, ""))
    for family, members in FAMILIES.items():
        part = cyclopts.App(name=family, help=FAMILY_HELP[family], help_epilogue=EPILOGUES[family])
        for name, text in members.items():
            function = "list_" if name == "list" else name  # list is Python's
            part.command(f"moe_gpt.commands.{family}:{function}", name=name, help=text)
        app.command(part)
    app.register_install_completion_command()
    return app


def run(*words: str) -> NoReturn:
    """Run ``moe-gpt`` with words before those of the command line, and exit: status 2 and a line for each problem.

    Args:
        words: the command, for a script that stands for it.
    """
    run_main(lambda: _call([*words, *sys.argv[1:]]))


def _call(words: Sequence[str]) -> int | None:
    try:
        status = make_app()(words, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        raise InputError(_as_line(error)) from None
    if words[:1] and words[0] in ("train", "finetune") and {"--help", "-h"} & set(words):
        from moe_gpt.commands.options import describe_settings

        print("\nkeys of a config, for the YAML file and for key.path=value:", *describe_settings(), sep="\n")
    return status


def _as_line(error: cyclopts.CycloptsError) -> str:
    """Return what is wrong with a command line, with the flag or argument that it is about."""
    chain = " ".join(error.command_chain or ())
    argument = error.argument.name if error.argument else ""
    text = str(error).partition(" Available commands:")[0].removesuffix(".")
    match error:
        case cyclopts.CoercionError(msg=str(problem)):
            text = f"{argument} {problem}"
        case cyclopts.MissingArgumentError(keyword=str(flag)):
            text = f"{flag} needs a value; write a value that starts with a dash as {flag}=VALUE"
        case cyclopts.MissingArgumentError():
            text = _missing(argument)
        case cyclopts.UnusedCliTokensError(unused_tokens=[word, *_]):
            text = f"unexpected argument {word!r}{_WANTED.get(chain, '')}"
        case cyclopts.UnknownOptionError(token=token) if setting := _setting_like(token.value):
            text = f"{token.value} is no option; a setting is given without dashes, as {setting}=..."
    return f"{text}; moe-gpt {chain} --help lists the arguments".replace("  ", " ")


_WANTED = {"generate": "; a prompt is given with --prompt", "evaluate": "; files are given with --files"}
"""The probable meaning of a superfluous argument."""


def _missing(argument: str) -> str:
    hint = "; give a YAML file, or a config that comes with moe_gpt: tiny.yaml" if argument == "--config" else ""
    return f"{argument.removeprefix('--').upper()} is missing{hint}"


def _setting_like(flag: str) -> str | None:
    """Return the setting of a config whose name a flag spells, such as model.n_layers for --n-layers."""
    from moe_gpt.config import RunConfig
    from moe_gpt.config.flat import flatten
    from moe_gpt.config.yaml import to_plain

    name = flag.lstrip("-").partition("=")[0].replace("-", "_")
    return next((key for key in flatten(to_plain(RunConfig())) if name in (key, key.rpartition(".")[2])), None)


def run_main(main: Callable[[], int | None]) -> NoReturn:
    """Call a function and exit with what it returns: status 2 and one line for each problem where the input is bad.

    The status is 141, as after SIGPIPE, if the reader of stdout is gone, and 2 if the disk is full or stdout is closed.
    """
    replace_closed_streams()
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        stream.reconfigure(errors=errors)  # type: ignore[union-attr]  # a console may lack characters
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        status = main() or 0
        print(end="", flush=True)  # what cannot be written shows now
        sys.exit(status)
    except BrokenPipeError:
        discard(sys.stdout)
        sys.exit(_READER_GONE)
    except InputError as error:
        _fail(str(error))
    except OSError as error:
        _fail_on_files(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _fail_on_files(error: OSError) -> NoReturn:
    if error.filename is None:  # an error of stdout, which Python would flush again
        discard(sys.stdout)
    _fail(f"{error.strerror}: {error.filename or 'stdout'}" if error.strerror else str(error))


def _fail(message: str) -> NoReturn:
    for line in (message or "failed without a message").splitlines():
        text = f"error: {line}"
        print(wrap(text) if sys.stderr.isatty() else text, file=sys.stderr)
    sys.exit(2)
