"""Reading the files of sentencepiece, without it."""

from __future__ import annotations

import struct
from collections.abc import Iterator


def sentencepiece(data: bytes) -> tuple[list[tuple[str, float]], bytes]:
    """Pieces with their scores, and the table of characters, of a file of sentencepiece: a ModelProto of its
    sentencepiece_model.proto. ValueError for a file that is none."""
    pieces, characters = [], b""
    for number, value in _fields(data):
        if number == 1:  # pieces: piece = 1, score = 2
            piece = dict(_fields(value))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece[2])[0] if 2 in piece else 0.0))
        elif number == 3:  # normalizer_spec: precompiled_charsmap = 2
            characters = dict(_fields(value)).get(2, b"")
    if not pieces:
        raise ValueError("no pieces")
    return pieces, characters


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a message of protocol buffers: their numbers, and the bytes of those that are no varint."""
    k = 0

    def varint() -> int:
        nonlocal k
        value = shift = 0
        while True:
            byte = data[k]
            value, shift, k = value | (byte & 127) << shift, shift + 7, k + 1
            if byte < 128:
                return value

    while k < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            varint()
            continue
        if kind not in (1, 2, 5):
            raise ValueError(f"no protocol buffer: a field of wire type {kind}")
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if k + size > len(data):
            raise ValueError("a field ends beyond the file")
        yield key >> 3, data[k : k + size]
        k += size
