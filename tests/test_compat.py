"""Former paths of modules: the same modules, with a warning that names the new path."""

from __future__ import annotations

import importlib
import pickle
import sys

import pytest
from hosts import make_images, make_model

import effvit
from effvit.compat import MOVED


@pytest.mark.parametrize("former", MOVED)
def test_a_former_path_is_the_module_and_says_where_it_is(former: str) -> None:
    if MOVED[former].startswith("dense."):
        pytest.importorskip("mmengine")
    sys.modules.pop(f"effvit.{former}", None)
    with pytest.warns(DeprecationWarning, match=rf"effvit\.{former} has moved to effvit\.{MOVED[former]};"):
        module = importlib.import_module(f"effvit.{former}")
    assert module is importlib.import_module(f"effvit.{MOVED[former]}")


def test_what_lies_in_a_moved_folder_has_moved_with_it() -> None:
    sys.modules.pop("effvit.closed_form.terms", None)
    with pytest.warns(DeprecationWarning, match=r"effvit\.closed_form(\.terms)? has moved to"):
        module = importlib.import_module("effvit.closed_form.terms")
    assert module is importlib.import_module("effvit.layers.macs")


def test_a_path_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"effvit\.models\.nothing"):
        importlib.import_module("effvit.models.nothing")


def test_a_pickle_made_before_the_move_is_read() -> None:
    model = make_model("evit", "class_token")
    former = pickle.dumps(model, protocol=0).replace(b"effvit.hosts.host", b"effvit.models.host")
    sys.modules.pop("effvit.models.host", None)
    with pytest.warns(DeprecationWarning, match="effvit.hosts.host"):
        back = pickle.loads(former)
    x = make_images(model)
    assert isinstance(back, effvit.hosts.host.ReducedHost)
    assert back(x).equal(model(x))
