"""Read from the messages of an Arrow file how many bytes its compressed batches take, before they are unpacked.

Source: Message.fbs of Apache Arrow, and https://flatbuffers.dev/internals. A table of a flatbuffer begins with the
distance back to its vtable, which has two bytes of size, two of the table's size, and the distance of each field.
"""

# Of Message: the type of its header, and the header. Of DictionaryBatch: its RecordBatch. Of RecordBatch: its buffers,
# and how they are compressed.
HEADER_TYPE, HEADER, DATA, BUFFERS, COMPRESSION = 1, 2, 1, 2, 3
# Types of a header.
DICTIONARY_BATCH, RECORD_BATCH = 2, 3
# A buffer is described by its offset and its length in the body.
BUFFER_BYTES = 16


def unpacked_size(metadata: memoryview, body: memoryview) -> int:
    """Return the bytes of the buffers in a message's body, unpacked; 0 if none is compressed.

    Raises IndexError for a damaged message.
    """
    message = _follow(metadata, 0)
    kind = _field(metadata, message, HEADER_TYPE)
    batch = _field(metadata, message, HEADER)
    if kind is None or batch is None or metadata[kind] not in (DICTIONARY_BATCH, RECORD_BATCH):
        return 0
    table = _follow(metadata, batch)
    if metadata[kind] == DICTIONARY_BATCH:
        if (data := _field(metadata, table, DATA)) is None:
            return 0
        table = _follow(metadata, data)
    buffers = _field(metadata, table, BUFFERS)
    if buffers is None or _field(metadata, table, COMPRESSION) is None:
        return 0
    vector = _follow(metadata, buffers)
    total, count = 0, _number(metadata, vector, 4)
    for number in range(count):
        at = vector + 4 + number * BUFFER_BYTES
        offset, length = _number(metadata, at, 8), _number(metadata, at + 8, 8)
        # A compressed buffer begins with its size unpacked, or with -1 if it is not compressed after all.
        total += max(length, _number(body, offset, 8)) if length >= 8 else length
    return total


def _number(data: memoryview, at: int, size: int) -> int:
    if not 0 <= at <= len(data) - size:
        raise IndexError(f"byte {at} of {len(data)}")
    return int.from_bytes(data[at : at + size], "little", signed=True)


def _follow(data: memoryview, at: int) -> int:
    """Return the place that an offset points to."""
    return at + _number(data, at, 4)


def _field(data: memoryview, table: int, number: int) -> int | None:
    """Return where a field of a table is, None if it has its default."""
    vtable = table - _number(data, table, 4)
    entry = 4 + 2 * number
    distance = _number(data, vtable + entry, 2) if entry < _number(data, vtable, 2) else 0
    return table + distance if distance else None
