"""What `python -m bench.demo_model` says of a run in the card of its model."""

import dataclasses

from bench.demo_model import changes, continued
from unept.presets import PRESETS
from unept.training.history import add_to_history


def test_card_says_how_a_run_differs_and_where_it_went_on(tmp_path):
    preset = PRESETS["camvid"]()
    assert changes(dataclasses.replace(preset, device="cpu")) == ""
    assert changes(dataclasses.replace(preset, lr=0.5, eval_every=7)) == " and lr 0.5"
    assert continued(tmp_path) == ""
    add_to_history(tmp_path, "start", 0, changed={})
    add_to_history(tmp_path, "stop", 300, reason="SIGTERM")
    add_to_history(tmp_path, "continue", 300, changed={"resume": ("never", "auto")})
    add_to_history(tmp_path, "continue", 500, changed={"resume": ("never", "auto"), "iterations": (500, 900)})
    assert continued(tmp_path) == "; it was continued at step 500 with iterations 900 in place of 500"
