"""Seeded mutations of a checkpoint folder: bytes, JSON values and whole files."""

import json
import os
import random
import shutil
from pathlib import Path

from cospadi.formats.checksums import CHECKSUMS

from .targets import mutated

_HEADER, _REPORT = b"\x01", b"\x07"
"""Targets whose inputs are a safetensors file and a JSON text."""


def mutate_folder(original: Path, out: Path, rng: random.Random, others: list[Path]) -> tuple[Path, list[str]]:
    """Give a mutated copy of a folder, and the names of the mutations; files that stay the same are hard links."""
    out.mkdir()
    for file in original.iterdir():
        os.link(file, out / file.name)
    names = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        files = sorted(path for path in out.iterdir() if path.is_file())
        if not files:
            break
        mutation = rng.choice(_MUTATIONS)
        names.append(mutation.__name__.strip("_"))
        mutation(rng.choice(files), rng, others)
    return out, names


def _rewrite(path: Path, data: bytes | bytearray) -> None:
    path.unlink()  # the bytes under the other name of a hard link stay
    path.write_bytes(data)


def _flip_bits(path: Path, rng: random.Random, others: list[Path]) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 1, 2, 8)) if data else 0):
        data[_place(len(data), rng)] ^= 1 << rng.randrange(8)
    _rewrite(path, data)


def _set_bytes(path: Path, rng: random.Random, others: list[Path]) -> None:
    data = bytearray(path.read_bytes())
    start = _place(len(data), rng)
    for place in range(start, min(start + rng.choice((1, 2, 4, 8, 64)), len(data))):
        data[place] = rng.choice((0, 255, 127, 128, rng.randrange(256)))
    _rewrite(path, data)


def _cut(path: Path, rng: random.Random, others: list[Path]) -> None:
    data = path.read_bytes()
    start = _place(len(data), rng)
    length = rng.choice((1, 8, len(data)))
    _rewrite(path, data[:start] + data[start + length :])


def _insert(path: Path, rng: random.Random, others: list[Path]) -> None:
    data = path.read_bytes()
    start = _place(len(data), rng)
    more = rng.choice((b"\0", b"\n", rng.randbytes(8), data[: rng.randrange(100)], data))
    _rewrite(path, data[:start] + more + data[start:])


def _exchange_parts(path: Path, rng: random.Random, others: list[Path]) -> None:
    data = path.read_bytes()
    a, b, c = sorted(_place(len(data), rng) for _ in range(3))
    _rewrite(path, data[:a] + data[b:c] + data[a:b] + data[c:])


def _change_json(path: Path, rng: random.Random, others: list[Path]) -> None:
    data = path.read_bytes()
    target = _HEADER if path.suffix == ".safetensors" else _REPORT
    changed = mutated(target + data, rng)
    if changed is not None:
        _rewrite(path, changed[1:])


def _reformat_json(path: Path, rng: random.Random, others: list[Path]) -> None:
    try:
        _rewrite(path, json.dumps(json.loads(path.read_bytes()), indent=rng.choice((None, 0, 3))).encode())
    except ValueError:
        _flip_bits(path, rng, others)


def _delete(path: Path, rng: random.Random, others: list[Path]) -> None:
    # Without its checksums a checkpoint is one of before there were any, which is another question.
    if path.name != CHECKSUMS:
        path.unlink()


def _empty(path: Path, rng: random.Random, others: list[Path]) -> None:
    _rewrite(path, b"")


def _take_from_another(path: Path, rng: random.Random, others: list[Path]) -> None:
    source = rng.choice(sorted(rng.choice([*others, path.parent]).iterdir()))
    if source.is_file() and source != path:
        _rewrite(path, source.read_bytes())


def _add(path: Path, rng: random.Random, others: list[Path]) -> None:
    names = (
        *("model.safetensors", "model.safetensors.index.json", "adapter_config.json", "generation_config.json"),
        *("tokenizer.json", "pytorch_model.bin", "modeling_x.py", "NOTES.txt", "model-00009-of-00009.safetensors"),
    )
    added = path.parent / rng.choice(names)
    if not os.path.lexists(added):  # never through a link, whose target may be an original
        added.write_bytes(rng.choice((b"", b"{}", path.read_bytes())))


def _link(path: Path, rng: random.Random, others: list[Path]) -> None:
    target = rng.choice((path.parent, Path("/dev/null"), Path(path.name), rng.choice(others) / path.name))
    path.unlink()
    path.symlink_to(target)


def _make_folder(path: Path, rng: random.Random, others: list[Path]) -> None:
    path.unlink()
    path.mkdir()


def _exchange_files(path: Path, rng: random.Random, others: list[Path]) -> None:
    other = rng.choice(sorted(file for file in path.parent.iterdir() if file.is_file()))
    shutil.move(path, path.with_name("exchanged"))
    if other != path:
        shutil.move(other, path)
    shutil.move(path.with_name("exchanged"), other)


def _place(length: int, rng: random.Random) -> int:
    """Choose a byte, half of the time among the first, where headers and keys are."""
    return min(rng.randrange(length + 1), rng.choice((64, 1024, length, length)), max(length - 1, 0))


_MUTATIONS = (
    *(_flip_bits,) * 4,
    *(_set_bytes,) * 3,
    *(_change_json,) * 5,
    *(_cut, _insert, _exchange_parts, _reformat_json, _delete, _empty, _take_from_another, _add, _link, _make_folder),
    _exchange_files,
)
