"""The contracts of methods, hosts and architectures as test classes, for those of this package and for your own.

    import effvit.testing
    import my_package  # registers the method "normdrop"

    @effvit.testing.parametrize("normdrop")
    class TestNormDrop(effvit.testing.Contract):
        pass

runs a method with the settings of its ``example`` on a small host of every kind that it takes. A host of your own joins
them as ``effvit.testing.HOSTS["mine"] = function that makes a small one``, and
``effvit.testing.parametrize(hosts=["mine"])`` runs every method on it. An architecture is given as small models of it:

    @effvit.testing.parametrize_models({"mine": effvit.testing.SmallModel("my_vit", {"depth": 4}, (64, 48), (48, 80))})
    class TestMine(effvit.testing.ArchitectureContract):
        pass

A method that acts inside windows (``Reducer.group`` or ``Reducer.shrink``) is run on the small hosts with windows by

    @effvit.testing.parametrize_windows("halves")
    class TestHalves(effvit.testing.WindowContract):
        pass

pytest is needed, and ``pytest.register_assert_rewrite("effvit.testing")`` in a conftest.py before the import lets it
show the values of a failed assertion.
"""

from effvit.testing.architectures import ArchitectureContract, SmallModel, parametrize_models
from effvit.testing.fakes import assert_runs_on_fakes
from effvit.testing.laws import assert_equal_scores_and_gradients, assert_law, double
from effvit.testing.methods import Contract, pairs, parametrize
from effvit.testing.models import HOSTS, SIZE, make_host, make_images, make_model
from effvit.testing.reads import assert_reads, count_reads
from effvit.testing.windows import (
    WINDOW_HOSTS,
    WindowContract,
    make_window_host,
    make_window_model,
    parametrize_windows,
    window_pairs,
)

__all__ = [
    "HOSTS",
    "SIZE",
    "WINDOW_HOSTS",
    "ArchitectureContract",
    "Contract",
    "SmallModel",
    "WindowContract",
    "assert_equal_scores_and_gradients",
    "assert_law",
    "assert_reads",
    "assert_runs_on_fakes",
    "count_reads",
    "double",
    "make_host",
    "make_images",
    "make_model",
    "make_window_host",
    "make_window_model",
    "pairs",
    "parametrize",
    "parametrize_models",
    "parametrize_windows",
    "window_pairs",
]
