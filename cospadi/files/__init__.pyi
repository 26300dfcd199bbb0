from .durable import (
    checksum,
    file_name,
    is_sound,
    make_folder,
    put_in_place,
    read_mark,
    remove_left_overs,
    seal,
    store_payload,
    storing,
    temporary_for,
    unseal,
    write_durably,
)
from .lock import Lock, holder
from .untrusted import file_in, one_line, parse_object, read_json, shown, stays_inside
from .user_cache import cache_folder

__all__ = [
    "Lock",
    "cache_folder",
    "checksum",
    "file_in",
    "file_name",
    "holder",
    "is_sound",
    "make_folder",
    "one_line",
    "parse_object",
    "put_in_place",
    "read_json",
    "read_mark",
    "remove_left_overs",
    "seal",
    "shown",
    "stays_inside",
    "store_payload",
    "storing",
    "temporary_for",
    "unseal",
    "write_durably",
]
