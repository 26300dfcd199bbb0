from .records import Records
from .setup import choose_method
from .stages import collect_grams, compress
from .statistics_store import FACTS, is_record, name_in, payloads
from .time_left import TimeLeft
from .work_folder import WORK, check_output, fields, read_fingerprint

__all__ = [
    "FACTS",
    "WORK",
    "Records",
    "TimeLeft",
    "check_output",
    "choose_method",
    "collect_grams",
    "compress",
    "fields",
    "is_record",
    "name_in",
    "payloads",
    "read_fingerprint",
]
