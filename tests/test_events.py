import dataclasses
import json

import pytest

from cospadi import events

ROW = {"name": "a", "members": [{"name": "a", "relative_error": 0.5}], "n_atoms": None, "bytes": 2**40}
SAMPLES = [
    events.Predicted(1, 2, 3, 4, 5, 15, None),
    events.Calibrated(1, 2, "windows"),
    events.Profiled(1, 2, work_done=0.25, work_total=7.5),
    events.Corrected(0, 4),
    events.Planned(1, 2, 1, 0, "htp", "named", (events.PlannedUnit("a", "factors", 1.5),)),
    events.GroupFinished(ROW, 1, 2, 0.5, True, work_done=3.0, work_total=4.0),
    events.Retried("a", "its worker ended by signal 9"),
    events.Written("out"),
    events.Evaluated(1, 2),
    events.Stopped("interrupted", "cospadi-cli compress --resume"),
]


def all_events(kind=events.Event):
    for child in kind.__subclasses__():
        yield child
        yield from all_events(child)


def test_every_event_has_a_name_of_its_own_and_a_sample_here():
    concrete = [kind for kind in all_events() if "event" in vars(kind)]
    assert {type(sample) for sample in SAMPLES} == set(concrete)
    assert len({kind.event for kind in concrete}) == len(concrete)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s.event)
def test_events_survive_strict_json(sample):
    data = json.loads(json.dumps(sample.to_dict(), allow_nan=False))
    assert data.pop("event") == sample.event
    if sample.event == "planned":
        data["units"] = tuple(events.PlannedUnit(**unit) for unit in data["units"])
    assert type(sample)(**data) == sample
    assert set(data) == {field.name for field in dataclasses.fields(sample)}


def test_work_is_the_count_unless_it_is_given():
    assert events.Profiled(1, 4).to_dict() == {
        "event": "profiled",
        "done": 1,
        "total": 4,
        "resumed": False,
        "work_done": 1.0,
        "work_total": 4.0,
    }
    assert events.Profiled(1, 4, work_done=0.0, work_total=9.0).work_done == 0.0
