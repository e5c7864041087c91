"""Model directories that are not as they should be."""

import json
import shutil
import struct
from pathlib import Path

from harness import DEMO


def copy(to, source=DEMO):
    """A copy of the demonstration model; files that a test does not touch are links."""
    to = Path(to)
    to.mkdir(parents=True)
    for file in source.iterdir():
        (to / file.name).symlink_to(file.resolve())
    return to


def own(model, name="model.safetensors"):
    """Makes one file of a copy its own, so that it can be changed."""
    path = model / name
    real = path.resolve()
    path.unlink()
    shutil.copyfile(real, path)
    return path


def header(path):
    """Header of a safetensors file, and where the data begins."""
    with path.open("rb") as file:
        [size] = struct.unpack("<Q", file.read(8))
        return json.loads(file.read(size)), 8 + size


def rewrite(path, change):
    """Changes the header of a safetensors file; the data stays."""
    tensors, data = header(path)
    body = path.read_bytes()[data:]
    change(tensors)
    text = json.dumps(tensors).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def truncated(model, cut=1000):
    """Cuts the weights' end off; names of the tensors that have lost something."""
    path = own(model)
    tensors, data = header(path)
    size = path.stat().st_size - cut
    with path.open("r+b") as file:
        file.truncate(size)
    return [name for name, t in tensors.items() if name != "__metadata__" and data + t["data_offsets"][1] > size]


def weight_of(tensors):
    """Some matrix that every decoder has."""
    return next(n for n in sorted(tensors) if n.endswith("self_attn.q_proj.weight"))


def without_a_tensor(model):
    path = own(model)
    name = weight_of(header(path)[0])
    rewrite(path, lambda tensors: tensors.update({"unheard.of": tensors.pop(name)}))
    return [name]


def with_a_wrong_shape(model):
    path = own(model)
    name = weight_of(header(path)[0])

    def change(tensors):
        rows, columns = tensors[name]["shape"]
        tensors[name]["shape"] = [rows // 2, columns * 2]

    rewrite(path, change)
    return [name]


def with_a_wrong_type(model):
    path = own(model)
    name = weight_of(header(path)[0])

    def change(tensors):
        # As wide as before, so that only the type is wrong.
        tensors[name]["dtype"] = {"U32": "I32", "F32": "I32", "BF16": "I16", "F16": "I16"}[tensors[name]["dtype"]]

    rewrite(path, change)
    return [name]


def without_sense(model):
    path = own(model)
    path.write_bytes(b"\xff" * path.stat().st_size)
    return ["model.safetensors"]


def with_config(model, **changes):
    path = own(model, "config.json")
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(config))
    return path


def without(model, name):
    (model / name).unlink()
    return [name]
