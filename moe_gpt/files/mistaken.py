"""What lies in the place of a file or beside it: pointers, error pages, unfinished downloads, other formats.

Each text says what was found and what to do, as the end of an error message.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

_AGAIN = "download the file again"
_WRITE = "write its model with save_pretrained(new_folder, safe_serialization=True) of transformers"
_CONVERT = f"load it with AutoModelForCausalLM.from_pretrained(folder{{0}}) and {_WRITE}"
_DISGUISES = {
    rb"version https://git-lfs": "it is a Git LFS pointer, not the file itself; git lfs pull fetches the file",
    rb"(?i)(\xef\xbb\xbf)?\s*<(!doctype|html|\?xml)": f"it is a web page that a server sent instead; {_AGAIN}",
    rb"Entry not found|Invalid username|Access to model": f"it is a server's error message; {_AGAIN}",
    rb"\Z": f"it is empty; {_AGAIN}",
    rb"\0{512}": f"it begins with zeros, as an unfinished download does; {_AGAIN}",
    rb"PK\x03\x04|\x80[\x02-\x05]": f"it is a pickle of torch.save; {_CONVERT.format('')}",
    rb"GGUF": f"it is a GGUF file; {_CONVERT.format(', gguf_file=...')}",
    rb"\x1f\x8b|\xfd7zXZ|\x28\xb5\x2f\xfd|BZh": "it is compressed; unpack it",
}
"""How files begin that are found in the place of others."""
_OTHER_WEIGHTS = {
    "adapter_*": "is a LoRA adapter without its model; AutoPeftModelForCausalLM.from_pretrained(folder) of peft loads "
    "both, and merge_and_unload().save_pretrained(new_folder) makes one model of them",
    "consolidated*": "is in the format of the model's makers; get the folder that is made for transformers",
    "tf_model*.h5": f"is a model of TensorFlow; {_CONVERT.format(', from_tf=True')}",
    "flax_model*.msgpack": f"is a model of Flax; {_CONVERT.format(', from_flax=True')}",
    "*.gguf": f"is a model of llama.cpp; {_CONVERT.format(', gguf_file=...')}",
    "pytorch_model*": f"is in the older format of torch.save; {_CONVERT.format('')}",
    "*.ckpt": f"is a training checkpoint; {_WRITE}",
    "*.pt*": f"is in the format of torch.save; {_WRITE}",
}
"""Files with weights that are not read here."""
_UNFINISHED = ("incomplete", "part", "partial", "crdownload", "download", "aria2")


def disguise(path: Path) -> str | None:
    """Say what a file is in truth; None for a file that begins as no other kind does."""
    with open(path, "rb") as file:
        start = file.read(512)
    return next((text for pattern, text in _DISGUISES.items() if re.match(pattern, start)), None)


def other_weights(folder: Path) -> str:
    """Name weights in a folder that are of another format, with the way to convert them; empty if there are none."""
    found = ((path, text) for pattern, text in _OTHER_WEIGHTS.items() for path in sorted(folder.glob(pattern)))
    return next((f"; {path.name} {text}" for path, text in found), "")


def unfinished_download(folder: Path) -> str:
    """Name a download into a folder that has not ended; empty if there is none."""
    cache = folder.resolve().parents[1:2]  # of a folder in the cache of Hugging Face, the one with blobs/
    places = [folder, folder / ".cache" / "huggingface" / "download", *(place / "blobs" for place in cache)]
    found = itertools.chain.from_iterable(place.glob(f"*.{end}") for place in places for end in _UNFINISHED)
    return next((f"; {path} is a download that has not ended: start it again" for path in found), "")


def cut_off(path: Path) -> str | None:
    """Say by its header how much of a safetensors file is missing; None where nothing is, or it has no such header."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        n_header = int.from_bytes(file.read(8), "little")
        header = file.read(min(n_header, size))
    if not re.match(rb'\{\s*"', header):
        return None
    ends = re.findall(rb'"data_offsets"\s*:\s*\[\s*\d+\s*,\s*(\d{1,18})\s*\]', header)
    wanted = 8 + n_header + max(map(int, ends), default=0)
    return f"it has {size:,} of the {wanted:,} bytes that its header says; {_AGAIN}" if size < wanted else None
